"""What a server knows only while it leads: each follower's progress, quorum contact, reads under way, a transfer.

The object is made when a term is won and dropped when it ends, so nothing of one term can leak into the next.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass, field

from mesh.raft.config import RaftConfig
from mesh.raft.log import RaftLog
from mesh.raft.messages import (
    AppendRequest,
    AppendResponse,
    Entry,
    HeartbeatRequest,
    Message,
    SnapshotChunk,
    SnapshotResponse,
    TimeoutNow,
)
from mesh.raft.progress import Progress, ProgressState
from mesh.raft.quorum import quorum_value


@dataclass(frozen=True, slots=True)
class ChunkWanted:
    """Snapshot bytes that a follower needs next; the driver reads them and gives them to `Node.provide_chunk`."""

    peer_id: str
    index: int
    offset: int


@dataclass(frozen=True, slots=True)
class ReadReady:
    """These reads were confirmed: a quorum knew us as leader after they came. Serve once `index` is applied."""

    read_ids: tuple[int, ...]
    index: int


@dataclass(slots=True)
class _ReadRound:
    round: int
    index: int
    read_ids: list[int] = field(default_factory=list)


class Leader:
    """One term of leadership."""

    def __init__(self, *, node_id: str, term: int, log: RaftLog, config: RaftConfig, now: float) -> None:
        self.term = term
        self._id = node_id
        self._log = log
        self._config = config
        self.progress: dict[str, Progress] = {}
        self.term_start_index = log.last_index + 1
        self.heartbeat_deadline = now
        self._push_deadline: float | None = None
        self._round = 0
        self._round_sent_s: deque[tuple[int, float]] = deque()
        self._lease_start_s: float | None = None
        self._grace_s = now
        self._reads_waiting: list[int] = []
        self._reads_sent: deque[_ReadRound] = deque()
        self.reads_ready: list[ReadReady] = []
        self.uncommitted_bytes = 0
        self.transfer_target: str | None = None
        self.transfer_deadline = 0.0
        self._timeout_now_sent = False
        self._lease_ended = False
        self._commit_told: dict[str, int] = {}
        self.sync_peers(now)

    # -- members

    def sync_peers(self, now: float) -> None:
        """Follow the latest configuration in the log: new servers start as probes, removed ones are forgotten."""
        wanted = [server for server in self._log.configuration.server_ids if server != self._id]
        for peer_id in sorted(self.progress.keys() - set(wanted)):
            del self.progress[peer_id]
        for peer_id in wanted:
            if peer_id not in self.progress:
                self.progress[peer_id] = Progress(
                    next_index=self._log.last_index + 1, window=self._config.window, now=now
                )
        if self.transfer_target is not None and self.transfer_target not in self._log.configuration.voter_ids:
            self.transfer_target = None

    def _voter_progress(self) -> Iterable[tuple[str, Progress | None]]:
        return ((voter, self.progress.get(voter)) for voter in self._log.configuration.voter_ids)

    # -- quorum contact

    def quorum_contact_s(self, now: float) -> float:
        """When a quorum was last heard from, or when this server last had a reason of its own for not hearing."""
        times = [now if peer is None else peer.contact_s for _, peer in self._voter_progress()]
        return max(quorum_value(times), self._grace_s)

    def note_time(self, now: float) -> None:
        """When our timer comes very late, this process was stopped: the silence says nothing about the followers."""
        if now - self.heartbeat_deadline > self._config.lease_s:
            self._grace_s = now

    def is_silenced(self, now: float) -> bool:
        """Without a quorum a leader stops sending once its lease is over.

        Its messages would only keep followers from electing the leader that a majority can reach (a bridge between two
        groups otherwise blocks both: openraft issue 2080).
        """
        return now - self.quorum_contact_s(now) > self._config.lease_s

    def quorum_deadline(self, now: float) -> float:
        """When this leader steps down unless a quorum is heard from."""
        return self.quorum_contact_s(now) + self._config.election_timeout_s

    def lease_valid(self, now: float) -> bool:
        """Whether no other leader can exist yet: a quorum answered a round *sent* less than a lease ago.

        False for the rest of the term once a transfer said TimeoutNow: that candidate is not held back by the
        followers' shield, however late it stands.
        """
        if self._lease_ended or self._log.commit < self.term_start_index:
            return False
        if self._lease_start_s is not None and now - self._lease_start_s < self._config.lease_s:
            return True
        return self._is_alone()

    def _is_alone(self) -> bool:
        return self._log.configuration.voter_ids == (self._id,)

    # -- what comes in

    def receive_append_response(self, peer_id: str, response: AppendResponse, now: float) -> None:
        """Advance or step back one follower."""
        peer = self.progress[peer_id]
        peer.contact_s = now
        if response.accepted:
            # A follower cannot hold more of our log than there is; anything else is a broken peer.
            peer.accepted(min(response.index, self._log.last_index), now)
            return
        if peer.state is ProgressState.SNAPSHOT:
            return
        if peer.state is ProgressState.PROBE and response.index != peer.next - 1:
            return  # the answer to an earlier probe
        if peer.state is ProgressState.REPLICATE and response.index <= peer.match <= response.hint_index:
            return  # a late answer from before the logs met
        hint, _ = self._log.latest_match(response.hint_index, response.hint_term)
        peer.refused(max(1, min(hint + 1, response.index, self._log.last_index + 1)))

    def receive_heartbeat_response(self, peer_id: str, round_id: int, now: float) -> bool:
        """Count the round for leases and reads, take up again what was lost; whether that gave work to do."""
        was_silenced = self.is_silenced(now)
        peer = self.progress[peer_id]
        peer.contact_s = now
        peer.acked_round = max(peer.acked_round, min(round_id, self._round))
        is_stalled = peer.stalled(now, self._config.retransmit_s)
        if is_stalled:
            peer.restart(now)
        self._count_round(now)
        return was_silenced or is_stalled or bool(self.reads_ready or self._reads_waiting)

    def receive_snapshot_response(self, peer_id: str, response: SnapshotResponse, now: float) -> None:
        """The next chunk, if this answers the snapshot under way."""
        peer = self.progress[peer_id]
        peer.contact_s = now
        if peer.state is not ProgressState.SNAPSHOT or response.index != peer.snapshot_index:
            return
        if response.offset != peer.snapshot_offset:  # equal: the answer to a repeated chunk, its successor is under way
            peer.continue_snapshot(response.offset, now)

    def _count_round(self, now: float) -> None:
        rounds = [self._round if peer is None else peer.acked_round for _, peer in self._voter_progress()]
        confirmed = quorum_value(rounds)
        while self._round_sent_s and self._round_sent_s[0][0] <= confirmed:
            self._lease_start_s = self._round_sent_s.popleft()[1]
        while self._reads_sent and self._reads_sent[0].round <= confirmed:
            reads = self._reads_sent.popleft()
            self.reads_ready.append(ReadReady(tuple(reads.read_ids), reads.index))

    # -- committing

    def advance_commit(self, now: float) -> bool:
        """Commit what a quorum holds durably; whether the index moved.

        Only an entry of this term may be counted (paper, figure 8), and never one that is not durable here.
        """
        matches = [self._log.stable if peer is None else peer.match for _, peer in self._voter_progress()]
        index = min(quorum_value(matches), self._log.stable)
        before = self._log.commit
        if index < self.term_start_index or not self._log.commit_to(index):
            return False
        committed = self._log.entries(before + 1, self._log.commit)
        self.uncommitted_bytes -= sum(len(entry.data) for entry in committed)
        if self._push_deadline is None:
            self._push_deadline = now + self._config.heartbeat_interval_s / 5
        return True

    # -- reads

    def request_read(self, read_id: int) -> None:
        """Confirm leadership for this read with the next round."""
        self._reads_waiting.append(read_id)

    @property
    def pending_reads(self) -> tuple[int, ...]:
        """Reads not confirmed yet."""
        sent = (read_id for reads in self._reads_sent for read_id in reads.read_ids)
        return (*sent, *self._reads_waiting)

    # -- transfer

    def start_transfer(self, target: str, now: float) -> None:
        """Hand over to target once it has the whole log; given up after one election timeout."""
        self.transfer_target = target
        self._timeout_now_sent = False
        self.transfer_deadline = now + self._config.election_timeout_s

    def best_successor(self, now: float) -> str | None:
        """The voter that was heard lately and holds the most of the log, the first by id among equals."""
        best: tuple[tuple[bool, int], str] | None = None
        for voter, peer in self._voter_progress():
            if peer is not None:
                rank = (now - peer.contact_s < self._config.election_timeout_s, peer.match)
                if best is None or rank > best[0]:
                    best = (rank, voter)
        return best[1] if best is not None else None

    # -- what goes out

    def next_deadline(self, now: float) -> float:
        """When handle_timer has something to do."""
        deadline = min(self.heartbeat_deadline, self.quorum_deadline(now))
        if self._push_deadline is not None:
            deadline = min(deadline, self._push_deadline)
        return deadline if self.transfer_target is None else min(deadline, self.transfer_deadline)

    def collect(self, now: float) -> list[tuple[str, Message]]:
        """Everything to send now: entries and probes, confirmation rounds, due heartbeats, the end of a transfer."""
        self.note_time(now)
        if self.transfer_target is not None and now >= self.transfer_deadline:
            self.transfer_target = None
        if self.is_silenced(now):
            self.heartbeat_deadline = max(self.heartbeat_deadline, now + self._config.heartbeat_interval_s)
            self._push_deadline = None
            return []
        messages: list[tuple[str, Message]] = []
        self._collect_rounds(messages, now)
        shared: dict[tuple[int, int], AppendRequest] = {}
        for peer_id, peer in self.progress.items():
            self._collect_appends(messages, peer_id, peer, shared, now)
        self._collect_push(messages, now)
        self._collect_transfer(messages)
        return messages

    def _collect_rounds(self, messages: list[tuple[str, Message]], now: float) -> None:
        # Reads wait while a round is under way, so any number of them cost one round trip each way. Before an entry of
        # this term is committed the commit index may be behind what the last leader acknowledged (dissertation 6.4).
        reads_due = bool(self._reads_waiting) and not self._reads_sent and self._log.commit >= self.term_start_index
        if now < self.heartbeat_deadline and not reads_due:
            return
        self._round += 1
        self._round_sent_s.append((self._round, now))
        if self._log.commit >= self.term_start_index and self._reads_waiting:
            self._reads_sent.append(_ReadRound(self._round, self._log.commit, self._reads_waiting))
            self._reads_waiting = []
        self.heartbeat_deadline = now + self._config.heartbeat_interval_s
        for peer_id, peer in self.progress.items():
            messages.append((peer_id, self._heartbeat(peer_id, peer)))
        self._push_deadline = None
        if self._is_alone():
            self._count_round(now)

    def _heartbeat(self, peer_id: str, peer: Progress) -> HeartbeatRequest:
        commit = min(peer.match, self._log.commit)
        self._commit_told[peer_id] = commit
        return HeartbeatRequest(self.term, self._round, commit)

    def _collect_appends(
        self,
        messages: list[tuple[str, Message]],
        peer_id: str,
        peer: Progress,
        shared: dict[tuple[int, int], AppendRequest],
        now: float,
    ) -> None:
        while not peer.is_paused():
            if peer.state is ProgressState.REPLICATE and peer.next > self._log.last_index:
                return
            prev_term = self._log.term_at(peer.next - 1)
            if prev_term is None or peer.next <= self._log.base:
                assert self._log.snapshot is not None
                peer.start_snapshot(self._log.snapshot.index, now)
                return
            # Followers that stand at the same place get the same message object, so that it is encoded once.
            key = (peer.next, self._log.commit)
            append = shared.get(key)
            if append is None:
                append = shared[key] = self._append_at(peer.next, prev_term)
            peer.sent(append.prev_index + len(append.entries), now)
            self._commit_told[peer_id] = min(self._log.commit, append.prev_index + len(append.entries))
            messages.append((peer_id, append))

    def _append_at(self, next_index: int, prev_term: int) -> AppendRequest:
        last = min(self._log.last_index, next_index + self._config.batch_entries_max - 1)
        entries: tuple[Entry, ...] = ()
        if last >= next_index:
            entries = self._log.entries(next_index, last, bytes_max=self._config.batch_bytes_max)
        return AppendRequest(self.term, next_index - 1, prev_term, self._log.commit, entries)

    def _collect_push(self, messages: list[tuple[str, Message]], now: float) -> None:
        # Under load the next append carries the commit index; when nothing follows, followers still learn it soon.
        if self._push_deadline is None or now < self._push_deadline:
            return
        self._push_deadline = None
        for peer_id, peer in self.progress.items():
            if self._commit_told.get(peer_id, 0) < min(peer.match, self._log.commit):
                messages.append((peer_id, self._heartbeat(peer_id, peer)))

    def _collect_transfer(self, messages: list[tuple[str, Message]]) -> None:
        if self.transfer_target is None or self._timeout_now_sent:
            return
        peer = self.progress[self.transfer_target]
        if peer.match == self._log.last_index:
            self._lease_ended = True
            self._timeout_now_sent = True  # said once; if it is lost, the deadline ends the transfer
            messages.append((self.transfer_target, TimeoutNow(self.term)))

    def chunks_wanted(self) -> list[ChunkWanted]:
        """Snapshot bytes to read for followers that are due one."""
        wanted: list[ChunkWanted] = []
        for peer_id, peer in self.progress.items():
            if peer.state is ProgressState.SNAPSHOT and peer.chunk_wanted:
                peer.chunk_wanted = False
                wanted.append(ChunkWanted(peer_id, peer.snapshot_index, peer.snapshot_offset))
        return wanted

    def chunk(self, wanted: ChunkWanted, data: bytes, *, is_last: bool, snapshot_term: int) -> SnapshotChunk | None:
        """The message with those bytes, unless the follower has moved on meanwhile."""
        peer = self.progress.get(wanted.peer_id)
        if peer is None or peer.state is not ProgressState.SNAPSHOT:
            return None
        if (peer.snapshot_index, peer.snapshot_offset) != (wanted.index, wanted.offset):
            return None
        return SnapshotChunk(self.term, wanted.index, snapshot_term, wanted.offset, data, is_last)

    def restart_snapshot(self, peer_id: str, now: float) -> None:
        """The file is gone (two newer ones exist): begin again with the newest."""
        peer = self.progress.get(peer_id)
        if peer is not None and peer.state is ProgressState.SNAPSHOT and self._log.snapshot is not None:
            peer.start_snapshot(self._log.snapshot.index, now)

    def oldest_snapshot_in_flight(self, now: float) -> int | None:
        """The lowest snapshot index being sent to a follower that still answers."""
        return min(
            (
                peer.snapshot_index
                for peer in self.progress.values()
                if peer.state is ProgressState.SNAPSHOT and now - peer.contact_s < self._config.election_timeout_s
            ),
            default=None,
        )
