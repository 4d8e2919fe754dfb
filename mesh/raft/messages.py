"""What raft servers say to each other, and the bytes it travels and is stored as (msgpack arrays, one tag per message).

The sender is not in a message: the transport knows whom it authenticated. Everything decoded here is bounded and
self-consistent; whether it fits our log and term is for `mesh.raft.node`.
"""

from __future__ import annotations

from enum import IntEnum
from typing import Annotated, Final

import msgspec

from mesh.errors import ProtocolError

MESSAGE_BYTES_MAX: Final = 8 * 1024 * 1024
"""One largest entry or one snapshot chunk, and room for the rest of the message."""
ENTRIES_MAX: Final = 4096
SERVERS_MAX: Final = 64
"""Voters and learners; Raft with more than a handful is a mistake, but the limit is only here to bound the decoder."""
_COUNTER_MAX: Final = 2**53 - 1
"""Terms and indexes: at a million a second, 285 years; exact in every language's numbers and in sqlite."""

ID_CHARACTERS_MAX: Final = 255
ADDRESS_CHARACTERS_MAX: Final = 512

Counter = Annotated[int, msgspec.Meta(ge=0, le=_COUNTER_MAX)]
ServerId = Annotated[str, msgspec.Meta(min_length=1, max_length=ID_CHARACTERS_MAX)]
Address = Annotated[str, msgspec.Meta(max_length=ADDRESS_CHARACTERS_MAX)]


class EntryKind(IntEnum):
    """What a log entry carries. An unknown kind is refused, never skipped: skipping would make servers differ."""

    COMMAND = 0
    NOOP = 1
    CONFIGURATION = 2


class Entry(msgspec.Struct, frozen=True, array_like=True, gc=False, forbid_unknown_fields=True):
    """One slot of the log."""

    index: Counter
    term: Counter
    kind: EntryKind
    data: bytes


class Server(msgspec.Struct, frozen=True, array_like=True, gc=False, order=True, forbid_unknown_fields=True):
    """A raft peer: its stable id and the address where its RPC port listens."""

    node_id: ServerId
    address: Address


class Configuration(msgspec.Struct, frozen=True, array_like=True, forbid_unknown_fields=True):
    """Who votes, and who only receives the log until caught up (learners). Both are sorted by id and disjoint."""

    voters: Annotated[tuple[Server, ...], msgspec.Meta(max_length=SERVERS_MAX)] = ()
    learners: Annotated[tuple[Server, ...], msgspec.Meta(max_length=SERVERS_MAX)] = ()

    @property
    def voter_ids(self) -> tuple[str, ...]:
        return tuple(server.node_id for server in self.voters)

    @property
    def server_ids(self) -> tuple[str, ...]:
        """Voters and learners, sorted."""
        return tuple(sorted(server.node_id for server in self.voters + self.learners))

    def with_learner(self, server: Server) -> Configuration:
        """The same with this server as a learner; a voter stays a voter with the new address."""
        if server.node_id in self.voter_ids:
            return self.with_voter(server)
        return Configuration(self.voters, _with(self.learners, server))

    def with_voter(self, server: Server) -> Configuration:
        """The same with this server voting."""
        return Configuration(_with(self.voters, server), _without(self.learners, server.node_id))

    def without(self, node_id: str) -> Configuration:
        """The same without this server in either list."""
        return Configuration(_without(self.voters, node_id), _without(self.learners, node_id))


def _with(servers: tuple[Server, ...], server: Server) -> tuple[Server, ...]:
    return tuple(sorted((*_without(servers, server.node_id), server)))


def _without(servers: tuple[Server, ...], node_id: str) -> tuple[Server, ...]:
    return tuple(server for server in servers if server.node_id != node_id)


class HardState(msgspec.Struct, frozen=True, array_like=True, gc=False):
    """What a server must never forget: its term and whom it voted for in it. Stored as one record."""

    term: Counter = 0
    vote: str | None = None


class SnapshotMeta(msgspec.Struct, frozen=True, array_like=True, forbid_unknown_fields=True):
    """The log prefix that a snapshot stands for, and the configuration at its end."""

    index: Counter
    term: Counter
    configuration: Configuration


class VoteRequest(msgspec.Struct, frozen=True, array_like=True, tag=1, gc=False, forbid_unknown_fields=True):
    """`pre` asks whether a vote in `term` would be given, and changes nothing at either side (dissertation 9.6).
    `transfer` marks a candidate that the leader itself asked to stand (3.10), so nobody shields that leader."""

    term: Counter
    last_index: Counter
    last_term: Counter
    pre: bool
    transfer: bool


class VoteResponse(msgspec.Struct, frozen=True, array_like=True, tag=2, gc=False, forbid_unknown_fields=True):
    """`term` is the one asked for when granted, else the voter's own."""

    term: Counter
    pre: bool
    granted: bool


class AppendRequest(msgspec.Struct, frozen=True, array_like=True, tag=3, gc=False, forbid_unknown_fields=True):
    """Entries that follow (prev_index, prev_term)."""

    term: Counter
    prev_index: Counter
    prev_term: Counter
    commit: Counter
    entries: Annotated[tuple[Entry, ...], msgspec.Meta(max_length=ENTRIES_MAX)]


