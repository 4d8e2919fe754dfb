"""The driver with real stores: three servers in one process, joined by an in-memory network."""

from __future__ import annotations

import random
import resource
import sqlite3
import struct
from collections.abc import Callable, Iterable
from pathlib import Path

import pytest
import trio
from trio.testing import MockClock

from agent.raft_driver import WAIT_S_MAX, LeadershipChanged, RaftDriver
from agent.raft_store import MemoryRaftStore, RaftStore, SqliteRaftStore
from mesh.errors import LimitExceeded, NotLeader, OutcomeUnknown, ProtocolError, Refused, StorageFailed
from mesh.raft.config import RaftConfig
from mesh.raft.messages import AppendResponse, decode_message

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
        self.lost: type | None = None
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
        except (StorageFailed, AssertionError) as error:
            self.failures[node_id] = error
        finally:
            self.drivers.pop(node_id, None)
            store.close()
            self.ended[node_id].set()

    async def _deliver(self, sender_id: str, peer_id: str, message: bytes) -> None:
        await trio.sleep(0.001)
        if sender_id in self.cut_off or peer_id in self.cut_off:
            return
        if self.lost is not None and isinstance(decode_message(message), self.lost):
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


@pytest.fixture
def clock() -> MockClock:
    """Virtual time that moves only when nothing has happened for a while, so that it seldom runs on during an fsync."""
    return MockClock(autojump_threshold=0.003)


async def three(cluster: Cluster) -> None:
    voters = {name: f"127.0.0.1:{port}" for port, name in enumerate(("a", "b", "c"), 1)}
    for node_id in voters:
        await cluster.start(node_id)
    assert cluster.drivers["a"].bootstrap(voters)


@pytest.fixture
def sqlite_stores(tmp_path: Path) -> Callable[[str], RaftStore]:
    return lambda node_id: SqliteRaftStore(tmp_path / node_id)


async def test_three_servers_elect_a_leader_and_commit_to_all(clock: MockClock, sqlite_stores) -> None:
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


# -- commits


async def test_many_concurrent_proposals_share_writes_and_messages(clock: MockClock, sqlite_stores) -> None:
    async with trio.open_nursery() as nursery:
        cluster = Cluster(nursery, sqlite_stores)
        await three(cluster)
        await cluster.propose(b"first")
        leader = await cluster.leader()
        store = cluster.stores[leader]
        writes: list[int] = []
        original = store.write

        def counted(write):
            writes.append(len(write.entries))
            return original(write)

        store.write = counted  # type: ignore[method-assign]
        results: list[object] = []

        async def client(number: int) -> None:
            results.append(await cluster.drivers[leader].propose(b"%d" % number))

        async with trio.open_nursery() as clients:
            for number in range(300):
                clients.start_soon(client, number)
        assert sorted(results) == list(range(2, 302))  # type: ignore[type-var]
        assert sum(writes) == 300
        assert len(writes) < 15
        nursery.cancel_scope.cancel()


async def test_acknowledged_writes_survive_a_kill_of_all_servers(clock: MockClock, sqlite_stores) -> None:
    async with trio.open_nursery() as nursery:
        cluster = Cluster(nursery, sqlite_stores)
        await three(cluster)
        written: list[bytes] = []
        for life in range(3):
            for number in range(10):
                data = b"%d.%d" % (life, number)
                await cluster.propose(data)
                written.append(data)
            for node_id in ("a", "b", "c"):
                await cluster.kill(node_id)
            for node_id in ("a", "b", "c"):
                driver = await cluster.start(node_id)
                assert driver.has_state()
                assert not driver.bootstrap({node_id: "127.0.0.1:1"})
                assert cluster.histories[node_id].applied == [], "nothing is applied before it is known to be committed"
        leader = await cluster.leader()
        assert cluster.histories[leader].data == written
        nursery.cancel_scope.cancel()


async def test_writes_go_on_when_the_leader_is_killed(clock: MockClock, sqlite_stores) -> None:
    async with trio.open_nursery() as nursery:
        cluster = Cluster(nursery, sqlite_stores)
        await three(cluster)
        await cluster.propose(b"before")
        old = await cluster.leader()
        await cluster.kill(old)
        started = trio.current_time()
        await cluster.propose(b"after")
        assert trio.current_time() - started < 5.0
        await cluster.start(old)
        await cluster.wait_until(lambda: cluster.histories[old].data == [b"before", b"after"])
        nursery.cancel_scope.cancel()


