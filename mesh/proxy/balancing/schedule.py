"""Weighted turns: earliest deadline first, as Envoy's round robin and weighted least request."""

import random
from collections.abc import Sequence
from heapq import heapify, heapreplace
from typing import Generic

from mesh.proxy.balancing.candidate import Candidate, E
from mesh.proxy.balancing.slow_start import Weigh


class Turns(Generic[E]):
    """Round robin with equal weights. The first turn is drawn: workers that start together do not move in step."""

    __slots__ = ("_endpoints", "_next")

    def __init__(self, endpoints: Sequence[E], rng: random.Random) -> None:
        self._endpoints = endpoints
        self._next = int(rng.random() * len(endpoints))

    def pick(self, _now: float, _request_hash: int | None = None) -> E:
        """The next one."""
        at = self._next
        endpoint = self._endpoints[at]
        at += 1
        self._next = at if at < len(self._endpoints) else 0
        return endpoint


class Schedule(Generic[E]):
    """Each endpoint has a deadline; the earliest is picked and its next one is 1/weight later, by its weight now.

    First deadlines are drawn, as if the schedule had been running for a while.
    """

    __slots__ = ("_heap", "_weigh")

    def __init__(self, endpoints: Sequence[E], weigh: Weigh, rng: random.Random, now: float) -> None:
        self._weigh = weigh
        self._heap = [
            (rng.random() / weigh(endpoint, now), order, endpoint) for order, endpoint in enumerate(endpoints)
        ]
        heapify(self._heap)

    def pick(self, now: float, _request_hash: int | None = None) -> E:
        """The one whose turn it is."""
        deadline, order, endpoint = self._heap[0]
        heapreplace(self._heap, (deadline + 1.0 / self._weigh(endpoint, now), order, endpoint))
        return endpoint


def by_weight(endpoint: Candidate, _now: float) -> float:
    """Round robin's: the weight as configured."""
    return endpoint.weight


def by_load(bias: float) -> Weigh:
    """Least request's: weight / (active + 1) ** bias."""
    if bias == 0.0:
        return by_weight
    if bias == 1.0:
        return lambda endpoint, _now: endpoint.weight / (endpoint.active + 1)
    return lambda endpoint, _now: endpoint.weight / (endpoint.active + 1) ** bias
