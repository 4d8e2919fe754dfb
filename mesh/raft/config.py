"""Timing and limits of one raft server; every number has its reason beside it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Self

from mesh.errors import ConfigError


@dataclass(frozen=True, kw_only=True, slots=True)
class RaftConfig:
    """How fast and how much. Times are seconds, sizes bytes. Raises ConfigError when the values clash."""

    heartbeat_interval_s: float
    election_timeout_s: float
    """A follower waits between one and two of these, drawn anew each time, before it asks for votes."""
    lease_s: float
    """How long a leader may serve reads after it *sent* a round that a quorum answered; below election_timeout_s,
    because followers refuse every vote for one election timeout after they heard from a leader."""
    retransmit_s: float
    """An append or snapshot chunk without an answer for this long is sent again, once its peer answers heartbeats."""
    batch_entries_max: int = 512
    batch_bytes_max: int = 256 * 1024
    """Per append message; a single larger entry still travels alone."""
    window: int = 8
    """Appends in flight per follower; deep pipelines only move the queue to the follower's disk."""
    snapshot_entries: int = 16384
    snapshot_interval_s: float = 10.0
    snapshot_bytes: int = 32 * 1024 * 1024
    """A snapshot is taken once so many entries were applied and the interval is over, so that steady writes do not copy
    the whole state all the time; or after so many bytes at once, because the log lives in memory."""
    trailing_entries: int = 10240
    trailing_bytes: int = 8 * 1024 * 1024
    """Kept behind a snapshot so that a follower that is a little late needs no snapshot."""
    uncommitted_bytes_max: int = 16 * 1024 * 1024
    """Proposals above this are refused: a leader without a quorum must not grow without limit."""
    entry_bytes_max: int = 4 * 1024 * 1024
    apply_entries_max: int = 256
    """Applied per turn of the driver, so that heartbeats are never behind a long batch."""
    chunk_bytes: int = 256 * 1024
    """Snapshot bytes per message; the next follows the answer to the last."""

    def __post_init__(self) -> None:
        if not 0 < self.heartbeat_interval_s * 2 <= self.lease_s < self.election_timeout_s:
            raise ConfigError(
                "raft timing: needs 2 * heartbeat <= lease < election timeout, got "
                f"{self.heartbeat_interval_s} s, {self.lease_s} s, {self.election_timeout_s} s"
            )
        if min(self.batch_entries_max, self.window, self.snapshot_entries, self.apply_entries_max) < 1:
            raise ConfigError("raft limits: batch, window, snapshot and apply counts must be at least 1")
        if self.trailing_entries < 0 or self.retransmit_s <= 0 or self.chunk_bytes < 1:
            raise ConfigError("raft limits: trailing entries, retransmit time and chunk size must be positive")

    @classmethod
    def consul_default(cls, multiplier: int = 1) -> Self:
        """Consul's timing at `raft_multiplier`: at 1, heartbeat 150 ms (its mean), election in [1 s, 2 s), lease 0.5 s.

        Raises ConfigError unless 1 <= multiplier <= 10.
        """
        if not 1 <= multiplier <= 10:
            raise ConfigError(f"raft_multiplier: must be between 1 and 10, got {multiplier}")
        return cls(
            heartbeat_interval_s=0.15 * multiplier,
            election_timeout_s=1.0 * multiplier,
            lease_s=0.5 * multiplier,
            retransmit_s=0.5 * multiplier,
        )

    @classmethod
    def dev(cls) -> Self:
        """For one machine: a new leader in well under a second, yet no needless election on a loaded host."""
        return cls(heartbeat_interval_s=0.025, election_timeout_s=0.2, lease_s=0.1, retransmit_s=0.1)