async def test_proposal_on_a_leader_without_quorum_ends_as_unknown(clock: MockClock, sqlite_stores) -> None:
    async with trio.open_nursery() as nursery:
        cluster = Cluster(nursery, sqlite_stores)
        await three(cluster)
        leader = await cluster.leader()
        driver = cluster.drivers[leader]
        cluster.cut_off.add(leader)
        with trio.fail_after(3.0), pytest.raises(OutcomeUnknown):
            await driver.propose(b"lonely")
        with pytest.raises(NotLeader):
            await driver.propose(b"later")
        with pytest.raises(NotLeader):
            await driver.read_index()
        assert not driver.lease_valid()
        await cluster.propose(b"by the others")
        cluster.cut_off.clear()
        await cluster.wait_until(lambda: cluster.histories[leader].data == [b"by the others"])
        nursery.cancel_scope.cancel()


async def test_wait_for_followers_that_answer_but_never_store_has_an_end(clock: MockClock) -> None:
    async with trio.open_nursery() as nursery:
        cluster = Cluster(nursery, lambda _: MemoryRaftStore())
        await three(cluster)
        leader = await cluster.leader()
        cluster.lost = AppendResponse
        started = trio.current_time()
        with pytest.raises(OutcomeUnknown, match="do not keep up"):
            await cluster.drivers[leader].propose(b"x")
        assert WAIT_S_MAX <= trio.current_time() - started < WAIT_S_MAX + 1
        cluster.lost = None
        assert await cluster.propose(b"y") == 2, "the first was committed in the end"
        nursery.cancel_scope.cancel()


async def test_oversized_entry_is_refused(clock: MockClock, sqlite_stores) -> None:
    async with trio.open_nursery() as nursery:
        cluster = Cluster(nursery, sqlite_stores)
        await three(cluster)
        with pytest.raises(LimitExceeded):
            await cluster.drivers[await cluster.leader()].propose(b"x" * (CONFIG.entry_bytes_max + 1))
        nursery.cancel_scope.cancel()


async def test_cancelled_proposal_leaves_nothing_behind(clock: MockClock, sqlite_stores) -> None:
    async with trio.open_nursery() as nursery:
        cluster = Cluster(nursery, sqlite_stores)
        await three(cluster)
        leader = await cluster.leader()
        with trio.move_on_after(0) as scope:
            await cluster.drivers[leader].propose(b"given up")
        assert scope.cancelled_caught
        assert await cluster.propose(b"next") == 2, "it was committed all the same"
        nursery.cancel_scope.cancel()


# -- reads, leadership


async def test_reads_are_confirmed_by_a_quorum_and_see_earlier_writes(clock: MockClock, sqlite_stores) -> None:
    async with trio.open_nursery() as nursery:
        cluster = Cluster(nursery, sqlite_stores)
        await three(cluster)
        leader = await cluster.leader()
        driver = cluster.drivers[leader]
        await driver.propose(b"x")
        index = cluster.histories[leader].applied[-1][0]
        assert await driver.read_index() >= index
        assert await driver.barrier() > index
        follower = next(node_id for node_id in cluster.drivers if node_id != leader)
        for call in (cluster.drivers[follower].read_index, cluster.drivers[follower].barrier):
            with pytest.raises(NotLeader) as caught:
                await call()
            assert caught.value.leader_id == leader
        nursery.cancel_scope.cancel()


async def test_read_that_no_quorum_confirms_ends_in_the_time_it_was_given(clock: MockClock, sqlite_stores) -> None:
    async with trio.open_nursery() as nursery:
        cluster = Cluster(nursery, sqlite_stores)
        await three(cluster)
        leader = await cluster.leader()
        await cluster.propose(b"x")
        cluster.cut_off.add(leader)
        started = trio.current_time()
        with pytest.raises(NotLeader):
            await cluster.drivers[leader].read_index(0.1)
        assert 0.1 <= trio.current_time() - started <= 0.1 + 2 * CONFIG.heartbeat_interval_s
        nursery.cancel_scope.cancel()


