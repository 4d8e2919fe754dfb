"""Who calls whom in the whole cluster, at the leader: agents' open calls, and one question at a time.

Nobody asks agents, as only servers listen. So each agent keeps one call open at the leader (`agent.edges`); when
somebody wants to know, these calls return, the agents ask their workers and call again with what they heard. Between
two questions nothing is sent or kept but the open calls, and the history stays with the workers that made it.
"""

from collections.abc import Callable, Iterable

import trio

from agent.rpc.calls import EdgesAsked, EdgesGathered, EdgesPollCall
from mesh.authz.observed import ObservedListener, merged
from mesh.errors import LimitExceeded, NotLeader

POLL_S = 60.0  # an agent's open call
GATHER_S = 3.0  # for all answers; who has not answered by then is named as missing
GATHERS_MAX = 8  # waiting for their turn
EXPECTED_CHECK_S = 0.1


class EdgeBoard:
    """The leader's side: open calls of the agents, and one question at a time."""

    def __init__(self) -> None:
        self._question = 0  # number of the last one; 0 in an agent's call: it answers nothing
        self._since_s = 0.0
        self._open = False
        self._asked = trio.Event()
        self._answered = trio.Event()
        self._answers: dict[str, tuple[ObservedListener, ...]] = {}
        self._gathering = trio.Lock()
        self._gathers = 0
        self._deposed = trio.Event()

    def abandon(self) -> None:
        """This server no longer leads: open calls go elsewhere."""
        self._deposed.set()
        self._deposed = trio.Event()
        self._asked.set()
        self._asked = trio.Event()

    async def poll(self, call: EdgesPollCall) -> EdgesAsked:
        """The next question for that agent, or one numbered 0 after a while without one. Raises NotLeader."""
        if self._open and call.answers == self._question:
            self._answers[call.node] = call.listeners
            self._answered.set()
        deposed = self._deposed
        with trio.move_on_after(POLL_S):
            while True:
                if deposed.is_set():
                    raise NotLeader(None)
                if self._open and call.node not in self._answers:
                    return EdgesAsked(self._question, self._since_s)
                await self._asked.wait()
        return EdgesAsked(0, 0.0)

    async def gather(self, since_s: float, expected: Callable[[], Iterable[str]]) -> EdgesGathered:
        """What the agents saw in the last `since_s` seconds, and which of those expected did not answer in time.

        Raises LimitExceeded when too many ask at once.
        """
        if self._gathers >= GATHERS_MAX:
            raise LimitExceeded("too many questions about traffic at once; ask again in a moment")
        self._gathers += 1
        try:
            async with self._gathering:
                return await self._gather(since_s, expected)
        finally:
            self._gathers -= 1

    async def _gather(self, since_s: float, expected: Callable[[], Iterable[str]]) -> EdgesGathered:
        self._question += 1
        self._since_s, self._answers, self._open = since_s, {}, True
        self._asked.set()
        self._asked = trio.Event()
        try:
            with trio.move_on_after(GATHER_S):
                while not set(expected()) <= self._answers.keys():
                    self._answered = trio.Event()
                    with trio.move_on_after(EXPECTED_CHECK_S):  # who has failed meanwhile is no longer waited for
                        await self._answered.wait()
            missing = tuple(sorted(set(expected()) - self._answers.keys()))
            listeners = merged([one for _, seen in sorted(self._answers.items()) for one in seen])
            return EdgesGathered(listeners, tuple(sorted(self._answers)), missing)
        finally:
            self._open, self._answers = False, {}
