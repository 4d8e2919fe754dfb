"""Deadlines of a core, as one heap: what is due, and when the next thing is."""

import heapq
import math
from collections.abc import Callable


class Timer:
    """One scheduled action; `cancel` makes it never run."""

    __slots__ = ("action", "cancelled", "deadline")

    def __init__(self, deadline: float, action: Callable[[float], None]) -> None:
        self.deadline = deadline
        self.action = action
        self.cancelled = False

    def cancel(self) -> None:
        self.cancelled = True


class Timers:
    """A heap of timers; equal deadlines run in the order in which they were scheduled."""

    def __init__(self) -> None:
        self._heap: list[tuple[float, int, Timer]] = []
        self._count = 0

    def schedule(self, deadline: float, action: Callable[[float], None]) -> Timer:
        """Runs `action(now)` at the first `run_due` at or after `deadline`."""
        timer = Timer(deadline, action)
        self._count += 1
        heapq.heappush(self._heap, (deadline, self._count, timer))
        return timer

    def next_deadline(self) -> float:
        """The earliest deadline; infinity when nothing is scheduled."""
        while self._heap and self._heap[0][2].cancelled:
            heapq.heappop(self._heap)
        return self._heap[0][0] if self._heap else math.inf

    def run_due(self, now: float) -> None:
        """Runs what is due at `now`. What an action schedules for `now` itself waits for the next call."""
        due: list[Timer] = []
        while self._heap and self._heap[0][0] <= now:
            due.append(heapq.heappop(self._heap)[2])
        for timer in due:
            if not timer.cancelled:
                timer.action(now)
