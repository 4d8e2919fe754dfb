"""One request and its response, from a caller's connection to a channel and back, streaming both ways.

Pure: connections are seen through `Caller` and `Channel`, endpoints through `Target`, accounts through `Dispatcher`.
Whatever order things happen in (an early response, a channel that dies, a caller that leaves), an exchange ends exactly
once, with `Dispatcher.finished`, and never holds more of a body than its retry policy's buffer beside what one read
returned. What a first try that fails leads to is in `further_tries`; copies of the request are in `mirror`.
"""

from collections.abc import Callable
from typing import TYPE_CHECKING

from mesh.errors import ProtocolError
from mesh.http.head import Headers, RequestHead, ResponseHead
from mesh.proxy.further_tries import FurtherTries
from mesh.proxy.parties import Attempt, Caller, Channel, Dispatcher, Target, Timer
from mesh.proxy.relay import Relay
from mesh.proxy.replies import (
    CONNECT_FAILED,
    CONNECT_TIMED_OUT,
    REQUEST_IDLE,
    RESPONSE_IDLE,
    TERMINATED,
    TIMED_OUT,
    TRY_TIMED_OUT,
    UNSENDABLE,
    UNSENDABLE_RESPONSE,
    UPSTREAM_PROTOCOL_ERROR,
    Reply,
)
from mesh.proxy.retry import SAFE_RETRIES, FailureKind, RetryRules, compile_retry, lost_keepalive_race
from mesh.proxy.sidecar_config import IDLE_TIMEOUT_S

if TYPE_CHECKING:
    from mesh.proxy.router import Route, RouteTarget

SAFE_RULES = compile_retry(SAFE_RETRIES)  # of a target without a policy

_NEVER = float("inf")
_NOWHERE = ("route_not_found", "direct_response", "cluster_not_found")  # details of what was meant for no target
RELAY_IDLE_TIMEOUT_S = 3600.0  # no byte either way after an upgrade, where the route says nothing

_FAILED: dict[FailureKind, Reply] = {
    "connect": CONNECT_FAILED,
    "connect-timeout": CONNECT_TIMED_OUT,
    "reset": TERMINATED,
    "reset-before-request": TERMINATED,
    "protocol": UPSTREAM_PROTOCOL_ERROR,
    "per-try-timeout": TRY_TIMED_OUT,
}


