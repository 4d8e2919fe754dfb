"""The state as bytes.

Format: the magic with a version, then frames: a 4-byte big-endian length and one msgpack `Frame`. The first frame is
the Header, the last is the End, which carries the number of frames and a digest of everything before it, so that a
cut or altered stream is noticed whatever its chunks were. Rows come in the order in which they were first written;
that is a function of the log alone, and a restored state keeps it.
"""

import hashlib
from collections.abc import Callable, Iterable, Iterator
from itertools import islice
from typing import TypeVar

import msgspec

from mesh.errors import ProtocolError, Refused
from mesh.model.ca import CaRoot
from mesh.model.catalog import Node, Service
from mesh.model.check import Check
from mesh.model.config_entry import ConfigEntry
from mesh.model.intention import Intention
from mesh.model.kv import KvEntry
from mesh.names import fold
from mesh.state.intentions import IntentionEntry, IntentionTable
from mesh.state.kv import KvTable
from mesh.state.store import Store
from mesh.state.watch import WatchKey
from mesh.wire import WIRE_BYTES_MAX, Codec

MAGIC = b"mesh state "
VERSION = 1
_PREAMBLE = MAGIC + VERSION.to_bytes(2, "big")
_LENGTH_BYTES = 4
_ROWS_PER_FRAME = 256  # about 100 KiB of catalog rows: small enough for one turn of a worker thread
_KV_FRAME_BYTES = 256 * 1024

RowT = TypeVar("RowT")


class Header(msgspec.Struct, frozen=True, tag=True):
    """The indexes of whole tables."""

    nodes: int
    services: int
    checks: int
    extinction: int
    kv: int
    config: int
    config_kinds: dict[str, int]
    intentions: int
    roots: int
    cluster_id: str


class NodeRows(msgspec.Struct, frozen=True, tag=True):
    """Nodes, each with the indexes of its services and of its checks."""

    rows: tuple[tuple[Node, int, int], ...]


class ServiceRows(msgspec.Struct, frozen=True, tag=True):
    rows: tuple[tuple[str, Service], ...]  # folded node name


class CheckRows(msgspec.Struct, frozen=True, tag=True):
    rows: tuple[Check, ...]


class GroupRows(msgspec.Struct, frozen=True, tag=True):
    rows: tuple[tuple[WatchKey, int], ...]


class KvRows(msgspec.Struct, frozen=True, tag=True):
    rows: tuple[KvEntry, ...]


class TombstoneRows(msgspec.Struct, frozen=True, tag=True):
    rows: tuple[tuple[str, int], ...]


class ConfigRows(msgspec.Struct, frozen=True, tag=True):
    rows: tuple[ConfigEntry, ...]


class IntentionRows(msgspec.Struct, frozen=True, tag=True):
    rows: tuple[Intention, ...]


class IntentionEntryRows(msgspec.Struct, frozen=True, tag=True):
    rows: tuple[tuple[str, IntentionEntry], ...]


class RootRows(msgspec.Struct, frozen=True, tag=True):
    rows: tuple[CaRoot, ...]


class End(msgspec.Struct, frozen=True, tag=True):
    frames: int
    digest: bytes


Frame = (
    Header
    | NodeRows
    | ServiceRows
    | CheckRows
    | GroupRows
    | KvRows
    | TombstoneRows
    | ConfigRows
    | IntentionRows
    | IntentionEntryRows
    | RootRows
    | End
)

_CODEC: Codec[Frame] = Codec(Frame)


