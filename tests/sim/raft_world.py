"""A world of raft cores under one seeded clock: lossy network, disks that lose what was not synced, crashes and pauses.

Everything that happens is an event in one heap and every choice comes from one generator, so a seed is a bug report.
After each event the invariants of the paper (figure 3) and of etcd's TLA+ specification are checked.
"""

from __future__ import annotations

import heapq
import zlib
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from random import Random

import msgspec

from mesh.errors import LimitExceeded, NotLeader, Refused
from mesh.raft.config import RaftConfig
from mesh.raft.messages import (
    AppendResponse,
    Configuration,
    Entry,
    EntryKind,
    HardState,
    Message,
    Server,
    SnapshotMeta,
    VoteResponse,
    decode_message,
    decode_snapshot_meta,
    encode_message,
    encode_snapshot_meta,
)
from mesh.raft.node import Node
from mesh.raft.ready import Compaction, Ready, Role, Write
from mesh.raft.replication import ChunkWanted

CONFIG = replace(
    RaftConfig.consul_default(),
    batch_entries_max=8,
    window=3,
    snapshot_entries=40,
    snapshot_interval_s=0.0,
    trailing_entries=10,
    chunk_bytes=48,
    apply_entries_max=5,
)


def configuration(*voters: str) -> Configuration:
    return Configuration(tuple(Server(voter, f"{voter}:8300") for voter in sorted(voters)))


@dataclass
class Disk:
    """What survives a crash. A write is a list of steps; a crash in the middle leaves any prefix of them done."""

    hard_state: HardState = field(default_factory=HardState)
    entries: dict[int, Entry] = field(default_factory=dict)
    snapshots: dict[int, tuple[SnapshotMeta, bytes]] = field(default_factory=dict)
    incoming: bytes = b""

    @property
    def snapshot(self) -> SnapshotMeta | None:
        return self.snapshots[max(self.snapshots)][0] if self.snapshots else None

    def holds(self, index: int, term: int) -> bool:
        snapshot = self.snapshot
        if snapshot is not None and snapshot.index >= index:
            return True
        return index in self.entries and self.entries[index].term == term

    def steps(self, write: Write) -> list[Callable[[], None]]:
        steps: list[Callable[[], None]] = []
        if write.completes_snapshot and write.hard_state is not None:
            steps.append(lambda: self._put_state(write.hard_state))
        for chunk in write.chunks:
            steps.append(lambda chunk=chunk: self._put_chunk(chunk.offset, chunk.data))
        if write.completes_snapshot:
            steps.append(lambda: self._install(write))
        steps.append(lambda: self._transaction(write))
        return steps

    def installed(self, write: Write) -> SnapshotMeta | None:
        last = write.chunks[-1] if write.completes_snapshot else None
        found = self.snapshots.get(last.index) if last is not None else None
        return found[0] if found is not None and found[0].term == last.snapshot_term else None

    def _put_state(self, state: HardState | None) -> None:
        if state is not None:
            assert state.term >= self.hard_state.term, "the stored term went back"
            if state.term == self.hard_state.term and self.hard_state.vote is not None:
                assert state.vote == self.hard_state.vote, "the stored vote changed within a term"
            self.hard_state = state

    def _put_chunk(self, offset: int, data: bytes) -> None:
        if offset == 0:
            self.incoming = b""
        assert len(self.incoming) == offset
        self.incoming += data

    def _install(self, write: Write) -> None:
        data, self.incoming = self.incoming, b""
        meta = open_snapshot(data)
        if meta is not None:
            self.snapshots[meta.index] = (meta, data)

    def _transaction(self, write: Write) -> None:
        self._put_state(write.hard_state)
        if self.installed(write) is not None:
            self.entries.clear()
        elif write.entries:
            first = write.entries[0].index
            self.entries = {index: entry for index, entry in self.entries.items() if index < first}
            self.entries.update((entry.index, entry) for entry in write.entries)

    def compact(self, compaction: Compaction) -> None:
        first = compaction.first_index
        self.entries = {index: entry for index, entry in self.entries.items() if index >= first}
        for index in sorted(self.snapshots)[:-2]:
            if compaction.oldest_snapshot is None or index < compaction.oldest_snapshot:
                del self.snapshots[index]

    def load(self) -> tuple[HardState, SnapshotMeta | None, list[Entry]]:
        entries = [self.entries[index] for index in sorted(self.entries)]
        snapshot = self.snapshot
        if snapshot is not None and entries and entries[0].index <= snapshot.index:
            at = self.entries.get(snapshot.index)
            if at is None or at.term != snapshot.term:
                entries = []
                self.entries.clear()
        return self.hard_state, snapshot, entries


