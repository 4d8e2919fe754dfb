"""The durable store: what was acknowledged comes back, and damage is named instead of served."""

from __future__ import annotations

import os
import resource
import shutil
import sqlite3
import stat
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from agent.raft_store import MemoryRaftStore, RaftStore, SqliteRaftStore
from mesh.errors import NotFound, StorageFailed
from mesh.raft.messages import (
    Configuration,
    Entry,
    EntryKind,
    HardState,
    Server,
    SnapshotChunk,
    SnapshotMeta,
    encode_configuration,
)
from mesh.raft.ready import Compaction, Write

CONFIGURATION = Configuration((Server("a", "a:1"), Server("b", "b:1")))


def entry(index: int, term: int = 1, data: bytes | None = None) -> Entry:
    return Entry(index, term, EntryKind.COMMAND, data if data is not None else b"entry %d" % index)


def write(*entries: Entry, term: int | None = None, vote: str | None = None) -> Write:
    return Write(HardState(term, vote) if term is not None else None, (), entries)


def filled(folder: Path, count: int = 20) -> SqliteRaftStore:
    store = SqliteRaftStore(folder)
    store.load()
    store.write(write(*(entry(index) for index in range(1, count + 1)), term=1, vote="a"))
    return store


def chunks_of(store: RaftStore, index: int, size: int = 50) -> list[SnapshotChunk]:
    """A snapshot as it travels."""
    chunks: list[SnapshotChunk] = []
    offset, is_last = 0, False
    while not is_last:
        data, is_last, term = store.read_snapshot(index, offset, size)
        chunks.append(SnapshotChunk(9, index, term, offset, data, is_last))
        offset += len(data)
    return chunks


def sql(folder: Path, statement: str, *values: object) -> None:
    with sqlite3.connect(folder / "raft.db") as db:
        db.execute(statement, values)
    db.close()


def test_entries_term_and_vote_come_back(tmp_path: Path) -> None:
    store = filled(tmp_path / "raft")
    store.write(write(term=5, vote=None))
    store.write(write(entry(21, 5, encode_configuration(CONFIGURATION))))
    store.close()
    state = SqliteRaftStore(tmp_path / "raft").load()
    assert state.hard_state == HardState(5, None)
    assert state.entries == (*(entry(i) for i in range(1, 21)), entry(21, 5, encode_configuration(CONFIGURATION)))
    assert state.snapshot is None


def test_new_store_is_empty_and_private(tmp_path: Path) -> None:
    store = SqliteRaftStore(tmp_path / "data" / "raft")
    state = store.load()
    assert (state.hard_state, state.snapshot, state.entries) == (HardState(), None, ())
    store.write(write(entry(1), term=1))
    store.save_snapshot(SnapshotMeta(1, 1, CONFIGURATION), [b"state"])
    assert stat.S_IMODE((tmp_path / "data" / "raft").stat().st_mode) == 0o700
    for path in (tmp_path / "data" / "raft").iterdir():
        assert stat.S_IMODE(path.stat().st_mode) == 0o600, path


def test_append_replaces_everything_from_its_first_entry_on(tmp_path: Path) -> None:
    store = filled(tmp_path)
    store.write(write(entry(15, 2), entry(16, 2), term=2))
    store.close()
    state = SqliteRaftStore(tmp_path).load()
    assert [(e.index, e.term) for e in state.entries[-3:]] == [(14, 1), (15, 2), (16, 2)]


@given(sizes=st.lists(st.integers(1, 700), min_size=1, max_size=4))
@settings(max_examples=15, deadline=None)
def test_batches_of_any_size_come_back_whole(sizes: list[int], tmp_path_factory: pytest.TempPathFactory) -> None:
    folder = tmp_path_factory.mktemp("raft")
    store = SqliteRaftStore(folder)
    store.load()
    last = 0
    for size in sizes:
        store.write(write(*(entry(index) for index in range(last + 1, last + size + 1)), term=1))
        last += size
    store.close()
    again = SqliteRaftStore(folder)
    assert again.load().entries == tuple(entry(index) for index in range(1, last + 1))
    again.close()


@pytest.mark.parametrize("index", [1, 7, 20])
@pytest.mark.parametrize("change", ["data = x'00'", "term = 2", "kind = 1", "crc = crc + 1", "data = 'text'"])
def test_damaged_entry_is_refused_by_its_index(tmp_path: Path, index: int, change: str) -> None:
    filled(tmp_path).close()
    sql(tmp_path, f"UPDATE entry SET {change} WHERE id = ?", index)
    with pytest.raises(StorageFailed, match=rf"log entry {index} is damaged.*join again"):
        SqliteRaftStore(tmp_path).load()


