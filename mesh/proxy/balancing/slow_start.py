"""Slow start: an endpoint that has just appeared gets a growing part of its weight (Envoy's formula)."""

from collections.abc import Callable, Iterable

from mesh.proxy.balancing.candidate import Candidate
from mesh.traffic.policy import SlowStart

AGE_MIN_S = 0.001  # Envoy's: an age of zero would have no weight at all when min_percent is 0

Weigh = Callable[[Candidate, float], float]  # (endpoint, now) -> its weight


def ramped(weigh: Weigh, policy: SlowStart) -> Weigh:
    """`weigh`, reduced for endpoints that are younger than the window."""
    window_s, exponent, least = policy.window_s, 1.0 / policy.aggression, policy.min_percent / 100.0

    def ramped_weight(endpoint: Candidate, now: float) -> float:
        age_s = now - endpoint.joined_at
        if age_s >= window_s:
            return weigh(endpoint, now)
        grown: float = (max(age_s, AGE_MIN_S) / window_s) ** exponent
        return weigh(endpoint, now) * max(least, grown)

    return ramped_weight


def ramps_until(endpoints: Iterable[Candidate], policy: SlowStart) -> float:
    """When the last of them has its whole weight."""
    return max((endpoint.joined_at for endpoint in endpoints), default=0.0) + policy.window_s
