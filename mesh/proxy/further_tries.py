"""What follows a try that failed, or takes too long: retries after a pause, and hedged tries that race the first.

Made by an exchange only when it needs one. A further try takes the exchange's own place when that is free; a hedged one
beside it is a `HedgedTry`, whose channel the exchange takes over when it is the first with an answer worth passing on.
"""

from typing import TYPE_CHECKING

from mesh.errors import ProtocolError
from mesh.http.head import Headers, ResponseHead
from mesh.proxy.replies import Reply
from mesh.proxy.retry import FailureKind, RetryVerdict, hedge_verdict, retry_verdict

if TYPE_CHECKING:
    from mesh.proxy.exchange import Exchange
    from mesh.proxy.parties import Channel, Timer


class FurtherTries:
    """The tries of one exchange after its first."""

    __slots__ = ("_admitted", "_exchange", "_hedged", "_hedges", "retries")

    def __init__(self, exchange: "Exchange") -> None:
        self._exchange = exchange
        self._admitted = 0  # by the target, and not over
        self._hedged = False  # the exchange's own try has been given a second one
        self._hedges: list[HedgedTry] = []
        self.retries = 0

    # ---- the exchange's own try

    def after_response(self, head: ResponseHead) -> bool:
        """A response's head to retry on has come on the exchange's own channel. False: pass it on."""
        again = self._judge(wanted=True, hedged=self._hedged, others=len(self._hedges))
        if again == "answer":
            self.cancel()
            return False
        exchange = self._exchange
        exchange.skip_endpoint()
        exchange.leave_channel(reusable=False)
        if again == "retry":
            self._begin(head)
        return True

    def after_failure(self, kind: FailureKind) -> bool:
        """The exchange's own try has failed. False: the caller hears of it."""
        exchange = self._exchange
        wanted = exchange.retry.after_failure(kind)
        again = self._judge(wanted=wanted, hedged=self._hedged, others=len(self._hedges))
        if again == "answer":
            return False
        exchange.skip_endpoint()
        exchange.leave_channel(reusable=False)
        if again == "retry":
            self._begin(None)
        return True

    def hedge(self) -> None:
        """The exchange's own try takes too long: it goes on, and a second one starts beside it."""
        if not self._hedged:
            self._hedged = True
            self._exchange.skip_endpoint()
            self._hedge_more()

    # ---- hedged tries

    def hedge_timed_out(self, hedged_try: "HedgedTry") -> None:
        """As `hedge`, for one of those."""
        if not hedged_try.hedged:
            hedged_try.hedged = True
            self._hedge_more()

    def _hedge_more(self) -> None:
        exchange = self._exchange
        if exchange.retry.after_failure("per-try-timeout") and self._verdict() == "retry":
            self._begin(None)

    def hedge_answered(
        self, hedged_try: "HedgedTry", head: ResponseHead, body: bytes, *, ended: bool, trailers: Headers
    ) -> None:
        """One has a response's head: it wins, or is dropped for another one."""
        exchange = self._exchange
        wanted = exchange.retry.after_response(head)
        others = len(self._hedges) - 1 + exchange.trying
        again = self._judge(wanted=wanted, hedged=hedged_try.hedged, others=others)
        if again == "answer":
            channel = hedged_try.channel
            assert channel is not None
            self._hedges.remove(hedged_try)
            hedged_try.done = True
            hedged_try.channel = None
            exchange.take_over(channel, hedged_try)
            exchange.response(head, body, ended=ended, trailers=trailers, judged=True)
            return
        self._drop(hedged_try)
        if again == "retry":
            self._begin(head)

    def hedge_failed(self, hedged_try: "HedgedTry", kind: FailureKind, reply: Reply) -> None:
        """One is over without a response."""
        exchange = self._exchange
        others = len(self._hedges) - 1 + exchange.trying
        again = self._judge(wanted=exchange.retry.after_failure(kind), hedged=hedged_try.hedged, others=others)
        self._drop(hedged_try)
        if again == "retry":
            self._begin(None)
        elif not others:
            exchange.fail(reply)

    def _drop(self, hedged_try: "HedgedTry") -> None:
        self._hedges.remove(hedged_try)
        hedged_try.cancel()

    # ---- both

    def _judge(self, *, wanted: bool, hedged: bool, others: int) -> str:
        verdict: RetryVerdict = "no"
        if wanted and not hedged:
            verdict = self._verdict()
        return hedge_verdict(wanted=wanted, hedged=hedged, verdict=verdict, others=others)

    def _verdict(self) -> RetryVerdict:
        exchange = self._exchange
        verdict = retry_verdict(
            exchange.retry, retries=self.retries, replayable=exchange.replayable, admitted=self._admit
        )
        if verdict == "limit_exceeded" and exchange.counts_retries:
            exchange.flag("URX")
        elif verdict == "overflow":
            exchange.flag("UO")
        return verdict

    def _admit(self) -> bool:
        exchange = self._exchange
        if not exchange.counts_retries:
            return True  # nothing has been sent: no load is added
        if not self._hedges and self._admitted:
            self._admitted -= 1  # the retry that failed is over
            exchange.target.retry_ended()
        if not exchange.target.take_retry():
            return False
        self._admitted += 1
        return True

    def _begin(self, head: ResponseHead | None) -> None:
        """Another try, after a pause; `head` is the response that asked for it."""
        exchange = self._exchange
        self.retries += 1
        own = not exchange.trying
        exchange.target.retrying(hedged=not own)
        dispatcher = exchange.dispatcher
        unix_now = dispatcher.unix_time() if head is not None and exchange.retry.honor_retry_after else 0.0
        pause_s = exchange.retry.pause_s(self.retries, dispatcher.rng, head, unix_now)
        if own:
            self._hedged = False
            if pause_s > 0.0:
                exchange.pause(pause_s, exchange.acquire)
            else:
                exchange.acquire()
            return
        hedged_try = HedgedTry(exchange, self)
        self._hedges.append(hedged_try)
        hedged_try.begin(pause_s)

    def cancel(self) -> None:
        """The exchange has its response, or has ended."""
        while self._hedges:
            self._hedges.pop().cancel()
        while self._admitted:
            self._admitted -= 1
            self._exchange.target.retry_ended()


