"""Copies of requests to other targets. Nobody waits for them, and nobody sees what becomes of them.

A copy is an exchange of its own whose caller swallows the response. It is fed as the request arrives; one that cannot
keep up (its target takes no more than its buffers hold, or none of a body larger than COPY_BYTES_MAX while it has no
connection yet) is dropped: it may never hold back the request itself. Envoy mirrors only once the whole request has
been buffered; here nothing is buffered for it.
"""

import msgspec

from mesh.http.head import Headers, RequestHead, ResponseHead
from mesh.proxy.exchange import Exchange
from mesh.proxy.faults import shadow_authority
from mesh.proxy.parties import Clock, Dispatcher, Target
from mesh.proxy.relay import Relay

IN_FLIGHT_MAX = 256  # copies per listener; further ones are not made


class _Nowhere:
    """Writes a response for nobody."""

    must_close = False
    unparsed = b""

    def send_response(self, head: ResponseHead, request: RequestHead) -> bytes:
        return b""

    def send_informational(self, head: ResponseHead) -> bytes:
        return b""

    def send_body(self, data: bytes) -> bytes:
        return b""

    def end(self, trailers: Headers = ()) -> bytes:
        return b""


class MirrorCaller:
    """Stands where a connection's caller would. `dropped`: the copy could not keep up."""

    write_blocked = False

    def __init__(self, clock: Clock) -> None:
        self.codec = _Nowhere()
        self.dropped = False
        self._exchange: Exchange | None = None
        self._clock = clock
        self._deadline = float("inf")
        self._ended = False

    def begin(self, exchange: Exchange, body: bytes, *, ended: bool) -> None:
        """Starts the copy."""
        self._exchange = exchange
        exchange.begin(body, ended=ended)
        self.watch()

    def watch(self) -> None:
        """Waits for the deadline, as long as there is something to wait for."""
        exchange = self._exchange
        if exchange is None or exchange.done:
            return
        if self._clock.now >= self._deadline:
            exchange.deadline_passed()
        else:
            self._clock.call_at(min(self._deadline, self._clock.now + _LOOK_S), self.watch)

    def pause_reading(self) -> None:
        """It cannot keep up. Not at once: the exchange is in the middle of something."""
        if not self.dropped:
            self.dropped = True
            self._clock.call_at(self._clock.now, self._drop)

    def _drop(self) -> None:
        if self._exchange is not None:
            self._exchange.caller_gone("")

    def set_deadline(self, deadline: float) -> None:
        """Caller's."""
        self._deadline = deadline

    def progress(self) -> None:
        """Caller's."""
        if self._exchange is not None:
            self._deadline = min(self._clock.now + self._exchange.idle_s, self._exchange.request_deadline)

    def exchange_done(self, *, close: bool) -> None:
        """Caller's."""
        self._exchange = None

    def abort(self) -> None:
        """Caller's."""
        self._exchange = None

    def relay_begins(self, relay: Relay) -> None:
        """Never: a copy does not ask for an upgrade."""
        raise AssertionError("a mirrored request was upgraded")

    def write(self, data: bytes) -> None:
        """Nobody reads it."""

    def resume_reading(self) -> None:
        """It was never paused."""

    def shutdown_write(self) -> None:
        """There is nothing to end."""

    def close(self, *, linger: bool = False) -> None:
        """There is nothing to close."""


_LOOK_S = 5.0  # a deadline is at most so late


def start_mirror(
    original: Exchange, dispatcher: Dispatcher, target: Target, body: bytes, *, ended: bool, timeout_s: float
) -> Exchange:
    """A copy of a request that is about to begin; the caller adds it to the original's `mirrors`."""
    clock = dispatcher.reactor
    head = original.forwarded
    head = msgspec.structs.replace(head, authority=shadow_authority(head.authority), expects_continue=False)
    caller = MirrorCaller(clock)
    copy = Exchange(caller, dispatcher, head, clock.now)
    copy.target = target
    copy.request_timeout_s = timeout_s
    if ended and timeout_s:
        copy.request_deadline = clock.now + timeout_s
    caller.set_deadline(min(clock.now + copy.idle_s, copy.request_deadline))
    caller.begin(copy, body, ended=ended)
    return copy
