"""A Backend beside the real state: one process, no Raft, the real FSM, queries and watches."""

import trio

from agent.watches import Watches
from mesh.errors import MeshError, Refused
from mesh.model.ca import IssuedLeaf
from mesh.model.command import COMMAND_CODEC, Command, CommandResult
from mesh.model.query import Answer, AnswerT, Asks, ReadMeta, ReadOptions
from mesh.state import queries
from mesh.state.fsm import Fsm
from mesh.state.store import Store
from mesh.state.watch import WatchRegistry


class MemoryBackend:
    """Applies each command to the state at once. `failure`, when set, is raised by every call instead."""

    def __init__(self) -> None:
        self.registry = WatchRegistry()
        self.fsm = Fsm(Store())
        self.watches = Watches(self.registry)
        self.commands: list[Command] = []
        self.options: list[ReadOptions] = []
        self.failure: MeshError | None = None
        self._index = 9  # a real log begins with entries of its own

    async def apply(self, command: Command) -> CommandResult:
        self._check()
        await trio.lowlevel.checkpoint()
        self.commands.append(command)
        self._index += 1
        result = self.fsm.apply(self._index, COMMAND_CODEC.encode(command))
        self.registry.notify(self.fsm.take_changes())
        return result

    async def read(self, query: Asks[AnswerT], options: ReadOptions) -> Answer[AnswerT]:
        self._check()
        await trio.lowlevel.checkpoint()
        self.options.append(options)
        until = trio.current_time() + options.wait_s
        while True:
            reading = queries.run(self.fsm.store, query)
            if reading.index > options.min_index or options.min_index == 0:
                break
            if not await self.watches.wait(reading.watch_keys, until=until):
                reading = queries.run(self.fsm.store, query)
                break
        return Answer(reading.value, ReadMeta(reading.index))

    async def sign_leaf(self, csr_der: bytes) -> IssuedLeaf:
        raise Refused(f"a request of {len(csr_der)} bytes is not signed here: this state has no CA")

    async def leader_address(self) -> str:
        return "127.0.0.1:8300"

    async def peer_addresses(self) -> tuple[str, ...]:
        return ("127.0.0.1:8300", "127.0.0.2:8300")

    def _check(self) -> None:
        if self.failure is not None:
            raise self.failure