def test_missing_entry_in_the_middle_is_refused_by_its_index(tmp_path: Path) -> None:
    filled(tmp_path).close()
    sql(tmp_path, "DELETE FROM entry WHERE id = 9")
    with pytest.raises(StorageFailed, match="log entry 9 is missing"):
        SqliteRaftStore(tmp_path).load()


@pytest.mark.parametrize("change", ["term = 2", "vote = 'b'", "vote = NULL"])
def test_damaged_vote_is_refused(tmp_path: Path, change: str) -> None:
    filled(tmp_path).close()
    sql(tmp_path, f"UPDATE hard_state SET {change}")
    with pytest.raises(StorageFailed, match="term and vote are damaged"):
        SqliteRaftStore(tmp_path).load()


def test_lost_vote_is_refused(tmp_path: Path) -> None:
    filled(tmp_path).close()
    sql(tmp_path, "DELETE FROM hard_state")
    with pytest.raises(StorageFailed, match="term and vote are missing"):
        SqliteRaftStore(tmp_path).load()


def test_lost_tail_of_acknowledged_entries_is_noticed(tmp_path: Path) -> None:
    filled(tmp_path).close()
    sql(tmp_path, "DELETE FROM entry WHERE id > 18")
    with pytest.raises(StorageFailed, match="ends at entry 18, but entry 20 was acknowledged"):
        SqliteRaftStore(tmp_path).load()


def test_term_behind_the_acknowledged_one_is_noticed(tmp_path: Path) -> None:
    store = filled(tmp_path)
    store.close()
    shutil.copytree(tmp_path, tmp_path / "old", ignore=lambda _, names: [name for name in names if name == "old"])
    store = SqliteRaftStore(tmp_path)
    store.load()
    store.write(write(term=7, vote="b"))
    store.close()
    shutil.copy(tmp_path / "old" / "raft.db", tmp_path / "raft.db")
    with pytest.raises(StorageFailed, match="stored term is 1, but term 7 was acknowledged"):
        SqliteRaftStore(tmp_path).load()


def journal_after_kill(folder: Path) -> tuple[bytes, int]:
    """The write-ahead log as kill -9 leaves it, with 30 acknowledged single-entry writes."""
    code = (
        "import os, sys; from pathlib import Path; from tests_store import *; "
        f"s = SqliteRaftStore(Path({str(folder)!r})); s.load(); "
        "[s.write(write(entry(i), term=1)) for i in range(1, 31)]; os._exit(9)"
    )
    code = code.replace("tests_store", "test_raft_store")
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(Path(__file__).parent), *sys.path])}
    assert subprocess.run([sys.executable, "-c", code], env=environment, check=False, timeout=60).returncode == 9
    path = folder / "raft.db-wal"
    return path.read_bytes(), path.stat().st_size


