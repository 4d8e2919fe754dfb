"""Whom an exchange deals with: the connections on both sides of it, its target, and who keeps its accounts."""

import random
from collections.abc import Callable
from typing import TYPE_CHECKING, Protocol

from mesh.http.h1 import ClientConnection
from mesh.http.head import Headers, RequestHead, ResponseHead
from mesh.proxy.relay import Pipe, Relay
from mesh.proxy.replies import Reply
from mesh.proxy.retry import FailureKind

if TYPE_CHECKING:
    from mesh.proxy.exchange import Exchange


class Timer(Protocol):
    """A call to come."""

    def cancel(self) -> None: ...


class Clock(Protocol):
    """Seconds, and calls at a time."""

    now: float

    def call_at(self, deadline: float, callback: Callable[[], None]) -> Timer: ...


class ResponseWriter(Protocol):
    """How a caller's response is put into bytes."""

    must_close: bool

    @property
    def unparsed(self) -> bytes: ...
    def send_response(self, head: ResponseHead, request: RequestHead) -> bytes: ...
    def send_informational(self, head: ResponseHead) -> bytes: ...
    def send_body(self, data: bytes) -> bytes: ...
    def end(self, trailers: Headers = ()) -> bytes: ...


class Caller(Pipe, Protocol):
    """The connection that the request came on."""

    @property
    def codec(self) -> ResponseWriter: ...
    def exchange_done(self, *, close: bool) -> None:
        """The exchange is over; with `close` the connection cannot carry another one."""

    def relay_begins(self, relay: Relay) -> None:
        """From now on bytes go to the relay."""

    def progress(self) -> None:
        """Something moved: `idle_s` starts again."""

    def set_deadline(self, deadline: float) -> None:
        """When to call `deadline_passed`."""


class Attempt(Protocol):
    """One try of a request, as its endpoint and channel see it: the exchange itself, or a hedged second one."""

    endpoint: object | None  # the target's
    endpoint_host: str
    done: bool
    probe: bool  # the endpoint is on probation, and this request decides

    @property
    def resets(self) -> int:
        """After one, a new connection is wanted, not an idle one: it may have been met by the same."""

    def channel_ready(self, channel: "Channel") -> None: ...
    def channel_drained(self) -> None: ...
    def channel_lost(self, kind: FailureKind = "reset", reason: str = "") -> None: ...
    def connect_failed(self, kind: FailureKind, reason: str) -> None: ...
    def refused(self, reply: Reply) -> None: ...
    def informational(self, head: ResponseHead) -> None: ...
    def response(self, head: ResponseHead | None, body: bytes, *, ended: bool, trailers: Headers = ()) -> None: ...
    def try_timed_out(self) -> None: ...


class Channel(Pipe, Protocol):
    """A connection to an endpoint, used by one attempt at a time."""

    reused: bool
    deadline: float

    @property
    def codec(self) -> ClientConnection: ...
    def handed_to(self, attempt: Attempt) -> None:
        """From now on it serves another attempt (a hedged one has won)."""

    def set_deadline(self, deadline: float) -> None:
        """When to call `try_timed_out`."""

    def relay_begins(self, relay: Relay) -> None:
        """From now on bytes go to the relay."""


class Target(Protocol):
    """Where the request goes: finds channels, and admits retries."""

    @property
    def name(self) -> str: ...
    @property
    def watched(self) -> bool:
        """Whether `responded` and `failed` want to be told."""

    def acquire(self, attempt: Attempt, exchange: "Exchange") -> None:
        """Calls `channel_ready`, `connect_failed` or `refused` on the attempt, at once or later."""

    def release(self, attempt: Attempt, channel: Channel, *, reusable: bool) -> None:
        """The attempt no longer uses the channel."""

    def give_up(self, attempt: Attempt) -> None:
        """The attempt no longer wants the channel that it asked for."""

    def responded(self, attempt: Attempt, head: ResponseHead, sent_at: float) -> None:
        """The attempt's endpoint has answered."""

    def failed(self, attempt: Attempt, kind: FailureKind, sent_at: float) -> None:
        """The attempt's endpoint has not answered."""

    def take_retry(self) -> bool:
        """Whether one more retry is admitted; `retry_ended` follows."""

    def retry_ended(self) -> None:
        """One that was admitted is over."""

    def retrying(self, *, hedged: bool) -> None:
        """A further try is being made, for the counters."""


class Dispatcher(Protocol):
    """Keeps the accounts; has the clock and the dice."""

    @property
    def reactor(self) -> Clock: ...
    @property
    def rng(self) -> random.Random: ...
    def unix_time(self) -> float:
        """Seconds since 1970."""

    def finished(self, exchange: "Exchange") -> None:
        """The exchange is over, exactly once."""
