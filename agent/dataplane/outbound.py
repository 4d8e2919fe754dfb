"""The application's side: plain listeners whose connections reach another service through its sidecars."""

import socket
from collections.abc import Callable

from agent.dataplane.http_accepted import HttpAccepted
from agent.dataplane.http_service import HttpService
from agent.dataplane.identity import SidecarIdentity
from agent.dataplane.metrics import ListenerMetrics
from agent.dataplane.reactor import Reactor
from agent.dataplane.routing import with_service_time
from agent.dataplane.target import Target
from agent.dataplane.tcp import TcpAccepted
from agent.dataplane.tracing import Tracer
from agent.dataplane.transport import MutualTls, PlainTransport
from mesh.proxy.rate_limit import TokenBucket
from mesh.proxy.sidecar_config import OutboundListener, SidecarConfig, TargetConfig

NewTarget = Callable[[TargetConfig], Target]


def _update_target(target: Target, config: TargetConfig, identity: SidecarIdentity, locality: str) -> None:
    """Gives a target its new tables; its transport is replaced only when leaf, bundle or expected peers changed."""
    before = target.config
    if identity is not target.identity or (before.expected_spiffe_ids, before.sni, before.plain) != (
        config.expected_spiffe_ids,
        config.sni,
        config.plain,
    ):
        target.identity = identity
        target.transport = (
            PlainTransport()
            if config.plain
            else MutualTls(
                identity.client,
                server_name=config.sni,
                expected_spiffe_ids=config.expected_spiffe_ids,
                identify=identity.server_spiffe_id,
            )
        )
    target.update(config, locality=locality)


class OutboundHttp(HttpService):
    """Requests from the local application to an upstream, or to wherever its routes lead."""

    def __init__(
        self, reactor: Reactor, metrics: ListenerMetrics, target: Target, tracer: Tracer, new_target: NewTarget
    ) -> None:
        """`target` is the listener's own; `new_target` makes further ones for its routes."""
        super().__init__(reactor, metrics, target, tracer)
        self.connections_max = 0
        self.dress = with_service_time
        self._new_target = new_target

    def update(self, listener: OutboundListener, identity: SidecarIdentity, sidecar: SidecarConfig) -> None:
        """New tables."""
        former = self.targets
        self.targets = {}
        for config in (listener.target, *listener.targets):
            if config is listener.target:
                target = self.target
            else:
                kept = former.get(config.name)
                target = self._new_target(config) if kept is None or kept is self.target else kept
            _update_target(target, config, identity, sidecar.locality)
            self.targets[config.name] = target
        for target in former.values():
            if target not in self.targets.values():
                target.close()
        self.connections_max = listener.connections_max
        self.request_timeout_s = listener.target.request_timeout_s
        self.set_rate_limit(listener.rate_limit)
        self.set_routes(
            listener.routes,
            default_target=listener.target.name,
            source=sidecar.service,
            metadata=sidecar.service_metadata,
            port=listener.bind_port,
        )

    def accept(self, sock: socket.socket, peer: str) -> None:
        """Listener callback."""
        accepted = HttpAccepted(self.reactor, sock, self, peer)
        accepted.codec.default_authority = self.target.name.encode()  # for HTTP/1.0: the next hop wants a Host
        self.accepted.add(accepted)
        accepted.attach()
        accepted.start()


class OutboundTcp:
    """Connections from the local application to one upstream."""

    def __init__(self, reactor: Reactor, metrics: ListenerMetrics, target: Target) -> None:
        self.reactor = reactor
        self.metrics = metrics
        self.target = target
        self.connections_max = 0
        self.accepted: set[TcpAccepted] = set()
        self.bucket: TokenBucket | None = None

    def update(self, listener: OutboundListener, identity: SidecarIdentity, sidecar: SidecarConfig) -> None:
        """New tables; relays that are open stay with the endpoint they have."""
        _update_target(self.target, listener.target, identity, sidecar.locality)
        self.connections_max = listener.connections_max
        policy = listener.rate_limit
        if policy is None:
            self.bucket = None
        elif self.bucket is None:
            self.bucket = TokenBucket(policy, self.target.rng, now=self.reactor.now)
        elif self.bucket.policy != policy:
            self.bucket.set_policy(policy, self.reactor.now)

    def accept(self, sock: socket.socket, peer: str) -> None:
        """Listener callback."""
        if self.bucket is not None and not self.bucket.take(self.reactor.now):
            self.metrics.active -= 1
            sock.close()
            return
        accepted = TcpAccepted(self.reactor, sock, self, self.target, peer)
        self.accepted.add(accepted)
        accepted.attach()
        accepted.start()

    def identify(self, accepted: TcpAccepted) -> bool:
        """Plain listeners have no identities."""
        return True

    def accepted_gone(self, accepted: TcpAccepted) -> None:
        """An accepted connection is closed."""
        self.accepted.discard(accepted)
        self.metrics.active -= 1

    def drain(self, *, idle_s: float = 0.0) -> None:
        """Open relays go on until they end, idle or not."""
        self.target.close()
