"""What a raft core hands to its driver; the order of things is in `mesh.raft.node`."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum

from mesh.raft.messages import Entry, HardState, Message, SnapshotChunk
from mesh.raft.replication import ChunkWanted, ReadReady


class Role(Enum):
    """Paper, section 5.1, and the pre-candidate of dissertation 9.6."""

    FOLLOWER = "follower"
    PRE_CANDIDATE = "pre-candidate"
    CANDIDATE = "candidate"
    LEADER = "leader"


@dataclass(frozen=True, slots=True)
class LeadershipChanged:
    """Who leads, as far as this server knows; leader_id is None while nobody is known to."""

    is_leader: bool
    leader_id: str | None
    term: int


@dataclass(frozen=True, slots=True)
class Write:
    """What must be durable, all of it in this order, before `advance`: term and vote together, a leader's snapshot
    (chunks for one temporary file; the last one completes it), then entries, replacing all at and above the first."""

    hard_state: HardState | None
    chunks: tuple[SnapshotChunk, ...]
    entries: tuple[Entry, ...]

    @property
    def completes_snapshot(self) -> bool:
        return bool(self.chunks) and self.chunks[-1].is_last


@dataclass(frozen=True, slots=True)
class Ready:
    """What to do now; see the module."""

    messages: tuple[tuple[str, Message], ...]
    write: Write | None
    committed: tuple[Entry, ...]
    leadership: tuple[LeadershipChanged, ...]
    reads: tuple[ReadReady, ...]
    reads_failed: tuple[int, ...]
    chunks_wanted: tuple[ChunkWanted, ...]


@dataclass(frozen=True, slots=True)
class Compaction:
    """What the store may forget: entries before first_index, and snapshots before the newest two and before
    oldest_snapshot, which a follower is receiving."""

    first_index: int
    oldest_snapshot: int | None
