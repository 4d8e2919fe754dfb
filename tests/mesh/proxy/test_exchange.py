"""An exchange ends exactly once, in whatever order things happen."""

import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mesh.http.h1 import ClientConnection, ServerConnection
from mesh.http.head import RequestHead, ResponseHead
from mesh.proxy.exchange import Exchange
from mesh.proxy.relay import Relay
from mesh.proxy.replies import NO_HEALTHY_UPSTREAM, TIMED_OUT
from mesh.proxy.retry import REPLAY_BYTES_MAX


class FakePipe:
    """Records what is asked of a connection."""

    def __init__(self, codec):
        self.codec = codec
        self.sent = b""
        self.write_blocked = False
        self.paused = False
        self.ended = None
        self.relay = None

    def write(self, data):
        assert self.ended != "aborted"
        self.sent += data

    def pause_reading(self):
        self.paused = True

    def resume_reading(self):
        self.paused = False

    def shutdown_write(self):
        self.ended = "shut"

    def close(self, *, linger=False):
        self.ended = "closed"

    def abort(self):
        self.ended = "aborted"

    def relay_begins(self, relay):
        self.relay = relay

    def progress(self):
        pass

    def set_deadline(self, deadline):
        self.deadline = deadline


class FakeCaller(FakePipe):
    def __init__(self):
        super().__init__(ServerConnection())
        self.done = []

    def exchange_done(self, *, close):
        self.done.append(close)


class FakeChannel(FakePipe):
    def __init__(self, *, reused=False):
        super().__init__(ClientConnection())
        self.reused = reused
        self.deadline = float("inf")
        self.attempt = None

    def handed_to(self, attempt):
        self.attempt = attempt


class Clock:
    """Time that passes when told to."""

    def __init__(self):
        self.now = 100.0
        self._calls = []

    def call_at(self, deadline, callback):
        timer = Timer(self._calls, deadline, callback)
        self._calls.append(timer)
        return timer

    def advance(self, seconds):
        until = self.now + seconds
        while due := [call for call in self._calls if call.deadline <= until]:
            call = min(due, key=lambda call: call.deadline)
            self._calls.remove(call)
            self.now = max(self.now, call.deadline)
            call.callback()
        self.now = until

    @property
    def pending(self):
        return len(self._calls)


class Timer:
    def __init__(self, calls, deadline, callback):
        self._calls, self.deadline, self.callback = calls, deadline, callback

    def cancel(self):
        if self in self._calls:
            self._calls.remove(self)


class FakeDispatcher:
    """Target and dispatcher in one: hands out channels when told to."""

    name = "api"
    watched = False

    def __init__(self):
        self.reactor = Clock()
        self.rng = random.Random(0)
        self.asked = []
        self.released = []
        self.given_up = 0
        self.finishes = 0
        self.retries_max = 10
        self.retries = 0
        self.endpoints = 0

    def unix_time(self):
        return 1_000_000.0

    def acquire(self, attempt, exchange):
        self.endpoints += 1
        attempt.endpoint = f"endpoint {self.endpoints}"
        self.asked.append(attempt)

    def release(self, attempt, channel, *, reusable):
        attempt.endpoint = None
        self.released.append((channel, reusable))

    def give_up(self, attempt):
        attempt.endpoint = None
        self.given_up += 1

    def take_retry(self):
        if self.retries >= self.retries_max:
            return False
        self.retries += 1
        return True

    def retry_ended(self):
        self.retries -= 1
        assert self.retries >= 0

    def retrying(self, *, hedged):
        pass

    def finished(self, exchange):
        self.finishes += 1


def make(method=b"GET", **fields):
    caller, dispatcher = FakeCaller(), FakeDispatcher()
    exchange = Exchange(caller, dispatcher, RequestHead(method, b"/", None, b"api", (), **fields), 100.0)
    exchange.target = dispatcher
    return exchange, caller, dispatcher


OK = ResponseHead(200, (), 2)


