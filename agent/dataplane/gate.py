"""Identity and policy of one inbound listener: who calls, whether it may, and the accounts of both."""

import logging
import socket
from collections.abc import Callable, Iterator

from agent.dataplane.connection import Connection
from agent.dataplane.http_accepted import HttpAccepted
from agent.dataplane.identity import SidecarIdentity
from agent.dataplane.metrics import ListenerMetrics, Sample
from agent.dataplane.reactor import Reactor
from agent.dataplane.sniffer import Outcome, Sniffer
from agent.dataplane.tcp import TcpAccepted
from agent.repeats import RepeatedLog
from mesh.authz import Policy, SourceRule, Verdict
from mesh.authz.observed import EdgeTable, ObservedListener
from mesh.ca.svid import Svid
from mesh.errors import InvalidIdentity
from mesh.proxy.client_cert import ClientCertField, element
from mesh.proxy.sidecar_config import InboundListener

_LOG = logging.getLogger("mesh.dataplane")

REFUSALS_LOGGED_MAX = 100  # different reasons per listener
AUDITED_SOURCES_MAX = 100  # callers with a counter of their own; the others share one
PLAINTEXT = "plaintext"  # how a caller without an identity is named in labels

_Key = tuple[tuple[SourceRule, ...], bool, bool, str]


class Gate:
    """What stands between the callers of one listener and its application."""

    def __init__(self, reactor: Reactor, metrics: ListenerMetrics, *, http: bool) -> None:
        self.identity: SidecarIdentity
        self.policy = Policy((), default_allow=False)
        self.edges = EdgeTable(reactor.now)
        self.plaintext = 0  # connections without TLS, on a permissive listener
        self._permissive = False
        self._fields: tuple[ClientCertField, ...] = ()
        self._http = http
        self._service = ""
        self._reactor = reactor
        self._metrics = metrics
        self._key: _Key | None = None
        self._audited: dict[str, int] = {}
        self._audits = RepeatedLog(_LOG)  # by rule
        self._refused_logged: set[str] = set()
        self._sniffers: set[Sniffer] = set()

    def update(self, listener: InboundListener, identity: SidecarIdentity) -> bool:
        """New tables; whether the policy differs from the one before."""
        self.identity = identity
        self._permissive = listener.mtls == "permissive"
        self._fields = listener.client_cert_fields
        self._service = identity.service
        key = (listener.intentions, listener.default_allow, listener.audit, identity.service)
        if key == self._key:
            return False
        self._key = key
        self.policy = Policy(
            listener.intentions,
            default_allow=listener.default_allow,
            service=identity.service,
            http=self._http,
            audit=listener.audit,
        )
        return True

    # ---- who

    def admit(self, sock: socket.socket, begin: Callable[[socket.socket, Outcome], None]) -> None:
        """Has `begin` called with the connection and what it speaks: at once, or once a permissive listener knows."""
        if not self._permissive:
            begin(sock, "tls")
            return

        def decided(sniffer: Sniffer, sock: socket.socket, outcome: Outcome) -> None:
            self._sniffers.discard(sniffer)
            self.plaintext += outcome == "plain"
            begin(sock, outcome)

        self._sniffers.add(Sniffer(self._reactor, sock, decided, self._sniffer_gone, server_first=not self._http))

    def _sniffer_gone(self, sniffer: Sniffer) -> None:
        self._sniffers.discard(sniffer)
        self._metrics.active -= 1

    def close(self) -> None:
        """Connections that have not begun never will."""
        for sniffer in tuple(self._sniffers):
            sniffer.close()

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

    def client_cert(self, accepted: Connection) -> bytes:
        """The caller's element of x-forwarded-client-cert."""
        assert accepted.tls is not None
        return element(self.identity.spiffe_id, self.identity.client_cert(accepted.tls), self._fields)

    def _refuse(self, peer: str, reason: str) -> None:
        self._metrics.tls_errors += 1
        if reason not in self._refused_logged and len(self._refused_logged) < REFUSALS_LOGGED_MAX:
            self._refused_logged.add(reason)
            _LOG.warning("a client at %s was refused: %s", peer, reason)

    # ---- whether

    def audited(self, source: str, verdict: Verdict, what: str) -> None:
        """Counts and logs what is let in only because a rule is in audit mode."""
        source = source or PLAINTEXT
        if source not in self._audited and len(self._audited) >= AUDITED_SOURCES_MAX:
            source = "other"
        self._audited[source] = self._audited.get(source, 0) + 1
        rule = verdict.rule or "default"
        text = "audit: %s of %s to %s would have been refused by rule %s"
        self._audits.warning(rule, text, what, source, self._service, rule)

    # ---- accounts

    def observed(self, since_s: float) -> ObservedListener:
        """Who called this service in the last `since_s` seconds."""
        observed_s, edges, left_out = self.edges.report(since_s, self._reactor.time())
        return ObservedListener(self._service, self._http, observed_s, edges, left_out)

    def samples(self) -> Iterator[Sample]:
        """The counters of policy."""
        labels = {"local_cluster": self._service}
        if self.plaintext or self._permissive:
            yield "mesh_inbound_plaintext_connections_total", labels, self.plaintext
        for source, count in sorted(self._audited.items()):
            audit = {"source": source, "destination": self._service}
            yield "mesh_intentions_audit_denied_total", audit, count