def capture(store: Store) -> Callable[[], Iterable[bytes]]:
    """A function that streams the state as it is now, from any thread, however the store changes meanwhile.

    Capturing copies the tables' dicts, not the rows: some milliseconds at 100 000 rows.
    """
    catalog, indexes = store.catalog, store.catalog.indexes
    header = Header(
        nodes=indexes.nodes,
        services=indexes.services,
        checks=indexes.checks,
        extinction=indexes.extinction,
        kv=store.kv.index,
        config=store.config.index,
        config_kinds=dict(store.config.kind_index),
        intentions=store.intentions.index,
        roots=store.roots.index,
        cluster_id=store.roots.cluster_id,
    )
    nodes, services, checks = catalog.nodes.copy(), catalog.services.copy(), catalog.checks.copy()
    of_node, of_node_checks = indexes.of_node.copy(), indexes.of_node_checks.copy()
    of_group = indexes.of_group.copy()
    kv, tombstones, config = store.kv.rows.copy(), store.kv.tombstones.copy(), store.config.rows.copy()
    intentions, entries = store.intentions.rows.copy(), store.intentions.entries.copy()
    roots = store.roots.rows

    def frames() -> Iterator[Frame]:
        yield header
        for node_keys in _batches(nodes):
            yield NodeRows(tuple((nodes[key], of_node[key], of_node_checks[key]) for key in node_keys))
        for service_items in _batches(services.items()):
            yield ServiceRows(tuple((key[0], row) for key, row in service_items))
        for check_rows in _batches(checks.values()):
            yield CheckRows(check_rows)
        for group_items in _batches(of_group.items()):
            yield GroupRows(group_items)
        for kv_rows in _kv_batches(kv.values()):
            yield KvRows(kv_rows)
        for tombstone_items in _batches(tombstones.items()):
            yield TombstoneRows(tombstone_items)
        for config_rows in _batches(config.values()):
            yield ConfigRows(config_rows)
        for intention_rows in _batches(intentions.values()):
            yield IntentionRows(intention_rows)
        for entry_items in _batches(entries.items()):
            yield IntentionEntryRows(entry_items)
        if roots:
            yield RootRows(roots)

    return lambda: _encoded(frames())


def restored(chunks: Iterable[bytes]) -> Store:
    """The state in a stream that `capture` made, cut anywhere. Raises ProtocolError unless all of it is there."""
    builder = _Builder()
    for frame in _decoded(chunks):
        builder.add(frame)
    return builder.store()


def _encoded(frames: Iterable[Frame]) -> Iterator[bytes]:
    digest = hashlib.blake2b(_PREAMBLE, digest_size=16)
    yield _PREAMBLE
    count = 0
    for frame in frames:
        data = _framed(frame)
        digest.update(data)
        count += 1
        yield data
    yield _framed(End(count, digest.digest()))


def _framed(frame: Frame) -> bytes:
    data = _CODEC.encode(frame)
    return len(data).to_bytes(_LENGTH_BYTES, "big") + data


def _decoded(chunks: Iterable[bytes]) -> Iterator[Frame]:
    """The frames between preamble and End. Raises ProtocolError when anything is missing, altered or left over."""
    reader = _Reader(chunks)
    preamble = reader.take(len(_PREAMBLE))
    if not preamble.startswith(MAGIC):
        raise ProtocolError("this is not a snapshot of the state")
    if preamble != _PREAMBLE:
        version = int.from_bytes(preamble[len(MAGIC) :], "big")
        raise ProtocolError(f"the snapshot has format version {version}; this server reads version {VERSION}")
    digest = hashlib.blake2b(preamble, digest_size=16)
    count = 0
    while True:
        length = reader.take(_LENGTH_BYTES)
        body = reader.take(min(int.from_bytes(length, "big"), WIRE_BYTES_MAX + 1))
        frame = _CODEC.decode(body)
        if isinstance(frame, End):
            if frame.frames != count or frame.digest != digest.digest():
                raise ProtocolError("the snapshot is damaged: its digest does not match its content")
            if reader.has_more():
                raise ProtocolError("the snapshot is damaged: there is data after its end")
            return
        digest.update(length + body)
        count += 1
        yield frame


