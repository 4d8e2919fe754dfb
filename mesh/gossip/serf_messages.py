"""Serf's message layer inside memberlist's user messages and push-pull user state (Serf protocols 2 to 5)."""

from collections.abc import Mapping
from enum import IntEnum

import msgpack
import msgspec

from mesh.errors import LimitExceeded
from mesh.gossip.fields import Fields, member_name, pack, unique_keys, unpack
from mesh.gossip.messages import META_BYTES_MAX
from mesh.gossip.stream import NODES_MAX, STREAM_BYTES_MAX
from mesh.gossip.wire_error import WireError

_TAGS_MAGIC = 0xFF
_UINT32_MAX = 2**32 - 1
# Lamport times count messages; half the range leaves room to witness any and still count on.
LAMPORT_MAX = 2**63
_EVENT_NAME_BYTES_MAX = 9 * 1024
_NO_BROADCAST = 2


class SerfKind(IntEnum):
    """The first byte of a Serf message. Numbers are the protocol's."""

    LEAVE = 0
    JOIN = 1
    PUSH_PULL = 2
    USER_EVENT = 3
    QUERY = 4
    QUERY_RESPONSE = 5
    CONFLICT_RESPONSE = 6
    KEY_REQUEST = 7
    KEY_RESPONSE = 8
    RELAY = 9


class JoinIntent(msgspec.Struct, frozen=True):
    """`node` joined at that Lamport time."""

    time: int
    node: str


class LeaveIntent(msgspec.Struct, frozen=True):
    """`node` means to leave, or an operator means it to be gone; `prune` also forgets it."""

    time: int
    node: str
    prune: bool = False


class SerfPushPull(msgspec.Struct, frozen=True):
    """Clocks, the Lamport time of each member's status, and who has left."""

    time: int
    status_times: Mapping[str, int]
    left: tuple[str, ...]
    event_time: int
    query_time: int


class UserEvent(msgspec.Struct, frozen=True):
    time: int
    name: bytes
    payload: bytes


class Query(msgspec.Struct, frozen=True):
    time: int
    identity: int
    name: bytes
    broadcast: bool


class Relay(msgspec.Struct, frozen=True):
    """Pass `payload` on to that address as a user message."""

    address: bytes
    port: int
    payload: bytes


class Ignored(msgspec.Struct, frozen=True):
    """A Serf message that is legal and not for us: an answer to a query that we did not ask, a key operation."""

    kind: int


SerfMessage = JoinIntent | LeaveIntent | UserEvent | Query | Relay | Ignored


def encode_intent(intent: JoinIntent | LeaveIntent) -> bytes:
    """The intent's bytes, Serf's type first."""
    match intent:
        case JoinIntent():
            return bytes((SerfKind.JOIN,)) + pack({"LTime": intent.time, "Node": intent.node})
        case LeaveIntent():
            fields = {"LTime": intent.time, "Node": intent.node, "Prune": intent.prune}
            return bytes((SerfKind.LEAVE,)) + pack(fields)


def encode_serf_push_pull(state: SerfPushPull) -> bytes:
    """The user state of a push-pull."""
    return bytes((SerfKind.PUSH_PULL,)) + pack(
        {
            "LTime": state.time,
            "StatusLTimes": dict(state.status_times),
            "LeftMembers": list(state.left),
            "EventLTime": state.event_time,
            "Events": [],
            "QueryLTime": state.query_time,
        }
    )


def decode_serf(payload: bytes) -> SerfMessage:
    """The Serf message in a user message. Raises WireError."""
    if not payload:
        raise WireError("empty", "a Serf message of no bytes")
    kind, body = payload[0], payload[1:]
    match kind:
        case SerfKind.JOIN:
            fields = Fields("join intent", unpack(body))
            return JoinIntent(fields.unsigned(b"LTime", LAMPORT_MAX), fields.name(b"Node"))
        case SerfKind.LEAVE:
            fields = Fields("leave intent", unpack(body))
            return LeaveIntent(fields.unsigned(b"LTime", LAMPORT_MAX), fields.name(b"Node"), fields.boolean(b"Prune"))
        case SerfKind.USER_EVENT:
            fields = Fields("user event", unpack(body))
            return UserEvent(
                fields.unsigned(b"LTime", LAMPORT_MAX),
                fields.raw(b"Name", _EVENT_NAME_BYTES_MAX),
                fields.raw(b"Payload", _EVENT_NAME_BYTES_MAX),
            )
        case SerfKind.QUERY:
            fields = Fields("query", unpack(body))
            flags = fields.unsigned(b"Flags", _UINT32_MAX)
            return Query(
                fields.unsigned(b"LTime", LAMPORT_MAX),
                fields.unsigned(b"ID", _UINT32_MAX),
                fields.raw(b"Name", _EVENT_NAME_BYTES_MAX),
                broadcast=not flags & _NO_BROADCAST,
            )
        case SerfKind.RELAY:
            return _decode_relay(body)
        case SerfKind.QUERY_RESPONSE | SerfKind.CONFLICT_RESPONSE | SerfKind.KEY_REQUEST | SerfKind.KEY_RESPONSE:
            return Ignored(kind)
        case _:
            raise WireError("type", f"Serf message type {kind} is unknown")