def seal_snapshot(meta: SnapshotMeta, state: int) -> bytes:
    body = msgspec.msgpack.encode((encode_snapshot_meta(meta), state))
    return zlib.crc32(body).to_bytes(4) + body


def open_snapshot(data: bytes) -> SnapshotMeta | None:
    if zlib.crc32(data[4:]).to_bytes(4) != data[:4]:
        return None
    return decode_snapshot_meta(msgspec.msgpack.decode(data[4:], type=tuple[bytes, int])[0])


def snapshot_state(data: bytes) -> int:
    return msgspec.msgpack.decode(data[4:], type=tuple[bytes, int])[1]


@dataclass
class Host:
    """One machine: its disk stays, its node comes and goes. `state` is a hash chain over everything applied."""

    name: str
    disk: Disk = field(default_factory=Disk)
    node: Node | None = None
    life: int = 0
    clock_rate: float = 1.0
    clock_offset: float = 0.0
    paused_until: float = 0.0
    timer: float = 0.0
    state: int = 0
    unfinished: list[Callable[[], None]] = field(default_factory=list)
    is_saving: bool = False
    proposals: dict[int, tuple[int, bytes]] = field(default_factory=dict)
    reads: dict[int, int] = field(default_factory=dict)
    confirmed: list[tuple[int, int]] = field(default_factory=list)
    seen: tuple[int, int, int] = (0, 0, 0)
    seen_leading: tuple[int, int, int] = (0, 0, 0)


@dataclass
class Faults:
    """How badly the network and the disks behave."""

    loss: float = 0.0
    duplication: float = 0.0
    slow: float = 0.0
    slow_disk: float = 0.0


