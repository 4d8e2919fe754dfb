"""What a leader knows about one follower, and how eagerly it may send to it (after etcd/raft's progress states).

probe: one append at a time until the logs are known to agree. replicate: several appends in flight, optimistically.
snapshot: the entries it needs are compacted away, so it gets a snapshot chunk by chunk.
"""

from __future__ import annotations

from collections import deque
from enum import Enum


class ProgressState(Enum):
    """See the module."""

    PROBE = "probe"
    REPLICATE = "replicate"
    SNAPSHOT = "snapshot"


class Progress:
    """One follower, as seen by the leader. `match` is durable there and never decreases; `next` is a guess above it."""

    def __init__(self, *, next_index: int, window: int, now: float) -> None:
        self.match = 0
        self.next = next_index
        self.state = ProgressState.PROBE
        self.acked_round = 0
        self.contact_s = now
        """When anything last came from it; the start of the term counts, so that a new leader has time to be heard."""
        self._window = window
        self._in_flight: deque[int] = deque()
        """The last index of each append in flight; a probe is one."""
        self._answered_s = now
        """When the pipe last moved: an answer came, or the first message went into an empty pipe."""
        self.snapshot_index = 0
        self.snapshot_offset = 0
        self.chunk_wanted = False

    def is_paused(self) -> bool:
        """Whether nothing more may be sent before an answer."""
        match self.state:
            case ProgressState.PROBE:
                return bool(self._in_flight)
            case ProgressState.REPLICATE:
                return len(self._in_flight) >= self._window
            case ProgressState.SNAPSHOT:
                return True

    def sent(self, last_index: int, now: float) -> None:
        """An append that ends at last_index (or an empty one, ending before `next`) was sent."""
        if not self._in_flight:
            self._answered_s = now
        if self.state is ProgressState.REPLICATE:
            self.next = last_index + 1
        self._in_flight.append(last_index)

    def accepted(self, index: int, now: float) -> bool:
        """The follower has everything up to index durably; whether that is news."""
        self._answered_s = now
        is_news = index > self.match
        self.match = max(self.match, index)
        self.next = max(self.next, self.match + 1)
        if self.state is ProgressState.SNAPSHOT and self.match < self.snapshot_index:
            return is_news
        if self.state is ProgressState.REPLICATE:
            while self._in_flight and self._in_flight[0] <= index:
                self._in_flight.popleft()
        else:
            self._become(ProgressState.REPLICATE)
        return is_news

    def refused(self, next_index: int) -> None:
        """The logs do not agree at the previous index; try again from next_index."""
        self.next = next_index
        self._become(ProgressState.PROBE)

    def stalled(self, now: float, retransmit_s: float) -> bool:
        """Whether what is in flight has had no answer for too long: the transport may have dropped it."""
        is_waiting = bool(self._in_flight) or (self.state is ProgressState.SNAPSHOT and not self.chunk_wanted)
        return is_waiting and now - self._answered_s >= retransmit_s

    def restart(self, now: float) -> None:
        """Give up on what is in flight and go on from what is certain."""
        self._answered_s = now
        if self.state is ProgressState.SNAPSHOT:
            self.chunk_wanted = True
            return
        self.next = self.match + 1
        self._become(ProgressState.PROBE)

    def start_snapshot(self, index: int, now: float) -> None:
        """Send the snapshot at index from its first byte."""
        self._become(ProgressState.SNAPSHOT)
        self.snapshot_index, self.snapshot_offset = index, 0
        self.chunk_wanted = True
        self._answered_s = now

    def continue_snapshot(self, offset: int, now: float) -> None:
        """The follower wants the file from offset on."""
        self.snapshot_offset = offset
        self.chunk_wanted = True
        self._answered_s = now

    def _become(self, state: ProgressState) -> None:
        self.state = state
        self._in_flight.clear()
        self.chunk_wanted = False
