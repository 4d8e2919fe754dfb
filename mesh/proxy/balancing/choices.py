"""Choices that draw: random, and the better of a few (Mitzenmacher 2001) by active requests or by peak EWMA."""

import itertools
import random
from bisect import bisect_right
from collections.abc import Sequence
from typing import Generic

from mesh.proxy.balancing.candidate import E


class Draw(Generic[E]):
    """Random, in proportion to weight."""

    __slots__ = ("_cumulative", "_draw", "_endpoints")

    def __init__(self, endpoints: Sequence[E], rng: random.Random) -> None:
        self._endpoints = endpoints
        self._draw = rng.random
        self._cumulative = list(itertools.accumulate(endpoint.weight for endpoint in endpoints))

    def pick(self, _now: float, _request_hash: int | None = None) -> E:
        """Any of them."""
        return self._endpoints[bisect_right(self._cumulative, self._draw() * self._cumulative[-1])]


class LessLoaded(Generic[E]):
    """Two different ones are drawn, the one with fewer active requests is taken: what most targets run on.

    Envoy draws with repetition, which of two endpoints gives the busier one a quarter of the requests; this does not.
    """

    __slots__ = ("_count", "_draw", "_endpoints")

    def __init__(self, endpoints: Sequence[E], rng: random.Random) -> None:
        self._endpoints = endpoints
        self._count = len(endpoints)  # at least 2
        self._draw = rng.random

    def pick(self, _now: float, _request_hash: int | None = None) -> E:
        """The less busy of two; of equals the first drawn."""
        draw, count = self._draw, self._count
        at = int(draw() * count)
        first = self._endpoints[at]
        second = self._endpoints[at - 1 - int(draw() * (count - 1))]
        return second if second.active < first.active else first


class LeastLoaded(Generic[E]):
    """The least busy of `choice_count` drawn, or of all when there are no more than that."""

    __slots__ = ("_choice_count", "_draw", "_endpoints")

    def __init__(self, endpoints: Sequence[E], choice_count: int, rng: random.Random) -> None:
        self._endpoints = endpoints
        self._choice_count = choice_count
        self._draw = rng.random

    def pick(self, _now: float, _request_hash: int | None = None) -> E:
        """The least busy; of equals the first drawn."""
        endpoints, draw = self._endpoints, self._draw
        count = len(endpoints)
        at = int(draw() * count)
        best = endpoints[at]
        everyone = count <= self._choice_count
        for step in range(1, min(count, self._choice_count)):
            other = endpoints[at - step if everyone else int(draw() * count)]
            if other.active < best.active:
                best = other
        return best


class Quicker(Generic[E]):
    """Two different ones are drawn, the one with the lower rtt * (in flight + 1) / weight is taken."""

    __slots__ = ("_count", "_draw", "_endpoints", "_initial_s")

    def __init__(self, endpoints: Sequence[E], initial_s: float, rng: random.Random) -> None:
        self._endpoints = endpoints
        self._count = len(endpoints)  # at least 2
        self._initial_s = initial_s
        self._draw = rng.random

    def _cost(self, endpoint: E, now: float) -> float:
        ewma = endpoint.ewma
        rtt_s = self._initial_s if ewma is None else ewma.read(now)
        return rtt_s * (endpoint.active + 1) / endpoint.weight

    def pick(self, now: float, _request_hash: int | None = None) -> E:
        """The one that is expected to answer sooner; of equals the first drawn."""
        at = int(self._draw() * self._count)
        first = self._endpoints[at]
        second = self._endpoints[at - 1 - int(self._draw() * (self._count - 1))]
        return second if self._cost(second, now) < self._cost(first, now) else first
