"""The application's side: plain listeners whose connections reach another service through its sidecars."""

import socket

from agent.dataplane.http_accepted import HttpAccepted
from agent.dataplane.http_service import HttpService
from agent.dataplane.identity import SidecarIdentity
from agent.dataplane.metrics import ListenerMetrics
from agent.dataplane.reactor import Reactor
from agent.dataplane.target import Target
from agent.dataplane.tcp import TcpAccepted
from agent.dataplane.tracing import Tracer
from agent.dataplane.transport import MutualTls
from mesh.proxy.sidecar_config import OutboundListener


def _update_target(
    target: Target, before: OutboundListener | None, listener: OutboundListener, identity: SidecarIdentity,
    identity_before: SidecarIdentity | None,
) -> None:  # fmt: skip
    """Gives a target its new tables; its transport is replaced only when leaf, bundle or expected peers changed."""
    config = listener.target
    if (
        before is None
        or identity is not identity_before
        or (before.target.expected_spiffe_ids, before.target.sni) != (config.expected_spiffe_ids, config.sni)
    ):
        target.transport = MutualTls(
            identity.client,
            server_name=config.sni,
            expected_spiffe_ids=config.expected_spiffe_ids,
            identify=identity.server_spiffe_id,
        )
    target.update(config)


class OutboundHttp(HttpService):
    """Requests from the local application to one upstream."""

    def __init__(self, reactor: Reactor, metrics: ListenerMetrics, target: Target, tracer: Tracer) -> None:
        super().__init__(reactor, metrics, target, tracer)
        self.connections_max = 0
        self._listener: OutboundListener | None = None
        self._identity: SidecarIdentity | None = None

    def update(self, listener: OutboundListener, identity: SidecarIdentity) -> None:
        """New tables."""
        _update_target(self.target, self._listener, listener, identity, self._identity)
        self._listener, self._identity = listener, identity
        self.connections_max = listener.connections_max
        self.request_timeout_s = listener.target.request_timeout_s

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
        self._listener: OutboundListener | None = None
        self._identity: SidecarIdentity | None = None

    def update(self, listener: OutboundListener, identity: SidecarIdentity) -> None:
        """New tables; relays that are open stay with the endpoint they have."""
        _update_target(self.target, self._listener, listener, identity, self._identity)
        self._listener, self._identity = listener, identity
        self.connections_max = listener.connections_max

    def accept(self, sock: socket.socket, peer: str) -> None:
        """Listener callback."""
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
