"""Backends over the real replicated state in this process: one server, no Raft and no network between."""

import trio

from agent.ca_duties import CertificateAuthority
from agent.runtime import Runtime
from mesh.errors import MeshError, NoLeader, Refused, Unreachable
from mesh.model.ca import IssuedLeaf
from mesh.model.command import COMMAND_CODEC, Command, CommandResult
from mesh.model.query import Answer, AnswerT, Asks, ReadMeta, ReadOptions
from mesh.state import queries
from mesh.state.fsm import Fsm
from mesh.state.store import Store
from mesh.state.watch import EVERYTHING, WatchRegistry


class WallClock(Runtime):
    """A wall clock that goes with Trio's, plus `jump_s`."""

    def __init__(self, start_s: float, *, seed: int = 1) -> None:
        super().__init__(seed=seed)
        self._start_s = start_s
        self.jump_s = 0.0

    def unix_time_s(self) -> float:
        return self._start_s + self.jump_s + trio.current_time()


class MemoryBackend:
    """Applies each command to the state at once. While `failure` is set every call raises it, waiting reads too."""

    def __init__(self) -> None:
        self.registry = WatchRegistry()
        self.fsm = Fsm(Store())
        self.commands: list[Command] = []
        self.options: list[ReadOptions] = []
        self._failure: MeshError | None = None
        self._index = 9  # Raft's own first entries are no commands; queries answer 1 for "nothing yet"

    @property
    def failure(self) -> MeshError | None:
        return self._failure

    @failure.setter
    def failure(self, value: MeshError | None) -> None:
        self._failure = value
        self.registry.notify((EVERYTHING,))

    async def apply(self, command: Command) -> CommandResult:
        await trio.lowlevel.checkpoint()
        self._check()
        self.commands.append(command)
        self._index += 1
        result = self.fsm.apply(self._index, COMMAND_CODEC.encode(command))
        self.registry.notify(self.fsm.take_changes())
        return result

    async def read(self, query: Asks[AnswerT], options: ReadOptions) -> Answer[AnswerT]:
        await trio.lowlevel.checkpoint()
        self.options.append(options)
        until = trio.current_time() + options.wait_s
        while True:
            self._check()
            reading = queries.run(self.fsm.store, query)
            if not options.min_index or reading.index > options.min_index or trio.current_time() >= until:
                return Answer(reading.value, ReadMeta(reading.index))
            event = trio.Event()
            with self.registry.register(reading.watch_keys, event.set), trio.move_on_at(until):
                await event.wait()

    async def sign_leaf(self, csr_der: bytes) -> IssuedLeaf:
        raise Refused(f"a request of {len(csr_der)} bytes is not signed here: this state has no CA")

    async def leader_address(self) -> str:
        return "127.0.0.1:8300"

    async def peer_addresses(self) -> tuple[str, ...]:
        return ("127.0.0.1:8300", "127.0.0.2:8300")

    def _check(self) -> None:
        if self._failure is not None:
            raise self._failure


class StateBackend(MemoryBackend):
    """With a CA. `down` True: every call fails as it does when no server answers."""

    def __init__(self, runtime: Runtime, *, datacenter: str = "dc1", csr_per_second_max: float = 50.0) -> None:
        super().__init__()
        self.authority = CertificateAuthority(
            state=self.fsm.store,
            apply=self.apply,
            runtime=runtime,
            datacenter=datacenter,
            csr_per_second_max=csr_per_second_max,
        )
        self.signed_at: list[float] = []

    @property
    def down(self) -> bool:
        return self.failure is not None

    @down.setter
    def down(self, value: bool) -> None:
        self.failure = Unreachable("no server answers") if value else None

    async def sign_leaf(self, csr_der: bytes) -> IssuedLeaf:
        await trio.lowlevel.checkpoint()
        if self.down:
            raise NoLeader("No cluster leader")
        issued = await self.authority.sign(csr_der)
        self.signed_at.append(trio.current_time())
        return issued
