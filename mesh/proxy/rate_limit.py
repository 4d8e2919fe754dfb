"""A local rate limit: a token bucket that is filled when it is looked at, without a timer.

Like Envoy's (measured on 1.40) it fills all the time: `tokens_per_fill` tokens in `fill_interval_s` come one after the
other, not at once when the interval is over.
"""

import random

from mesh.traffic.policy import RateLimit

_WHOLE = 1.0 - 1e-6  # a token that rounding has taken a little of


class TokenBucket:
    """Starts full. `refused` counts what found no token; `enforced` those of them that were turned away for it."""

    __slots__ = (
        "_enforced_percent", "_filled_at", "_per_second", "_rng", "_tokens", "_tokens_max", "enforced", "policy",
        "refused",
    )  # fmt: skip

    def __init__(self, policy: RateLimit, rng: random.Random, *, now: float) -> None:
        self.refused = 0
        self.enforced = 0
        self._rng = rng
        self._filled_at = now
        self._tokens = float(policy.tokens_max)
        self._use(policy)

    def _use(self, policy: RateLimit) -> None:
        self.policy = policy
        self._tokens_max = policy.tokens_max
        self._per_second = policy.tokens_per_fill / policy.fill_interval_s
        self._enforced_percent = policy.enforced_percent
        self._tokens = min(self._tokens, policy.tokens_max)

    def set_policy(self, policy: RateLimit, now: float) -> None:
        """From now on. Tokens that are there stay, as far as they fit."""
        self._fill(now)
        self._use(policy)

    def _fill(self, now: float) -> None:
        self._tokens = min(self._tokens + (now - self._filled_at) * self._per_second, self._tokens_max)
        self._filled_at = now

    def tokens(self, now: float) -> int:
        """How many whole ones are there."""
        self._fill(now)
        return int(self._tokens + 1.0 - _WHOLE)

    def take(self, now: float) -> bool:
        """Whether a request may go on. Without a token it still may, but for `enforced_percent` of the cases."""
        if now > self._filled_at:
            self._fill(now)
        if self._tokens >= _WHOLE:
            self._tokens -= 1.0
            return True
        self.refused += 1
        if 100.0 * self._rng.random() >= self._enforced_percent:
            return True
        self.enforced += 1
        return False