def test_request_and_response_in_one_piece_each():
    exchange, caller, dispatcher = make()
    exchange.begin(b"", ended=True)
    channel = FakeChannel()
    exchange.channel_ready(channel)
    assert channel.sent == b"GET / HTTP/1.1\r\nhost: api\r\n\r\n"
    exchange.response(OK, b"ok", ended=True)
    assert caller.sent == b"HTTP/1.1 200 OK\r\ncontent-length: 2\r\n\r\nok"
    assert caller.done == [False]
    assert dispatcher.released == [(channel, True)]
    assert (dispatcher.finishes, exchange.status, exchange.bytes_sent) == (1, 200, 2)


def test_a_body_that_comes_before_its_channel_is_bounded_and_complete():
    exchange, caller, _ = make(b"POST", content_length=5 * REPLAY_BYTES_MAX)
    exchange.begin(b"x" * REPLAY_BYTES_MAX, ended=False)
    assert not caller.paused
    exchange.request_body(b"y")
    assert caller.paused
    channel = FakeChannel()
    exchange.channel_ready(channel)
    assert not caller.paused
    assert channel.sent.endswith(b"x" * REPLAY_BYTES_MAX + b"y")


def test_a_blocked_channel_stops_the_caller_and_the_reverse():
    exchange, caller, _ = make(b"POST", chunked=True)
    exchange.begin(b"", ended=False)
    channel = FakeChannel()
    exchange.channel_ready(channel)
    channel.write_blocked = True
    exchange.request_body(b"x")
    assert caller.paused
    exchange.channel_drained()
    assert not caller.paused
    caller.write_blocked = True
    exchange.response(ResponseHead(200), b"y", ended=False)
    assert channel.paused
    exchange.caller_drained()
    assert not channel.paused


@pytest.mark.parametrize(("method", "retried"), [(b"GET", True), (b"PUT", True), (b"POST", False)])
def test_a_reused_channel_that_dies_early_is_replaced_once(method, retried):
    exchange, caller, dispatcher = make(method, content_length=3)
    exchange.begin(b"abc", ended=True)
    first, second = FakeChannel(reused=True), FakeChannel(reused=True)
    exchange.channel_ready(first)
    exchange.channel_lost()
    assert len(dispatcher.asked) == 1 + retried
    if retried:
        exchange.channel_ready(second)
        assert second.sent == first.sent
        exchange.channel_lost()
    assert caller.sent.startswith(b"HTTP/1.1 503 ")
    assert (dispatcher.finishes, exchange.flags) == (1, "UC")


def test_a_body_too_large_to_keep_is_not_replayed():
    exchange, caller, dispatcher = make(b"PUT", content_length=REPLAY_BYTES_MAX + 1)
    exchange.begin(b"x", ended=False)
    exchange.channel_ready(FakeChannel(reused=True))
    exchange.request_body(b"x" * REPLAY_BYTES_MAX)
    exchange.request_end()
    exchange.channel_lost()
    assert len(dispatcher.asked) == 1
    assert caller.sent.startswith(b"HTTP/1.1 503 ")


def test_a_response_that_breaks_off_resets_the_caller():
    exchange, caller, dispatcher = make()
    exchange.begin(b"", ended=True)
    exchange.channel_ready(FakeChannel())
    exchange.response(OK, b"o", ended=False)
    exchange.channel_lost()
    assert caller.ended == "aborted"
    assert (dispatcher.finishes, dispatcher.released[0][1], exchange.flags) == (1, False, "UC")


def test_an_early_response_closes_the_caller_and_drops_the_channel():
    exchange, caller, dispatcher = make(b"POST", content_length=10)
    exchange.begin(b"x", ended=False)
    exchange.channel_ready(FakeChannel())
    exchange.response(OK, b"ok", ended=True)
    assert b"connection: close" in caller.sent
    assert caller.done == [True]
    assert dispatcher.released[0][1] is False


def test_timeouts():
    exchange, caller, dispatcher = make()
    exchange.begin(b"", ended=True)
    exchange.timed_out(TIMED_OUT)
    assert caller.sent.startswith(b"HTTP/1.1 504 ")
    assert caller.sent.endswith(b"upstream request timeout")
    assert (dispatcher.given_up, dispatcher.finishes, exchange.flags) == (1, 1, "UT")


