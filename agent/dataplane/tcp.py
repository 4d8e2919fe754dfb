"""Plain TCP through a sidecar: connect first, then relay both ways with half-close and back-pressure."""

import logging
import socket
from typing import Protocol

from agent.dataplane.connection import Connection
from agent.dataplane.dialed import Dialed, dial_socket
from agent.dataplane.endpoint import Endpoint
from agent.dataplane.metrics import ListenerMetrics
from agent.dataplane.reactor import Reactor
from agent.dataplane.target import Target
from mesh.proxy.relay import Relay
from mesh.proxy.retry import CONNECT_ATTEMPTS_MAX

IDLE_TIMEOUT_S = 3600.0  # no byte either way: Envoy's TCP proxy default


class Service(Protocol):
    """What an accepted connection asks of its listener's side."""

    metrics: ListenerMetrics

    def identify(self, accepted: "TcpAccepted") -> bool:
        """After a TLS handshake: who is it, and may it come in? False: it was refused."""

    def accepted_gone(self, accepted: "TcpAccepted") -> None:
        """The connection is closed."""


class TcpAccepted(Connection):
    """The side that a client opened. It is not read before the far side is connected."""

    __slots__ = ("_attempts", "_far", "_relay", "_target", "_tried", "peer", "service", "source")

    def __init__(self, reactor: Reactor, sock: socket.socket, service: Service, target: Target, peer: str) -> None:
        super().__init__(reactor, sock)
        self.service = service
        self.peer = peer
        self.source = ""
        self._target = target
        self._relay: Relay | None = None
        self._far: TcpDialed | None = None
        self._tried: tuple[Endpoint, ...] = ()
        self._attempts = 0

    def start(self) -> None:
        """Looks for an endpoint."""
        self.pause_reading()
        self._dial()

    def opened(self) -> None:
        """Connection callback."""
        if self.service.identify(self):
            self.start()
        else:
            self.close()

    def _dial(self) -> None:
        target = self._target
        now = self.reactor.now
        endpoint = target.balancer.choose(now, None, self._tried) if self._attempts < CONNECT_ATTEMPTS_MAX else None
        if endpoint is not None and not target.breaker.take_connection(endpoint.active):
            endpoint = None
        if endpoint is None:
            self.close()
            return
        self._attempts += 1
        self._tried += (endpoint,)
        try:
            sock = dial_socket(endpoint.ip_address(), target.pool_policy.keepalive_s)
        except OSError as error:
            endpoint.connect_failed(error.strerror or str(error))
            target.breaker.connections -= 1
            self.reactor.call_soon(self.far_failed)
            return
        target.metrics.connections += 1
        target.metrics.connections_active += 1
        self._far = TcpDialed(self.reactor, sock, endpoint, self)
        self._far.begin()

    def far_ready(self, far: "TcpDialed") -> None:
        """The far side is connected and verified."""
        relay = Relay(self, far)
        self._relay = relay
        far.relay = relay
        self.set_deadline(self.reactor.now + IDLE_TIMEOUT_S)
        self.resume_reading()

    def far_failed(self) -> None:
        """The far side could not be connected."""
        self._far = None
        if not self.closed:
            self._target.metrics.retries += 1
            self._dial()

    def data_received(self, data: bytes) -> None:
        """Connection callback."""
        self.service.metrics.bytes_received += len(data)
        assert self._relay is not None
        self._relay.received(self, data)

    def progress(self) -> None:
        """Relay callback."""
        self.deadline = self.reactor.now + IDLE_TIMEOUT_S

    def eof_received(self) -> None:
        """Connection callback."""
        assert self._relay is not None
        self._relay.ended(self)

    def write_drained(self) -> None:
        """Connection callback."""
        if self._relay is not None:
            self._relay.drained(self)

    def deadline_passed(self) -> None:
        """Connection callback."""
        self.abort()

    def lost(self, reason: str) -> None:
        """Connection callback."""
        if self._handshaking:
            self.service.metrics.tls_errors += 1
            self.reactor.repeats.log("handshake", logging.INFO, "%s: no TLS handshake: %s", self.peer, reason)

    def finished(self) -> None:
        """Connection callback."""
        if self._far is not None and not self._far.closed and not self._far.closing:
            self._far.abort()
        self.service.accepted_gone(self)

    def released(self) -> None:
        """Connection callback."""
        self._far = self._relay = None


class TcpDialed(Dialed):
    """The side that we opened."""

    __slots__ = ("_near", "relay")

    def __init__(self, reactor: Reactor, sock: socket.socket, endpoint: Endpoint, near: TcpAccepted) -> None:
        super().__init__(reactor, sock, endpoint)
        self._near = near
        self.relay: Relay | None = None
        endpoint.active += 1

    def ready_to_use(self) -> None:
        """Dialed callback."""
        self._near.far_ready(self)

    def failed(self, reason: str) -> None:
        """Dialed callback."""
        self._near.far_failed()

    def broken(self, reason: str) -> None:
        """Dialed callback."""
        if self.relay is not None:
            self.relay.broke(self)

    def data_received(self, data: bytes) -> None:
        """Connection callback."""
        assert self.relay is not None
        self._near.service.metrics.bytes_sent += len(data)
        self.relay.received(self, data)

    def eof_received(self) -> None:
        """Connection callback."""
        assert self.relay is not None
        self.relay.ended(self)

    def write_drained(self) -> None:
        """Connection callback."""
        if self.relay is not None:
            self.relay.drained(self)

    def finished(self) -> None:
        """Connection callback."""
        self.endpoint.active -= 1
        self.endpoint.target.breaker.connections -= 1
        self.endpoint.target.metrics.connections_active -= 1

    def released(self) -> None:
        """Connection callback."""
        self.relay = None
