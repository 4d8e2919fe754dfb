"""Which connection carries a request: reuse an idle one, open another, wait for one, or refuse. Pure bookkeeping."""

from collections import deque
from typing import Generic, Literal, TypeVar

IDLE_MAX = 256  # idle connections kept per endpoint
IDLE_TIMEOUT_S = 30.0  # towards other sidecars, which keep idle connections for an hour
# Towards applications, whose keep-alive is often 5 s (Node, uvicorn): a request that meets a server just closing an
# idle connection fails, unless it may be sent twice. Connecting anew on the same host costs next to nothing.
LOCAL_IDLE_TIMEOUT_S = 4.0
AGE_MAX_S = 3600.0  # a connection older than this is closed when it falls idle, so that traffic re-spreads
REQUESTS_PER_CONNECTION_MAX = 100_000

Admission = Literal["open", "wait", "overflow"]

C = TypeVar("C")
W = TypeVar("W")


class ConnectionPool(Generic[C, W]):
    """The connections to one endpoint (`C`), and who waits for one (`W`). The most recently used is reused first."""

    __slots__ = ("_connections_max", "_idle", "_pending_max", "_waiting", "opened")

    def __init__(self, *, connections_max: int, pending_max: int) -> None:
        self._connections_max = connections_max
        self._pending_max = pending_max
        self._idle: list[C] = []
        self._waiting: deque[W] = deque()
        self.opened = 0  # connecting, busy and idle ones

    def set_limits(self, *, connections_max: int, pending_max: int) -> None:
        """New limits; what is over them already stays."""
        self._connections_max = connections_max
        self._pending_max = pending_max

    @property
    def idle(self) -> tuple[C, ...]:
        """The idle connections, least recently used first."""
        return tuple(self._idle)

    @property
    def waiting(self) -> int:
        """How many requests wait for a connection."""
        return len(self._waiting)

    def take_idle(self) -> C | None:
        """An idle connection, now busy; None when there is none."""
        return self._idle.pop() if self._idle else None

    def admit(self) -> Admission:
        """What a request that found no idle connection does; `open` counts the connection as opened."""
        if self.opened < self._connections_max:
            self.opened += 1
            return "open"
        return "wait" if len(self._waiting) < self._pending_max else "overflow"

    def wait(self, waiter: W) -> None:
        """Queues a request that was told to wait."""
        self._waiting.append(waiter)

    def forget(self, waiter: W) -> None:
        """Removes a waiting request that has given up."""
        if waiter in self._waiting:
            self._waiting.remove(waiter)

    def next_waiting(self) -> W | None:
        """The request that has waited longest, no longer queued."""
        return self._waiting.popleft() if self._waiting else None

    def put_idle(self, connection: C, *, age_s: float, requests: int) -> bool:
        """Keeps a connection whose request is done. False: it is to be closed (old, worn, or too many idle)."""
        if age_s > AGE_MAX_S or requests >= REQUESTS_PER_CONNECTION_MAX or len(self._idle) >= IDLE_MAX:
            return False
        self._idle.append(connection)
        return True

    def remove(self, connection: C) -> None:
        """A connection has closed, whatever it was doing."""
        self.opened -= 1
        if connection in self._idle:
            self._idle.remove(connection)
