"""The driver with real stores: three servers in one process, joined by an in-memory network that delivers whole messages."""

from __future__ import annotations

import random
import struct
from collections.abc import Callable, Iterable
from pathlib import Path

import pytest
import trio
from trio.testing import MockClock

from agent.raft_driver import LeadershipChanged, RaftDriver
from agent.raft_store import MemoryRaftStore, RaftStore, SqliteRaftStore
from mesh.errors import LimitExceeded, NotLeader, OutcomeUnknown, ProtocolError, Refused, StorageFailed
from mesh.raft.config import RaftConfig

CONFIG = RaftConfig.consul_default()


class History:
    """A state machine that remembers what it was given, in order."""

    def __init__(self) -> None:
        self.applied: list[tuple[int, bytes]] = []
        self.restored_at = 0

    def apply(self, index: int, data: bytes) -> object:
        assert not self.applied or index > self.applied[-1][0]
        self.applied.append((index, data))
        return len(self.applied)

    def snapshot(self) -> Callable[[], Iterable[bytes]]:
        frozen = tuple(self.applied)

        def chunks() -> Iterable[bytes]:
            for index, data in frozen:
                yield struct.pack(">Q", index) + data

        return chunks

    def restore(self, index: int, chunks: Iterable[bytes]) -> None:
        self.applied = [(struct.unpack(">Q", chunk[:8])[0], chunk[8:]) for chunk in chunks]
        self.restored_at = index

    @property
    def data(self) -> list[bytes]:
        return [data for _, data in self.applied]


class Cluster:
    """Servers that can be started, killed and cut off."""

    def __init__(self, nursery: trio.Nursery, make_store: Callable[[str], RaftStore], config: RaftConfig = CONFIG):
        self.nursery = nursery
        self.make_store = make_store
        self.config = config
        self.drivers: dict[str, RaftDriver] = {}
        self.histories: dict[str, History] = {}
        self.stores: dict[str, RaftStore] = {}
        self.scopes: dict[str, trio.CancelScope] = {}
        self.ended: dict[str, trio.Event] = {}
        self.failures: dict[str, BaseException] = {}
        self.cut_off: set[str] = set()
        self.events: list[tuple[str, LeadershipChanged]] = []

    async def start(self, node_id: str) -> RaftDriver:
        store = self.make_store(node_id)
        history = History()

        def send(peer_id: str, message: bytes) -> None:
            self.nursery.start_soon(self._deliver, node_id, peer_id, message)

        driver = RaftDriver(
            node_id=node_id,
            config=self.config,
            store=store,
            state_machine=history,
            send=send,
            rng=random.Random(node_id),
            on_leadership=lambda changed: self.events.append((node_id, changed)),
        )
        self.ended[node_id] = trio.Event()
        self.stores[node_id] = store
        await self.nursery.start(self._run, node_id, driver, store)
        self.drivers[node_id], self.histories[node_id] = driver, history
        return driver

    async def _run(
        self, node_id: str, driver: RaftDriver, store: RaftStore, task_status: trio.TaskStatus[None]
    ) -> None:
        try:
            with trio.CancelScope() as scope:
                self.scopes[node_id] = scope
                await driver.run(task_status)
        except* (StorageFailed, AssertionError) as group:
            self.failures[node_id] = group.exceptions[0]
        finally:
            self.drivers.pop(node_id, None)
            store.close()
            self.ended[node_id].set()

    async def _deliver(self, sender_id: str, peer_id: str, message: bytes) -> None:
        await trio.sleep(0.001)
        if sender_id in self.cut_off or peer_id in self.cut_off:
            return
        driver = self.drivers.get(peer_id)
        if driver is not None:
            driver.receive_message(sender_id, message)

    async def kill(self, node_id: str) -> None:
        self.scopes[node_id].cancel()
        await self.ended[node_id].wait()

    async def leader(self) -> str:
        """The one that can serve; waits for it."""
        while True:
            for node_id, driver in self.drivers.items():
                if node_id not in self.cut_off and driver.lease_valid():
                    return node_id
            await trio.sleep(0.05)

    async def propose(self, data: bytes) -> object:
        """Through whoever leads, as an RPC client would."""
        while True:
            try:
                return await self.drivers[await self.leader()].propose(data)
            except NotLeader:
                await trio.sleep(0.05)

    async def wait_until(self, condition: Callable[[], bool]) -> None:
        with trio.fail_after(60):
            while not condition():
                await trio.sleep(0.05)


async def three(cluster: Cluster) -> None:
    voters = {name: f"127.0.0.1:{port}" for port, name in enumerate(("a", "b", "c"), 1)}
    for node_id in voters:
        await cluster.start(node_id)
    assert cluster.drivers["a"].bootstrap(voters)


@pytest.fixture
def sqlite_stores(tmp_path: Path) -> Callable[[str], RaftStore]:
    return lambda node_id: SqliteRaftStore(tmp_path / node_id)


async def test_three_servers_elect_a_leader_and_commit_to_all(autojump_clock: MockClock, sqlite_stores) -> None:
    async with trio.open_nursery() as nursery:
        cluster = Cluster(nursery, sqlite_stores)
        await three(cluster)
        assert await cluster.propose(b"one") == 1
        assert await cluster.propose(b"two") == 2
        await cluster.wait_until(lambda: all(h.data == [b"one", b"two"] for h in cluster.histories.values()))
        leader = await cluster.leader()
        assert {d.status.leader_id for d in cluster.drivers.values()} == {leader}
        assert sorted(cluster.drivers[leader].status.voters) == ["a", "b", "c"]
        nursery.cancel_scope.cancel()
