"""The connections to one endpoint: which are idle, who waits for one, and which are too worn to be kept."""

from collections import deque
from typing import Generic, TypeVar

from mesh.traffic.policy import PoolPolicy

IDLE_MAX = 256  # idle connections kept per endpoint
IDLE_TIMEOUT_S = 30.0  # towards other sidecars, which keep idle connections for an hour
# Towards applications, whose keep-alive is often 5 s (Node, uvicorn): a request that meets a server just closing an
# idle connection fails, unless it may be sent twice. Connecting anew on the same host costs next to nothing.
LOCAL_IDLE_TIMEOUT_S = 4.0
AGE_MAX_S = 3600.0  # where a policy says nothing: an older one is closed when it falls idle, so that traffic re-spreads
REQUESTS_PER_CONNECTION_MAX = 100_000  # likewise

C = TypeVar("C")
W = TypeVar("W")


class ConnectionPool(Generic[C, W]):
    """The connections to one endpoint (`C`), and who waits for one (`W`). The most recently used is reused first.

    Who may open or wait is the circuit breaker's to say.
    """

    __slots__ = ("_waiting", "idle", "opened")

    def __init__(self) -> None:
        self.idle: list[C] = []  # least recently used first
        self._waiting: deque[W] = deque()
        self.opened = 0  # connecting, busy and idle ones

    @property
    def idle_ones(self) -> tuple[C, ...]:
        """The idle connections as they are now, for closing them one by one."""
        return tuple(self.idle)

    @property
    def waiting(self) -> int:
        """How many requests wait for a connection."""
        return len(self._waiting)

    def take_idle(self) -> C | None:
        """An idle connection, now busy; None when there is none."""
        return self.idle.pop() if self.idle else None

    def wait(self, waiter: W) -> None:
        """Queues a request that may wait."""
        self._waiting.append(waiter)

    def forget(self, waiter: W) -> bool:
        """Removes a waiting request that has given up; whether it was waiting."""
        if waiter in self._waiting:
            self._waiting.remove(waiter)
            return True
        return False

    def next_waiting(self) -> W | None:
        """The request that has waited longest, no longer queued."""
        return self._waiting.popleft() if self._waiting else None

    def worn(self, age_s: float, requests: int, policy: PoolPolicy) -> bool:
        """Whether a connection has served long or often enough."""
        return age_s > (policy.age_max_s or AGE_MAX_S) or requests >= (
            policy.requests_max or REQUESTS_PER_CONNECTION_MAX
        )

    def put_idle(self, connection: C, age_s: float, requests: int, policy: PoolPolicy) -> bool:
        """Keeps a connection whose request is done. False: it is to be closed (old, worn, or too many idle)."""
        if len(self.idle) >= IDLE_MAX or self.worn(age_s, requests, policy):
            return False
        self.idle.append(connection)
        return True

    def remove(self, connection: C) -> None:
        """A connection has closed, whatever it was doing."""
        self.opened -= 1
        if connection in self.idle:
            self.idle.remove(connection)
