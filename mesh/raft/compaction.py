"""When the log is worth a snapshot, and how much of the log may go once there is one."""

from __future__ import annotations

import math

from mesh.raft.config import RaftConfig
from mesh.raft.log import RaftLog
from mesh.raft.messages import SnapshotMeta
from mesh.raft.ready import Compaction


class Compactor:
    """Of one server's log."""

    def __init__(self, log: RaftLog, config: RaftConfig) -> None:
        self._log = log
        self._config = config
        self._snapshot_s = -math.inf

    def is_due(self, now: float) -> bool:
        """Whether enough has been applied since the last snapshot, and not too soon after it."""
        entries, data_bytes = self._log.applied_since_snapshot
        if entries >= self._config.snapshot_entries and now - self._snapshot_s >= self._config.snapshot_interval_s:
            return True
        return entries > 0 and data_bytes >= self._config.snapshot_bytes

    def meta(self) -> SnapshotMeta:
        """What a snapshot of the state as applied now stands for. Requires that something was applied."""
        index = self._log.applied
        term = self._log.term_at(index)
        assert term is not None
        return SnapshotMeta(index, term, self._log.configuration_at(index))

    def compact(self, meta: SnapshotMeta, now: float, *, oldest_in_flight: int | None) -> Compaction:
        """That snapshot is durable; drop what it replaces. Returns what the store may forget.

        `oldest_in_flight`: the lowest index of a snapshot that this leader is sending to a follower.
        """
        self._snapshot_s = now
        log = self._log
        if log.snapshot is not None and meta.index <= log.snapshot.index:
            return Compaction(log.first_index, oldest_in_flight)  # a leader's snapshot overtook it
        first = log.trailing_from(
            meta.index, entries=self._config.trailing_entries, data_bytes=self._config.trailing_bytes
        )
        # 1. A follower installs the snapshot at 1000. 2. We compact to 3000. 3. It arrives and needs 1001: another
        # snapshot, and so on for ever. A snapshot under way and what follows it stay, within reason.
        bytes_max = 4 * self._config.snapshot_bytes
        if oldest_in_flight is not None and oldest_in_flight + 1 < first and log.data_bytes < bytes_max:
            first = max(oldest_in_flight + 1, log.first_index)
        log.compact(meta, first)
        return Compaction(log.first_index, oldest_in_flight)
