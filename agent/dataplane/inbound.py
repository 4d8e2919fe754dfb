"""The public side: mutual TLS, who the caller is, whether it may come in, and the local application behind."""

import math
import socket
import time
from collections.abc import Iterable

from msgspec.structs import replace

from agent.dataplane.gate import Gate
from agent.dataplane.http_accepted import HttpAccepted
from agent.dataplane.http_service import HttpService
from agent.dataplane.identity import SidecarIdentity
from agent.dataplane.metrics import ListenerMetrics, Sample
from agent.dataplane.reactor import Reactor
from agent.dataplane.sniffer import Outcome
from agent.dataplane.target import Target
from agent.dataplane.tcp import TcpAccepted
from agent.dataplane.tracing import Tracer
from agent.dataplane.transport import PlainTransport
from mesh.authz import Verdict
from mesh.authz.observed import ObservedListener
from mesh.http.head import Headers
from mesh.http.path import DEFAULT_POLICY
from mesh.proxy.client_cert import Edit, compile_edit, without
from mesh.proxy.exchange import Exchange
from mesh.proxy.pool import LOCAL_IDLE_TIMEOUT_S
from mesh.proxy.replies import DENIED, Reply
from mesh.proxy.sidecar_config import EndpointConfig, InboundListener, LimitsConfig, TargetConfig

_UNLIMITED = LimitsConfig(connections_max=2**31, pending_requests_max=2**31, requests_max=2**31)
_EXPIRED = Verdict(allowed=False, rule="expired certificate")


def _local_target(listener: InboundListener) -> TargetConfig:
    endpoint = EndpointConfig("local", listener.local_address, listener.local_port)
    timeout_s = listener.connect_timeout_s
    return TargetConfig("local_app", (), (endpoint,), connect_timeout_s=timeout_s, limits=_UNLIMITED, plain=True)


class InboundHttp(HttpService):
    """Requests from other sidecars to the local application. Authorised one by one, by the rules of the moment."""

    def __init__(self, reactor: Reactor, metrics: ListenerMetrics, target: Target, tracer: Tracer) -> None:
        super().__init__(reactor, metrics, target, tracer)
        self.inbound = True
        self.connections_max = 0
        self._gate = Gate(reactor, metrics, http=True)
        self._path_policy = DEFAULT_POLICY
        self._edit: Edit | None = None
        self.target.transport = PlainTransport()
        self.target.set_idle_timeout(LOCAL_IDLE_TIMEOUT_S)

    def update(self, listener: InboundListener, identity: SidecarIdentity) -> None:
        """New tables; open connections keep the identity that they were verified with, and requests under way their
        verdict. What was upgraded (WebSocket) is closed when its request would no longer be let in.
        """
        self._path_policy = listener.path_policy
        self._edit = compile_edit(listener.forward_client_cert)
        self.forwards_client_cert = self._edit is not None
        self.connections_max = listener.connections_max
        self.request_timeout_s = listener.request_timeout_s
        self.target.update(_local_target(listener))
        self.set_rate_limit(listener.rate_limit)
        self.set_routes(
            listener.routes, default_target="local_app", source=None, metadata=None, port=listener.bind_port
        )
        for accepted in self.accepted:
            accepted.codec.path_policy = self._path_policy
        if self._gate.update(listener, identity):
            for accepted in tuple(self.accepted):
                exchange = accepted.exchange
                if accepted.relaying and exchange is not None and not self._judge(accepted, exchange).allowed:
                    self.metrics.denied += 1
                    accepted.abort()

    def accept(self, sock: socket.socket, peer: str) -> None:
        """Listener callback."""

        def begin(sock: socket.socket, outcome: Outcome) -> None:
            accepted = HttpAccepted(self.reactor, sock, self, peer)
            accepted.codec.path_policy = self._path_policy
            self.accepted.add(accepted)
            if outcome == "tls":
                accepted.attach_tls(self._gate.identity.server, server_side=True)
            else:
                accepted.valid_until_s = math.inf
                accepted.attach()
                accepted.start()

        self._gate.admit(sock, begin)

    def identify(self, accepted: HttpAccepted) -> bool:
        """HttpAccepted callback."""
        caller = self._gate.caller(accepted)
        if caller is None:
            return False
        accepted.source = caller.spiffe_id.service or ""
        accepted.valid_until_s = caller.not_after_s
        if self.forwards_client_cert:
            accepted.client_cert = self._gate.client_cert(accepted)
        return True

    def _judge(self, accepted: HttpAccepted, exchange: Exchange) -> Verdict:
        verdict = self._gate.policy.verdict(accepted.source, exchange.request)
        exchange.decision = verdict.text
        return verdict

    def refusal(self, accepted: HttpAccepted, exchange: Exchange) -> Reply | None:
        """HttpService callback. A caller that renews its leaf connects anew with it, long before the old one ends."""
        if time.time() > accepted.valid_until_s:
            accepted.codec.must_close = True
            exchange.decision = _EXPIRED.text
            return replace(DENIED, details=_EXPIRED.details)
        gate, request, source = self._gate, exchange.request, accepted.source
        verdict = gate.policy.verdict(source, request)
        exchange.decision = verdict.text
        gate.edges.count(source, request.method, request.path, self.reactor.now, allowed=verdict.allowed)
        if verdict.allowed:
            if verdict.audit_denied:
                gate.audited(source, verdict, f"{request.method.decode()} {request.path[:200].decode('latin-1')}")
            return None
        return replace(DENIED, details=verdict.details)

    def client_cert_headers(self, accepted: HttpAccepted, headers: Headers) -> Headers:
        """HttpService callback."""
        if self._edit is None:
            return without(headers)
        if accepted.tls is not None and not accepted.client_cert:
            accepted.client_cert = self._gate.client_cert(accepted)  # it came before this was asked for
        return self._edit(headers, accepted.client_cert)

    def drain(self, *, idle_s: float = 0.0) -> None:
        """As HttpService's."""
        self._gate.close()
        super().drain(idle_s=idle_s)

    def observed(self, since_s: float) -> ObservedListener:
        """Who called in the last `since_s` seconds."""
        return self._gate.observed(since_s)

    def policy_samples(self) -> Iterable[Sample]:
        """The counters of policy."""
        return self._gate.samples()