class World:
    """See the module. Script it (`run`, `isolate`, `crash` ...) or let `chaos` choose."""

    def __init__(self, seed: int, names: str = "abc", *, config: RaftConfig = CONFIG, bootstrap: str | None = None):
        self.rng = Random(seed)
        self.config = config
        self.now = 0.0
        self.faults = Faults()
        self.blocked: set[tuple[str, str]] = set()
        self.tampered: Callable[[str, str, Message], Message | None] | None = None
        self.hosts = {name: Host(name) for name in names}
        self.events = 0
        self._heap: list[tuple[float, int, Callable[[], None]]] = []
        self._sequence = 0
        self.leaders: dict[int, str] = {}
        self.votes: dict[tuple[str, int], str] = {}
        self.entry_at: dict[tuple[int, int], tuple[EntryKind, bytes, int]] = {}
        self.committed: dict[int, tuple[int, bytes]] = {}
        self.commit_term: dict[int, int] = {}
        self.highest_committed = 0
        self.acknowledged: dict[bytes, int] = {}
        self.highest_acknowledged = 0
        self.reads_done = 0
        self.log: list[str] = []
        first = configuration(*(bootstrap if bootstrap is not None else names))
        for host in self.hosts.values():
            self.start(host.name)
            if host.name in first.voter_ids:
                assert host.node is not None
                host.node.bootstrap(first)
                self._pump(host)

    # -- time

    def at(self, delay: float, action: Callable[[], None]) -> None:
        self._sequence += 1
        heapq.heappush(self._heap, (self.now + delay, self._sequence, action))

    def _for(self, host: Host, delay: float, action: Callable[[], None]) -> None:
        """Later, unless the host has crashed; after its pause, if it is paused."""
        life = host.life

        def event() -> None:
            if host.life != life or host.node is None:
                return
            if host.paused_until > self.now:
                self.at(host.paused_until - self.now, event)
                return
            action()

        self.at(delay, event)

    def run(self, seconds: float) -> None:
        end = self.now + seconds
        while self._heap and self._heap[0][0] <= end:
            self.now, _, action = heapq.heappop(self._heap)
            self.events += 1
            action()
        self.now = end

    def run_until(self, condition: Callable[[], bool], seconds: float, what: str) -> None:
        end = self.now + seconds
        while not condition():
            assert self._heap, f"nothing left to happen, waiting for {what}"
            assert self._heap[0][0] <= end, f"after {seconds} s still waiting for {what}\n" + self.describe()
            self.now, _, action = heapq.heappop(self._heap)
            self.events += 1
            action()

    def clock(self, host: Host) -> float:
        return host.clock_offset + self.now * host.clock_rate

    # -- hosts

    def node(self, name: str) -> Node:
        node = self.hosts[name].node
        assert node is not None
        return node

    def start(self, name: str) -> None:
        host = self.hosts[name]
        assert host.node is None
        hard_state, snapshot, entries = host.disk.load()
        host.life += 1
        host.state = snapshot_state(host.disk.snapshots[snapshot.index][1]) if snapshot is not None else 0
        host.unfinished, host.is_saving = [], False
        host.proposals, host.reads, host.confirmed = {}, {}, []
        host.seen = host.seen_leading = (0, 0, 0)
        host.timer = 0.0
        host.node = Node(
            node_id=name,
            config=self.config,
            rng=Random(self.rng.getrandbits(32)),
            now=self.clock(host),
            hard_state=hard_state,
            snapshot=snapshot,
            entries=entries,
        )
        self._pump(host)

    def crash(self, name: str, *, steps_done: int | None = None) -> None:
        """Stop a host now; of the write under way, a prefix of the steps (random, or as told) reached the disk."""
        host = self.hosts[name]
        steps = host.unfinished
        for step in steps[: self.rng.randint(0, len(steps)) if steps_done is None else steps_done]:
            step()
        host.disk.incoming = b""
        host.node = None
        host.life += 1

    def pause(self, name: str, seconds: float) -> None:
        self.hosts[name].paused_until = self.now + seconds

    def live(self) -> list[Host]:
        return [host for host in self.hosts.values() if host.node is not None]

    # -- network

    def isolate(self, *names: str) -> None:
        """Cut these off from all others (not from each other)."""
        for name in names:
            for other in self.hosts:
                if other not in names:
                    self.blocked |= {(name, other), (other, name)}

    def heal(self) -> None:
        self.blocked.clear()

    def send(self, sender: str, peer_id: str, message: Message) -> None:
        if self.tampered is not None:
            changed = self.tampered(sender, peer_id, message)
            if changed is None:
                return
            message = changed
        data = encode_message(message)
        copies = 1 + (self.rng.random() < self.faults.duplication)
        for _ in range(copies):
            if self.rng.random() < self.faults.loss:
                continue
            delay = self.rng.uniform(0.0005, 0.002)
            if self.rng.random() < self.faults.slow:
                delay = self.rng.uniform(0.01, 1.5)
            host = self.hosts.get(peer_id)
            if host is not None:
                self.at(delay, lambda host=host: self._arrive(sender, host, data))

    def _arrive(self, sender: str, host: Host, data: bytes) -> None:
        if (sender, host.name) in self.blocked or host.node is None:
            return
        self._for(host, 0.0, lambda: self.deliver(sender, host.name, decode_message(data)))

    def deliver(self, sender: str, name: str, message: Message) -> None:
        host = self.hosts[name]
        node = self.node(name)
        if node.receive_message(sender, message, self.clock(host)):
            self._pump(host)

    # -- the driver's part

    def _pump(self, host: Host) -> None:
        while True:
            node = host.node
            assert node is not None
            now = self.clock(host)
            if now >= node.next_deadline(now):
                node.handle_timer(now)
            ready = node.take_ready(now)
            self._carry_out(host, node, ready)
            self._check(host, node)
            if not node.log.has_committed:
                break
        self._arm(host, node)

    def _arm(self, host: Host, node: Node) -> None:
        deadline = node.next_deadline(self.clock(host))
        if deadline in (float("inf"), host.timer):
            return
        host.timer = deadline
        life = host.life

        def ring() -> None:
            if host.life == life and host.timer == deadline:
                host.timer = 0.0
                self._pump(host)

        self._for(host, max(0.0, (deadline - self.clock(host)) / host.clock_rate) + 1e-6, ring)

    def _carry_out(self, host: Host, node: Node, ready: Ready) -> None:
        for peer_id, message in ready.messages:
            self._check_sent(host, peer_id, message)
            self.send(host.name, peer_id, message)
        if ready.write is not None:
            self._start_write(host, ready.write)
        for entry in ready.committed:
            self._apply(host, node, entry)
        for reads in ready.reads:
            host.confirmed.extend((reads.index, host.reads.pop(read_id)) for read_id in reads.read_ids)
        for read_id in ready.reads_failed:
            host.reads.pop(read_id)
        for index, floor in [read for read in host.confirmed if read[0] <= node.log.applied]:
            assert index >= floor, f"{host.name} answered a read at {index}, but {floor} was acknowledged before"
            host.confirmed.remove((index, floor))
            self.reads_done += 1
        for wanted in ready.chunks_wanted:
            self._for(host, 0.001, lambda wanted=wanted: self._provide_chunk(host, wanted))
        if node.snapshot_due(self.clock(host)) and not host.is_saving:
            self._save_snapshot(host, node)

    def _start_write(self, host: Host, write: Write) -> None:
        host.unfinished = host.disk.steps(write)
        delay = self.rng.uniform(0.0002, 0.003)
        if self.rng.random() < self.faults.slow_disk:
            delay = self.rng.uniform(0.05, 1.0)

        def done() -> None:
            node = host.node
            assert node is not None
            for step in host.unfinished:
                step()
            host.unfinished = []
            installed = host.disk.installed(write)
            if installed is not None:
                host.state = snapshot_state(host.disk.snapshots[installed.index][1])
                host.proposals = {}
            node.advance(write, self.clock(host), installed=installed)
            self._pump(host)

        self._for(host, delay, done)

    def _apply(self, host: Host, node: Node, entry: Entry) -> None:
        known = self.committed.setdefault(entry.index, (entry.term, entry.data))
        assert known == (entry.term, entry.data), f"{host.name} applies another entry at {entry.index}"
        host.state = zlib.crc32(entry.data, zlib.crc32(entry.index.to_bytes(8), host.state))
        proposal = host.proposals.pop(entry.index, None)
        if proposal is not None and proposal[0] == entry.term:
            self.acknowledged[proposal[1]] = entry.index
            self.highest_acknowledged = max(self.highest_acknowledged, entry.index)

    def _save_snapshot(self, host: Host, node: Node) -> None:
        host.is_saving = True
        meta, state = node.snapshot_meta(), host.state

        def saved() -> None:
            assert host.node is not None
            host.disk.snapshots[meta.index] = (meta, seal_snapshot(meta, state))
            compaction = host.node.compact(meta, self.clock(host))
            host.is_saving = False
            self._for(host, 0.002, lambda: host.disk.compact(compaction))
            self._pump(host)

        self._for(host, self.rng.uniform(0.001, 0.3), saved)

    def _provide_chunk(self, host: Host, wanted: ChunkWanted) -> None:
        assert host.node is not None
        found = host.disk.snapshots.get(wanted.index)
        if found is None:
            host.node.chunk_unavailable(wanted, self.clock(host))
        else:
            meta, data = found
            end = wanted.offset + self.config.chunk_bytes
            host.node.provide_chunk(
                wanted, data[wanted.offset : end], is_last=end >= len(data), snapshot_term=meta.term
            )
        self._pump(host)

    # -- clients

    def leader(self) -> str | None:
        """The live leader of the highest term."""
        found = [host for host in self.live() if host.node is not None and host.node.role is Role.LEADER]
        return max(found, key=lambda host: host.node.term).name if found else None  # type: ignore[union-attr]

    def wait_leader(self, seconds: float = 15.0) -> str:
        """A leader that has committed in its term."""
        self.run_until(
            lambda: (name := self.leader()) is not None and self.node(name).is_ready_for_changes, seconds, "a leader"
        )
        name = self.leader()
        assert name is not None
        return name

    def propose(self, name: str, data: bytes) -> int | None:
        host, node = self.hosts[name], self.node(name)
        try:
            index = node.propose(data, self.clock(host))
        except (NotLeader, LimitExceeded):
            return None
        host.proposals[index] = (node.term, data)
        self._pump(host)
        return index

    def commit(self, data: bytes, seconds: float = 15.0) -> int:
        """Propose until acknowledged, as a client with retries does (each try is a new command to the log)."""
        end = self.now + seconds
        while data not in self.acknowledged:
            assert self.now < end, f"{data!r} was not committed\n" + self.describe()
            name = self.leader()
            if name is not None:
                self.propose(name, data)
            self.run(0.2)
        return self.acknowledged[data]

    def read(self, name: str) -> None:
        """A linearizable read; checked when it is answered."""
        host = self.hosts[name]
        try:
            read_id = self.node(name).request_read()
        except NotLeader:
            return
        host.reads[read_id] = self.highest_acknowledged
        self._pump(host)

    def change(self, name: str, wanted: Configuration) -> bool:
        host = self.hosts[name]
        try:
            self.node(name).propose_configuration(wanted, self.clock(host))
        except (NotLeader, Refused):
            return False
        self._pump(host)
        return True

    def transfer(self, name: str, target: str | None = None) -> bool:
        host = self.hosts[name]
        try:
            self.node(name).transfer_leadership(target, self.clock(host))
        except (NotLeader, Refused):
            return False
        self._pump(host)
        return True

    # -- invariants

    def _check_sent(self, host: Host, peer_id: str, message: Message) -> None:
        match message:
            case VoteResponse(pre=False, granted=True):
                known = self.votes.setdefault((host.name, message.term), peer_id)
                assert known == peer_id, f"{host.name} voted twice in term {message.term}"
                assert host.disk.hard_state.term >= message.term, "a vote was sent before it was durable"
            case AppendResponse(accepted=True):
                node = host.node
                assert node is not None
                assert host.disk.hard_state.term >= message.term
                if node.term == message.term and message.index > 0:
                    term = node.log.term_at(message.index)
                    snapshot = host.disk.snapshot
                    is_durable = message.index in host.disk.entries or (
                        snapshot is not None and snapshot.index >= message.index
                    )
                    assert is_durable, f"{host.name} acknowledged {message.index} (term {term}) before it was durable"
            case _:
                pass

    def _check(self, host: Host, node: Node) -> None:
        log = node.log
        assert log.applied <= min(log.commit, log.stable)
        assert log.commit <= log.last_index
        assert log.stable <= log.last_index
        if log.snapshot is not None:
            assert log.snapshot.index <= log.commit
            assert log.base <= log.snapshot.index
        self._check_entries(host, node)
        self._check_commit(host, node)
        if node.is_leader:
            self._check_leader(host, node)
        else:
            host.seen_leading = (0, 0, 0)

    def _check_entries(self, host: Host, node: Node) -> None:
        log = node.log
        last, last_term, base = host.seen
        first = last if log.term_at(last) == last_term and base == log.base else log.base
        for index in range(max(first, log.base) + 1, log.last_index + 1):
            entry = log.entries(index, index)[0]
            previous = log.term_at(index - 1)
            known = self.entry_at.setdefault((index, entry.term), (entry.kind, entry.data, previous or -1))
            assert known[:2] == (entry.kind, entry.data), f"two entries of term {entry.term} at {index}"
            if previous is not None and known[2] != -1:
                assert known[2] == (previous or -1), f"entry {index} of term {entry.term} follows two different ones"
        host.seen = (log.last_index, log.last_term, log.base)

    def _check_commit(self, host: Host, node: Node) -> None:
        log = node.log
        index = log.commit
        while index > max(log.base, 0):
            entry = log.entries(index, index)[0]
            known = self.committed.get(index)
            if known is None:
                self.committed[index] = (entry.term, entry.data)
                self.commit_term[index] = node.term
            else:
                assert known == (entry.term, entry.data), f"{host.name} commits another entry at {index}"
                if index in self.commit_term:
                    break
                self.commit_term[index] = node.term
            index -= 1
        self.highest_committed = max(self.highest_committed, log.commit)

    def _check_leader(self, host: Host, node: Node) -> None:
        log, term = node.log, node.term
        known = self.leaders.setdefault(term, host.name)
        assert known == host.name, f"term {term} has two leaders, {known} and {host.name}"
        assert log.commit <= log.stable, "a leader committed what is not durable at itself"
        was_term, was_last, was_commit = host.seen_leading
        if was_term != term:
            for index, commit_term in self.commit_term.items():
                if commit_term < term and index > log.base:
                    assert log.term_at(index) == self.committed[index][0], f"leader {host.name} of {term} lacks {index}"
        else:
            assert log.last_index >= was_last, "a leader removed an entry"
            if log.commit > was_commit:
                self._check_quorum(node)
        host.seen_leading = (term, log.last_index, log.commit)
        if host.paused_until <= self.now and node.lease_valid(self.clock(host)):
            assert log.applied >= self.highest_acknowledged, (
                f"{host.name} may serve reads at {log.applied}, but {self.highest_acknowledged} was acknowledged"
            )

    def _check_quorum(self, node: Node) -> None:
        index = node.log.commit
        term = node.log.term_at(index)
        assert term == node.term, "a leader committed by counting an entry of an older term"
        voters = node.log.configuration.voter_ids
        holding = [voter for voter in voters if self.hosts[voter].disk.holds(index, term)]
        assert len(holding) > len(voters) // 2, f"{index} was committed but only {holding} hold it durably"

    def describe(self) -> str:
        lines = [f"t={self.now:.3f}"]
        for host in self.hosts.values():
            node = host.node
            if node is None:
                lines.append(f"{host.name}: down")
            else:
                log = node.log
                lines.append(
                    f"{host.name}: {node.role.value} term {node.term} leader {node.leader_id} last {log.last_index}@"
                    f"{log.last_term} commit {log.commit} applied {log.applied} stable {log.stable} base {log.base} "
                    f"voters {log.configuration.voter_ids} installing {node._installation.is_complete}"
                )
        return "\n".join(lines)

    # -- chaos

    def chaos(self, seconds: float, *, membership: bool = True) -> None:
        """Random faults at rates drawn for this run, then none: the rest must recover and converge."""
        rng = self.rng
        self.faults = Faults(
            loss=rng.choice((0.0, 0.01, 0.1, 0.25)),
            duplication=rng.choice((0.0, 0.05, 0.3)),
            slow=rng.choice((0.0, 0.02, 0.2)),
            slow_disk=rng.choice((0.0, 0.02, 0.1)),
        )
        rates = [rng.uniform(0.0, 1.0) for _ in range(7)]
        for host in self.hosts.values():
            host.clock_rate = rng.uniform(0.97, 1.03)
        end = self.now + seconds
        count = 0
        while self.now < end:
            self.run(rng.expovariate(40.0))
            count += 1
            live = [host.name for host in self.live()]
            if live:
                name = rng.choice(live)
                for _ in range(rng.choice((1, 1, 3, 10))):
                    count += 1
                    self.propose(name, b"%d" % count)
                self.read(rng.choice(live))
            if rng.random() < 0.08:
                self._mischief(rates, membership=membership)

    def _mischief(self, rates: list[float], *, membership: bool) -> None:
        rng = self.rng
        names = sorted(self.hosts)
        live = [host.name for host in self.live()]
        kind = rng.choices(range(len(rates)), rates)[0]
        leader = self.leader()
        victim = leader if leader is not None and rng.random() < 0.5 else rng.choice(live or names)
        if kind == 0 and live:
            self.crash(victim)
        elif kind == 1:
            down = [name for name in names if name not in live]
            if down:
                self.start(rng.choice(down))
        elif kind == 2 and live:
            self.pause(victim, rng.uniform(0.05, 4.0))
        elif kind == 3:
            self.heal()
            self.isolate(*{victim, *rng.sample(names, rng.randint(0, len(names) // 2))})
        elif kind == 4:
            self.blocked.add(rng.choice(((victim, rng.choice(names)), (rng.choice(names), victim))))
        elif kind == 5:
            self.heal()
        elif kind == 6 and live:
            if leader is None:
                return
            if rng.random() < 0.3 or not membership:
                self.transfer(leader, rng.choice((None, rng.choice(names))))
            else:
                self._change_membership(leader, rng.choice(names))

    def _change_membership(self, leader: str, name: str) -> None:
        now = self.node(leader).log.configuration
        if name in now.voter_ids:
            if len(now.voters) > 2:
                self.change(leader, now.without(name))
        elif name in now.server_ids or self.rng.random() < 0.2:
            self.change(leader, now.with_voter(Server(name, f"{name}:8300")))
        else:
            self.change(leader, now.with_learner(Server(name, f"{name}:8300")))

    def recover(self) -> None:
        """Faults end; a write must commit within ten election timeouts, and every member must have it."""
        self.faults = Faults()
        self.heal()
        for host in self.hosts.values():
            host.paused_until = min(host.paused_until, self.now)
            if host.node is None:
                self.start(host.name)
        self.commit(b"at the end", seconds=10 * 2 * self.config.election_timeout_s)
        leader = self.wait_leader()
        self.run_until(lambda: self._has_converged(self.leader() or leader), 30.0, "all members to agree")
        for data, index in self.acknowledged.items():
            if index in self.committed:
                assert self.committed[index][1] == data, f"acknowledged {data!r} was lost"

    def _has_converged(self, leader: str) -> bool:
        top = self.node(leader).log
        members = [self.hosts[name] for name in top.configuration.server_ids]
        applied = {(host.node.log.applied, host.state) for host in members if host.node is not None}
        return len(applied) == 1 and top.applied == top.last_index
