"""One raft server as a synchronous state machine: messages, proposals and time go in, a `Ready` comes out.

The contract with the driver, after etcd/raft: `take_ready` gives messages that may leave at once, entries to apply, and
at most one `Write`. Persist the write, then call `advance`; only then do its own messages leave, with the next `Ready`.
So no answer promises what is not on disk, the leader's appends travel while its own disk works, and everything that
arrives during a write shares the next one. Apply `Ready.committed` before the next `take_ready`. Deadlines, not ticks:
call `handle_timer` once `next_deadline` has passed.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from random import Random

from mesh.errors import LimitExceeded, NotLeader, ProtocolError, Refused
from mesh.raft.compaction import Compactor
from mesh.raft.config import RaftConfig
from mesh.raft.election import Election
from mesh.raft.installation import Installation
from mesh.raft.log import RaftLog
from mesh.raft.messages import (
    AppendRequest,
    AppendResponse,
    Configuration,
    Entry,
    EntryKind,
    HardState,
    HeartbeatRequest,
    HeartbeatResponse,
    Message,
    SnapshotChunk,
    SnapshotMeta,
    SnapshotResponse,
    TimeoutNow,
    VoteRequest,
    VoteResponse,
    check_configuration,
    encode_configuration,
)
from mesh.raft.outbox import Outbox
from mesh.raft.progress import Progress
from mesh.raft.ready import Compaction, LeadershipChanged, Ready, Role, Write
from mesh.raft.replication import ChunkWanted, Leader, ReadReady

__all__ = ["LeadershipChanged", "Node", "Ready", "Role", "Write"]

TERM_JUMP_MAX = 1 << 20
"""How far ahead a server that we do not know may be; a member may be any distance ahead."""


class Node:
    """The façade; see the module. Times are monotonic seconds."""

    def __init__(
        self,
        *,
        node_id: str,
        config: RaftConfig,
        rng: Random,
        now: float,
        hard_state: HardState | None = None,
        snapshot: SnapshotMeta | None = None,
        entries: Iterable[Entry] = (),
    ) -> None:
        """From what the store holds; nothing above the snapshot counts as committed until a leader says so."""
        self.node_id = node_id
        self.config = config
        self.log = RaftLog(snapshot, entries)
        self.term = hard_state.term if hard_state is not None else 0
        self.vote = hard_state.vote if hard_state is not None else None
        self.role = Role.FOLLOWER
        self.leader_id: str | None = None
        self._leader: Leader | None = None
        self._election = Election(config, rng, now)
        self._outbox = Outbox(self.log, hard_state if hard_state is not None else HardState())
        self._installation = Installation()
        self._compactor = Compactor(self.log, config)
        self._leadership: list[LeadershipChanged] = []
        self._announced = LeadershipChanged(is_leader=False, leader_id=None, term=self.term)
        self._reads_ready: list[ReadReady] = []
        self._reads_failed: list[int] = []
        self._next_read_id = 1
        if self.term > 0:
            # 1. We answer a leader's heartbeat. 2. We are killed and start again at once. 3. Without this we would vote
            # for another while that leader still serves reads under the lease that our answer gave it.
            self._election.contact_s = now
        if self.log.configuration.voter_ids == (node_id,):
            self._election.deadline = now  # nobody else can lead
            self._election.contact_s = -math.inf

    # -- what the driver and its callers ask

    @property
    def has_state(self) -> bool:
        """Whether this server has ever been part of a cluster."""
        return self.term > 0 or self.log.last_index > 0

    @property
    def is_leader(self) -> bool:
        return self._leader is not None

    @property
    def progress(self) -> dict[str, Progress]:
        """Each follower as this leader sees it; empty elsewhere."""
        return self._leader.progress if self._leader is not None else {}

    @property
    def contact_s(self) -> float:
        """When a leader was last heard here; minus infinity when never."""
        return self._election.contact_s

    @property
    def is_ready_for_changes(self) -> bool:
        """Leader: an entry of its term is committed, so reads and membership changes may begin."""
        return self._leader is not None and self.log.commit >= self._leader.term_start_index

    def lease_valid(self, now: float) -> bool:
        """Whether this leader may answer reads from its applied state without asking anyone.

        It has applied all that its predecessors acknowledged, and no other leader can exist yet.
        """
        leader = self._leader
        return leader is not None and leader.lease_valid(now) and self.log.applied >= leader.term_start_index

    def bootstrap(self, configuration: Configuration) -> bool:
        """Start a cluster with these voters; False (and nothing changes) when this server has state already.

        Servers that bootstrap must all be given the same voters; the others join empty and learn.
        """
        if self.has_state:
            return False
        check_configuration(configuration)
        self.term = 1
        self.log.append(Entry(1, 1, EntryKind.CONFIGURATION, encode_configuration(configuration)))
        if configuration.voter_ids == (self.node_id,):
            self._election.deadline = -math.inf
        return True

    def propose(self, data: bytes, now: float, *, kind: EntryKind = EntryKind.COMMAND) -> int:
        """Append a command; returns its index (its term is `term`). Committed only if applied with that term.

        Raises NotLeader, or LimitExceeded when it or the uncommitted log is too large.
        """
        leader = self._proposing_leader()
        if len(data) > self.config.entry_bytes_max:
            raise LimitExceeded(f"a log entry of {len(data)} bytes; the limit is {self.config.entry_bytes_max}")
        if leader.uncommitted_bytes + len(data) > self.config.uncommitted_bytes_max:
            raise LimitExceeded(
                f"{leader.uncommitted_bytes} bytes wait for a quorum of servers; try again once they have caught up"
            )
        return self._append(leader, kind, data, now)

    def propose_configuration(self, configuration: Configuration, now: float) -> int:
        """Append a configuration, in force from now on; returns its index.

        Raises NotLeader, or Refused: when the last change is not committed, when this leader has committed nothing in
        its term (two disjoint majorities were possible: raft-dev, July 2015), or when more than one voter would change.
        """
        leader = self._proposing_leader()
        if self.log.configuration_index > self.log.commit:
            raise Refused("the last membership change is not committed yet; try again later")
        if self.log.commit < leader.term_start_index:
            raise Refused("this leader has not committed an entry of its term yet; try again later")
        changed = set(configuration.voter_ids) ^ set(self.log.configuration.voter_ids)
        if len(changed) > 1:
            raise Refused(f"one voter may change at a time, not {', '.join(sorted(changed))}")
        try:
            check_configuration(configuration)
        except ProtocolError as error:
            raise Refused(str(error)) from None
        index = self._append(leader, EntryKind.CONFIGURATION, encode_configuration(configuration), now)
        leader.sync_peers(now)
        return index

    def request_read(self) -> int:
        """Ask for a linearizable read (dissertation 6.4); its id comes back in Ready.reads or Ready.reads_failed.

        Raises NotLeader.
        """
        if self._leader is None:
            raise NotLeader(self.leader_id)
        read_id = self._next_read_id
        self._next_read_id += 1
        self._leader.request_read(read_id)
        return read_id

    def transfer_leadership(self, target: str | None, now: float) -> str:
        """Begin handing over to that voter, or to the one that holds the most; returns its id.

        Until it stands or one election timeout has passed, proposals raise NotLeader. Raises NotLeader or Refused.
        """
        leader = self._proposing_leader()
        chosen = target if target is not None else leader.best_successor(now)
        if chosen is None or chosen == self.node_id or chosen not in self.log.configuration.voter_ids:
            raise Refused(f"no other voter to hand the leadership to (asked for: {target})")
        leader.start_transfer(chosen, now)
        return chosen

    def _proposing_leader(self) -> Leader:
        if self._leader is None:
            raise NotLeader(self.leader_id)
        if self._leader.transfer_target is not None:
            raise NotLeader(None)
        return self._leader

    def _append(self, leader: Leader, kind: EntryKind, data: bytes, now: float) -> int:
        entry = Entry(self.log.last_index + 1, self.term, kind, data)
        self.log.append(entry)
        leader.uncommitted_bytes += len(data)
        return entry.index

    # -- time

    def next_deadline(self, now: float) -> float:
        """When to call handle_timer next; infinity when only a message can change anything."""
        if self._leader is not None:
            return self._leader.next_deadline(now)
        return self._election.deadline if self._may_stand() else math.inf

    def handle_timer(self, now: float) -> None:
        """Do what is due: heartbeats leave with the next Ready, elections start, a lonely leader steps down."""
        leader = self._leader
        if leader is not None:
            leader.note_time(now)
            if now >= leader.quorum_deadline(now):
                self._become_follower(self.term, None, now)
            return
        if now >= self._election.deadline and self._may_stand():
            if self.log.configuration.voter_ids == (self.node_id,):
                self._campaign(now, is_transfer=False)
            else:
                self._ask_around(now)

    def _may_stand(self) -> bool:
        return self.node_id in self.log.configuration.voter_ids and not self._installation.is_complete

    # -- elections

    def _ask_around(self, now: float) -> None:
        self._set_role(Role.PRE_CANDIDATE, None)
        self._election.start(now)
        self._election.record(self.node_id, granted=True)
        request = VoteRequest(self.term + 1, self.log.last_index, self.log.last_term, pre=True, transfer=False)
        for voter in self._other_voters():
            self._outbox.send(voter, request)

    def _campaign(self, now: float, *, is_transfer: bool) -> None:
        self.term += 1
        self.vote = self.node_id
        self._set_role(Role.CANDIDATE, None)
        self._election.start(now)
        # The requests leave, and our own vote counts, once the vote is durable: after a crash we must not vote again.
        request = VoteRequest(self.term, self.log.last_index, self.log.last_term, pre=False, transfer=is_transfer)
        for voter in self._other_voters():
            self._outbox.send_after_write(voter, request)

    def _other_voters(self) -> list[str]:
        return [voter for voter in self.log.configuration.voter_ids if voter != self.node_id]

    def _count_votes(self, now: float) -> None:
        outcome = self._election.outcome(self.log.configuration.voter_ids)
        if outcome == "pending":
            return
        if outcome == "lost":
            self._set_role(Role.FOLLOWER, None)  # the timer runs on
        elif self.role is Role.PRE_CANDIDATE:
            self._campaign(now, is_transfer=False)
        else:
            self._become_leader(now)

    def _become_leader(self, now: float) -> None:
        leader = Leader(node_id=self.node_id, term=self.term, log=self.log, config=self.config, now=now)
        leader.uncommitted_bytes = self.log.bytes_after(self.log.commit)
        self._leader = leader
        self._set_role(Role.LEADER, self.node_id)
        self._append(leader, EntryKind.NOOP, b"", now)

    def _become_follower(self, term: int, leader_id: str | None, now: float) -> None:
        if term > self.term:
            self.term, self.vote = term, None
        if self._leader is not None:
            self._reads_ready.extend(self._leader.reads_ready)
            self._reads_failed.extend(self._leader.pending_reads)
            self._leader = None
            self._election.rearm(now)
        self._set_role(Role.FOLLOWER, leader_id)

    def _set_role(self, role: Role, leader_id: str | None) -> None:
        self.role, self.leader_id = role, leader_id
        changed = LeadershipChanged(role is Role.LEADER, leader_id, self.term)
        known = self._announced
        if (changed.is_leader, leader_id) != (known.is_leader, known.leader_id) or (leader_id and changed != known):
            self._announced = changed
            self._leadership.append(changed)
        if role is not Role.LEADER:
            self._leader = None

    # -- messages

    def receive_message(self, sender_id: str, message: Message, now: float) -> bool:
        """Take in one message from an authenticated server; False when that leaves nothing for take_ready.

        An idle leader's followers answer heartbeats all the time, and waking the driver for each would be most of its
        work. Raises ProtocolError when it contradicts what raft allows (nothing has changed then); drop the connection.
        """
        match message:
            case VoteRequest():
                self._receive_vote_request(sender_id, message, now)
            case AppendRequest() | HeartbeatRequest() | SnapshotChunk():
                self._receive_from_leader(sender_id, message, now)
            case TimeoutNow():
                # Only the leader of this term may ask, and only a voter can stand.
                if message.term == self.term and sender_id == self.leader_id != self.node_id and self._may_stand():
                    self._campaign(now, is_transfer=True)
            case VoteResponse() | AppendResponse() | HeartbeatResponse() | SnapshotResponse():
                return self._receive_response(sender_id, message, now)
        return True

    def _receive_vote_request(self, sender_id: str, request: VoteRequest, now: float) -> None:
        if request.term < self.term:
            self._answer_vote(sender_id, request, granted=False)
            return
        is_known = not self.has_state or sender_id in self.log.configuration.server_ids
        if not (request.transfer and is_known) and self._shields(now):
            # Someone who cannot hear the leader, or was removed, must not depose it, nor raise our term. Our own term
            # may have moved past that leader's since: its lease, which we helped to give, has not ended for that.
            if request.pre or request.term == self.term:
                self._answer_vote(sender_id, request, granted=False)
            return
        is_up_to_date = (request.last_term, request.last_index) >= (self.log.last_term, self.log.last_index)
        may_vote = self.vote == sender_id or (self.vote is None and self.leader_id is None)
        if request.pre:
            granted = is_up_to_date and (request.term > self.term or may_vote)
            self._answer_vote(sender_id, request, granted=granted)
            return
        if request.term > self.term:
            if not is_known and (not is_up_to_date or request.term - self.term > TERM_JUMP_MAX):
                return  # it may be a voter that we have not learned of, but then its log is ahead
            self._become_follower(request.term, None, now)
            may_vote = True
        granted = is_up_to_date and may_vote
        if granted:
            self.vote = sender_id
            self._set_role(Role.FOLLOWER, None)  # it may have been asking around itself
            self._election.rearm(now)
        self._answer_vote(sender_id, request, granted=granted)

    def _shields(self, now: float) -> bool:
        if self._leader is not None:
            return now < self._leader.quorum_deadline(now)
        return self._election.shields(now)

    def _answer_vote(self, sender_id: str, request: VoteRequest, *, granted: bool) -> None:
        term = request.term if granted else self.term
        self._outbox.send_after_write(sender_id, VoteResponse(term, request.pre, granted))

    def _receive_response(
        self,
        sender_id: str,
        response: VoteResponse | AppendResponse | HeartbeatResponse | SnapshotResponse,
        now: float,
    ) -> bool:
        if sender_id not in self.log.configuration.server_ids:
            return False
        if isinstance(response, VoteResponse) and response.pre and response.granted:
            if self.role is Role.PRE_CANDIDATE and response.term == self.term + 1:
                self._election.record(sender_id, granted=True)
                self._count_votes(now)
            return True
        if response.term > self.term:
            self._become_follower(response.term, None, now)
            return True
        if isinstance(response, VoteResponse):
            wanted = Role.PRE_CANDIDATE if response.pre else Role.CANDIDATE
            if self.role is wanted and (response.pre or response.term == self.term):
                self._election.record(sender_id, granted=response.granted)
                self._count_votes(now)
            return True
        leader = self._leader
        if leader is None or response.term < self.term or sender_id not in leader.progress:
            return False
        match response:
            case AppendResponse():
                leader.receive_append_response(sender_id, response, now)
                self._advance_commit(leader, now)
            case HeartbeatResponse():
                return leader.receive_heartbeat_response(sender_id, response.round, now)
            case SnapshotResponse():
                leader.receive_snapshot_response(sender_id, response, now)
        return True

    def _advance_commit(self, leader: Leader, now: float) -> None:
        if not leader.advance_commit(now):
            return
        voters = self.log.configuration.voter_ids
        if self.node_id not in voters and self.log.commit >= self.log.configuration_index:
            # We led our own removal to its commit (dissertation 4.2.2); let the best of the others go on at once.
            successor = leader.best_successor(now)
            if successor is not None:
                self._outbox.send(successor, TimeoutNow(self.term))
            self._become_follower(self.term, None, now)

    # -- following

    def _receive_from_leader(
        self, sender_id: str, message: AppendRequest | HeartbeatRequest | SnapshotChunk, now: float
    ) -> None:
        if message.term < self.term:
            # An old leader, or we came back from a lonely campaign with a higher term: it must learn of our term.
            self._outbox.send_after_write(sender_id, HeartbeatResponse(self.term, 0))
            return
        if message.term == 0:
            raise ProtocolError(f"raft message of term 0 from {sender_id}")
        if message.term > self.term and not self._trusts(sender_id, message.term, now):
            return
        if message.term == self.term and self.leader_id not in (None, sender_id):
            raise ProtocolError(f"raft: {sender_id} claims to lead term {self.term}, but {self.leader_id} does")
        if message.term > self.term or self.role is not Role.FOLLOWER or self.leader_id != sender_id:
            self._become_follower(message.term, sender_id, now)
        self._election.heard_leader(now)
        match message:
            case AppendRequest():
                self._receive_append(sender_id, message)
            case HeartbeatRequest():
                self.log.commit_to(message.commit)
                self._outbox.send_when_durable(
                    sender_id, HeartbeatResponse(self.term, message.round), term=self.term, index=0
                )
            case SnapshotChunk():
                self._receive_chunk(sender_id, message)

    def _trusts(self, sender_id: str, term: int, now: float) -> bool:
        # A server that joined while we were away may lead us without being in our configuration, but one that we do
        # not know can neither depose a leader that we hear nor run our term up.
        if not self.has_state or sender_id in self.log.configuration.server_ids:
            return True
        return not self._shields(now) and term - self.term <= TERM_JUMP_MAX

    def _receive_append(self, leader_id: str, request: AppendRequest) -> None:
        if self._installation.is_complete:
            return
        here = self.log.term_at(request.prev_index)
        if here == request.prev_term:
            last = self.log.merge(request.entries) if request.entries else request.prev_index
            self.log.commit_to(min(request.commit, last))
            self._outbox.accept(leader_id, self.term, last)
        elif request.prev_index <= self.log.commit:
            if here is not None:
                raise ProtocolError(f"raft append on entry {request.prev_index}, committed here with another term")
            self._outbox.accept(leader_id, self.term, self.log.commit)  # compacted, so the leader has it too
        else:
            hint_index, hint_term = self.log.latest_match(request.prev_index, request.prev_term)
            answer = AppendResponse(self.term, False, request.prev_index, hint_index, hint_term)  # noqa: FBT003
            self._outbox.send_when_durable(leader_id, answer, term=self.term, index=0)

    def _receive_chunk(self, leader_id: str, chunk: SnapshotChunk) -> None:
        if self._installation.is_complete:
            return
        if chunk.index <= self.log.commit:
            self._outbox.accept(leader_id, self.term, self.log.commit)
            return
        if self.log.term_at(chunk.index) == chunk.snapshot_term:
            # Our log reaches it. Dropping what follows would drop entries that we may have acknowledged.
            self.log.commit_to(chunk.index)
            self._outbox.accept(leader_id, self.term, chunk.index)
            return
        offset = self._installation.take(chunk)
        if offset is not None:
            self._outbox.send_after_write(leader_id, SnapshotResponse(self.term, chunk.index, offset))

    # -- snapshots

    def provide_chunk(self, wanted: ChunkWanted, data: bytes, *, is_last: bool, snapshot_term: int) -> None:
        """The bytes asked for in Ready.chunks_wanted."""
        if self._leader is None:
            return
        chunk = self._leader.chunk(wanted, data, is_last=is_last, snapshot_term=snapshot_term)
        if chunk is not None:
            self._outbox.send(wanted.peer_id, chunk)

    def chunk_unavailable(self, wanted: ChunkWanted, now: float) -> None:
        """That snapshot is not there any more; the follower gets the newest instead."""
        if self._leader is not None:
            self._leader.restart_snapshot(wanted.peer_id, now)

    def snapshot_due(self, now: float) -> bool:
        """Whether enough has been applied since the last snapshot, and not too soon after it."""
        return self._compactor.is_due(now)

    def snapshot_meta(self) -> SnapshotMeta:
        """What a snapshot of the state as applied now stands for. Requires that something was applied."""
        return self._compactor.meta()

    def compact(self, meta: SnapshotMeta, now: float) -> Compaction:
        """That snapshot is durable; drop what it replaces. Returns what the store may forget."""
        oldest = self._leader.oldest_snapshot_in_flight(now) if self._leader is not None else None
        return self._compactor.compact(meta, now, oldest_in_flight=oldest)

    # -- output

    def take_ready(self, now: float) -> Ready:
        """Everything to do now; see the module for the order."""
        leader = self._leader
        wanted: list[ChunkWanted] = []
        if leader is not None:
            for peer_id, message in leader.collect(now):
                self._outbox.send(peer_id, message)
            wanted = leader.chunks_wanted()
            self._reads_ready.extend(leader.reads_ready)
            leader.reads_ready.clear()
        write = self._outbox.take_write(HardState(self.term, self.vote), self._installation)
        messages = self._outbox.take_messages()
        leadership, self._leadership = self._leadership, []
        reads, self._reads_ready = self._reads_ready, []
        failed, self._reads_failed = self._reads_failed, []
        committed = self.log.take_committed(self.config.apply_entries_max)
        return Ready(messages, write, committed, tuple(leadership), tuple(reads), tuple(failed), tuple(wanted))

    def advance(self, write: Write, now: float, *, installed: SnapshotMeta | None = None) -> None:
        """That write is durable. `installed` is the snapshot it completed, whose state the driver has restored by now;
        None when its bytes were damaged on the way, and then it is asked for again."""
        self._outbox.end_write(write)
        if write.completes_snapshot:
            self._finish_snapshot(write.chunks[-1], installed)
        if self.role is Role.CANDIDATE and self._outbox.durable == HardState(self.term, self.node_id):
            self._election.record(self.node_id, granted=True)
            self._count_votes(now)
        if self._leader is not None:
            self._advance_commit(self._leader, now)

    def _finish_snapshot(self, chunk: SnapshotChunk, installed: SnapshotMeta | None) -> None:
        self._installation.end()
        if installed is not None:
            self.log.reset(installed)
        if self.leader_id is None or self.leader_id == self.node_id:
            return
        if installed is None:
            self._outbox.send(self.leader_id, SnapshotResponse(self.term, chunk.index, 0))
        else:
            self._outbox.accept(self.leader_id, self.term, installed.index)
