"""The accounts of mirrored requests: apart from those of the requests that they are copies of."""

import bisect
import random
import time

from agent.dataplane.metrics import LATENCY_BOUNDS_MS
from agent.dataplane.reactor import Reactor
from agent.dataplane.target import Target
from mesh.proxy.exchange import Exchange
from mesh.proxy.mirror import IN_FLIGHT_MAX, start_mirror


class Mirrors:
    """Starts copies of one listener's requests and forgets them when they are over."""

    def __init__(self, reactor: Reactor, rng: random.Random) -> None:
        self.reactor = reactor
        self.rng = rng
        self.in_flight = 0
        self.refused = 0  # for want of room

    def start(self, original: Exchange, target: Target, body: bytes, *, ended: bool) -> None:
        """A copy for a target, if there is room for one more."""
        if self.in_flight >= IN_FLIGHT_MAX:
            self.refused += 1
            return
        self.in_flight += 1
        timeout_s = original.request_timeout_s
        copy = start_mirror(original, self, target, body, ended=ended, timeout_s=timeout_s)
        if not copy.done:
            original.mirrors += (copy,)

    def unix_time(self) -> float:
        """Exchange callback."""
        return time.time()

    def finished(self, copy: Exchange) -> None:
        """Exchange callback: only the target's own figures know of it."""
        self.in_flight -= 1
        target = copy.target
        if copy.attempts and isinstance(target, Target):
            latency_ms = (self.reactor.time() - copy.started_at) * 1000.0
            target.metrics.classes[copy.status // 100] += 1
            target.metrics.latency.observe(latency_ms, bisect.bisect_left(LATENCY_BOUNDS_MS, latency_ms))
