"""How many retries a target bears, so that they do not turn an overload into an outage.

One budget per target. A retry is under way from the moment it is admitted (its pause counts) until its response has
begun or its try has failed. All budgets have the same calls; those that need not count let them do nothing.
"""

from typing import Protocol

from mesh.traffic.policy import RetryBudget

SLOTS = 10  # of a token budget's time to live (tower)
TTL_MIN_S = 1.0
TTL_MAX_S = 60.0


class Budget(Protocol):
    """`active`, `pending` and `retrying` are the target's requests that have an endpoint, wait for one, and retry."""

    def request_began(self, now: float) -> None:
        """An original request: not called for retries."""

    def request_ended(self, now: float) -> None:
        """It is over, answered or not."""

    def may_retry(self, now: float, active: int, pending: int, retrying: int) -> bool:
        """Whether one more retry is admitted now; a budget of tokens has paid for it then."""

    def retry_ended(self, now: float) -> None:
        """A retry that was admitted is over."""


class FixedBudget:
    """The circuit breaker's: so many at a time, whatever the load (Envoy's `max_retries`)."""

    __slots__ = ("retries_max",)

    def __init__(self, retries_max: int) -> None:
        self.retries_max = retries_max

    def request_began(self, now: float) -> None:
        """Not counted."""

    def request_ended(self, now: float) -> None:
        """Not counted."""

    def may_retry(self, now: float, active: int, pending: int, retrying: int) -> bool:
        """Whether fewer than the maximum are under way."""
        return retrying < self.retries_max

    def retry_ended(self, now: float) -> None:
        """Not counted."""


class ConcurrencyBudget:
    """A share of the requests at hand, never less than a minimum (Envoy's `retry_budget`)."""

    __slots__ = ("_min_concurrency", "_share")

    def __init__(self, percent: float, min_concurrency: int) -> None:
        self._share = percent / 100.0
        self._min_concurrency = min_concurrency

    def request_began(self, now: float) -> None:
        """Not counted."""

    def request_ended(self, now: float) -> None:
        """Not counted."""

    def retries_max(self, active: int, pending: int) -> int:
        """How many retries may be under way with so many requests: a fraction of one is none."""
        return max(int(self._share * (active + pending)), self._min_concurrency)

    def may_retry(self, now: float, active: int, pending: int, retrying: int) -> bool:
        """Whether fewer than the maximum are under way."""
        return retrying < self.retries_max(active, pending)

    def retry_ended(self, now: float) -> None:
        """Not counted."""


class TokenBudget:
    """Requests deposit, retries withdraw, deposits expire after a time (tower's, Linkerd's and Finagle's budget).

    The time to live is cut in SLOTS. What is deposited and withdrawn goes to the running slot, which closes when its
    time is over and the budget is next used; the oldest closed one is overwritten then. `ratio` retries are paid for by
    each request; `min_retries_per_s` can be made without any.
    """

    __slots__ = ("_closed", "_deposit", "_index", "_reserve", "_running", "_slot_began_at", "_slot_s", "_withdrawal")

    def __init__(self, ratio: float, min_retries_per_s: float, ttl_s: float, *, now: float) -> None:
        if not TTL_MIN_S <= ttl_s <= TTL_MAX_S:
            raise ValueError(f"ttl_s {ttl_s} is outside {TTL_MIN_S} to {TTL_MAX_S}")
        # Whole tokens: 1 or 1000 are deposited, so that the withdrawal is not rounded to nothing.
        if ratio <= 0.0:
            self._deposit, self._withdrawal = 0, 1
        elif ratio <= 1.0:
            self._deposit, self._withdrawal = 1, int(1.0 / ratio)
        else:
            self._deposit, self._withdrawal = 1000, int(1000.0 / ratio)
        self._reserve = int(min_retries_per_s * int(ttl_s) * self._withdrawal)
        self._slot_s = ttl_s / SLOTS
        self._closed = [0] * SLOTS
        self._index = 0  # of the closed slot that the running one will replace
        self._running = 0
        self._slot_began_at = now

    def _expire(self, now: float) -> None:
        elapsed = now - self._slot_began_at
        if elapsed < self._slot_s:
            return
        closed, index = self._closed, self._index
        closed[index] = self._running
        self._running = 0
        index = (index + 1) % SLOTS
        # Slots that passed unused hold nothing; after SLOTS of them all is forgotten.
        skipped = 0
        while elapsed > self._slot_s and skipped <= SLOTS:
            closed[index] = 0
            index = (index + 1) % SLOTS
            elapsed -= self._slot_s
            skipped += 1
        self._index = index
        self._slot_began_at = now

    def balance(self, now: float) -> int:
        """Tokens at hand, the reserve included; a retry costs 1/ratio of a request's deposit."""
        self._expire(now)
        return self._running + sum(self._closed) + self._reserve

    def request_began(self, now: float) -> None:
        """Deposits."""
        if now - self._slot_began_at >= self._slot_s:
            self._expire(now)
        self._running += self._deposit

    def request_ended(self, now: float) -> None:
        """Not counted."""

    def may_retry(self, now: float, active: int, pending: int, retrying: int) -> bool:
        """Withdraws, if there is enough."""
        if self.balance(now) < self._withdrawal:
            return False
        self._running -= self._withdrawal
        return True

    def retry_ended(self, now: float) -> None:
        """Not counted."""


def make_budget(policy: RetryBudget | None, retries_max: int, *, now: float) -> Budget:
    """The budget of a target: with a policy it takes the place of the circuit breaker's `retries_max`."""
    if policy is None:
        return FixedBudget(retries_max)
    if policy.kind == "concurrency":
        return ConcurrencyBudget(policy.percent, policy.min_concurrency)
    return TokenBudget(policy.ratio, policy.min_retries_per_s, policy.ttl_s, now=now)