def test_what_was_acknowledged_survives_a_kill_and_a_damaged_journal_is_never_silently_shorter(tmp_path: Path) -> None:
    original = tmp_path / "original"
    wal, size = journal_after_kill(original)
    store = SqliteRaftStore(shutil.copytree(original, tmp_path / "intact"))
    assert [e.index for e in store.load().entries] == list(range(1, 31))
    store.close()
    refused = 0
    for number, at in enumerate(range(100, size, max(1, size // 25))):
        folder = shutil.copytree(original, tmp_path / f"flipped{number}")
        damaged = bytearray(wal)
        damaged[at] ^= 0x10
        (folder / "raft.db-wal").write_bytes(damaged)
        try:
            store = SqliteRaftStore(folder)
            assert [e.index for e in store.load().entries] == list(range(1, 31))
        except StorageFailed:
            refused += 1
        else:
            store.close()
    assert refused > 10


def test_second_process_on_the_same_folder_is_refused(tmp_path: Path) -> None:
    store = filled(tmp_path)
    with pytest.raises(StorageFailed, match="locked"):
        SqliteRaftStore(tmp_path)
    store.close()


def test_folder_that_cannot_be_made_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(StorageFailed, match=r"file/raft"):
        SqliteRaftStore(tmp_path / "file" / "raft")


# -- failing writes


def test_failed_write_stops_the_store_for_good(tmp_path: Path) -> None:
    """The kernel refuses to grow the file (RLIMIT_FSIZE); nothing is tried again after that, limit or no limit."""
    store = filled(tmp_path)
    size = (tmp_path / "raft.db-wal").stat().st_size
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size + 5000, hard))
    try:
        with pytest.raises(StorageFailed, match=r"cannot write .*raft.db"):
            store.write(write(entry(21, 1, b"x" * 100_000)))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    with pytest.raises(StorageFailed):
        store.write(write(entry(21)))
    store.close()
    assert [e.index for e in SqliteRaftStore(tmp_path).load().entries] == list(range(1, 21))


@pytest.mark.interop
@pytest.mark.skipif(shutil.which("strace") is None and "CI" not in os.environ, reason="strace is not installed")
def test_failed_fsync_is_never_retried(tmp_path: Path) -> None:
    """strace makes one fdatasync fail with EIO; the write reports it, and no sync of that file follows."""
    code = (
        "import sys; from pathlib import Path; from test_raft_store import *\n"
        f"s = SqliteRaftStore(Path({str(tmp_path / 'raft')!r})); s.load()\n"
        "try:\n"
        "    for i in range(1, 50): s.write(write(entry(i), term=1)); print(i, flush=True)\n"
        "except StorageFailed as e: print('failed', e, flush=True)\n"
        "try: s.write(write(entry(50)))\n"
        "except StorageFailed: print('still failed', flush=True)\n"
        "import os; os._exit(0)\n"
    )
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(Path(__file__).parent), *sys.path])}
    trace = tmp_path / "trace"
    inject = ["-e", "trace=fsync,fdatasync", "-e", "inject=fdatasync:error=EIO:when=20", "-o", str(trace)]
    done = subprocess.run(
        ["strace", "-f", *inject, sys.executable, "-c", code],
        env=environment,
        check=False,
        capture_output=True,
        text=True,
        timeout=60,
    )
    lines = done.stdout.splitlines()
    assert lines[-2].startswith("failed raft store: cannot write"), done.stderr
    assert lines[-1] == "still failed"
    syncs = trace.read_text().splitlines()
    failed_at = next(number for number, line in enumerate(syncs) if "EIO" in line)
    assert not [line for line in syncs[failed_at + 1 :] if "sync(" in line]


# -- snapshots


@pytest.fixture(params=["sqlite", "memory"])
def make(request: pytest.FixtureRequest, tmp_path: Path) -> Callable[[str], RaftStore]:
    def make_store(name: str) -> RaftStore:
        store: RaftStore = MemoryRaftStore() if request.param == "memory" else SqliteRaftStore(tmp_path / name)
        store.load()
        return store

    return make_store


def test_snapshot_gives_its_chunks_back_and_travels_in_pieces(make: Callable[[str], RaftStore]) -> None:
    source, target = make("source"), make("target")
    meta = SnapshotMeta(40, 3, CONFIGURATION)
    source.write(write(*(entry(i) for i in range(1, 41)), term=3))
    source.save_snapshot(meta, [b"one", b"x" * 1000, b"three"])
    assert list(source.snapshot_chunks(40)) == [b"one", b"x" * 1000, b"three"]
    target.write(write(entry(1, 2, b"of another history"), term=2))
    chunks = chunks_of(source, 40)
    assert len(chunks) > 5
    for chunk in chunks[:-1]:
        assert target.write(Write(None, (chunk,), ())) is None
    assert target.write(Write(HardState(9), chunks[-1:], ())) == meta  # type: ignore[arg-type]
    assert list(target.snapshot_chunks(40)) == [b"one", b"x" * 1000, b"three"]


