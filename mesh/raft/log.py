"""The log in memory: what is known, what of it is durable here, what is committed, what is applied.

0 <= applied <= commit <= last, applied <= stable <= last. Entries at or below `base` were compacted away; the snapshot
index is at or above the base, and the entries between the two are kept for followers that are a little late.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from mesh.errors import ProtocolError
from mesh.raft.messages import Configuration, Entry, EntryKind, SnapshotMeta, decode_configuration


class RaftLog:
    """Entries by index and term, and the configurations among them."""

    def __init__(self, snapshot: SnapshotMeta | None = None, entries: Iterable[Entry] = ()) -> None:
        """From what the store holds. Requires contiguous entries that reach the snapshot or follow it directly."""
        self._entries: list[Entry] = list(entries)
        self._bytes = sum(len(entry.data) for entry in self._entries)
        self._snapshot = snapshot
        floor = snapshot.index if snapshot is not None else 0
        self._base = self._entries[0].index - 1 if self._entries else floor
        assert self._base <= floor, "a gap between the snapshot and the log"
        self._base_term: int | None = None
        if self._base == floor:
            self._base_term = snapshot.term if snapshot is not None else 0
        self._configurations: list[tuple[int, Configuration]] = []
        if snapshot is not None:
            self._configurations.append((snapshot.index, snapshot.configuration))
        for entry in self._entries:
            if entry.index > floor:
                self._note_configuration(entry)
        self.commit = floor
        self.applied = floor
        self.stable = self.last_index
        self._writing_to = 0
        self._applied_bytes = 0
        assert self.last_index >= floor, "the log ends before the snapshot"

    # -- reading

    @property
    def base(self) -> int:
        """The index before the first entry held."""
        return self._base

    @property
    def first_index(self) -> int:
        return self._base + 1

    @property
    def last_index(self) -> int:
        return self._base + len(self._entries)

    @property
    def last_term(self) -> int:
        if self._entries:
            return self._entries[-1].term
        assert self._base_term is not None
        return self._base_term

    @property
    def data_bytes(self) -> int:
        """Bytes of the data of all entries held."""
        return self._bytes

    @property
    def snapshot(self) -> SnapshotMeta | None:
        """The newest snapshot that this server has."""
        return self._snapshot

    @property
    def configuration(self) -> Configuration:
        """The latest configuration in the log, committed or not (dissertation 4.1); empty before bootstrap."""
        return self._configurations[-1][1] if self._configurations else Configuration()

    @property
    def configuration_index(self) -> int:
        return self._configurations[-1][0] if self._configurations else 0

    def configuration_at(self, index: int) -> Configuration:
        """The configuration in force at `index`, which is not below the snapshot."""
        found = Configuration()
        for at, configuration in self._configurations:
            if at <= index:
                found = configuration
        return found

    def term_at(self, index: int) -> int | None:
        """The term of the entry at `index`; None when it is compacted away or not here yet."""
        position = index - self._base - 1
        if 0 <= position < len(self._entries):
            return self._entries[position].term
        if index == self._base:
            return self._base_term
        if self._snapshot is not None and index == self._snapshot.index:
            return self._snapshot.term
        return None

    def entries(self, first: int, last: int, *, bytes_max: int | None = None) -> tuple[Entry, ...]:
        """Entries first..last (both included, and held); at least one, then as many as fit in bytes_max."""
        assert self._base < first
        assert last <= self.last_index
        found = self._entries[first - self._base - 1 : last - self._base]
        if bytes_max is not None:
            size = 0
            for position, entry in enumerate(found):
                size += len(entry.data)
                if size > bytes_max and position > 0:
                    return tuple(found[:position])
        return tuple(found)

    def bytes_after(self, index: int) -> int:
        """Bytes of the data of the entries above index, which is not below the base."""
        return sum(len(entry.data) for entry in self._entries[index - self._base :])

    def latest_match(self, index: int, term: int) -> tuple[int, int]:
        """The largest (index', term') held with index' <= index and term' <= term: how far back logs may still agree.

        One answer skips a whole term instead of one entry a round trip (paper, end of 5.3).
        """
        index = min(index, self.last_index)
        while index > self._base:
            found = self._entries[index - self._base - 1].term
            if found <= term:
                return index, found
            index -= 1
        return self._base, self._base_term or 0

    # -- writing

    def append(self, entry: Entry) -> None:
        """The leader's own next entry."""
        assert entry.index == self.last_index + 1
        self._entries.append(entry)
        self._bytes += len(entry.data)
        self._note_configuration(entry)

    def merge(self, entries: Sequence[Entry]) -> int:
        """Take a leader's entries, whose predecessor is here; returns the index of the last of them.

        What is here already stays, so a late or repeated message never cuts off what came after it; the log is cut only
        where an entry conflicts. Raises ProtocolError when that would undo a committed entry.
        """
        for position, entry in enumerate(entries):
            if entry.index <= self._base or self.term_at(entry.index) == entry.term:
                continue
            if entry.index <= self.last_index:
                self._truncate(entry.index)
            for new in entries[position:]:
                self.append(new)
            break
        return entries[-1].index

    def _truncate(self, first: int) -> None:
        if first <= self.commit:
            raise ProtocolError(f"raft append would replace entry {first}, but entries to {self.commit} are committed")
        removed = self._entries[first - self._base - 1 :]
        del self._entries[first - self._base - 1 :]
        self._bytes -= sum(len(entry.data) for entry in removed)
        while self._configurations and self._configurations[-1][0] >= first:
            self._configurations.pop()
        self.stable = min(self.stable, first - 1)
        # 1. Entries 10..12 of term 5 are on their way to the disk. 2. A new leader replaces 11 on. 3. The write ends:
        # only 10 of it may count as durable, whatever term its replacement has.
        self._writing_to = min(self._writing_to, first - 1)

    def _note_configuration(self, entry: Entry) -> None:
        if entry.kind is EntryKind.CONFIGURATION:
            self._configurations.append((entry.index, decode_configuration(entry.data)))

    # -- durability

    def begin_write(self) -> tuple[Entry, ...]:
        """All entries not yet durable, now on their way to the disk; one write at a time."""
        self._writing_to = self.last_index
        if self.stable == self.last_index:
            return ()
        return self.entries(self.stable + 1, self.last_index)

    def end_write(self) -> None:
        """That write is durable, as far as its entries are still the log's."""
        self.stable = max(self.stable, self._writing_to)

    # -- committing and applying

    def commit_to(self, index: int) -> bool:
        """Raise the commit index to `index`, at most to the end of the log; whether it moved."""
        index = min(index, self.last_index)
        if index <= self.commit:
            return False
        self.commit = index
        return True

    def take_committed(self, entries_max: int) -> tuple[Entry, ...]:
        """The next committed and durable entries, which the caller applies before it comes again."""
        last = min(self.commit, self.stable, self.applied + entries_max)
        if last <= self.applied:
            return ()
        found = self.entries(self.applied + 1, last)
        self.applied = last
        self._applied_bytes += sum(len(entry.data) for entry in found)
        return found

    @property
    def has_committed(self) -> bool:
        """Whether take_committed would give something."""
        return min(self.commit, self.stable) > self.applied

    # -- snapshots

    @property
    def applied_since_snapshot(self) -> tuple[int, int]:
        """Entries applied, and their bytes, since the newest snapshot (bytes: since this server's start, if later)."""
        floor = self._snapshot.index if self._snapshot is not None else 0
        return self.applied - floor, self._applied_bytes

    def trailing_from(self, index: int, *, entries: int, data_bytes: int) -> int:
        """The first index to keep so that at most that many entries and bytes up to `index` stay."""
        first = index + 1
        while first > self.first_index and index + 1 - first < entries:
            data_bytes -= len(self._entries[first - 2 - self._base].data)
            if data_bytes < 0:
                break
            first -= 1
        return first

    def compact(self, meta: SnapshotMeta, keep_from: int) -> None:
        """The state up to meta.index is in a snapshot; drop entries before keep_from (at most meta.index + 1)."""
        assert meta.index <= self.applied
        assert keep_from <= meta.index + 1
        if self._snapshot is not None and meta.index <= self._snapshot.index:
            return
        self._snapshot = meta
        self._applied_bytes = 0
        kept = [(index, configuration) for index, configuration in self._configurations if index > meta.index]
        self._configurations = [(meta.index, meta.configuration), *kept]
        cut = keep_from - 1
        if cut > self._base:
            self._base_term = self.term_at(cut)
            removed = self._entries[: cut - self._base]
            del self._entries[: cut - self._base]
            self._bytes -= sum(len(entry.data) for entry in removed)
            self._base = cut

    def reset(self, meta: SnapshotMeta) -> None:
        """A leader's snapshot replaces everything; the caller has made it durable and restored its state."""
        assert meta.index > self.commit
        self._entries = []
        self._bytes = self._applied_bytes = 0
        self._base, self._base_term = meta.index, meta.term
        self._snapshot = meta
        self._configurations = [(meta.index, meta.configuration)]
        self.commit = self.applied = self.stable = meta.index
        self._writing_to = 0
