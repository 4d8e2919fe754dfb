"""Where a raft server keeps what it must never forget: term, vote, log (sqlite3) and snapshots (files).

Every method blocks; the driver calls them in worker threads, `write` and `compact` one at a time. Rules of the house:
what was read back is checked (a CRC per row and per file), damage is never repaired by guessing, and after one failed
write or fsync nothing is tried again, because the kernel may have dropped the very pages that failed.
"""

from __future__ import annotations

import io
import os
import sqlite3
import struct
import threading
import zlib
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, Final, Protocol

from mesh.errors import NotFound, ProtocolError, StorageFailed
from mesh.raft.messages import (
    Entry,
    EntryKind,
    HardState,
    SnapshotMeta,
    decode_snapshot_meta,
    encode_snapshot_meta,
)
from mesh.raft.ready import Compaction, Write

SNAPSHOTS_KEPT: Final = 2
"""The newest, and the one before it that a follower may be receiving."""
_ROWS_PER_INSERT: Final = 256
"""Rows of one INSERT: sqlite3 gives the interpreter lock up at every statement, so few statements beat many rows."""
_MAGIC: Final = b"MESHSNP1"
_REJOIN: Final = "stop this server, remove its raft folder, and let it join again as a new, empty server"


@dataclass(frozen=True, slots=True)
class StoredState:
    """What was found at start; entries are contiguous and reach the snapshot or follow it."""

    hard_state: HardState
    snapshot: SnapshotMeta | None
    entries: tuple[Entry, ...]


class RaftStore(Protocol):
    """What the driver needs. Every method may raise StorageFailed, and the server stops then."""

    @property
    def is_durable(self) -> bool:
        """Whether calls may wait for a disk, and so belong into a worker thread."""

    def load(self) -> StoredState:
        """What survived; called once, first."""

    def write(self, write: Write) -> SnapshotMeta | None:
        """Make it durable. When it completes a snapshot: its head, or None when the bytes were damaged on the way."""

    def save_snapshot(self, meta: SnapshotMeta, chunks: Iterable[bytes]) -> None:
        """Make a snapshot of our own state durable; may run beside `write`."""

    def compact(self, compaction: Compaction) -> None:
        """Forget what it says."""

    def read_snapshot(self, index: int, offset: int, size: int) -> tuple[bytes, bool, int]:
        """Bytes of that snapshot's file, whether they are its last, and its term. Raises NotFound when it is gone."""

    def snapshot_chunks(self, index: int) -> Iterator[bytes]:
        """The chunks that save_snapshot was given."""

    def close(self) -> None:
        """Release everything; nothing may be called after."""


# -- snapshot files: magic, head (length, bytes, CRC), chunks (length, bytes) up to an empty one, CRC of all before it


def _snapshot_parts(meta: SnapshotMeta, chunks: Iterable[bytes]) -> Iterator[bytes]:
    head = encode_snapshot_meta(meta)
    first = _MAGIC + struct.pack(">I", len(head)) + head + struct.pack(">I", zlib.crc32(head))
    crc = zlib.crc32(first)
    yield first
    for chunk in chunks:
        if chunk:
            size = struct.pack(">I", len(chunk))
            crc = zlib.crc32(chunk, zlib.crc32(size, crc))
            yield size
            yield chunk
    end = struct.pack(">I", 0)
    yield end + struct.pack(">I", zlib.crc32(end, crc))


def _read_head(file: BinaryIO) -> SnapshotMeta:
    prefix = file.read(len(_MAGIC) + 4)
    if prefix[: len(_MAGIC)] != _MAGIC or len(prefix) != len(_MAGIC) + 4:
        raise ProtocolError("raft snapshot: not a snapshot file")
    (size,) = struct.unpack(">I", prefix[len(_MAGIC) :])
    if size > 1 << 20:
        raise ProtocolError("raft snapshot: head too long")
    head, crc = file.read(size), file.read(4)
    if len(head) != size or crc != struct.pack(">I", zlib.crc32(head)):
        raise ProtocolError("raft snapshot: damaged head")
    return decode_snapshot_meta(head)


