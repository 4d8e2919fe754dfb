"""Endpoint choice: power of two choices on active requests (Mitzenmacher 2001; Envoy's least-request balancer)."""

import bisect
import itertools
import random
from collections.abc import Sequence
from typing import Generic, Protocol, TypeVar


class Candidate(Protocol):
    """What the balancer looks at."""

    active: int

    @property
    def weight(self) -> int: ...


E = TypeVar("E", bound=Candidate)


class Balancer(Generic[E]):
    """Chooses among a fixed set; a new set is a new balancer, so that a choice never sees half of a change."""

    __slots__ = ("_cumulative", "_draw", "endpoints")

    def __init__(self, endpoints: Sequence[E], rng: random.Random) -> None:
        self.endpoints = tuple(endpoints)
        self._draw = rng.random
        weights = [endpoint.weight for endpoint in self.endpoints]
        self._cumulative = [] if len(set(weights)) < 2 else list(itertools.accumulate(weights))

    def _index(self) -> int:
        if self._cumulative:
            return bisect.bisect_right(self._cumulative, self._draw() * self._cumulative[-1])
        return int(self._draw() * len(self.endpoints))

    def choose(self, tried: Sequence[E] = ()) -> E | None:
        """An endpoint that is not among `tried`, or None when there is none left.

        Two are drawn (in proportion to their weights) and the one with fewer active requests per weight is taken.
        """
        if tried:
            return self._choose_untried(tried)
        count = len(self.endpoints)
        if count < 2:
            return self.endpoints[0] if count else None
        first = self.endpoints[self._index()]
        second = self.endpoints[self._index()]
        return second if second.active * first.weight < first.active * second.weight else first

    def _choose_untried(self, tried: Sequence[E]) -> E | None:
        rest = [endpoint for endpoint in self.endpoints if not any(endpoint is other for other in tried)]
        if not rest:
            return None
        fewest = min(endpoint.active / endpoint.weight for endpoint in rest)
        best = [endpoint for endpoint in rest if endpoint.active / endpoint.weight == fewest]
        return best[int(self._draw() * len(best))]