def decode_serf_push_pull(payload: bytes) -> SerfPushPull:
    """The user state of a peer's push-pull; its recent events are left out. Raises WireError."""
    if payload[:1] != bytes((SerfKind.PUSH_PULL,)):
        raise WireError("type", "the user state of a push-pull is not Serf's")
    unpacker = msgpack.Unpacker(
        raw=True,
        strict_map_key=True,
        object_pairs_hook=unique_keys,
        max_buffer_size=STREAM_BYTES_MAX,
        max_str_len=65_536,
        max_bin_len=65_536,
        max_array_len=NODES_MAX,
        max_map_len=NODES_MAX,
        max_ext_len=64,
    )
    try:
        unpacker.feed(payload[1:])
        value: object = unpacker.unpack()
    except (ValueError, TypeError, OverflowError, msgpack.UnpackException) as error:
        raise WireError("msgpack", f"malformed Serf state: {error}") from error
    fields = Fields("Serf state", value)
    times: dict[str, int] = {}
    for key, time in fields.mapping(b"StatusLTimes", NODES_MAX).items():
        if isinstance(time, bool) or not isinstance(time, int) or not 0 <= time <= LAMPORT_MAX:
            raise WireError("field", "Serf state: a status time is not a Lamport time")
        times[member_name(key, "Serf state")] = time
    left = tuple(member_name(item, "Serf state") for item in fields.items(b"LeftMembers", NODES_MAX))
    return SerfPushPull(
        time=fields.unsigned(b"LTime", LAMPORT_MAX),
        status_times=times,
        left=left,
        event_time=fields.unsigned(b"EventLTime", LAMPORT_MAX),
        query_time=fields.unsigned(b"QueryLTime", LAMPORT_MAX),
    )


def encode_tags(tags: Mapping[str, str]) -> bytes:
    """A member's tags as its meta bytes. Raises LimitExceeded above memberlist's 512 bytes."""
    meta = bytes((_TAGS_MAGIC,)) + pack(dict(sorted(tags.items())))
    if len(meta) > META_BYTES_MAX:
        raise LimitExceeded(
            f"the gossip tags encode to {len(meta)} bytes and the protocol's limit is {META_BYTES_MAX}: "
            "use fewer or shorter tags"
        )
    return meta


def decode_tags(meta: bytes) -> dict[str, str]:
    """The tags in a member's meta bytes; what is not a tag map is the old single role, or nothing."""
    if not meta:
        return {}
    if meta[0] != _TAGS_MAGIC:
        return {"role": meta.decode("utf-8", "replace")}
    try:
        value = unpack(meta[1:])
    except WireError:
        return {}
    if not isinstance(value, dict):
        return {}
    return {
        key.decode("utf-8", "replace"): item.decode("utf-8", "replace")
        for key, item in value.items()
        if isinstance(key, bytes) and isinstance(item, bytes)
    }


def _decode_relay(body: bytes) -> Relay:
    unpacker = msgpack.Unpacker(raw=True, strict_map_key=True, max_buffer_size=65_536, max_map_len=16, max_array_len=16)
    try:
        unpacker.feed(body)
        header: object = unpacker.unpack()
        payload = bytes(unpacker.read_bytes(len(body)))
    except (ValueError, TypeError, OverflowError, msgpack.UnpackException) as error:
        raise WireError("msgpack", f"malformed relay header: {error}") from error
    destination = Fields("relay address", Fields("relay", header).mapping(b"DestAddr", 16))
    return Relay(destination.address(b"IP"), destination.unsigned(b"Port", 65_535), payload)
