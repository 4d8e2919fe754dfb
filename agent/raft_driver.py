"""Runs a raft core: gives it messages, proposals and time, and does what it asks for with the store and the network.

Three things happen at once and none waits for the others: the pump (messages out, entries applied, timers), one storage
task (writes in worker threads, in order), and snapshots being saved or read. Everything that arrives while the disk
works shares the next write: many proposals, one fsync, one message per follower.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from random import Random
from typing import Final, Protocol, TypeVar

import trio

from agent.raft_store import RaftStore
from mesh.errors import LimitExceeded, MeshError, NotFound, NotLeader, OutcomeUnknown, StorageFailed, Unreachable
from mesh.raft.config import RaftConfig
from mesh.raft.messages import (
    Configuration,
    Entry,
    EntryKind,
    Message,
    Server,
    SnapshotMeta,
    decode_message,
    encode_message,
)
from mesh.raft.node import Node
from mesh.raft.ready import Compaction, LeadershipChanged, Ready, Write
from mesh.raft.replication import ChunkWanted

__all__ = ["LeadershipChanged", "PeerStatus", "RaftDriver", "RaftStatus", "StateMachine"]

logger = logging.getLogger("mesh.raft")
Result = TypeVar("Result")

WAIT_S_MAX: Final = 30.0
"""A proposal or read without an end after this long gets OutcomeUnknown; losing the quorum ends it much sooner."""
PROPOSALS_MAX: Final = 16384
"""Waiting for their entry; the callers beyond are told to come back."""
CATCH_UP_ENTRIES: Final = 250
"""A new server votes once it is this close to the end of the log (Consul autopilot's default)."""
CATCH_UP_S: Final = 120.0
_JOBS_MAX: Final = 8
"""For the storage task: one write and one compaction at a time exist."""


class StateMachine(Protocol):
    """What the log is applied to. All calls come from the Trio thread; only snapshots are iterated elsewhere."""

    def apply(self, index: int, data: bytes) -> object:
        """Apply one command, totally and deterministically; the proposer gets the result. Raising stops the server."""

    def snapshot(self) -> Callable[[], Iterable[bytes]]:
        """Capture the state now, in little time; what is returned is called in a worker thread and yields chunks."""

    def restore(self, index: int, chunks: Iterable[bytes]) -> None:
        """Replace the state by that of a snapshot at index."""


@dataclass(frozen=True, slots=True)
class PeerStatus:
    """One follower, as the leader sees it."""

    match_index: int
    last_contact_s: float
    is_voter: bool


@dataclass(frozen=True, slots=True)
class RaftStatus:
    """What this server knows of the cluster and of itself; ages in seconds."""

    role: str
    term: int
    leader_id: str | None
    commit_index: int
    applied_index: int
    first_log_index: int
    last_log_index: int
    last_log_term: int
    last_snapshot_index: int
    last_snapshot_term: int
    log_bytes: int
    voters: dict[str, str]
    learners: dict[str, str]
    last_contact_s: float | None
    """Since the leader was heard; 0 on the leader, None when none was ever heard."""
    peers: dict[str, PeerStatus]


@dataclass(slots=True, eq=False)
class _Waiter:
    """A task that waits for one result, without the cost of an Event per proposal."""

    term: int
    until_s: float
    task: trio.lowlevel.Task | None = None
    is_done: bool = False
    result: object = None
    error: MeshError | None = None

    def resolve(self, result: object) -> None:
        self.result = result
        self._wake()

    def fail(self, error: MeshError) -> None:
        self.error = error
        self._wake()

    def _wake(self) -> None:
        self.is_done = True
        if self.task is not None:
            trio.lowlevel.reschedule(self.task)
            self.task = None

    async def wait(self) -> object:
        """The result, or raises what it failed with."""
        self.task = trio.lowlevel.current_task()

        def abort(_: object) -> trio.lowlevel.Abort:
            self.task = None
            return trio.lowlevel.Abort.SUCCEEDED

        await trio.lowlevel.wait_task_rescheduled(abort)
        if self.error is not None:
            raise self.error
        return self.result


def _first_cause(group: ExceptionGroup[Exception]) -> Exception:
    """What ended the driver, bare: a StorageFailed if there is one, else the first exception."""
    failed, others = group.split(StorageFailed)
    cause: Exception | None = failed if failed is not None else others
    while isinstance(cause, ExceptionGroup):
        cause = cause.exceptions[0]
    assert cause is not None
    return cause


@dataclass(slots=True)
class _Reads:
    """Reads under way: by id until confirmed, then by index until applied."""

    waiting: dict[int, _Waiter] = field(default_factory=dict)
    confirmed: list[tuple[int, _Waiter]] = field(default_factory=list)


class RaftDriver:
    """One raft server. Methods other than `run` may be called once `run` has reported that it started."""

    def __init__(
        self,
        *,
        node_id: str,
        config: RaftConfig,
        store: RaftStore,
        state_machine: StateMachine,
        send: Callable[[str, bytes], None],
        rng: Random,
        on_leadership: Callable[[LeadershipChanged], None],
    ) -> None:
        """`send(peer_id, message)` never blocks, may drop; `on_leadership` hears every change of leader known here."""
        self._node_id = node_id
        self._config = config
        self._store = store
        self._state_machine = state_machine
        self._send = send
        self._rng = rng
        self._on_leadership = on_leadership
        self._node: Node | None = None
        self._broken: BaseException | None = None
        self._woken = trio.Event()
        self._leadership_changed = trio.Event()
        self._waiters: dict[int, _Waiter] = {}
        self._reads = _Reads()
        self._membership_lock = trio.Lock()
        self._is_saving_snapshot = False
        self._threads = trio.CapacityLimiter(4)
        self._jobs_in, self._jobs_out = trio.open_memory_channel[Write | Compaction](_JOBS_MAX)

    # -- life

    async def run(self, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Load the store, restore its snapshot, then take part until cancelled.

        Nothing behind the snapshot is applied before a leader says how far the log is committed. Raises StorageFailed
        when a write failed or stored data is damaged. The store stays open; its owner closes it.
        """
        state = await self._blocking(self._store.load)
        if state.snapshot is not None:
            self._restore(state.snapshot)
        self._node = Node(
            node_id=self._node_id,
            config=self._config,
            rng=self._rng,
            now=trio.current_time(),
            hard_state=state.hard_state,
            snapshot=state.snapshot,
            entries=state.entries,
        )
        try:
            async with trio.open_nursery() as nursery:
                nursery.start_soon(self._run_storage)
                task_status.started()
                await self._pump(self._node, nursery)
        except ExceptionGroup as group:
            raise _first_cause(group) from None
        finally:
            self._node = None
            self._fail_all()

    def _restore(self, snapshot: SnapshotMeta) -> None:
        self._state_machine.restore(snapshot.index, self._store.snapshot_chunks(snapshot.index))

    async def _blocking(self, call: Callable[[], Result]) -> Result:
        if not self._store.is_durable:
            return call()
        return await trio.to_thread.run_sync(call, limiter=self._threads)

    def _wake(self) -> None:
        self._woken.set()

    async def _pump(self, node: Node, nursery: trio.Nursery) -> None:
        while True:
            if self._broken is not None:
                raise self._broken
            self._woken = trio.Event()
            now = trio.current_time()
            if now >= node.next_deadline(now):
                node.handle_timer(now)
                self._expire(now)
            ready = node.take_ready(now)
            self._carry_out(node, ready, nursery)
            if node.log.has_committed:
                # More than one turn's worth: let heartbeats and readers in between.
                await trio.lowlevel.checkpoint()
                continue
            with trio.move_on_at(node.next_deadline(now)):
                await self._woken.wait()

    def _carry_out(self, node: Node, ready: Ready, nursery: trio.Nursery) -> None:
        if ready.write is not None:
            self._jobs_in.send_nowait(ready.write)
        if ready.messages:
            self._send_all(ready.messages)
        for changed in ready.leadership:
            self._note_leadership(node, changed)
        if ready.committed:
            self._apply(ready.committed)
        for reads in ready.reads:
            waiters = [self._reads.waiting.pop(read_id, None) for read_id in reads.read_ids]
            self._reads.confirmed.extend((reads.index, waiter) for waiter in waiters if waiter is not None)
        for read_id in ready.reads_failed:
            waiter = self._reads.waiting.pop(read_id, None)
            if waiter is not None:
                waiter.fail(NotLeader(node.leader_id))
        if self._reads.confirmed:
            self._release_reads(node)
        for wanted in ready.chunks_wanted:
            nursery.start_soon(self._read_chunk, node, wanted)
        if node.snapshot_due(trio.current_time()) and not self._is_saving_snapshot:
            self._is_saving_snapshot = True
            nursery.start_soon(self._save_snapshot, node, node.snapshot_meta(), self._state_machine.snapshot())

    def _send_all(self, messages: tuple[tuple[str, Message], ...]) -> None:
        # Followers that stand at the same place share one message object: encode it once.
        encoded: dict[int, bytes] = {}
        for peer_id, message in messages:
            data = encoded.get(id(message))
            if data is None:
                data = encoded[id(message)] = encode_message(message)
            self._send(peer_id, data)

    def _apply(self, entries: tuple[Entry, ...]) -> None:
        apply, waiters = self._state_machine.apply, self._waiters
        for entry in entries:
            result = apply(entry.index, entry.data) if entry.kind is EntryKind.COMMAND else None
            waiter = waiters.pop(entry.index, None)
            if waiter is None:
                continue
            if waiter.term == entry.term:
                waiter.resolve(result)
            else:
                waiter.fail(NotLeader(None))  # another leader's entry took the place, so ours is certainly not there

    def _note_leadership(self, node: Node, changed: LeadershipChanged) -> None:
        if changed.is_leader:
            logger.info("leading term %d", changed.term)
        else:
            logger.info("term %d: the leader is %s", changed.term, changed.leader_id or "not known")
        for index in [
            index for index, waiter in self._waiters.items() if waiter.term != node.term or not node.is_leader
        ]:
            if index > node.log.commit:
                self._waiters.pop(index).fail(OutcomeUnknown("leadership was lost before the write was committed"))
        self._leadership_changed.set()
        self._leadership_changed = trio.Event()
        self._on_leadership(changed)

    def _release_reads(self, node: Node) -> None:
        left: list[tuple[int, _Waiter]] = []
        for index, waiter in self._reads.confirmed:
            if index <= node.log.applied:
                waiter.resolve(index)
            else:
                left.append((index, waiter))
        self._reads.confirmed = left

    def _expire(self, now: float) -> None:
        # Dictionaries keep their order, so the oldest are first.
        while self._waiters:
            index, waiter = next(iter(self._waiters.items()))
            if now < waiter.until_s:
                break
            del self._waiters[index]
            waiter.fail(OutcomeUnknown(f"not committed within {WAIT_S_MAX:.0f} s: the other servers do not keep up"))
        for read_id in [read_id for read_id, waiter in self._reads.waiting.items() if now >= waiter.until_s]:
            self._reads.waiting.pop(read_id).fail(NotLeader(None))
        if any(now >= waiter.until_s for _, waiter in self._reads.confirmed):
            for _, waiter in self._reads.confirmed:
                if now >= waiter.until_s:
                    waiter.fail(NotLeader(None))
            self._reads.confirmed = [pair for pair in self._reads.confirmed if now < pair[1].until_s]

    def _fail_all(self) -> None:
        gone = OutcomeUnknown("this server stopped before the write was committed")
        for waiter in (*self._waiters.values(), *self._reads.waiting.values()):
            waiter.fail(gone)
        for _, waiter in self._reads.confirmed:
            waiter.fail(gone)
        self._waiters.clear()
        self._reads = _Reads()

    # -- storage

    async def _run_storage(self) -> None:
        async for job in self._jobs_out:
            match job:
                case Write():
                    await self._write(job)
                case Compaction():
                    await self._blocking(lambda: self._store.compact(job))  # noqa: B023 — awaited before the next job

    async def _write(self, write: Write) -> None:
        installed = await self._blocking(lambda: self._store.write(write))
        if self._node is None:
            return
        if installed is not None:
            logger.info("installing the leader's snapshot at index %d", installed.index)
            self._restore(installed)
            for index in [index for index in self._waiters if index <= installed.index]:
                self._waiters.pop(index).fail(OutcomeUnknown("the entry is behind a snapshot of the new leader"))
        self._node.advance(write, trio.current_time(), installed=installed)
        self._wake()

    async def _save_snapshot(self, node: Node, meta: SnapshotMeta, capture: Callable[[], Iterable[bytes]]) -> None:
        await self._blocking(lambda: self._store.save_snapshot(meta, capture()))
        compaction = node.compact(meta, trio.current_time())
        self._jobs_in.send_nowait(compaction)
        self._is_saving_snapshot = False
        logger.info("snapshot at index %d; the log begins at %d", meta.index, compaction.first_index)
        self._wake()

    async def _read_chunk(self, node: Node, wanted: ChunkWanted) -> None:
        size = self._config.chunk_bytes
        try:
            data, is_last, term = await self._blocking(
                lambda: self._store.read_snapshot(wanted.index, wanted.offset, size)
            )
        except NotFound:
            node.chunk_unavailable(wanted, trio.current_time())
        else:
            node.provide_chunk(wanted, data, is_last=is_last, snapshot_term=term)
        self._wake()

    # -- what others call

    def receive_message(self, sender_id: str, data: bytes) -> None:
        """One message from an authenticated server. Raises ProtocolError: drop the connection it came from."""
        if self._node is None:
            return
        message = decode_message(data)
        try:
            is_work = self._node.receive_message(sender_id, message, trio.current_time())
        except AssertionError as error:
            self._broken = error  # our own belief was wrong: the server stops, whoever's task this is
            is_work = True
        if is_work:
            self._wake()

    async def propose(self, data: bytes) -> object:
        """Replicate a command, and wait until it is applied here; what `apply` returned.

        It is on the disks of a majority then. Raises NotLeader (it is not in the log), LimitExceeded, or
        OutcomeUnknown: it may yet be committed.
        """
        return await self._append(EntryKind.COMMAND, data)

    async def barrier(self) -> int:
        """Leader: commit and apply an empty entry, so all earlier ones are applied; its index. Raises as propose."""
        node = self._running()
        index = node.log.last_index + 1
        await self._append(EntryKind.NOOP, b"")
        return index

    async def _append(self, kind: EntryKind, data: bytes) -> object:
        node = self._running()
        if len(self._waiters) >= PROPOSALS_MAX:
            raise LimitExceeded(f"{PROPOSALS_MAX} writes wait for the other servers; try again later")
        index = node.propose(data, trio.current_time(), kind=kind)
        return await self._wait_applied(node, index)

    async def _wait_applied(self, node: Node, index: int) -> object:
        assert index not in self._waiters, "a waiter of a lost term is failed before the index is used again"
        waiter = self._waiters[index] = _Waiter(node.term, trio.current_time() + WAIT_S_MAX)
        self._wake()
        try:
            return await waiter.wait()
        finally:
            if self._waiters.get(index) is waiter:
                del self._waiters[index]

    async def read_index(self, wait_s: float = WAIT_S_MAX) -> int:
        """Leader: an index that holds every write acknowledged before this call; it is applied here.

        One round trip to a quorum, shared by all reads that come meanwhile (dissertation 6.4). Raises NotLeader, also
        when no quorum has answered within `wait_s` (to the next heartbeat): a deadline of the caller's would cost more.
        """
        node = self._running()
        read_id = node.request_read()
        waiter = self._reads.waiting[read_id] = _Waiter(node.term, trio.current_time() + wait_s)
        self._wake()
        try:
            result = await waiter.wait()
        finally:
            self._reads.waiting.pop(read_id, None)
        assert isinstance(result, int)
        return result

    def lease_valid(self) -> bool:
        """Whether this leader may answer default-consistency reads from its state now.

        False for moments of doubt (also after a failed transfer, for the rest of the term): use read_index then.
        """
        return self._node is not None and self._node.lease_valid(trio.current_time())

    def bootstrap(self, voters: Mapping[str, str]) -> bool:
        """Start a cluster with these servers (id -> address); False when this one has state already.

        Safest on one server only: the others stay empty and learn from it. If several do it, all must name the same
        set. Raises ProtocolError when there is no voter.
        """
        servers = tuple(Server(node_id, voters[node_id]) for node_id in sorted(voters))
        is_new = self._started().bootstrap(Configuration(servers))
        self._wake()
        return is_new

    async def add_voter(self, node_id: str, address: str) -> None:
        """Let a server follow, and vote once it is caught up; done when that is committed. Idempotent.

        Raises NotLeader, OutcomeUnknown, Refused (another change is under way), or Unreachable when the server did not
        catch up; it stays a learner then and the call can be repeated.
        """
        server = Server(node_id, address)
        async with self._membership_lock:
            node = self._running()
            if server in node.log.configuration.voters:
                return
            if node_id not in node.log.configuration.server_ids:
                await self._change(node, node.log.configuration.with_learner(server))
            with trio.move_on_after(CATCH_UP_S) as scope:
                while self._is_behind(node, node_id):  # noqa: ASYNC110 — a look at the progress per heartbeat will do
                    await trio.sleep(self._config.heartbeat_interval_s)
            if scope.cancelled_caught:
                raise Unreachable(f"server {node_id} at {address} did not catch up within {CATCH_UP_S:.0f} s")
            await self._change(node, node.log.configuration.with_voter(server))

    def _is_behind(self, node: Node, node_id: str) -> bool:
        if not node.is_leader:
            raise NotLeader(node.leader_id)
        peer = node.progress.get(node_id)
        return peer is not None and (peer.match == 0 or node.log.last_index - peer.match > CATCH_UP_ENTRIES)

    async def remove_server(self, node_id: str) -> None:
        """Take a server out, voter or learner; done when that is committed. Idempotent.

        A leader may remove itself: it steps down at the end. Raises NotLeader, OutcomeUnknown, Refused.
        """
        async with self._membership_lock:
            node = self._running()
            if not node.is_leader:
                raise NotLeader(node.leader_id)
            if node_id in node.log.configuration.server_ids:
                await self._change(node, node.log.configuration.without(node_id))

    async def _change(self, node: Node, configuration: Configuration) -> None:
        await self._wait_applied(node, node.propose_configuration(configuration, trio.current_time()))

    async def transfer_leadership(self) -> None:
        """Hand the leadership to the most up-to-date voter; returns once this server leads no more.

        Raises NotLeader, Refused when there is no other voter, or Unreachable when none took over in time.
        """
        node = self._running()
        successor = node.transfer_leadership(None, trio.current_time())
        self._wake()
        with trio.move_on_after(self._config.election_timeout_s * 2) as scope:
            while node.is_leader:
                await self._leadership_changed.wait()
        if scope.cancelled_caught and node.is_leader:
            raise Unreachable(f"server {successor} did not take over the leadership in time")

    def has_state(self) -> bool:
        """Whether this server has ever been part of a cluster."""
        return self._started().has_state

    def _started(self) -> Node:
        assert self._node is not None, "the raft driver is not running"
        return self._node

    def _running(self) -> Node:
        if self._node is None:
            raise NotLeader(None)
        return self._node

    @property
    def status(self) -> RaftStatus:
        """See RaftStatus."""
        node, now = self._started(), trio.current_time()
        log, configuration = node.log, node.log.configuration
        contact_s = None if node.contact_s == float("-inf") else now - node.contact_s
        return RaftStatus(
            role=node.role.value,
            term=node.term,
            leader_id=node.leader_id,
            commit_index=log.commit,
            applied_index=log.applied,
            first_log_index=log.first_index,
            last_log_index=log.last_index,
            last_log_term=log.last_term,
            last_snapshot_index=log.snapshot.index if log.snapshot is not None else 0,
            last_snapshot_term=log.snapshot.term if log.snapshot is not None else 0,
            log_bytes=log.data_bytes,
            voters={server.node_id: server.address for server in configuration.voters},
            learners={server.node_id: server.address for server in configuration.learners},
            last_contact_s=0.0 if node.is_leader else contact_s,
            peers={
                peer_id: PeerStatus(peer.match, now - peer.contact_s, peer_id in configuration.voter_ids)
                for peer_id, peer in sorted(node.progress.items())
            },
        )