class InboundTcp:
    """Connections from other sidecars to the local application. A rule that turns to deny closes them."""

    def __init__(self, reactor: Reactor, metrics: ListenerMetrics, target: Target) -> None:
        self.reactor = reactor
        self.metrics = metrics
        self.target = target
        self.connections_max = 0
        self.accepted: set[TcpAccepted] = set()
        self._gate = Gate(reactor, metrics, http=False)
        self.target.transport = PlainTransport()

    def update(self, listener: InboundListener, identity: SidecarIdentity) -> None:
        """New tables; what they no longer allow is closed."""
        self.connections_max = listener.connections_max
        self.target.update(_local_target(listener))
        if self._gate.update(listener, identity):
            for accepted in tuple(self.accepted):
                known = accepted.source or accepted.tls is None  # else it is still shaking hands
                if known and not self._gate.policy.connection(accepted.source).allowed:
                    self.metrics.denied += 1
                    accepted.abort()

    def accept(self, sock: socket.socket, peer: str) -> None:
        """Listener callback."""

        def begin(sock: socket.socket, outcome: Outcome) -> None:
            accepted = TcpAccepted(self.reactor, sock, self, self.target, peer)
            self.accepted.add(accepted)
            if outcome == "tls":
                accepted.attach_tls(self._gate.identity.server, server_side=True)
                return
            accepted.attach()
            if self._allowed(""):
                accepted.start()
            else:
                accepted.close()

        self._gate.admit(sock, begin)

    def identify(self, accepted: TcpAccepted) -> bool:
        """TcpAccepted callback."""
        caller = self._gate.caller(accepted)
        if caller is None:
            return False
        source = caller.spiffe_id.service or ""
        if not self._allowed(source):
            return False
        accepted.source = source
        return True

    def _allowed(self, source: str) -> bool:
        verdict = self._gate.policy.connection(source)
        self._gate.edges.count(source, b"", b"", self.reactor.now, allowed=verdict.allowed)
        if verdict.audit_denied:
            self._gate.audited(source, verdict, "a connection")
        if not verdict.allowed:
            self.metrics.denied += 1
        return verdict.allowed

    def accepted_gone(self, accepted: TcpAccepted) -> None:
        """An accepted connection is closed."""
        self.accepted.discard(accepted)
        self.metrics.active -= 1

    def drain(self, *, idle_s: float = 0.0) -> None:
        """Open relays go on until they end, idle or not."""
        self._gate.close()
        self.target.close()

    def observed(self, since_s: float) -> ObservedListener:
        """Who called in the last `since_s` seconds."""
        return self._gate.observed(since_s)

    def policy_samples(self) -> Iterable[Sample]:
        """The counters of policy."""
        return self._gate.samples()
