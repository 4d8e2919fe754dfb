"""The accepted side of HTTP: requests in, one exchange at a time, in order."""

import logging
import socket
from collections.abc import Sequence
from typing import Protocol

from agent.dataplane.connection import Connection
from agent.dataplane.metrics import ListenerMetrics
from agent.dataplane.reactor import Reactor
from mesh.http.h1 import END, Rejected, RequestEvent, ServerConnection, Trailers
from mesh.http.head import RequestHead
from mesh.proxy.exchange import Exchange
from mesh.proxy.relay import Relay

HEAD_TIMEOUT_S = 10.0  # from the first byte of a request's head to its last
KEEP_ALIVE_TIMEOUT_S = 3600.0  # Envoy's connection idle timeout
HELD_BYTES_MAX = 64 * 1024  # sent behind an upgrade request, before the answer to it

_TIMED_OUT = Rejected(408, "the request took too long to arrive")


class Service(Protocol):
    """What an accepted connection asks of its listener's side."""

    metrics: ListenerMetrics
    draining: bool

    def begin(self, accepted: "HttpAccepted", request: RequestHead, body: bytes, *, ended: bool) -> Exchange:
        """Starts an exchange; it may be over already when this returns."""

    def identify(self, accepted: "HttpAccepted") -> bool:
        """After a TLS handshake: who is it? False: it was refused."""

    def accepted_gone(self, accepted: "HttpAccepted") -> None:
        """The connection is closed."""