async def test_leadership_is_handed_over_at_once(clock: MockClock, sqlite_stores) -> None:
    async with trio.open_nursery() as nursery:
        cluster = Cluster(nursery, sqlite_stores)
        await three(cluster)
        await cluster.propose(b"x")
        old = await cluster.leader()
        started = trio.current_time()
        await cluster.drivers[old].transfer_leadership()
        assert trio.current_time() - started < CONFIG.election_timeout_s
        new = await cluster.leader()
        assert new != old
        changes = [changed.is_leader for node_id, changed in cluster.events if node_id == old]
        assert changes[-2:] == [False, False] or changes[-1] is False
        assert (new, True) in [(node_id, changed.is_leader) for node_id, changed in cluster.events]
        nursery.cancel_scope.cancel()


async def test_single_server_leads_at_once_and_cannot_hand_over(clock: MockClock) -> None:
    async with trio.open_nursery() as nursery:
        cluster = Cluster(nursery, lambda _: MemoryRaftStore(), RaftConfig.dev())
        driver = await cluster.start("a")
        started = trio.current_time()
        assert driver.bootstrap({"a": "127.0.0.1:8300"})
        assert await cluster.propose(b"x") == 1
        assert trio.current_time() - started < 0.2
        assert await driver.read_index() > 0
        with pytest.raises(Refused, match="no other voter"):
            await driver.transfer_leadership()
        nursery.cancel_scope.cancel()


async def test_empty_server_joins_and_a_member_leaves(clock: MockClock, sqlite_stores) -> None:
    async with trio.open_nursery() as nursery:
        cluster = Cluster(nursery, sqlite_stores)
        driver = await cluster.start("a")
        driver.bootstrap({"a": "127.0.0.1:1"})
        await cluster.propose(b"x")
        for node_id in ("b", "c"):
            assert not (await cluster.start(node_id)).has_state()
            await driver.add_voter(node_id, "127.0.0.1:2")
        assert list(driver.status.voters) == ["a", "b", "c"]
        assert driver.status.learners == {}
        await cluster.wait_until(lambda: cluster.histories["c"].data == [b"x"])
        await driver.remove_server("b")
        await cluster.kill("b")
        await driver.remove_server("a")
        await cluster.wait_until(lambda: cluster.drivers["c"].lease_valid())
        assert cluster.drivers["c"].status.voters == {"c": "127.0.0.1:2"}
        assert await cluster.drivers["c"].propose(b"y") == 2
        nursery.cancel_scope.cancel()


# -- snapshots


SMALL = RaftConfig(
    heartbeat_interval_s=0.1,
    election_timeout_s=1.0,
    lease_s=0.5,
    retransmit_s=0.5,
    snapshot_entries=50,
    snapshot_interval_s=0.0,
    trailing_entries=10,
    chunk_bytes=200,
    apply_entries_max=16,
)


@pytest.mark.parametrize("kind", ["sqlite", "memory"])
async def test_follower_that_was_away_catches_up_by_snapshot(
    clock: MockClock, sqlite_stores: Callable[[str], RaftStore], kind: str
) -> None:
    async with trio.open_nursery() as nursery:
        cluster = Cluster(nursery, sqlite_stores if kind == "sqlite" else lambda _: MemoryRaftStore(), SMALL)
        await three(cluster)
        leader = await cluster.leader()
        away = next(node_id for node_id in cluster.drivers if node_id != leader)
        cluster.cut_off.add(away)
        for number in range(180):
            await cluster.drivers[leader].propose(b"%d" % number)
        await cluster.wait_until(lambda: cluster.drivers[leader].status.first_log_index > 100)
        cluster.cut_off.clear()
        await cluster.wait_until(lambda: len(cluster.histories[away].data) == 180)
        assert cluster.histories[away].restored_at > 0
        assert cluster.histories[away].applied == cluster.histories[leader].applied
        await cluster.drivers[leader].propose(b"after")
        await cluster.wait_until(lambda: cluster.histories[away].data[-1] == b"after")
        nursery.cancel_scope.cancel()


