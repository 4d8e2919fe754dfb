"""One request and its response, from a caller's connection to a channel and back, streaming both ways.

Pure: connections are seen through `Caller` and `Channel`, the choice of an endpoint through `Dispatcher`. Whatever
order things happen in (an early response, a channel that dies, a caller that leaves), an exchange ends exactly once,
with `Dispatcher.finished`, and never holds more than REPLAY_BYTES_MAX of a body beside what one read returned.
"""

from typing import Protocol

import msgspec

from mesh.http.h1 import ClientConnection, ServerConnection
from mesh.http.head import Headers, RequestHead, ResponseHead
from mesh.proxy.relay import Pipe, Relay
from mesh.proxy.retry import REPLAY_BYTES_MAX, may_retry

# Envoy's words: operators grep for them.
CONNECT_ERROR = "upstream connect error or disconnect/reset before headers. reset reason: "

_TEXT: Headers = ((b"content-type", b"text/plain"),)


class Reply(msgspec.Struct, frozen=True):
    """An answer of our own. `flags` are Envoy's response flags."""

    status: int
    body: bytes
    flags: str
    headers: Headers = ()


NO_HEALTHY_UPSTREAM = Reply(503, b"no healthy upstream", "UH")
OVERFLOW = Reply(503, f"{CONNECT_ERROR}overflow".encode(), "UO", ((b"x-envoy-overloaded", b"true"),))
DENIED = Reply(403, b"RBAC: access denied", "")
TERMINATED = Reply(503, f"{CONNECT_ERROR}connection termination".encode(), "UC")
UPSTREAM_PROTOCOL_ERROR = Reply(502, f"{CONNECT_ERROR}protocol error".encode(), "UPE")
CONNECT_FAILED = Reply(503, f"{CONNECT_ERROR}remote connection failure".encode(), "UF")
TIMED_OUT = Reply(504, b"upstream request timeout", "UT")


class Caller(Pipe, Protocol):
    """The connection that the request came on."""

    @property
    def codec(self) -> ServerConnection: ...
    def exchange_done(self, *, close: bool) -> None:
        """The exchange is over; with `close` the connection cannot carry another one."""

    def relay_begins(self, relay: Relay) -> None:
        """From now on bytes go to the relay."""

    def progress(self) -> None:
        """Something moved: the idle deadline starts again."""

    def request_complete(self) -> None:
        """The whole request has arrived: from now on the response is due."""


class Channel(Pipe, Protocol):
    """A connection to an endpoint, used by one exchange at a time."""

    reused: bool

    @property
    def codec(self) -> ClientConnection: ...
    def relay_begins(self, relay: Relay) -> None:
        """From now on bytes go to the relay."""


class Dispatcher(Protocol):
    """Finds channels, and keeps the accounts."""

    def acquire(self, exchange: "Exchange") -> None:
        """Calls `channel_ready` or `fail` on the exchange, at once or later."""

    def release(self, exchange: "Exchange", channel: Channel, *, reusable: bool) -> None:
        """The exchange no longer uses the channel."""

    def give_up(self, exchange: "Exchange") -> None:
        """The exchange no longer wants the channel that it asked for."""

    def finished(self, exchange: "Exchange") -> None:
        """The exchange is over, exactly once."""