class HttpAccepted(Connection):
    """A connection that a client opened to one of our listeners: requests in, one exchange at a time, in order."""

    __slots__ = (
        "_backlog", "_head_began", "_processing", "_relay", "client_cert", "codec", "exchange", "peer", "service",
        "source", "valid_until_s",
    )  # fmt: skip

    def __init__(self, reactor: Reactor, sock: socket.socket, service: Service, peer: str) -> None:
        super().__init__(reactor, sock)
        self.service = service
        self.peer = peer
        self.source = ""  # the caller's service, once identified
        self.valid_until_s = 0.0  # Unix time when its certificate ends
        self.client_cert = b""  # its element of x-forwarded-client-cert, once asked for
        self.exchange: Exchange | None = None
        self.codec = ServerConnection()
        self._backlog: Sequence[RequestEvent] = ()
        self._processing = False
        self._head_began = False
        self._relay: Relay | None = None

    @property
    def relaying(self) -> bool:
        """Whether it was upgraded and carries another protocol now."""
        return self._relay is not None

    def start(self) -> None:
        """Waits for a first request."""
        self.set_deadline(self.reactor.now + KEEP_ALIVE_TIMEOUT_S)

    def opened(self) -> None:
        """Connection callback."""
        if self.service.identify(self):
            self.start()
        else:
            self.abort()

    def data_received(self, data: bytes) -> None:
        """Connection callback."""
        if self._relay is not None:
            self._relay.received(self, data)
            return
        events = self.codec.receive_data(data)
        if self._backlog:
            self._backlog = (*self._backlog, *events)
            self.pause_reading()
            return
        if events:
            self._process(events)
        if self.exchange is None:
            if not self.closed:
                self._await_head()
        elif len(self.codec.unparsed) > HELD_BYTES_MAX:
            self.pause_reading()

    def _await_head(self) -> None:
        if not self.codec.mid_message:
            self.deadline = self.reactor.now + KEEP_ALIVE_TIMEOUT_S
        elif not self._head_began:
            self._head_began = True
            self.set_deadline(self.reactor.now + HEAD_TIMEOUT_S)

    def _process(self, events: Sequence[RequestEvent]) -> None:
        if len(events) == 2 and events[1] is END and type(events[0]) is RequestHead and self.exchange is None:
            self._head_began = False
            self.service.begin(self, events[0], b"", ended=True)  # a whole request in one read, as most are
            return
        self._processing = True
        position, count = 0, len(events)
        while position < count and not self.closed and not self._close_when_flushed:
            event = events[position]
            if type(event) is RequestHead:
                if self.exchange is not None:
                    break
                position, body, ended = _fold(events, position + 1)
                self._head_began = False
                self.service.begin(self, event, body, ended=ended)
                continue
            if type(event) is Rejected:
                if self.exchange is not None and self.exchange.request_ended:
                    break  # answered in its turn
                self._refuse(event)
            elif self.exchange is not None:
                if type(event) is bytes:
                    self.exchange.request_body(event)
                elif event is END:
                    self.exchange.request_end()
                elif type(event) is Trailers:
                    self.exchange.trailers_received(event.headers)
            position += 1
        self._processing = False
        if position < count and not self.closed and not self._close_when_flushed:
            self._backlog = events[position:]
            self.pause_reading()

    def _refuse(self, rejected: Rejected) -> None:
        """Malformed input: our last answer on this connection, if there is room for one."""
        self.service.metrics.protocol_errors += 1
        self.reactor.repeats.log("malformed", logging.INFO, "%s: request refused: %s", self.peer, rejected.reason)
        exchange = self.exchange
        if exchange is not None:
            started = exchange.response_started
            exchange.caller_gone("DPE")
            self.exchange = None
            if started:
                self.abort()
                return
        self.service.metrics.requests += 1
        self.service.metrics.classes[4 if rejected.status < 500 else 5] += 1
        self.write(self.codec.reject(rejected))
        self.close(linger=True)

    def exchange_done(self, *, close: bool) -> None:
        """Exchange callback."""
        self.exchange = None
        if close:
            self._backlog = ()
            self.close(linger=True)
            return
        if self.service.draining:
            self.close(linger=True)
            return
        self.deadline = self.reactor.now + KEEP_ALIVE_TIMEOUT_S
        if self._processing:
            return
        if self._paused:
            events, self._backlog = self._backlog, ()
            self.resume_reading()
            if events:
                self._process(events)
        if self.exchange is None and not self.closed and self.codec.mid_message:
            self._await_head()

    def resume_reading(self) -> None:
        """As Connection's, unless later requests already wait."""
        if not self._backlog:
            super().resume_reading()

    def relay_begins(self, relay: Relay) -> None:
        """Exchange callback."""
        self._relay = relay
        self.resume_reading()
        self.progress()
        self.set_deadline(self.deadline)

    def progress(self) -> None:
        """Exchange and Relay callback."""
        exchange = self.exchange
        if exchange is not None:
            self.deadline = min(self.reactor.now + exchange.idle_s, exchange.request_deadline)

    def eof_received(self) -> None:
        """Connection callback. A client that ends its direction has gone, as Envoy sees it."""
        if self._relay is not None:
            self._relay.ended(self)
        elif self.exchange is not None:
            self.abort()
        else:
            self.close()

    def write_drained(self) -> None:
        """Connection callback."""
        if self._relay is not None:
            self._relay.drained(self)
        elif self.exchange is not None:
            self.exchange.caller_drained()

    def deadline_passed(self) -> None:
        """Connection callback."""
        if self._relay is not None:
            self.abort()
        elif self.exchange is not None:
            self.exchange.deadline_passed()
        elif self.codec.mid_message:
            self._refuse(_TIMED_OUT)
        else:
            self.service.metrics.idle_timeouts += 1
            self.close()

    def lost(self, reason: str) -> None:
        """Connection callback."""
        if self._handshaking:
            self.service.metrics.tls_errors += 1
            self.reactor.repeats.log("handshake", logging.INFO, "%s: no TLS handshake: %s", self.peer, reason)
        if self._relay is not None:
            self._relay.broke(self)

    def finished(self) -> None:
        """Connection callback."""
        exchange, self.exchange = self.exchange, None
        if exchange is not None and not exchange.done:
            exchange.caller_gone("" if self._relay is not None else "DC")
        self.service.accepted_gone(self)

    def released(self) -> None:
        """Connection callback."""
        self._relay = None


def _fold(events: Sequence[RequestEvent], position: int) -> tuple[int, bytes, bool]:
    """What followed a head in the same read: the next position, its body bytes, whether it is complete."""
    if position < len(events) and events[position] is END:
        return position + 1, b"", True
    pieces: list[bytes] = []
    while position < len(events):
        event = events[position]
        if type(event) is bytes:
            pieces.append(event)
        elif event is END:
            return position + 1, b"".join(pieces), True
        else:
            break
        position += 1
    return position, b"".join(pieces), False