class HedgedTry:
    """A second try beside the exchange's own. The request is complete, and all of it is at hand."""

    __slots__ = (
        "_exchange", "_timer", "_tries", "_waiting", "channel", "done", "endpoint", "endpoint_host", "hedged", "probe",
        "sent_at",
    )  # fmt: skip

    resets = 0  # an idle connection will do

    def __init__(self, exchange: "Exchange", tries: FurtherTries) -> None:
        self._exchange = exchange
        self._tries = tries
        self._timer: Timer | None = None
        self._waiting = False
        self.channel: Channel | None = None
        self.endpoint: object | None = None
        self.endpoint_host = ""
        self.done = False
        self.hedged = False  # has been given another one itself
        self.probe = False
        self.sent_at = 0.0

    def begin(self, pause_s: float) -> None:
        """Asks for a channel, after a pause."""
        clock = self._exchange.dispatcher.reactor
        if pause_s > 0.0:
            self._timer = clock.call_at(clock.now + pause_s, self._acquire)
        else:
            self._acquire()

    def _acquire(self) -> None:
        self._timer = None
        self._waiting = True
        self._exchange.target.acquire(self, self._exchange)

    def channel_ready(self, channel: "Channel") -> None:
        """Attempt callback."""
        exchange = self._exchange
        self._waiting = False
        self.channel = channel
        exchange.attempts += 1
        self.sent_at = exchange.dispatcher.reactor.now
        codec = channel.codec
        try:
            head = codec.send_request(exchange.forwarded)
        except ProtocolError:
            self._fail("overflow", "")
            return
        body = exchange.replay
        channel.write(head + (codec.send_body(body) if body else b"") + codec.end(exchange.request_trailers))
        exchange.start_try_timeout(channel)

    def channel_drained(self) -> None:
        """Attempt callback: all of the request has been handed over already."""

    def informational(self, head: ResponseHead) -> None:
        """Attempt callback: it is not known yet whether this one wins."""

    def response(self, head: ResponseHead | None, body: bytes, *, ended: bool, trailers: Headers = ()) -> None:
        """Attempt callback: a head, or the channel would be the exchange's already."""
        assert head is not None
        if self._exchange.target.watched:
            self._exchange.target.responded(self, head, self.sent_at)
        self._tries.hedge_answered(self, head, body, ended=ended, trailers=trailers)

    def channel_lost(self, kind: FailureKind = "reset", reason: str = "") -> None:
        """Attempt callback."""
        if not self.done:
            self._fail(kind, reason)

    def connect_failed(self, kind: FailureKind, reason: str) -> None:
        """Attempt callback."""
        self._exchange.attempts += 1
        self._fail(kind, reason)

    def refused(self, reply: Reply) -> None:
        """Attempt callback."""
        self._waiting = False
        self._tries.hedge_failed(self, "overflow", reply)

    def try_timed_out(self) -> None:
        """Attempt callback."""
        if not self.done:
            if self._exchange.target.watched:
                self._exchange.target.failed(self, "per-try-timeout", self.sent_at)
            self._tries.hedge_timed_out(self)

    def _fail(self, kind: FailureKind, reason: str) -> None:
        exchange = self._exchange
        exchange.upstream_failure = reason
        if exchange.target.watched:
            exchange.target.failed(self, kind, self.sent_at)
        self._tries.hedge_failed(self, kind, exchange.reply_to(kind))

    def cancel(self) -> None:
        """It is no longer wanted."""
        self.done = True
        target = self._exchange.target
        if self.channel is not None:
            channel, self.channel = self.channel, None
            target.release(self, channel, reusable=False)
        elif self._waiting:
            self._waiting = False
            target.give_up(self)
        elif self._timer is not None:
            self._timer.cancel()
            self._timer = None