async def test_restart_restores_the_snapshot_and_replays_the_rest(clock: MockClock, sqlite_stores) -> None:
    async with trio.open_nursery() as nursery:
        cluster = Cluster(nursery, sqlite_stores, SMALL)
        (await cluster.start("a")).bootstrap({"a": "127.0.0.1:1"})
        for number in range(130):
            await cluster.propose(b"%d" % number)
        await cluster.wait_until(lambda: cluster.drivers["a"].status.last_snapshot_index >= 100)
        await cluster.kill("a")
        await cluster.start("a")
        assert cluster.histories["a"].restored_at >= 100
        await cluster.propose(b"after")
        assert cluster.histories["a"].data == [*(b"%d" % number for number in range(130)), b"after"]
        nursery.cancel_scope.cancel()


# -- faults


async def test_damaged_log_entry_refuses_to_start_and_is_named(tmp_path: Path, sqlite_stores) -> None:
    async with trio.open_nursery() as nursery:
        cluster = Cluster(nursery, sqlite_stores)
        (await cluster.start("a")).bootstrap({"a": "127.0.0.1:1"})
        for number in range(5):
            await cluster.propose(b"%d" % number)
        await cluster.kill("a")
        nursery.cancel_scope.cancel()
    with sqlite3.connect(tmp_path / "a" / "raft.db") as db:
        db.execute("UPDATE entry SET data = x'ff' WHERE id = 4")
    db.close()
    with pytest.raises(StorageFailed, match="log entry 4 is damaged"):
        await _driver(SqliteRaftStore(tmp_path / "a"), History()).run()


async def test_failed_write_stops_the_server_without_acknowledging(tmp_path: Path) -> None:
    store = SqliteRaftStore(tmp_path)
    driver = _driver(store, History())
    outcome: list[BaseException] = []

    async def run(task_status: trio.TaskStatus[None]) -> None:
        try:
            await driver.run(task_status)
        except StorageFailed as error:
            outcome.append(error)

    async with trio.open_nursery() as nursery:
        await nursery.start(run)
        driver.bootstrap({"a": "127.0.0.1:1"})
        while not driver.lease_valid():
            await trio.sleep(0.01)
        await driver.propose(b"good")
        soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, ((tmp_path / "raft.db-wal").stat().st_size + 5000, hard))
        try:
            with trio.fail_after(5), pytest.raises(OutcomeUnknown):
                await driver.propose(b"x" * 100_000)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert isinstance(outcome[0], StorageFailed)
    with pytest.raises(NotLeader):
        await driver.propose(b"after")
    store.close()


async def test_exception_from_apply_stops_the_server(clock: MockClock) -> None:
    class Broken(History):
        def apply(self, index: int, data: bytes) -> object:
            raise AssertionError("apply is total")

    driver = _driver(MemoryRaftStore(), Broken())
    with pytest.RaisesGroup(pytest.RaisesExc(AssertionError, match="apply is total")):
        async with trio.open_nursery() as nursery:
            await nursery.start(driver.run)
            driver.bootstrap({"a": "127.0.0.1:1"})
            while not driver.lease_valid():
                await trio.sleep(0.01)
            with pytest.raises(OutcomeUnknown):
                await driver.propose(b"x")
            await trio.sleep(1.0)


async def test_malformed_message_is_refused_and_changes_nothing(clock: MockClock) -> None:
    driver = _driver(MemoryRaftStore(), History())
    driver.receive_message("b", b"before it runs, messages are dropped")
    async with trio.open_nursery() as nursery:
        await nursery.start(driver.run)
        before = driver.status
        for data in (b"", b"\xc1", b"\x93\x01\x02", b"\x00" * 100):
            with pytest.raises(ProtocolError):
                driver.receive_message("b", data)
        assert driver.status == before
        nursery.cancel_scope.cancel()


def _driver(store: RaftStore, history: History) -> RaftDriver:
    return RaftDriver(
        node_id="a",
        config=CONFIG,
        store=store,
        state_machine=history,
        send=lambda _, __: None,
        rng=random.Random(1),
        on_leadership=lambda _: None,
    )
