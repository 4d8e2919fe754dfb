"""Live looks at the requests of one worker. While nobody looks, a request is not even compared with anything.

A tap is a bounded queue that its owner empties now and then; one that is no longer emptied ends by itself, so that an
agent that dies leaves nothing behind.
"""

import time
from collections import deque
from collections.abc import Callable, Iterable
from typing import Protocol

from mesh.errors import LimitExceeded
from mesh.proxy.access_log.record import LoggedExchange
from mesh.proxy.tap import Direction, TapFilter, TapRecord, compile_filter, record_of

TAPS_MAX = 8  # per worker: each costs every request that it could show
QUEUED_MAX = 4096  # records of a tap; further ones are dropped and counted
TAKEN_MAX = 1024  # records in one answer
LEASE_S = 10.0  # without being asked; its owner asks several times a second

Watcher = Callable[[LoggedExchange, float], None]
Clock = Callable[[], float]


class Tapped(Protocol):
    """The part of an HTTP service that is needed here. `tap` None: nobody looks."""

    inbound: bool
    tap: Watcher | None

    @property
    def service_name(self) -> str:
        """The sidecar's service."""


class _Tap:
    def __init__(self, wanted: TapFilter) -> None:
        self.wanted = wanted
        self.matches = compile_filter(wanted)
        self.queue: deque[TapRecord] = deque()
        self.dropped = 0
        self.expires_at = 0.0

    def fits(self, service: str, direction: Direction) -> bool:
        wanted = self.wanted
        return wanted.service in ("", service) and wanted.direction in (None, direction)


class Taps:
    """The taps of one worker. Times are the reactor's."""

    def __init__(self, clock: Clock, services: Callable[[], Iterable[Tapped]]) -> None:
        """`services`: those that serve now, and those that finish what they have."""
        self._clock = clock
        self._services = services
        self._taps: dict[str, _Tap] = {}

    def take(self, key: str, wanted: TapFilter) -> tuple[tuple[TapRecord, ...], int]:
        """What a tap has seen since the last time, and how many more it had no room for, in all. The first call begins
        it. Raises ConfigError for a filter that makes no sense, LimitExceeded for one too many.
        """
        self.expire()
        tap = self._taps.get(key)
        if tap is None:
            if len(self._taps) >= TAPS_MAX:
                raise LimitExceeded(f"{TAPS_MAX} taps are active, which is the most; end another one first")
            tap = self._taps[key] = _Tap(wanted)
            self.attach()
        tap.expires_at = self._clock() + LEASE_S
        queue = tap.queue
        return tuple([queue.popleft() for _ in range(min(len(queue), TAKEN_MAX))]), tap.dropped

    def end(self, key: str) -> None:
        """Ends a tap, if it is there."""
        if self._taps.pop(key, None) is not None:
            self.attach()

    def expire(self) -> None:
        """Ends those that nobody has asked for."""
        now = self._clock()
        over = [key for key, tap in self._taps.items() if tap.expires_at < now]
        for key in over:
            del self._taps[key]
        if over:
            self.attach()

    def attach(self) -> None:
        """Has each service show its requests to the taps that may want them, and to no others: after a change of
        either.
        """
        for service in self._services():
            direction: Direction = "inbound" if service.inbound else "outbound"
            taps = [tap for tap in self._taps.values() if tap.fits(service.service_name, direction)]
            service.tap = self._watcher(taps, service.service_name, direction) if taps else None

    def _watcher(self, taps: list[_Tap], service: str, direction: Direction) -> Watcher:
        def watch(exchange: LoggedExchange, ended_at: float) -> None:
            for tap in taps:
                if not tap.matches(exchange):
                    continue
                if len(tap.queue) >= QUEUED_MAX:
                    tap.dropped += 1
                    continue
                offset_s = time.time() - ended_at  # it has only just ended
                tap.queue.append(
                    record_of(
                        exchange, ended_at, offset_s, service=service, direction=direction, headers=tap.wanted.headers
                    )
                )

        return watch