def test_upgrade_joins_both_sides_with_what_they_already_sent():
    caller, dispatcher = FakeCaller(), FakeDispatcher()
    (head, _) = caller.codec.receive_data(
        b"GET / HTTP/1.1\r\nHost: a\r\nConnection: upgrade\r\nUpgrade: websocket\r\n\r\nearly"
    )
    exchange = Exchange(caller, dispatcher, head, 100.0)
    exchange.target = dispatcher
    exchange.begin(b"", ended=True)
    channel = FakeChannel()
    exchange.channel_ready(channel)
    (answer, _) = channel.codec.receive_data(b"HTTP/1.1 101 X\r\nConnection: upgrade\r\nUpgrade: websocket\r\n\r\nlate")
    exchange.response(answer, b"", ended=True)
    assert caller.sent.startswith(b"HTTP/1.1 101 ")
    assert caller.sent.endswith(b"\r\n\r\nlate")
    assert channel.sent.endswith(b"\r\n\r\nearly")
    assert caller.relay is channel.relay is not None


STEPS = ("ready", "body", "end", "head", "more", "finish", "lost", "malformed", "gone", "timeout", "fail", "drained")


@settings(max_examples=400)
@given(st.lists(st.sampled_from(STEPS), max_size=14), st.booleans(), st.sampled_from([b"GET", b"POST"]))
def test_any_order_of_events_ends_once_and_returns_every_channel(steps, reused, method):
    exchange, caller, dispatcher = make(method, chunked=True)
    rng = random.Random(0)
    given_out = []
    exchange.begin(b"a", ended=False)
    for step in steps:
        if exchange.done:
            break
        channel = exchange.channel
        if step == "ready" and channel is None:
            given_out.append(FakeChannel(reused=reused))
            exchange.channel_ready(given_out[-1])
        elif step == "body" and not exchange.request_ended:
            exchange.request_body(rng.randbytes(10))
        elif step == "end" and not exchange.request_ended:
            exchange.request_end()
        elif step == "head" and channel is not None and not exchange.response_started:
            exchange.response(ResponseHead(200), b"x", ended=False)
        elif step == "more" and exchange.response_started:
            exchange.response(None, b"y", ended=False)
        elif step == "finish" and exchange.response_started:
            exchange.response(None, b"", ended=True)
        elif step in ("lost", "malformed") and channel is not None:
            exchange.channel_lost("protocol" if step == "malformed" else "reset")
        elif step == "gone":
            exchange.caller_gone()
        elif step == "timeout":
            exchange.timed_out(TIMED_OUT)
        elif step == "fail" and not exchange.response_started:
            exchange.fail(NO_HEALTHY_UPSTREAM)
        elif step == "drained":
            exchange.caller_drained()
            exchange.channel_drained()
    if not exchange.done:
        exchange.caller_gone()
    assert dispatcher.finishes == 1
    assert [channel for channel, _ in dispatcher.released] == given_out
    assert exchange.channel is None
    assert len(caller.done) + (caller.ended == "aborted") <= 1


# ---- relay


def test_relay_passes_bytes_marks_and_ends_each_way():
    near, far = FakePipe(None), FakePipe(None)
    relay = Relay(near, far)
    relay.received(near, b"up")
    relay.received(far, b"down")
    assert (far.sent, near.sent) == (b"up", b"down")
    far.write_blocked = True
    relay.received(near, b"!")
    assert near.paused
    relay.drained(far)
    assert not near.paused
    relay.ended(near)
    assert (near.ended, far.ended) == (None, "shut")
    relay.ended(far)
    assert (near.ended, far.ended) == ("closed", "closed")


def test_relay_resets_the_other_side_of_a_broken_one():
    near, far = FakePipe(None), FakePipe(None)
    Relay(near, far).broke(far)
    assert (near.ended, far.ended) == ("aborted", None)
