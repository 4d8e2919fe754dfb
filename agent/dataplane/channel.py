"""A connection to an endpoint that carries HTTP exchanges, one at a time."""

import socket
from collections.abc import Sequence
from typing import TYPE_CHECKING

from agent.dataplane.dialed import Dialed
from agent.dataplane.reactor import Reactor
from mesh.http.h1 import END, ClientConnection, Rejected, ResponseEvent
from mesh.http.head import ResponseHead
from mesh.proxy.exchange import Exchange
from mesh.proxy.relay import Relay

if TYPE_CHECKING:
    from agent.dataplane.endpoint import Endpoint


class HttpDialed(Dialed):
    """A channel: carries one exchange at a time, or is idle in its endpoint's pool."""

    __slots__ = ("_opened_at", "_relay", "codec", "exchange", "requests", "reused")

    def __init__(self, reactor: Reactor, sock: socket.socket, endpoint: "Endpoint", exchange: Exchange | None) -> None:
        super().__init__(reactor, sock, endpoint)
        self.codec = ClientConnection()
        self.exchange = exchange
        self.reused = False
        self.requests = 0
        self._opened_at = reactor.now
        self._relay: Relay | None = None

    @property
    def age_s(self) -> float:
        """Seconds since it began to connect."""
        return self.reactor.now - self._opened_at

    def use(self, exchange: Exchange) -> None:
        """Carries an exchange from now on."""
        self.exchange = exchange
        self.reused = self.requests > 0
        self.requests += 1
        self.deadline = float("inf")
        exchange.channel_ready(self)

    def rest(self) -> None:
        """Idle: it may stay so for a while."""
        self.exchange = None
        if self._paused:
            self.resume_reading()
        self.set_deadline(self.reactor.now + self.endpoint.target.idle_timeout_s)

    def relay_begins(self, relay: Relay) -> None:
        """From now on bytes go to the relay."""
        self._relay = relay

    def ready_to_use(self) -> None:
        """Dialed callback."""
        self.endpoint.channel_established(self)

    def failed(self) -> None:
        """Dialed callback."""
        exchange, self.exchange = self.exchange, None
        self.endpoint.channel_failed(exchange)

    def data_received(self, data: bytes) -> None:
        """Connection callback."""
        if self._relay is not None:
            self._relay.received(self, data)
            return
        events = self.codec.receive_data(data)
        exchange = self.exchange
        if exchange is None:
            self.abort()  # bytes with no request in flight: this connection is out of step
            return
        if len(events) == 3 and events[2] is END and type(events[0]) is ResponseHead and type(events[1]) is bytes:
            exchange.response(events[0], events[1], ended=True)  # a whole response in one read, as most are
        else:
            self._deliver(exchange, events)

    def _deliver(self, exchange: Exchange, events: Sequence[ResponseEvent]) -> None:
        head: ResponseHead | None = None
        pieces: list[bytes] = []
        ended = malformed = False
        for event in events:
            if type(event) is bytes:
                pieces.append(event)
            elif type(event) is ResponseHead:
                if event.informational:
                    exchange.informational(event)
                else:
                    head = event
            elif event is END:
                ended = True
            elif type(event) is Rejected:
                malformed = True
        if head is not None or pieces or ended:
            body = pieces[0] if len(pieces) == 1 else b"".join(pieces)
            exchange.response(head, body, ended=ended)
        if malformed and self.exchange is exchange and not exchange.done:
            exchange.channel_lost(malformed=True)

    def eof_received(self) -> None:
        """Connection callback."""
        if self._relay is not None:
            self._relay.ended(self)
            return
        exchange = self.exchange
        if exchange is None:
            self.close()
            return
        events = self.codec.receive_eof()
        if events and events[0] is END:
            exchange.response(None, b"", ended=True)
        else:
            exchange.channel_lost()
        if not self.closed:
            self.close()

    def write_drained(self) -> None:
        """Connection callback."""
        if self._relay is not None:
            self._relay.drained(self)
        elif self.exchange is not None:
            self.exchange.channel_drained()

    def deadline_passed(self) -> None:
        """Connection callback: connecting took too long, or it has been idle for long enough."""
        if not self.established:
            super().deadline_passed()
        elif self.exchange is None:
            self.close()

    def broken(self, reason: str) -> None:
        """Dialed callback."""
        if self._relay is not None:
            self._relay.broke(self)
        elif self.exchange is not None:
            self.endpoint.target.metrics.resets += 1
            self.exchange.channel_lost()

    def finished(self) -> None:
        """Connection callback."""
        self.endpoint.channel_closed(self)

    def released(self) -> None:
        """Connection callback."""
        self._relay = self.exchange = None