def test_snapshot_damaged_on_the_way_is_not_installed(make: Callable[[str], RaftStore]) -> None:
    source, target = make("source"), make("target")
    source.save_snapshot(SnapshotMeta(40, 3, CONFIGURATION), [b"x" * 300])
    chunks = chunks_of(source, 40, 10_000)
    data = bytearray(chunks[0].data)
    for at in (0, 9, 20, len(data) // 2, len(data) - 1):
        damaged = data.copy()
        damaged[at] ^= 1
        chunk = SnapshotChunk(9, 40, 3, 0, bytes(damaged), True)
        assert target.write(Write(None, (chunk,), ())) is None
    for length in (0, 5, 30, len(data) - 1):
        assert target.write(Write(None, (SnapshotChunk(9, 40, 3, 0, bytes(data[:length]), True),), ())) is None
    with pytest.raises(NotFound):
        target.read_snapshot(40, 0, 10)
    assert target.write(Write(None, tuple(chunks), ())) is not None


def test_installed_snapshot_replaces_the_log_across_a_restart(tmp_path: Path) -> None:
    source = SqliteRaftStore(tmp_path / "source")
    source.load()
    meta = SnapshotMeta(40, 3, CONFIGURATION)
    source.save_snapshot(meta, [b"state"])
    target = filled(tmp_path / "target", 60)  # longer, but of another history
    target.write(Write(HardState(9), tuple(chunks_of(source, 40)), ()))
    target.write(write(entry(41, 9)))
    target.close()
    state = SqliteRaftStore(tmp_path / "target").load()
    assert (state.hard_state.term, state.snapshot) == (9, meta)
    assert state.entries == (entry(41, 9),)


def test_stop_between_install_and_log_removal_starts_from_the_snapshot(tmp_path: Path) -> None:
    source = SqliteRaftStore(tmp_path / "source")
    source.load()
    source.save_snapshot(SnapshotMeta(15, 3, CONFIGURATION), [b"state"])
    filled(tmp_path / "target").close()
    (tmp_path / "target" / "acknowledged").unlink()  # as the install has lowered it
    sql(tmp_path / "target", "UPDATE hard_state SET term = 3, vote = NULL, crc = ?", _state_crc_of(3))
    for path in (tmp_path / "source").glob("*.snap"):
        shutil.copy(path, tmp_path / "target" / path.name)
    state = SqliteRaftStore(tmp_path / "target").load()
    assert state.snapshot is not None
    assert state.snapshot.index == 15
    assert state.entries == ()


def _state_crc_of(term: int) -> int:
    from agent.raft_store import _state_crc

    return _state_crc(term, None)


def test_compaction_keeps_two_snapshots_and_the_one_under_way(make: Callable[[str], RaftStore]) -> None:
    store = make("store")
    for index in (10, 20, 30, 40):
        store.write(write(*(entry(i) for i in range(index - 9, index + 1)), term=1))
        store.save_snapshot(SnapshotMeta(index, 1, CONFIGURATION), [b"%d" % index])
    store.compact(Compaction(35, 20))
    assert list(store.snapshot_chunks(20)) == [b"20"]
    with pytest.raises(NotFound):
        store.read_snapshot(10, 0, 10)
    store.compact(Compaction(35, None))
    with pytest.raises(NotFound):
        store.read_snapshot(20, 0, 10)
    assert store.read_snapshot(30, 0, 10)[2] == 1


def test_compacted_log_starts_again_after_its_snapshot(tmp_path: Path) -> None:
    store = filled(tmp_path)
    store.save_snapshot(SnapshotMeta(18, 1, CONFIGURATION), [b"state"])
    store.compact(Compaction(15, None))
    store.close()
    state = SqliteRaftStore(tmp_path).load()
    assert [e.index for e in state.entries] == list(range(15, 21))


def test_compacted_log_without_its_snapshot_is_refused(tmp_path: Path) -> None:
    store = filled(tmp_path)
    store.save_snapshot(SnapshotMeta(18, 1, CONFIGURATION), [b"state"])
    store.compact(Compaction(15, None))
    store.close()
    for path in tmp_path.glob("*.snap"):
        path.unlink()
    with pytest.raises(StorageFailed, match="begins at entry 15 and there is no snapshot"):
        SqliteRaftStore(tmp_path).load()


@pytest.mark.parametrize("at", [0, 10, 40, 200, -1])
def test_damaged_snapshot_file_is_refused_by_its_name(tmp_path: Path, at: int) -> None:
    store = filled(tmp_path)
    store.save_snapshot(SnapshotMeta(18, 1, CONFIGURATION), [b"s" * 300])
    store.close()
    path = next(tmp_path.glob("*.snap"))
    data = bytearray(path.read_bytes())
    data[at] ^= 4
    path.write_bytes(data)
    with pytest.raises(StorageFailed, match=r"snapshot-0+18\.snap.*join again"):
        SqliteRaftStore(tmp_path).load()


def test_unfinished_files_are_removed_at_start(tmp_path: Path) -> None:
    filled(tmp_path).close()
    (tmp_path / "incoming.tmp").write_bytes(b"half")
    SqliteRaftStore(tmp_path).load()
    assert not list(tmp_path.glob("*.tmp"))
