"""A local rate limit: a token bucket that is filled when it is looked at, without a timer."""

import random

from mesh.traffic.policy import RateLimit


class TokenBucket:
    """Starts full. `refused` counts what found no token; `enforced` those of them that were turned away for it."""

    __slots__ = (
        "_enforced_percent", "_fill_s", "_filled_at", "_per_fill", "_rng", "_tokens", "_tokens_max", "enforced",
        "policy", "refused",
    )  # fmt: skip

    def __init__(self, policy: RateLimit, rng: random.Random, *, now: float) -> None:
        self.policy = policy
        self.refused = 0
        self.enforced = 0
        self._rng = rng
        self._tokens_max = policy.tokens_max
        self._per_fill = policy.tokens_per_fill
        self._fill_s = policy.fill_interval_s
        self._enforced_percent = policy.enforced_percent
        self._tokens = policy.tokens_max
        self._filled_at = now

    def set_policy(self, policy: RateLimit, now: float) -> None:
        """From now on. Tokens that are there stay, as far as they fit."""
        self._fill(now)
        self.policy = policy
        self._tokens_max = policy.tokens_max
        self._per_fill = policy.tokens_per_fill
        self._fill_s = policy.fill_interval_s
        self._enforced_percent = policy.enforced_percent
        self._tokens = min(self._tokens, policy.tokens_max)

    def _fill(self, now: float) -> None:
        fills = int((now - self._filled_at) / self._fill_s)
        if fills > 0:
            self._tokens = min(self._tokens + fills * self._per_fill, self._tokens_max)
            self._filled_at += fills * self._fill_s

    def tokens(self, now: float) -> int:
        """How many are there."""
        self._fill(now)
        return self._tokens

    def take(self, now: float) -> bool:
        """Whether a request may go on. Without a token it still may, but for `enforced_percent` of the cases."""
        if now - self._filled_at >= self._fill_s:
            self._fill(now)
        if self._tokens:
            self._tokens -= 1
            return True
        self.refused += 1
        if 100.0 * self._rng.random() >= self._enforced_percent:
            return True
        self.enforced += 1
        return False
