"""How long each connection may take for what it is doing, at the price of an assignment.

A request passes through several waits, each with its own bound. A cancel scope around each was a third of a write's
cost (measured); here a connection has one scope for its life and says until when its present wait may last, and one
task, asleep until the soonest of those times, cancels what is overdue.
"""

import math
from collections.abc import Iterator
from contextlib import contextmanager

import trio

_PAUSE_S = 0.05  # between two looks at all connections, however many of them are hasty


class Deadline:
    """Of one connection. `scope` is cancelled once `at` has passed."""

    __slots__ = ("_owner", "at", "is_overdue", "scope")

    def __init__(self, owner: "Deadlines", scope: trio.CancelScope) -> None:
        self._owner = owner
        self.scope = scope
        self.at = math.inf
        self.is_overdue = False

    def set(self, at: float) -> None:
        """Until when the wait that begins now may last, in Trio's time."""
        self.at = at
        if at < self._owner.next_look:
            self._owner.look_sooner()


class Deadlines:
    """The deadlines of one server's connections; `run` is what enforces them."""

    def __init__(self) -> None:
        self._watched: set[Deadline] = set()
        self._sooner = trio.Event()
        self.next_look = math.inf

    def look_sooner(self) -> None:
        """A deadline was set that comes before the next look."""
        self.next_look = -math.inf  # once is enough
        self._sooner.set()

    @contextmanager
    def watch(self) -> Iterator[Deadline]:
        """A scope that is cancelled when the deadline that it is given has passed."""
        with trio.CancelScope() as scope:
            deadline = Deadline(self, scope)
            self._watched.add(deadline)
            try:
                yield deadline
            finally:
                self._watched.discard(deadline)

    async def run(self) -> None:
        """Until cancelled."""
        while True:
            now = trio.current_time()
            self._sooner = trio.Event()
            soonest = math.inf
            for deadline in self._watched:
                if deadline.at <= now:
                    deadline.is_overdue = True
                    deadline.scope.cancel()
                else:
                    soonest = min(soonest, deadline.at)
            self.next_look = soonest
            with trio.move_on_at(soonest):
                await self._sooner.wait()
                await trio.sleep(_PAUSE_S)
