"""The public side: mutual TLS, who the caller is, whether it may come in, and the local application behind."""

import logging
import socket
import time

from agent.dataplane.http_accepted import HttpAccepted
from agent.dataplane.http_service import HttpService
from agent.dataplane.identity import SidecarIdentity
from agent.dataplane.metrics import ListenerMetrics
from agent.dataplane.reactor import Reactor
from agent.dataplane.target import Target
from agent.dataplane.tcp import TcpAccepted
from agent.dataplane.tracing import Tracer
from agent.dataplane.transport import PlainTransport
from mesh.authz import Policy
from mesh.ca.svid import Svid
from mesh.errors import InvalidIdentity
from mesh.proxy.pool import LOCAL_IDLE_TIMEOUT_S
from mesh.proxy.sidecar_config import EndpointConfig, InboundListener, LimitsConfig, SourceRule

_LOG = logging.getLogger("mesh.dataplane")

REFUSALS_LOGGED_MAX = 100  # different reasons per listener

_UNLIMITED = LimitsConfig(connections_max=2**31, pending_requests_max=2**31, requests_max=2**31)


class Authorizer:
    """The L4 rules of one listener, as they stand now."""

    def __init__(self) -> None:
        self._key: tuple[tuple[SourceRule, ...], bool] = ((), False)
        self._policy = Policy((), default_allow=False)

    def update(self, rules: tuple[SourceRule, ...], *, default_allow: bool) -> bool:
        """Takes new rules; whether they differ from those before."""
        if (rules, default_allow) == self._key:
            return False
        self._key = (rules, default_allow)
        self._policy = Policy(rules, default_allow=default_allow)
        return True

    def allows(self, source: str) -> bool:
        """Whether a service may come in."""
        return self._policy.connection(source).allowed


class _Gate:
    """Identity and policy of one inbound listener."""

    def __init__(self, metrics: ListenerMetrics) -> None:
        self.identity: SidecarIdentity
        self.authorizer = Authorizer()
        self._metrics = metrics
        self._refused_logged: set[str] = set()

    def caller(self, accepted: HttpAccepted | TcpAccepted) -> Svid | None:
        """Who calls, or None when its certificate is no service's that we accept."""
        assert accepted.tls is not None
        try:
            svid = self.identity.client_svid(accepted.tls)
        except InvalidIdentity as error:
            self._refuse(accepted.peer, str(error))
            return None
        if svid.spiffe_id.service is None:
            self._refuse(accepted.peer, f"{svid.spiffe_id} is not a service's identity")
            return None
        return svid

    def _refuse(self, peer: str, reason: str) -> None:
        self._metrics.tls_errors += 1
        if reason not in self._refused_logged and len(self._refused_logged) < REFUSALS_LOGGED_MAX:
            self._refused_logged.add(reason)
            _LOG.warning("a client at %s was refused: %s", peer, reason)


def _local_endpoint(listener: InboundListener) -> tuple[EndpointConfig, ...]:
    return (EndpointConfig("local", listener.local_address, listener.local_port),)


class InboundHttp(HttpService):
    """Requests from other sidecars to the local application. Authorised one by one, by the rules of the moment."""

    def __init__(self, reactor: Reactor, metrics: ListenerMetrics, target: Target, tracer: Tracer) -> None:
        super().__init__(reactor, metrics, target, tracer)
        self.inbound = True
        self.connections_max = 0
        self._gate = _Gate(metrics)
        self.target.transport = PlainTransport()
        self.target.idle_timeout_s = LOCAL_IDLE_TIMEOUT_S

    def update(self, listener: InboundListener, identity: SidecarIdentity) -> None:
        """New tables; open connections keep the identity that they were verified with."""
        self._gate.identity = identity
        self._gate.authorizer.update(listener.intentions, default_allow=listener.default_allow)
        self.connections_max = listener.connections_max
        self.request_timeout_s = listener.request_timeout_s
        self.target.update(_local_endpoint(listener), connect_timeout_s=listener.connect_timeout_s, limits=_UNLIMITED)

    def accept(self, sock: socket.socket, peer: str) -> None:
        """Listener callback."""
        accepted = HttpAccepted(self.reactor, sock, self, peer)
        self.accepted.add(accepted)
        accepted.attach_tls(self._gate.identity.server, server_side=True)

    def identify(self, accepted: HttpAccepted) -> bool:
        """HttpAccepted callback."""
        caller = self._gate.caller(accepted)
        if caller is None:
            return False
        accepted.source = caller.spiffe_id.service or ""
        accepted.valid_until_s = caller.not_after_s
        return True

    def allowed(self, accepted: HttpAccepted) -> bool:
        """HttpService callback. A caller that renews its leaf connects anew with it, long before the old one ends."""
        if time.time() > accepted.valid_until_s:
            accepted.codec.must_close = True
            return False
        return self._gate.authorizer.allows(accepted.source)


class InboundTcp:
    """Connections from other sidecars to the local application. A rule that turns to deny closes them."""

    def __init__(self, reactor: Reactor, metrics: ListenerMetrics, target: Target) -> None:
        self.reactor = reactor
        self.metrics = metrics
        self.target = target
        self.connections_max = 0
        self.accepted: set[TcpAccepted] = set()
        self._gate = _Gate(metrics)
        self.target.transport = PlainTransport()

    def update(self, listener: InboundListener, identity: SidecarIdentity) -> None:
        """New tables; what they no longer allow is closed."""
        self._gate.identity = identity
        self.connections_max = listener.connections_max
        self.target.update(_local_endpoint(listener), connect_timeout_s=listener.connect_timeout_s, limits=_UNLIMITED)
        if self._gate.authorizer.update(listener.intentions, default_allow=listener.default_allow):
            for accepted in tuple(self.accepted):
                if accepted.source and not self._gate.authorizer.allows(accepted.source):
                    self.metrics.denied += 1
                    accepted.abort()

    def accept(self, sock: socket.socket, peer: str) -> None:
        """Listener callback."""
        accepted = TcpAccepted(self.reactor, sock, self, self.target, peer)
        self.accepted.add(accepted)
        accepted.attach_tls(self._gate.identity.server, server_side=True)

    def identify(self, accepted: TcpAccepted) -> bool:
        """TcpAccepted callback."""
        caller = self._gate.caller(accepted)
        if caller is None:
            return False
        source = caller.spiffe_id.service or ""
        if not self._gate.authorizer.allows(source):
            self.metrics.denied += 1
            return False
        accepted.source = source
        return True

    def accepted_gone(self, accepted: TcpAccepted) -> None:
        """An accepted connection is closed."""
        self.accepted.discard(accepted)
        self.metrics.active -= 1

    def drain(self, *, idle_s: float = 0.0) -> None:
        """Open relays go on until they end, idle or not."""
        self.target.close()