class Exchange:
    """See the module. `forwarded` is the head as the endpoint gets it; `request` as it came.

    The dispatcher sets `target`, and before `begin` what differs from the defaults. Times are the clock's; 0.0: not
    (yet). `hosts_tried` are `address:port` of all endpoints, in order, `upstream_failure` says how the last try failed.
    """

    __slots__ = (
        "_again", "_details", "_held", "_request_trailers", "_retained", "_retained_bytes", "_timer", "_waiting",
        "attempts", "bytes_received", "bytes_sent", "caller", "channel", "chosen", "context", "decision", "dispatcher",
        "done", "dress", "endpoint", "endpoint_host", "far", "flags", "forwarded", "hosts_tried", "idle_s", "mirrors",
        "probe", "replayable", "reply_body", "request", "request_deadline", "request_ended", "request_ended_at",
        "request_hash",
        "request_timeout_s", "resets", "response_at", "response_head", "response_started", "retry", "route", "sent_at",
        "set_cookie", "started_at", "status", "target", "trailers", "tried", "upstream_failure",
    )  # fmt: skip

    target: Target

    def __init__(self, caller: Caller, dispatcher: Dispatcher, request: RequestHead, started_at: float) -> None:
        self.caller = caller
        self.dispatcher = dispatcher
        self.request = request
        self.forwarded = request
        self.started_at = started_at
        self.channel: Channel | None = None
        self.far: Channel | None = None  # of the last try, also when it is over: for the access log
        self.endpoint: object | None = None  # the target's
        self.endpoint_host = ""  # of the last attempt
        self.hosts_tried: tuple[str, ...] = ()
        self.context: object | None = None  # the dispatcher's: a span
        self.route: Route | None = None
        self.chosen: RouteTarget | None = None  # of the route
        self.retry: RetryRules = SAFE_RULES
        self.dress: Callable[[Exchange, ResponseHead], ResponseHead] | None = None  # the response's head on its way
        self.mirrors: tuple[Exchange, ...] = ()
        self.request_hash: int | None = None
        self.set_cookie: bytes | None = None  # of a hash policy
        self.request_timeout_s = 0.0
        self.request_deadline = _NEVER
        self.idle_s = IDLE_TIMEOUT_S
        self.tried: tuple[object, ...] = ()  # endpoints that are not to be tried again
        self.attempts = 0
        self.resets = 0
        self.probe = False
        self.status = 0
        self.flags = ""
        self.decision = ""  # the policy's reason
        self.upstream_failure = ""
        self.reply_body = b""  # of an answer of our own
        self.bytes_received = 0
        self.bytes_sent = 0
        self.request_ended = False
        self.request_ended_at = 0.0
        self.sent_at = 0.0
        self.response_at = 0.0
        self.response_head: ResponseHead | None = None
        self.trailers: Headers = ()
        self.response_started = False
        self.replayable = True  # all of the body so far is in `_retained`
        self.done = False
        self._details = ""
        self._again: FurtherTries | None = None
        self._timer: Timer | None = None  # before a try
        self._request_trailers: Headers = ()
        self._retained: list[bytes] = []
        self._retained_bytes = 0
        self._held = False  # we have stopped the caller's reading
        self._waiting = False  # for a channel

    @property
    def details(self) -> str:
        """Envoy's RESPONSE_CODE_DETAILS."""
        return self._details or ("via_upstream" if self.response_head is not None else "")

    @property
    def target_name(self) -> str:
        """Where it went; empty: nowhere."""
        return "" if self._details in _NOWHERE else self.target.name

    @property
    def route_name(self) -> str:
        """The rule's name."""
        return self.route.name if self.route is not None else ""

    def flag(self, flags: str) -> None:
        """Adds response flags."""
        if not self.flags:
            self.flags = flags
        elif flags and flags not in self.flags.split(","):
            self.flags = f"{self.flags},{flags}"

    # ---- from the caller

    def begin(self, body: bytes, *, ended: bool, delay_s: float = 0.0, answer: Reply | None = None) -> None:
        """Starts, with as much of the request as has arrived. After `delay_s`, and with `answer` only to get that."""
        if ended:
            self.request_ended = True
            self.request_ended_at = self.started_at
        if body:
            self.bytes_received = len(body)
            self._retain(body)
        if delay_s > 0.0:
            self.flag("DI")
            self.pause(delay_s, self.acquire if answer is None else lambda: self.fail(answer))
        elif answer is not None:
            self.fail(answer)
        else:
            self._waiting = True
            self.target.acquire(self, self)

    def acquire(self) -> None:
        """Asks for a channel."""
        self._waiting = True
        self.target.acquire(self, self)

    def pause(self, seconds: float, then: Callable[[], None]) -> None:
        """Goes on later, unless it has ended by then."""

        def resume() -> None:
            self._timer = None
            then()

        clock = self.dispatcher.reactor
        self._timer = clock.call_at(clock.now + seconds, resume)

    def _retain(self, data: bytes) -> None:
        self._retained.append(data)
        self._retained_bytes += len(data)
        if self._retained_bytes > self.retry.policy.buffer_bytes_max and self.channel is None and not self._held:
            self._held = True
            self.caller.pause_reading()

    def request_body(self, data: bytes) -> None:
        """A further piece of the request's body."""
        self.bytes_received += len(data)
        self.caller.progress()
        for mirror in self.mirrors:
            mirror.request_body(data)
        channel = self.channel
        if channel is None:
            self._retain(data)
            return
        if self.replayable:
            if self._retained_bytes + len(data) <= self.retry.policy.buffer_bytes_max:
                self._retain(data)
            else:
                self.drop_retained()
        channel.write(channel.codec.send_body(data))
        if channel.write_blocked:
            self._held = True
            self.caller.pause_reading()

    def trailers_received(self, trailers: Headers) -> None:
        """Behind the request's body; its end follows."""
        self._request_trailers = trailers
        for mirror in self.mirrors:
            mirror.trailers_received(trailers)

    def request_end(self) -> None:
        """The request is complete."""
        now = self.dispatcher.reactor.now
        self.request_ended = True
        self.request_ended_at = now
        if self.request_timeout_s:
            self.request_deadline = now + self.request_timeout_s
        self.caller.set_deadline(min(self.request_deadline, now + self.idle_s))
        for mirror in self.mirrors:
            mirror.request_end()
        channel = self.channel
        if channel is not None:
            data = channel.codec.end(self._request_trailers)
            if data:
                channel.write(data)
            self.start_try_timeout(channel)

    def start_try_timeout(self, channel: Channel) -> None:
        """From the end of the request to the response's head."""
        if self.retry.per_try_timeout_s and not self.response_started:
            seconds = self.retry.try_timeout_s(self.request_timeout_s)
            if seconds:
                channel.set_deadline(self.dispatcher.reactor.now + seconds)

    def caller_drained(self) -> None:
        """The caller takes response bytes again."""
        if self.channel is not None:
            self.channel.resume_reading()

    def caller_gone(self, flags: str = "DC") -> None:
        """The caller's connection is over, or can no longer be answered."""
        if not self.done:
            self.flag(flags)
            self._details = self._details or "downstream_remote_disconnect"
            self._leave(reusable=False)
            self._finish()

    def deadline_passed(self) -> None:
        """The caller's deadline for this exchange is over."""
        if self.dispatcher.reactor.now >= self.request_deadline:
            self.timed_out(TIMED_OUT)
        else:
            self.timed_out(RESPONSE_IDLE if self.request_ended else REQUEST_IDLE)

    def timed_out(self, reply: Reply) -> None:
        """No more waiting: an answer, or a reset after the response has begun."""
        if self.response_started:
            self.flag(reply.flags)
            self._details = reply.details
            self._reset_caller()
            return
        if reply is TIMED_OUT and self.channel is not None and self.target.watched:
            self.target.failed(self, "per-try-timeout", self.sent_at)
        self.fail(reply)

    # ---- from the target

    def channel_ready(self, channel: Channel) -> None:
        """A channel is ours: send what there is of the request."""
        self._waiting = False
        self.channel = self.far = channel
        self.attempts += 1
        self.sent_at = self.dispatcher.reactor.now
        codec = channel.codec
        try:
            data = codec.send_request(self.forwarded)
        except ProtocolError:
            self.fail(UNSENDABLE)
            return
        if self._retained:
            data = b"".join((data, *map(codec.send_body, self._retained)))
            # What may not be sent again need not be kept.
            if self._retained_bytes > self.retry.policy.buffer_bytes_max or not (
                channel.reused or self.retry is not SAFE_RULES
            ):
                self.drop_retained()
        if self.request_ended:
            data += codec.end(self._request_trailers)
            if self.retry.per_try_timeout_s:
                self.start_try_timeout(channel)
        channel.write(data)
        if self._held and not channel.write_blocked:
            self._held = False
            self.caller.resume_reading()

    def connect_failed(self, kind: FailureKind, reason: str) -> None:
        """No connection to the endpoint: another try, or the caller hears of it."""
        self.attempts += 1
        self._try_failed(kind, reason)

    def refused(self, reply: Reply) -> None:
        """The target has no channel for us: it is overloaded, or has no endpoint."""
        self._waiting = False
        self.fail(reply)

    def fail(self, reply: Reply) -> None:
        """Answers in place of the endpoint. Only before a response has begun."""
        assert not self.response_started
        if self.done:
            return
        self._leave(reusable=False)
        body = self.reply_body = reply.text(self.attempts)
        self.status = reply.status
        self.flag(reply.flags)
        self._details = reply.details
        self.response_started = True
        codec = self.caller.codec
        if not self.request_ended:
            codec.must_close = True
        head = ResponseHead(reply.status, reply.typed_headers if body else reply.headers, len(body))
        if self.dress is not None:
            head = self.dress(self, head)
        self.bytes_sent = len(body)
        self.caller.write(codec.send_response(head, self.request) + codec.send_body(body) + codec.end())
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

    def response(
        self, head: ResponseHead | None, body: bytes, *, ended: bool, trailers: Headers = (), judged: bool = False
    ) -> None:
        """What one read of the channel held: the head when it came, body bytes, trailers, the end. With `judged` it has
        been decided that this is the response to pass on.
        """
        caller = self.caller
        codec = caller.codec
        if head is not None:
            if not judged:
                if self.target.watched:
                    self.target.responded(self, head, self.sent_at)
                if (self.retry is not SAFE_RULES or self._again is not None) and self._retries_after(head):
                    return
            self.response_at = self.dispatcher.reactor.now
            self.response_head = head
            self.status = head.status
            self.response_started = True
            if self._retained:
                self.drop_retained()
            if self.dress is not None:
                head = self.dress(self, head)
            if head.status == 101:
                self._start_relay(head)
                return
            if ended and not self.request_ended:
                codec.must_close = True  # the rest of the request is not wanted, and is not read
            try:
                data = codec.send_response(head, self.request)
            except ProtocolError:
                self.response_started = False
                self.response_head = None
                self.fail(UNSENDABLE_RESPONSE)
                return
            if body:
                data += codec.send_body(body)
        else:
            data = codec.send_body(body) if body else b""
        self.bytes_sent += len(body)
        if ended:
            self.trailers = trailers
            data += codec.end(trailers)
        if data:
            caller.write(data)
        if ended:
            self._leave(reusable=self.request_ended)
            self._finish()
            caller.exchange_done(close=codec.must_close or not self.request_ended)
            return
        caller.progress()
        if caller.write_blocked and self.channel is not None:
            self.channel.pause_reading()

    def channel_lost(self, kind: FailureKind = "reset", reason: str = "") -> None:
        """The channel broke, or (`protocol`) what came from it was no response."""
        if self.done:
            return
        channel = self.channel
        assert channel is not None
        if self.response_started:
            self.flag("UPE" if kind == "protocol" else "UC")
            self._details = "upstream_reset_after_response_started"
            self.upstream_failure = reason
            self._reset_caller()
            return
        if kind != "protocol" and lost_keepalive_race(
            method=self.request.method, reused=channel.reused, resets=self.resets, replayable=self.replayable
        ):
            self.resets += 1
            self.leave_channel(reusable=False)
            self.acquire()
            return
        self._try_failed(kind, reason)

    def try_timed_out(self) -> None:
        """The per-try timeout is over."""
        if self.done or self.response_started:
            return
        if self.retry.hedge:
            if self.target.watched:
                self.target.failed(self, "per-try-timeout", self.sent_at)
            self.further_tries().hedge()
        else:
            self._try_failed("per-try-timeout", "per-try timeout")

    # ---- tries

    def further_tries(self) -> FurtherTries:
        """What is needed beyond the first try."""
        if self._again is None:
            self._again = FurtherTries(self)
        return self._again

    def _retries_after(self, head: ResponseHead) -> bool:
        """Whether another try is made, or waited for, instead of passing this response on."""
        if self.retry.after_response(head):
            return self.further_tries().after_response(head)
        if self.channel is not None:
            self.channel.deadline = _NEVER  # the per-try timeout ends here
        if self._again is not None:
            self._again.cancel()
        return False

    def _try_failed(self, kind: FailureKind, reason: str) -> None:
        self.upstream_failure = reason
        if self.target.watched:
            self.target.failed(self, kind, self.sent_at)
        if (self.retry.after_failure(kind) or self._again is not None) and self.further_tries().after_failure(kind):
            return
        self.fail(self.reply_to(kind))

    def skip_endpoint(self) -> None:
        """The endpoint of this try is not to be tried again."""
        if self.endpoint is not None:
            self.tried += (self.endpoint,)

    @property
    def counts_retries(self) -> bool:
        """Whether budgets and flags apply: the retries that are always safe add no load."""
        return self.retry is not SAFE_RULES

    @staticmethod
    def reply_to(kind: FailureKind) -> Reply:
        """What the caller gets when its last try failed so."""
        return _FAILED.get(kind, TERMINATED)

    @property
    def trying(self) -> bool:
        """Whether a try of its own is under way, or will be."""
        return self.channel is not None or self._waiting or self._timer is not None

    def take_over(self, channel: Channel, attempt: Attempt) -> None:
        """A hedged attempt has won: its channel is ours, and what we had is given up."""
        self.leave_channel(reusable=False)
        self.channel = self.far = channel
        self.endpoint, self.endpoint_host, self.probe = attempt.endpoint, attempt.endpoint_host, attempt.probe
        attempt.endpoint = None
        channel.handed_to(self)

    @property
    def replay(self) -> bytes:
        """The body so far. Only while `replayable`."""
        return b"".join(self._retained)

    @property
    def request_trailers(self) -> Headers:
        """Behind the body."""
        return self._request_trailers

    # ---- inside

    def drop_retained(self) -> None:
        """It will not be sent again."""
        self._retained = []
        self._retained_bytes = 0
        self.replayable = False

    def leave_channel(self, *, reusable: bool) -> None:
        """Ends our own try."""
        channel = self.channel
        if channel is not None:
            self.channel = None
            self.target.release(self, channel, reusable=reusable)
        elif self._waiting:
            self._waiting = False
            self.target.give_up(self)
        elif self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _leave(self, *, reusable: bool) -> None:
        self.leave_channel(reusable=reusable)
        if self._again is not None:
            self._again.cancel()

    def _reset_caller(self) -> None:
        """The response cannot be completed, and the caller must not take what it has for all of it."""
        self._leave(reusable=False)
        self._finish()
        self.caller.abort()

    def _finish(self) -> None:
        if not self.done:
            self.done = True
            self._retained = []
            if self.mirrors and not self.request_ended:
                for mirror in self.mirrors:
                    mirror.caller_gone("")
            self.dispatcher.finished(self)

    def _start_relay(self, head: ResponseHead) -> None:
        caller, channel = self.caller, self.channel
        assert channel is not None
        caller.write(caller.codec.send_response(head, self.request))
        self.request_deadline = _NEVER
        if self.idle_s == IDLE_TIMEOUT_S:
            self.idle_s = RELAY_IDLE_TIMEOUT_S
        relay = Relay(caller, channel)
        caller.relay_begins(relay)
        channel.relay_begins(relay)
        # What either side sent right behind its head belongs to the new protocol.
        early, late = caller.codec.unparsed, channel.codec.unparsed
        if early:
            relay.received(caller, early)
        if late:
            relay.received(channel, late)
