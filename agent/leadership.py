"""Who leads, as this server's Raft driver last said, for everyone who has to know or wait."""

from collections.abc import Callable

import trio

from mesh.raft.node import LeadershipChanged


class Leadership:
    """The last `LeadershipChanged`; give its `update` to the Raft driver."""

    def __init__(self) -> None:
        self._current = LeadershipChanged(is_leader=False, leader_id=None, term=0)
        self._changed = trio.Event()
        self._subscribers: list[Callable[[], None]] = []

    @property
    def is_leader(self) -> bool:
        """Whether this server leads."""
        return self._current.is_leader

    @property
    def leader_id(self) -> str | None:
        """The leader's node ID, None during an election."""
        return self._current.leader_id

    @property
    def term(self) -> int:
        """The term of what the other two say."""
        return self._current.term

    def subscribe(self, callback: Callable[[], None]) -> None:
        """Has the callback called after every change."""
        self._subscribers.append(callback)

    def update(self, change: LeadershipChanged) -> None:
        """The driver's callback."""
        self._current = change
        self._changed.set()
        self._changed = trio.Event()
        for callback in self._subscribers:
            callback()

    async def changed(self) -> None:
        """Waits for the next change."""
        await self._changed.wait()
