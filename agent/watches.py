"""Waiting for changes of the state: the async side of `mesh.state.watch`.

A change that thousands wait for must not stop the agent's loop for the time it takes to answer them all, nor send all
answers in one burst: beyond a first batch, sleepers are woken a batch at a time.
"""

from collections import deque
from collections.abc import Callable, Iterable

import trio

from mesh.model.command import CommandResult
from mesh.state.fsm import Fsm
from mesh.state.watch import EVERYTHING, WatchKey, WatchRegistry

WAKE_BATCH = 128
WAKE_INTERVAL_S = 0.01


class Watches:
    """Tasks that wait for watch keys. `run` paces the wake-ups."""

    def __init__(self, registry: WatchRegistry) -> None:
        self._registry = registry
        self._budget = WAKE_BATCH
        self._deferred: deque[trio.Event] = deque()
        self._spent = trio.Event()

    def __len__(self) -> int:
        """How many tasks wait."""
        return len(self._registry)

    async def run(self, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Wakes deferred sleepers until cancelled."""
        task_status.started()
        while True:
            await self._spent.wait()
            self._spent = trio.Event()
            await trio.sleep(WAKE_INTERVAL_S)
            self._budget = WAKE_BATCH
            while self._deferred and self._budget:
                self._budget -= 1
                self._deferred.popleft().set()
            if self._deferred:
                self._spent.set()

    async def wait(self, keys: Iterable[WatchKey], *, until: float) -> bool:
        """Waits for a change of any of the keys; False when `until` came first. Spurious wake-ups happen.

        The caller must not have awaited anything between reading what it compares and calling this. Raises
        LimitExceeded when too many wait already.
        """
        event = trio.Event()
        woken = False

        def wake() -> None:
            nonlocal woken
            if woken:
                return
            woken = True
            if self._budget > 0:
                self._budget -= 1
                event.set()
            else:
                self._deferred.append(event)
            self._spent.set()

        with self._registry.register(keys, wake), trio.move_on_at(until):
            await event.wait()
            return True
        return False

    def wake_everyone(self) -> None:
        """Has every waiting task look again: leadership changed, so may have who may answer it."""
        self._registry.notify((EVERYTHING,))


class WatchedState:
    """The state machine that Raft applies to: `Fsm`, with everyone told who waits for what changed."""

    def __init__(self, fsm: Fsm, registry: WatchRegistry) -> None:
        self._fsm = fsm
        self._registry = registry

    def apply(self, index: int, data: bytes) -> CommandResult:
        """See Fsm."""
        result = self._fsm.apply(index, data)
        self._registry.notify(self._fsm.take_changes())
        return result

    def snapshot(self) -> Callable[[], Iterable[bytes]]:
        """See Fsm."""
        return self._fsm.snapshot()

    def restore(self, index: int, chunks: Iterable[bytes]) -> None:
        """See Fsm."""
        self._fsm.restore(index, chunks)
        self._registry.notify(self._fsm.take_changes())