def _read_chunks(file: BinaryIO) -> Iterator[bytes]:
    _read_head(file)
    while True:
        (size,) = struct.unpack(">I", file.read(4))
        if size == 0:
            return
        yield file.read(size)


def _check_file(file: BinaryIO) -> SnapshotMeta:
    """The head of a whole and undamaged file. Raises ProtocolError naming the byte where that ends."""
    meta = _read_head(file)
    body_at = file.tell()
    length = file.seek(0, os.SEEK_END)
    file.seek(0)
    crc, left = 0, length - 4
    while left > 0:
        block = file.read(min(left, 1 << 20))
        crc = zlib.crc32(block, crc)
        left -= len(block)
    if length < body_at + 8 or file.read(4) != struct.pack(">I", crc):
        raise ProtocolError(f"raft snapshot: wrong checksum over {length} bytes")
    file.seek(0)
    return meta


# -- rows


def _entry_crc(index: int, term: int, kind: int, data: bytes) -> int:
    return zlib.crc32(data, zlib.crc32(struct.pack(">QQI", index, term, kind)))


def _state_crc(term: int, vote: str | None) -> int:
    return zlib.crc32(
        (vote if vote is not None else "").encode(), zlib.crc32(struct.pack(">Q?", term, vote is not None))
    )


_SCHEMA: Final = """
CREATE TABLE IF NOT EXISTS entry (
    id INTEGER PRIMARY KEY, term INTEGER NOT NULL, kind INTEGER NOT NULL, data BLOB NOT NULL, crc INTEGER NOT NULL);
CREATE TABLE IF NOT EXISTS hard_state (
    id INTEGER PRIMARY KEY CHECK (id = 1), term INTEGER NOT NULL, vote TEXT, crc INTEGER NOT NULL);
"""


