"""A Backend over the real replicated state in this process: one server, no Raft and no network between."""

import trio

from agent.ca_duties import CertificateAuthority
from agent.runtime import Runtime
from mesh.errors import NoLeader, Unreachable
from mesh.model.command import COMMAND_CODEC
from mesh.model.query import Answer, ReadMeta
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


class StateBackend:
    """`down` True: every call fails as it does when no server answers."""

    def __init__(self, runtime: Runtime, *, datacenter: str = "dc1", csr_per_second_max: float = 50.0) -> None:
        self.fsm = Fsm(Store())
        self.registry = WatchRegistry()
        self.authority = CertificateAuthority(
            state=self.fsm.store,
            apply=self.apply,
            runtime=runtime,
            datacenter=datacenter,
            csr_per_second_max=csr_per_second_max,
        )
        self.index = 10  # Raft's own first entries are no commands; queries answer 1 for "nothing yet"
        self.signed_at: list[float] = []
        self.reads = 0
        self._down = False

    @property
    def down(self) -> bool:
        return self._down

    @down.setter
    def down(self, value: bool) -> None:
        self._down = value
        self.registry.notify((EVERYTHING,))

    async def apply(self, command):
        await trio.lowlevel.checkpoint()
        if self._down:
            raise Unreachable("no server answers")
        self.index += 1
        result = self.fsm.apply(self.index, COMMAND_CODEC.encode(command))
        self.registry.notify(self.fsm.take_changes())
        return result

    async def read(self, query, options):
        await trio.lowlevel.checkpoint()
        self.reads += 1
        until = trio.current_time() + options.wait_s
        while True:
            if self._down:
                raise Unreachable("no server answers")
            reading = queries.run(self.fsm.store, query)
            if not options.min_index or reading.index > options.min_index or trio.current_time() >= until:
                return Answer(reading.value, ReadMeta(index=reading.index))
            event = trio.Event()
            with self.registry.register(reading.watch_keys, event.set), trio.move_on_at(until):
                await event.wait()

    async def sign_leaf(self, csr_der):
        await trio.lowlevel.checkpoint()
        if self._down:
            raise NoLeader("No cluster leader")
        issued = await self.authority.sign(csr_der)
        self.signed_at.append(trio.current_time())
        return issued

    async def leader_address(self):
        return "127.0.0.1:8300"

    async def peer_addresses(self):
        return ("127.0.0.1:8300",)
