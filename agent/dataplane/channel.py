"""A connection to an endpoint that carries HTTP exchanges, one at a time."""

import socket
from collections.abc import Sequence
from typing import TYPE_CHECKING

from agent.dataplane.dialed import CONNECT_TIMED_OUT, Dialed
from agent.dataplane.reactor import Reactor
from mesh.http.h1 import END, ClientConnection, Rejected, ResponseEvent, Trailers
from mesh.http.head import Headers, ResponseHead
from mesh.proxy.parties import Attempt
from mesh.proxy.relay import Relay
from mesh.proxy.retry import FailureKind

if TYPE_CHECKING:
    from agent.dataplane.endpoint import Endpoint


class HttpDialed(Dialed):
    """A channel: carries one attempt at a time, or is idle in its endpoint's pool."""

    __slots__ = ("_nothing_sent", "_opened_at", "_relay", "attempt", "codec", "requests", "reused")

    def __init__(self, reactor: Reactor, sock: socket.socket, endpoint: "Endpoint", attempt: Attempt | None) -> None:
        super().__init__(reactor, sock, endpoint)
        self.codec = ClientConnection()
        self.attempt = attempt
        self.reused = False
        self._nothing_sent = False
        self.requests = 0
        self._opened_at = reactor.now
        self._relay: Relay | None = None

    @property
    def age_s(self) -> float:
        """Seconds since it began to connect."""
        return self.reactor.now - self._opened_at

    def use(self, attempt: Attempt) -> None:
        """Carries an attempt from now on."""
        self.attempt = attempt
        self.reused = self.requests > 0
        self.requests += 1
        self.deadline = float("inf")
        attempt.channel_ready(self)
        if self._shut and not self.closed:
            self._nothing_sent = True  # the very first write of this request failed

    def handed_to(self, attempt: Attempt) -> None:
        """Exchange callback."""
        self.attempt = attempt
        self.deadline = float("inf")

    def rest(self) -> None:
        """Idle: it may stay so for a while."""
        self.attempt = None
        if self._paused:
            self.resume_reading()
        self.set_deadline(self.reactor.now + self.endpoint.target.idle_timeout_s)

    def relay_begins(self, relay: Relay) -> None:
        """From now on bytes go to the relay."""
        self._relay = relay

    def ready_to_use(self) -> None:
        """Dialed callback."""
        self.endpoint.channel_established(self)

    def failed(self, reason: str) -> None:
        """Dialed callback."""
        attempt, self.attempt = self.attempt, None
        self.endpoint.channel_failed(attempt, "connect-timeout" if reason == CONNECT_TIMED_OUT else "connect", reason)

    def data_received(self, data: bytes) -> None:
        """Connection callback."""
        if self._relay is not None:
            self._relay.received(self, data)
            return
        events = self.codec.receive_data(data)
        attempt = self.attempt
        if attempt is None:
            self.abort()  # bytes with no request in flight: this connection is out of step
            return
        if len(events) == 3 and events[2] is END and type(events[0]) is ResponseHead and type(events[1]) is bytes:
            attempt.response(events[0], events[1], ended=True)  # a whole response in one read, as most are
        else:
            self._deliver(attempt, events)

    def _deliver(self, attempt: Attempt, events: Sequence[ResponseEvent]) -> None:
        head: ResponseHead | None = None
        pieces: list[bytes] = []
        trailers: Headers = ()
        ended = False
        rejected: Rejected | None = None
        for event in events:
            if type(event) is bytes:
                pieces.append(event)
            elif type(event) is ResponseHead:
                if event.informational:
                    attempt.informational(event)
                else:
                    head = event
            elif event is END:
                ended = True
            elif type(event) is Trailers:
                trailers = event.headers
            elif type(event) is Rejected:
                rejected = event
        if head is not None or pieces or ended:
            body = pieces[0] if len(pieces) == 1 else b"".join(pieces)
            attempt.response(head, body, ended=ended, trailers=trailers)
        # Whoever had this attempt may have handed the channel over, or left it.
        now = self.attempt
        if rejected is not None and now is not None and not now.done:
            now.channel_lost("protocol", rejected.reason)

    def eof_received(self) -> None:
        """Connection callback."""
        if self._relay is not None:
            self._relay.ended(self)
            return
        attempt = self.attempt
        if attempt is None:
            self.close()
            return
        events = self.codec.receive_eof()
        if events and events[0] is END:
            attempt.response(None, b"", ended=True)
        else:
            attempt.channel_lost(self._reset_kind, "the connection was closed")
        if not self.closed:
            self.close()

    def write_drained(self) -> None:
        """Connection callback."""
        if self._relay is not None:
            self._relay.drained(self)
        elif self.attempt is not None:
            self.attempt.channel_drained()

    def deadline_passed(self) -> None:
        """Connection callback: connecting took too long, a try does, or it has been idle for long enough."""
        if not self.established:
            super().deadline_passed()
        elif self.attempt is None:
            self.close()
        else:
            self.attempt.try_timed_out()

    @property
    def _reset_kind(self) -> FailureKind:
        return "reset-before-request" if self._nothing_sent else "reset"

    def broken(self, reason: str) -> None:
        """Dialed callback."""
        if self._relay is not None:
            self._relay.broke(self)
        elif self.attempt is not None:
            self.endpoint.target.metrics.resets += 1
            self.attempt.channel_lost(self._reset_kind, reason)

    def finished(self) -> None:
        """Connection callback."""
        self.endpoint.channel_closed(self)

    def released(self) -> None:
        """Connection callback."""
        self._relay = self.attempt = None