class SqliteRaftStore:
    """The durable store, in a folder of its own (mode 0700, files 0600): raft.db, acknowledged, snapshot-*.

    Raises StorageFailed when the folder cannot be used, or another process uses it.
    """

    is_durable = True

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._path = folder / "raft.db"
        self._lock = threading.Lock()
        self._failed: str | None = None
        self._last_index = 0
        self._incoming: BinaryIO | None = None
        self._temporary = 0
        with self._failing("open", self._path):
            folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            folder.chmod(0o700)
            os.close(os.open(self._path, os.O_RDWR | os.O_CREAT, 0o600))
            self._mark = os.open(folder / "acknowledged", os.O_RDWR | os.O_CREAT, 0o600)
            self._db = sqlite3.connect(
                self._path, isolation_level=None, check_same_thread=False, timeout=0.0, cached_statements=64
            )
            for pragma in ("locking_mode=EXCLUSIVE", "journal_mode=WAL", "synchronous=FULL", "cell_size_check=ON"):
                self._db.execute(f"PRAGMA {pragma}").fetchall()
            self._db.executescript(_SCHEMA)
            self._sync_folder()

    @contextmanager
    def _failing(self, doing: str, path: Path) -> Iterator[None]:
        if self._failed is not None:
            raise StorageFailed(self._failed)
        try:
            yield
        except (sqlite3.Error, OSError) as error:
            self._failed = f"raft store: cannot {doing} {path}: {error}; fix the disk, then start this server again"
            raise StorageFailed(self._failed) from error
        except StorageFailed as error:
            self._failed = str(error)
            raise

    # -- start

    def load(self) -> StoredState:
        """What survived. Raises StorageFailed naming the entry or file when something is damaged or missing."""
        with self._lock, self._failing("read", self._path):
            for leftover in sorted(self._folder.glob("*.tmp")):
                leftover.unlink()
            state = self._load_hard_state()
            entries = self._load_entries()
            snapshot = self._load_snapshot()
            if snapshot is not None:
                entries = self._reconcile(snapshot, entries)
            elif entries and entries[0].index != 1:
                raise self._damaged(f"the log begins at entry {entries[0].index} and there is no snapshot before it")
            self._last_index = max(entries[-1].index if entries else 0, snapshot.index if snapshot is not None else 0)
            if state is None and self._last_index > 0:
                raise self._damaged("term and vote are missing")
            self._check_mark(state if state is not None else HardState())
            return StoredState(state if state is not None else HardState(), snapshot, tuple(entries))

    def _damaged(self, what: str) -> StorageFailed:
        return StorageFailed(f"raft store {self._path}: {what}; {_REJOIN}")

    def _load_hard_state(self) -> HardState | None:
        row = self._db.execute("SELECT term, vote, crc FROM hard_state").fetchone()
        if row is None:
            return None
        term, vote, crc = row
        if not isinstance(term, int) or not (vote is None or isinstance(vote, str)) or crc != _state_crc(term, vote):
            raise self._damaged("term and vote are damaged")
        return HardState(term, vote)

    def _load_entries(self) -> list[Entry]:
        entries: list[Entry] = []
        due: int | None = None
        try:
            for index, term, kind, data, crc in self._db.execute(
                "SELECT id, term, kind, data, crc FROM entry ORDER BY id"
            ):
                if due is not None and index != due:
                    raise self._damaged(f"log entry {due} is missing (the next is {index})")
                is_typed = isinstance(term, int) and isinstance(kind, int) and isinstance(data, bytes)
                if not is_typed or crc != _entry_crc(index, term, kind, data):
                    raise self._damaged(f"log entry {index} is damaged (its checksum does not match)")
                try:
                    entries.append(Entry(index, term, EntryKind(kind), data))
                except ValueError:
                    raise self._damaged(f"log entry {index} is of unknown kind {kind}, of a newer version") from None
                due = index + 1
        except sqlite3.DatabaseError as error:
            after = f"after log entry {entries[-1].index}" if entries else "at the first log entry"
            raise self._damaged(f"unreadable {after} ({error})") from error
        return entries

    def _load_snapshot(self) -> SnapshotMeta | None:
        paths = self._snapshot_paths()
        if not paths:
            return None
        try:
            with paths[-1].open("rb") as file:
                return _check_file(file)
        except ProtocolError as error:
            raise StorageFailed(f"{paths[-1]}: {error}; {_REJOIN}") from error

    def _reconcile(self, snapshot: SnapshotMeta, entries: list[Entry]) -> list[Entry]:
        if entries and entries[0].index > snapshot.index + 1:
            raise self._damaged(f"log entries {snapshot.index + 1} to {entries[0].index - 1} are missing")
        if entries and entries[0].index <= snapshot.index:
            at = snapshot.index - entries[0].index
            if at >= len(entries) or entries[at].term != snapshot.term:
                # Stopped between the rename of a leader's snapshot and the removal of the log that it replaces.
                with self._transaction():
                    self._db.execute("DELETE FROM entry")
                return []
        return entries

    # -- the mark of what was acknowledged: sqlite drops a damaged tail of its journal in silence, this notices. It is
    # written after each commit without fsync, so it can be behind the log but never ahead of it.

    def _check_mark(self, state: HardState) -> None:
        raw = os.pread(self._mark, 20, 0)
        if len(raw) == 20 and raw[16:] == struct.pack(">I", zlib.crc32(raw[:16])):
            index, term = struct.unpack(">QQ", raw[:16])
            if index > self._last_index:
                raise self._damaged(f"the log ends at entry {self._last_index}, but entry {index} was acknowledged")
            if term > state.term:
                raise self._damaged(f"the stored term is {state.term}, but term {term} was acknowledged")
        self._marked_term = state.term

    def _write_mark(self, *, is_lower: bool = False) -> None:
        raw = struct.pack(">QQ", self._last_index, self._marked_term)
        os.pwrite(self._mark, raw + struct.pack(">I", zlib.crc32(raw)), 0)
        if is_lower:
            os.fsync(self._mark)

    # -- writing

    def write(self, write: Write) -> SnapshotMeta | None:
        """Make it durable; see RaftStore."""
        with self._lock, self._failing("write", self._path):
            installed: SnapshotMeta | None = None
            if write.chunks:
                if write.hard_state is not None and write.completes_snapshot:
                    with self._transaction():
                        self._put_hard_state(write.hard_state)
                installed = self._write_chunks(write)
            entries = write.entries if installed is None else ()
            if entries and entries[0].index <= self._last_index:
                self._last_index = entries[0].index - 1
                self._write_mark(is_lower=True)
            with self._transaction():
                if write.hard_state is not None:
                    self._put_hard_state(write.hard_state)
                if installed is not None:
                    self._db.execute("DELETE FROM entry")
                if entries:
                    self._put_entries(entries)
            if entries:
                self._last_index = entries[-1].index
            if write.hard_state is not None:
                self._marked_term = write.hard_state.term
            self._write_mark()
            return installed

    @contextmanager
    def _transaction(self) -> Iterator[None]:
        self._db.execute("BEGIN IMMEDIATE")
        yield  # on an error the connection is never used again, and closing it rolls back
        self._db.execute("COMMIT")

    def _put_hard_state(self, state: HardState) -> None:
        self._db.execute(
            "INSERT OR REPLACE INTO hard_state (id, term, vote, crc) VALUES (1, ?, ?, ?)",
            (state.term, state.vote, _state_crc(state.term, state.vote)),
        )

    def _put_entries(self, entries: tuple[Entry, ...]) -> None:
        self._db.execute("DELETE FROM entry WHERE id >= ?", (entries[0].index,))
        at = 0
        while at < len(entries):
            # A power of two rows at a time: nine statements, all of them prepared once.
            rows = min(_ROWS_PER_INSERT, 1 << ((len(entries) - at).bit_length() - 1))
            values: list[int | bytes] = []
            for entry in entries[at : at + rows]:
                kind = int(entry.kind)
                crc = _entry_crc(entry.index, entry.term, kind, entry.data)
                values += (entry.index, entry.term, kind, entry.data, crc)
            placeholders = ",".join(["(?,?,?,?,?)"] * rows)
            self._db.execute(f"INSERT INTO entry (id, term, kind, data, crc) VALUES {placeholders}", values)
            at += rows

    def compact(self, compaction: Compaction) -> None:
        """Forget the prefix of the log and old snapshots."""
        with self._lock, self._failing("compact", self._path):
            with self._transaction():
                self._db.execute("DELETE FROM entry WHERE id < ?", (compaction.first_index,))
            for path in self._snapshot_paths()[:-SNAPSHOTS_KEPT]:
                if compaction.oldest_snapshot is None or path < self._snapshot_path(compaction.oldest_snapshot):
                    path.unlink()

    # -- snapshots

    def _snapshot_paths(self) -> list[Path]:
        """Oldest first."""
        return sorted(self._folder.glob("snapshot-*.snap"))

    def _snapshot_path(self, index: int) -> Path:
        return self._folder / f"snapshot-{index:020d}.snap"

    def save_snapshot(self, meta: SnapshotMeta, chunks: Iterable[bytes]) -> None:
        """Write, fsync, rename, fsync the folder; a crash leaves the old one or the new one."""
        path = self._snapshot_path(meta.index)
        self._temporary += 1
        temporary = path.with_name(f"own-{self._temporary}.tmp")
        with self._failing("write", temporary):
            with _create(temporary) as file:
                for part in _snapshot_parts(meta, chunks):
                    file.write(part)
                file.flush()
                os.fsync(file.fileno())
            temporary.rename(path)
            self._sync_folder()

    def _write_chunks(self, write: Write) -> SnapshotMeta | None:
        temporary = self._folder / "incoming.tmp"
        for chunk in write.chunks:
            if chunk.offset == 0:
                if self._incoming is not None:
                    self._incoming.close()
                self._incoming = _create(temporary)
            assert self._incoming is not None
            assert self._incoming.tell() == chunk.offset
            self._incoming.write(chunk.data)
        if not write.completes_snapshot:
            return None
        assert self._incoming is not None
        last = write.chunks[-1]
        with self._incoming as file:
            self._incoming = None
            file.flush()
            os.fsync(file.fileno())
        try:
            with temporary.open("rb") as received:
                meta = _check_file(received)
        except ProtocolError:
            temporary.unlink()
            return None
        if (meta.index, meta.term) != (last.index, last.snapshot_term):
            temporary.unlink()
            return None
        self._last_index = meta.index
        self._write_mark(is_lower=True)
        temporary.rename(self._snapshot_path(meta.index))
        self._sync_folder()
        return meta

    def _sync_folder(self) -> None:
        descriptor = os.open(self._folder, os.O_RDONLY | os.O_DIRECTORY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)

    def read_snapshot(self, index: int, offset: int, size: int) -> tuple[bytes, bool, int]:
        """Part of a snapshot file; see RaftStore."""
        path = self._snapshot_path(index)
        with self._failing("read", path):
            try:
                with path.open("rb") as file:
                    term = _read_head(file).term
                    length = file.seek(0, os.SEEK_END)
                    file.seek(offset)
                    data = file.read(size)
                    return data, offset + len(data) >= length, term
            except FileNotFoundError:
                raise NotFound(f"snapshot {index} was replaced by newer ones") from None
            except ProtocolError as error:
                raise StorageFailed(f"{path}: {error}; {_REJOIN}") from error

    def snapshot_chunks(self, index: int) -> Iterator[bytes]:
        """The chunks of a snapshot, after its whole file was checked."""
        path = self._snapshot_path(index)
        with self._failing("read", path), path.open("rb") as file:
            try:
                _check_file(file)
            except ProtocolError as error:
                raise StorageFailed(f"{path}: {error}; {_REJOIN}") from error
            yield from _read_chunks(file)

    def close(self) -> None:
        """Release files and locks; what was not committed is rolled back."""
        with self._lock:
            self._failed = self._failed or f"raft store {self._path}: closed"
            if self._incoming is not None:
                self._incoming.close()
            os.close(self._mark)
            self._db.close()


