"""The inner poller: one Trio task owns an epoll set and drives ready connections as callbacks, in batches.

Trio runs everything else of the worker (control socket, signals, telemetry) between batches. A task per connection
costs three times as much per request (measured, see benchmarks/two_hops.py), which is why this exists at all.

A callback never blocks and never awaits. One that raises closes its own connection and nothing else.
"""

import heapq
import logging
import select
import socket
from collections import deque
from collections.abc import Callable
from typing import Protocol

import trio

from agent.repeats import RepeatedLog

_LOG = logging.getLogger("mesh.dataplane")

TURNS_S = 0.005  # of batches in a row; then Trio's own tasks run, whatever the traffic
CANCELLED_TIMERS_MAX = 1024  # in the heap, beyond as many live ones
FAULTS_LOGGED_MAX = 20  # tracebacks per worker life: a repeating fault must not fill the disk

READABLE = select.EPOLLIN
WRITABLE = select.EPOLLOUT
HANG_UP = select.EPOLLHUP | select.EPOLLERR


class Handler(Protocol):
    """What a registered descriptor belongs to."""

    def ready(self, mask: int) -> None:
        """The descriptor is ready; the mask may be stale, so every operation must be non-blocking."""

    def fault(self, error: Exception) -> None:
        """`ready` raised; close, and do not raise again."""


class Timer:
    """One pending call; `cancel` forgets it."""

    __slots__ = ("_reactor", "callback", "deadline")

    def __init__(self, reactor: "Reactor", deadline: float, callback: Callable[[], None]) -> None:
        self._reactor = reactor
        self.deadline = deadline
        self.callback: Callable[[], None] | None = callback

    def cancel(self) -> None:
        """The callback will not run, and what it refers to is let go at once. Calling it again does nothing."""
        if self.callback is not None:
            self.callback = None
            self._reactor.timer_cancelled()

    def __lt__(self, other: "Timer") -> bool:
        return self.deadline < other.deadline


class Reactor:
    """Descriptors, timers and deferred calls of one worker. `now` is refreshed once per batch (Trio's clock)."""

    def __init__(self) -> None:
        self._poller = select.epoll()
        self._handlers: dict[int, Handler] = {}
        self._timers: list[Timer] = []
        self._cancelled = 0
        self._soon: deque[Callable[[], None]] = deque()
        self._closing: list[socket.socket] = []
        self._in_turn = False
        self._sleep: trio.CancelScope | None = None
        self._clock = trio.lowlevel.current_clock().current_time
        self.now = self._clock()
        self.faults = 0
        self._numbered = 0
        self.repeats = RepeatedLog(_LOG)  # what peers can cause

    def next_number(self) -> int:
        """For connections, so that log lines can tell them apart."""
        self._numbered += 1
        return self._numbered

    def time(self) -> float:
        """Seconds on the reactor's clock, this instant."""
        return self._clock()

    def refresh(self) -> None:
        """Reads the clock: before work that does not come from a turn."""
        self.now = self._clock()

    def register(self, descriptor: int, handler: Handler, mask: int) -> None:
        """Starts watching a descriptor."""
        self._handlers[descriptor] = handler
        self._poller.register(descriptor, mask)

    def modify(self, descriptor: int, mask: int) -> None:
        """Watches for something else; hang-ups are always reported."""
        self._poller.modify(descriptor, mask)

    def suspend(self, descriptor: int) -> None:
        """Stops all reports, hang-ups too, until `resume`."""
        self._poller.unregister(descriptor)

    def resume(self, descriptor: int, mask: int) -> None:
        """Undoes `suspend`."""
        self._poller.register(descriptor, mask)

    def close(self, descriptor: int, sock: socket.socket, *, suspended: bool = False) -> None:
        """Stops watching, and closes the socket once the current batch is done: a number freed and taken again within a
        batch would get the old socket's pending event.
        """
        if self._handlers.pop(descriptor, None) is not None and not suspended:
            self._poller.unregister(descriptor)
        if self._in_turn:
            self._closing.append(sock)
        else:
            sock.close()

    def call_at(self, deadline: float, callback: Callable[[], None]) -> Timer:
        """Runs a callback at or after a time on this reactor's clock."""
        timer = Timer(self, deadline, callback)
        heapq.heappush(self._timers, timer)
        if not self._in_turn:
            self._wake()
        return timer

    def timer_cancelled(self) -> None:
        """A timer has become a husk; too many of them are swept out of the heap."""
        self._cancelled += 1
        if self._cancelled > CANCELLED_TIMERS_MAX and self._cancelled * 2 > len(self._timers):
            # In place: a turn may be looking at this list.
            self._timers[:] = [timer for timer in self._timers if timer.callback is not None]
            heapq.heapify(self._timers)
            self._cancelled = 0

    def call_soon(self, callback: Callable[[], None]) -> None:
        """Runs a callback after the current one has returned: for results that may not arrive re-entrantly."""
        self._soon.append(callback)
        if not self._in_turn:
            self._wake()

    def _wake(self) -> None:
        """A Trio task has changed something while the poller sleeps."""
        if self._sleep is not None:
            self._sleep.cancel()

    def guard(self, callback: Callable[[], None], on_fault: Callable[[Exception], None] | None = None) -> None:
        """Runs a callback; what it raises is counted, logged, and goes no further."""
        try:
            callback()
        except Exception as error:
            self._report(error)
            if on_fault is not None:
                on_fault(error)

    def _report(self, error: Exception) -> None:
        self.faults += 1
        if self.faults <= FAULTS_LOGGED_MAX:
            _LOG.error("a connection's handler failed; the connection was closed", exc_info=error)

    def _dispatch(self, ready: list[tuple[int, int]]) -> None:
        handlers = self._handlers
        for descriptor, mask in ready:
            handler = handlers.get(descriptor)
            if handler is None:
                continue
            try:
                handler.ready(mask)
            except Exception as error:
                self._report(error)
                self.guard(lambda handler=handler, error=error: handler.fault(error))  # type: ignore[misc]

    def _run_due(self) -> None:
        soon = self._soon
        for _ in range(len(soon)):  # what these add runs in the next batch
            self.guard(soon.popleft())
        timers = self._timers
        while timers and timers[0].deadline <= self.now:
            timer = heapq.heappop(timers)
            callback = timer.callback
            if callback is None:
                self._cancelled -= 1
            else:
                timer.callback = None  # it has run: cancelling it later means nothing
                self.guard(callback)
        if self._closing:
            for sock in self._closing:
                sock.close()
            self._closing.clear()

    def turn(self) -> bool:
        """One batch: ready descriptors, deferred calls, due timers. False when no descriptor was ready."""
        ready = self._poller.poll(0)
        self.now = self._clock()
        self._in_turn = True
        if ready:
            self._dispatch(ready)
        self._run_due()
        self._in_turn = False
        return bool(ready) or bool(self._soon)

    async def run(self) -> None:
        """Drives everything until cancelled."""
        descriptor = self._poller.fileno()
        while True:
            deadline = self._timers[0].deadline if self._timers else float("inf")
            if self._soon:
                await trio.lowlevel.checkpoint()
            else:
                with trio.CancelScope(deadline=deadline) as self._sleep:
                    await trio.lowlevel.wait_readable(descriptor)
                self._sleep = None
            until = self._clock() + TURNS_S
            while self.turn() and self.now < until:
                pass

    def dispose(self) -> None:
        """Closes the poller; the owner has closed the connections."""
        for sock in self._closing:
            sock.close()
        self._closing.clear()
        self._poller.close()