class Exchange:
    """See the module. `forwarded` is the head as the endpoint gets it; `request` as it came."""

    __slots__ = (
        "_held", "_retained", "_retained_bytes", "_waiting", "attempts", "bytes_received", "bytes_sent", "caller",
        "channel", "context", "dispatcher", "done", "endpoint", "endpoint_host", "flags", "forwarded", "replayable",
        "request", "request_ended", "resets", "response_started", "started_at", "status", "tried",
    )  # fmt: skip

    def __init__(self, caller: Caller, dispatcher: Dispatcher, request: RequestHead, started_at: float) -> None:
        self.caller = caller
        self.dispatcher = dispatcher
        self.request = request
        self.forwarded = request
        self.started_at = started_at
        self.channel: Channel | None = None
        self.endpoint: object | None = None  # the dispatcher's
        self.endpoint_host = ""  # of the last attempt, for the access log
        self.context: object | None = None  # the dispatcher's: a span
        self.tried: tuple[object, ...] = ()  # endpoints whose connect failed
        self.attempts = 0
        self.resets = 0
        self.status = 0
        self.flags = ""
        self.bytes_received = 0
        self.bytes_sent = 0
        self.request_ended = False
        self.response_started = False
        self.replayable = True  # all of the body so far is in `_retained`
        self.done = False
        self._retained: list[bytes] = []
        self._retained_bytes = 0
        self._held = False  # we have stopped the caller's reading
        self._waiting = False  # for a channel

    # ---- from the caller

    def begin(self, body: bytes, *, ended: bool) -> None:
        """Starts, with as much of the request as has arrived."""
        self.request_ended = ended
        if body:
            self.bytes_received = len(body)
            self._retain(body)
        self._acquire()

    def _acquire(self) -> None:
        self._waiting = True
        self.dispatcher.acquire(self)

    def _retain(self, data: bytes) -> None:
        self._retained.append(data)
        self._retained_bytes += len(data)
        if self._retained_bytes > REPLAY_BYTES_MAX and self.channel is None and not self._held:
            self._held = True
            self.caller.pause_reading()

    def request_body(self, data: bytes) -> None:
        """A further piece of the request's body."""
        self.bytes_received += len(data)
        self.caller.progress()
        channel = self.channel
        if channel is None:
            self._retain(data)
            return
        if self.replayable:
            if self._retained_bytes + len(data) <= REPLAY_BYTES_MAX:
                self._retain(data)
            else:
                self._drop_retained()
        channel.write(channel.codec.send_body(data))
        if channel.write_blocked:
            self._held = True
            self.caller.pause_reading()

    def request_end(self) -> None:
        """The request is complete."""
        self.request_ended = True
        self.caller.request_complete()
        if self.channel is not None:
            data = self.channel.codec.end()
            if data:
                self.channel.write(data)

    def caller_drained(self) -> None:
        """The caller takes response bytes again."""
        if self.channel is not None:
            self.channel.resume_reading()

    def caller_gone(self, flags: str = "DC") -> None:
        """The caller's connection is over, or can no longer be answered."""
        if not self.done:
            self.flags = self.flags or flags
            self._leave_channel(reusable=False)
            self._finish()

    def timed_out(self) -> None:
        """The caller's deadline for this exchange is over."""
        if self.response_started:
            self.flags = "UT" if not self.flags else self.flags
            self._reset_caller()
        else:
            self.fail(TIMED_OUT)

    # ---- from the dispatcher

    def channel_ready(self, channel: Channel) -> None:
        """A channel is ours: send what there is of the request."""
        self._waiting = False
        self.channel = channel
        self.attempts += 1
        codec = channel.codec
        data = codec.send_request(self.forwarded)
        if self._retained:
            data = b"".join((data, *map(codec.send_body, self._retained)))
        if self.request_ended:
            data += codec.end()
        if not channel.reused or self._retained_bytes > REPLAY_BYTES_MAX:
            self.replayable = False
            if self._retained:
                self._drop_retained()
        channel.write(data)
        if self._held and not channel.write_blocked:
            self._held = False
            self.caller.resume_reading()

    def fail(self, reply: Reply) -> None:
        """Answers in place of the endpoint. Only before a response has begun."""
        assert not self.response_started
        if self.done:
            return
        self._leave_channel(reusable=False)
        self.status = reply.status
        self.flags = reply.flags
        self.response_started = True
        codec = self.caller.codec
        if not self.request_ended:
            codec.must_close = True
        head = ResponseHead(reply.status, _TEXT + reply.headers, len(reply.body))
        self.bytes_sent = len(reply.body)
        self.caller.write(codec.send_response(head, self.request) + codec.send_body(reply.body) + codec.end())
        self._finish()
        self.caller.exchange_done(close=codec.must_close)

    # ---- from the channel

    def channel_drained(self) -> None:
        """The channel takes request bytes again."""
        if self._held:
            self._held = False
            self.caller.resume_reading()

    def informational(self, head: ResponseHead) -> None:
        """A 1xx head (101 apart): passed on to callers that know them."""
        if self.request.http_minor and not self.response_started:
            self.caller.write(self.caller.codec.send_informational(head))

    def response(self, head: ResponseHead | None, body: bytes, *, ended: bool) -> None:
        """What one read of the channel held: the head when it came, body bytes, the end."""
        caller = self.caller
        codec = caller.codec
        if head is not None:
            self.status = head.status
            self.response_started = True
            if self._retained:
                self._drop_retained()
            if head.status == 101:
                self._start_relay(head)
                return
            if ended and not self.request_ended:
                codec.must_close = True  # the rest of the request is not wanted, and is not read
            data = codec.send_response(head, self.request)
            if body:
                data += codec.send_body(body)
        else:
            data = codec.send_body(body) if body else b""
        self.bytes_sent += len(body)
        if ended:
            data += codec.end()
        if data:
            caller.write(data)
        if ended:
            self._leave_channel(reusable=self.request_ended)
            self._finish()
            caller.exchange_done(close=codec.must_close or not self.request_ended)
            return
        caller.progress()
        if caller.write_blocked and self.channel is not None:
            self.channel.pause_reading()

    def channel_lost(self, *, malformed: bool = False) -> None:
        """The channel broke, or what came from it was no response."""
        if self.done:
            return
        channel = self.channel
        assert channel is not None
        if self.response_started:
            self.flags = "UPE" if malformed else "UC"
            self._reset_caller()
            return
        retried = not malformed and may_retry(
            "reset",
            method=self.request.method,
            attempts=self.attempts,
            reused=channel.reused,
            resets=self.resets,
            replayable=self.replayable,
        )
        if retried:
            self.resets += 1
            self._leave_channel(reusable=False)
            self._acquire()
        else:
            self.fail(UPSTREAM_PROTOCOL_ERROR if malformed else TERMINATED)

    # ---- inside

    def _drop_retained(self) -> None:
        self._retained = []
        self._retained_bytes = 0
        self.replayable = False

    def _leave_channel(self, *, reusable: bool) -> None:
        channel = self.channel
        if channel is not None:
            self.channel = None
            self.dispatcher.release(self, channel, reusable=reusable)
        elif self._waiting:
            self._waiting = False
            self.dispatcher.give_up(self)

    def _reset_caller(self) -> None:
        """The response cannot be completed, and the caller must not take what it has for all of it."""
        self._leave_channel(reusable=False)
        self._finish()
        self.caller.abort()

    def _finish(self) -> None:
        if not self.done:
            self.done = True
            self._retained = []
            self.dispatcher.finished(self)

    def _start_relay(self, head: ResponseHead) -> None:
        caller, channel = self.caller, self.channel
        assert channel is not None
        caller.write(caller.codec.send_response(head, self.request))
        relay = Relay(caller, channel)
        caller.relay_begins(relay)
        channel.relay_begins(relay)
        # What either side sent right behind its head belongs to the new protocol.
        early, late = caller.codec.unparsed, channel.codec.unparsed
        if early:
            relay.received(caller, early)
        if late:
            relay.received(channel, late)