class AppendResponse(msgspec.Struct, frozen=True, array_like=True, tag=4, gc=False, forbid_unknown_fields=True):
    """Accepted: everything up to `index` is durable at the follower and equals the leader's log.
    Refused: `index` is the prev_index that did not fit; the logs may agree at `hint_index`, of term `hint_term`."""

    term: Counter
    accepted: bool
    index: Counter
    hint_index: Counter = 0
    hint_term: Counter = 0


class HeartbeatRequest(msgspec.Struct, frozen=True, array_like=True, tag=5, gc=False, forbid_unknown_fields=True):
    """Apart from appends, so that the answer waits for no disk; `commit` is at most what this peer acknowledged."""

    term: Counter
    round: Counter
    commit: Counter


class HeartbeatResponse(msgspec.Struct, frozen=True, array_like=True, tag=6, gc=False, forbid_unknown_fields=True):
    term: Counter
    round: Counter


class SnapshotChunk(msgspec.Struct, frozen=True, array_like=True, tag=7, gc=False, forbid_unknown_fields=True):
    """Bytes of the snapshot file from `offset` on; the file carries its own configuration and checksum."""

    term: Counter
    index: Counter
    snapshot_term: Counter
    offset: Counter
    data: bytes
    is_last: bool


class SnapshotResponse(msgspec.Struct, frozen=True, array_like=True, tag=8, gc=False, forbid_unknown_fields=True):
    """`offset` is where the follower wants the file at `index` to go on."""

    term: Counter
    index: Counter
    offset: Counter


class TimeoutNow(msgspec.Struct, frozen=True, array_like=True, tag=9, gc=False, forbid_unknown_fields=True):
    """From the leader to its chosen successor: stand for election at once (dissertation 3.10)."""

    term: Counter


Message = (
    VoteRequest
    | VoteResponse
    | AppendRequest
    | AppendResponse
    | HeartbeatRequest
    | HeartbeatResponse
    | SnapshotChunk
    | SnapshotResponse
    | TimeoutNow
)

_encoder = msgspec.msgpack.Encoder()
_decoder: msgspec.msgpack.Decoder[Message] = msgspec.msgpack.Decoder(Message)
_configuration_decoder = msgspec.msgpack.Decoder(Configuration)
_meta_decoder = msgspec.msgpack.Decoder(SnapshotMeta)


def encode_message(message: Message) -> bytes:
    """The bytes of one message."""
    return _encoder.encode(message)


def decode_message(data: bytes) -> Message:
    """The message in `data`. Raises ProtocolError when it is malformed, over a limit, or contradicts itself."""
    if len(data) > MESSAGE_BYTES_MAX:
        raise ProtocolError(f"raft message of {len(data)} bytes; the limit is {MESSAGE_BYTES_MAX}")
    try:
        message = _decoder.decode(data)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise ProtocolError(f"raft message: {error}") from None
    if isinstance(message, AppendRequest):
        _check_append(message)
    return message


def _check_append(message: AppendRequest) -> None:
    index, term = message.prev_index, message.prev_term
    if term > message.term or (index == 0) != (term == 0):
        raise ProtocolError(f"raft append: previous entry {index} has term {term} in a message of term {message.term}")
    for entry in message.entries:
        index += 1
        if entry.index != index:
            raise ProtocolError(f"raft append: entry {entry.index} where {index} was due")
        if not term <= entry.term <= message.term or entry.term == 0:
            raise ProtocolError(f"raft append: entry {index} has term {entry.term} after term {term}")
        if entry.kind is EntryKind.CONFIGURATION:
            decode_configuration(entry.data)
        term = entry.term


def encode_configuration(configuration: Configuration) -> bytes:
    """The bytes of a configuration entry; equal configurations give equal bytes."""
    return _encoder.encode(configuration)


def decode_configuration(data: bytes) -> Configuration:
    """The configuration in an entry. Raises ProtocolError when malformed or when check_configuration refuses it."""
    try:
        configuration = _configuration_decoder.decode(data)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise ProtocolError(f"raft configuration: {error}") from None
    check_configuration(configuration)
    return configuration


def check_configuration(configuration: Configuration) -> None:
    """Raises ProtocolError unless there is a voter, both lists are sorted and within limits, and every id appears once.

    Checked before an entry is made as well: one that our peers' decoders refuse would stop the log for ever.
    """
    if max(len(configuration.voters), len(configuration.learners)) > SERVERS_MAX:
        raise ProtocolError(f"raft configuration: more than {SERVERS_MAX} servers")
    for server in configuration.voters + configuration.learners:
        if not 0 < len(server.node_id) <= ID_CHARACTERS_MAX or len(server.address) > ADDRESS_CHARACTERS_MAX:
            raise ProtocolError(f"raft configuration: id or address too long or empty: {server.node_id[:40]!r}")
    ids = [server.node_id for server in configuration.voters + configuration.learners]
    if not configuration.voters or len(set(ids)) != len(ids):
        raise ProtocolError("raft configuration: no voter, or a server named twice")
    for servers in (configuration.voters, configuration.learners):
        if list(servers) != sorted(servers):
            raise ProtocolError("raft configuration: servers are not sorted")


def encode_snapshot_meta(meta: SnapshotMeta) -> bytes:
    """The bytes in the head of a snapshot file."""
    return _encoder.encode(meta)


def decode_snapshot_meta(data: bytes) -> SnapshotMeta:
    """The head of a snapshot file. Raises ProtocolError when malformed."""
    try:
        meta = _meta_decoder.decode(data)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise ProtocolError(f"raft snapshot: {error}") from None
    check_configuration(meta.configuration)
    return meta