class _Reader:
    """Exact reads from chunks of any sizes."""

    def __init__(self, chunks: Iterable[bytes]) -> None:
        self._chunks = iter(chunks)
        self._buffer = bytearray()

    def take(self, count: int) -> bytes:
        while len(self._buffer) < count:
            chunk = next(self._chunks, None)
            if chunk is None:
                raise ProtocolError("the snapshot is cut short")
            self._buffer += chunk
        data = bytes(self._buffer[:count])
        del self._buffer[:count]
        return data

    def has_more(self) -> bool:
        return bool(self._buffer) or any(self._chunks)


class _Builder:
    """Puts a store together from frames."""

    def __init__(self) -> None:
        self._store = Store()
        self._header: Header | None = None
        self._kv: dict[str, KvEntry] = {}
        self._tombstones: dict[str, int] = {}
        self._intentions: dict[tuple[str, str], Intention] = {}
        self._entries: dict[str, IntentionEntry] = {}

    def add(self, frame: Frame) -> None:
        if (self._header is None) != isinstance(frame, Header):
            raise ProtocolError("the snapshot must have one header, first")
        try:
            self._add_rows(frame)
        except Refused as error:
            raise ProtocolError(f"the snapshot contradicts itself: {error}") from error

    def _add_rows(self, frame: Frame) -> None:
        catalog, indexes = self._store.catalog, self._store.catalog.indexes
        match frame:
            case Header():
                self._header = frame
            case NodeRows(rows):
                for node, index, checks_index in rows:
                    key = fold(node.node)
                    catalog.restore_row(key, node)
                    indexes.of_node[key], indexes.of_node_checks[key] = index, checks_index
            case ServiceRows(rows):
                for node_name, service in rows:
                    catalog.restore_row(node_name, service)
            case CheckRows(rows):
                for check in rows:
                    catalog.restore_row(fold(check.node), check)
            case GroupRows(rows):
                indexes.of_group.update(rows)
            case KvRows(rows):
                self._kv.update((row.key, row) for row in rows)
            case TombstoneRows(rows):
                self._tombstones.update(rows)
            case ConfigRows(rows):
                self._store.config.rows.update(((row.kind, fold(row.name)), row) for row in rows)
            case IntentionRows(rows):
                self._intentions.update(((row.destination, row.source), row) for row in rows)
            case IntentionEntryRows(rows):
                self._entries.update(rows)
            case RootRows(rows):
                self._store.roots.rows = rows
            case End():
                raise AssertionError("the decoder ends at the End frame")

    def store(self) -> Store:
        header, store = self._header, self._store
        if header is None:
            raise ProtocolError("the snapshot has no header")
        if {row.destination for row in self._intentions.values()} != self._entries.keys():
            raise ProtocolError("the snapshot contradicts itself: intentions and their entries differ")
        store.catalog.require_complete()
        indexes = store.catalog.indexes
        indexes.nodes, indexes.services, indexes.checks = header.nodes, header.services, header.checks
        indexes.extinction = header.extinction
        store.kv = KvTable.restored(self._kv, self._tombstones, header.kv)
        store.config.index, store.config.kind_index = header.config, dict(header.config_kinds)
        store.intentions = IntentionTable.restored(self._intentions, self._entries, header.intentions)
        store.roots.cluster_id, store.roots.index = header.cluster_id, header.roots
        return store


def _batches(rows: Iterable[RowT]) -> Iterator[tuple[RowT, ...]]:
    iterator = iter(rows)
    while batch := tuple(islice(iterator, _ROWS_PER_FRAME)):
        yield batch


def _kv_batches(rows: Iterable[KvEntry]) -> Iterator[tuple[KvEntry, ...]]:
    batch: list[KvEntry] = []
    size = 0
    for row in rows:
        batch.append(row)
        size += len(row.value) + 4 * len(row.key) + 64
        if size >= _KV_FRAME_BYTES:
            yield tuple(batch)
            batch, size = [], 0
    if batch:
        yield tuple(batch)