def _create(path: Path) -> BinaryIO:
    return os.fdopen(os.open(path, os.O_RDWR | os.O_CREAT | os.O_TRUNC, 0o600), "w+b")


class MemoryRaftStore:
    """The same without a disk, for `-dev`: everything is forgotten with the process."""

    is_durable = False

    def __init__(self) -> None:
        self._snapshots: dict[int, tuple[SnapshotMeta, bytes]] = {}
        self._incoming = bytearray()

    def load(self) -> StoredState:
        """Nothing."""
        return StoredState(HardState(), None, ())

    def write(self, write: Write) -> SnapshotMeta | None:
        """The log itself lives in the core; only a leader's snapshot must be kept."""
        for chunk in write.chunks:
            if chunk.offset == 0:
                self._incoming.clear()
            self._incoming += chunk.data
        if not write.completes_snapshot:
            return None
        data, self._incoming = bytes(self._incoming), bytearray()
        try:
            meta = _check_file(io.BytesIO(data))
        except ProtocolError:
            return None
        self._snapshots[meta.index] = (meta, data)
        return meta

    def save_snapshot(self, meta: SnapshotMeta, chunks: Iterable[bytes]) -> None:
        """Keep it."""
        self._snapshots[meta.index] = (meta, b"".join(_snapshot_parts(meta, chunks)))

    def compact(self, compaction: Compaction) -> None:
        """Keep the newest two snapshots, and one that a follower is receiving."""
        for index in sorted(self._snapshots)[:-SNAPSHOTS_KEPT]:
            if compaction.oldest_snapshot is None or index < compaction.oldest_snapshot:
                del self._snapshots[index]

    def read_snapshot(self, index: int, offset: int, size: int) -> tuple[bytes, bool, int]:
        """Part of a snapshot; see RaftStore."""
        found = self._snapshots.get(index)
        if found is None:
            raise NotFound(f"snapshot {index} was replaced by newer ones")
        meta, data = found
        return data[offset : offset + size], offset + size >= len(data), meta.term

    def snapshot_chunks(self, index: int) -> Iterator[bytes]:
        """The chunks of a snapshot."""
        yield from _read_chunks(io.BytesIO(self._snapshots[index][1]))

    def close(self) -> None:
        """Nothing to release."""
