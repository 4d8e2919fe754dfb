"""memberlist's messages, protocol versions 2 to 5: frozen values, and their bytes.

A message is one type byte and one msgpack map. Its envelopes are in `packet` (datagrams) and `stream` (TCP).
"""

from enum import IntEnum

import msgspec

from mesh.gossip.fields import Fields, pack, unpack
from mesh.gossip.wire_error import WireError

# Protocol and delegate versions we announce: min, max, current each. They are Serf's and Consul's.
VERSIONS = (1, 5, 2, 2, 5, 4)
META_BYTES_MAX = 512
PAYLOAD_BYTES_MAX = 65_536
_UINT32_MAX = 2**32 - 1
# An accusation must leave room for the refutation that tops it, or a forged one at the limit could never be answered;
# so the highest incarnation that may be accused is one below the highest that may be alive, and nothing ever wraps.
ACCUSED_INCARNATION_MAX = 2**32 - 3
ALIVE_INCARNATION_MAX = 2**32 - 2


class Kind(IntEnum):
    """The type byte. Numbers are the protocol's."""

    PING = 0
    INDIRECT_PING = 1
    ACK = 2
    SUSPECT = 3
    ALIVE = 4
    DEAD = 5
    PUSH_PULL = 6
    COMPOUND = 7
    USER = 8
    COMPRESS = 9
    ENCRYPT = 10
    NACK = 11
    CHECKSUM = 12
    ERROR = 13
    LABEL = 244


class NodeState(IntEnum):
    """SWIM's view of a member; numbers are the wire's."""

    ALIVE = 0
    SUSPECT = 1
    DEAD = 2
    LEFT = 3


class Ping(msgspec.Struct, frozen=True):
    """Are you there, `node`? The answer goes to the source given, or back where the ping came from."""

    sequence: int
    node: str
    source_address: bytes = b""
    source_port: int = 0
    source_node: str = ""


class IndirectPing(msgspec.Struct, frozen=True):
    """Please ping `node` at the target for me and pass its ack on."""

    sequence: int
    target: bytes
    port: int
    node: str
    nack: bool
    source_address: bytes = b""
    source_port: int = 0
    source_node: str = ""


class Ack(msgspec.Struct, frozen=True):
    """Answers the ping of that sequence. Serf's payload is a network coordinate."""

    sequence: int
    payload: bytes = b""


class Nack(msgspec.Struct, frozen=True):
    """The relay works but its target has not answered it."""

    sequence: int


class Suspect(msgspec.Struct, frozen=True):
    incarnation: int
    node: str
    accuser: str


class Alive(msgspec.Struct, frozen=True):
    incarnation: int
    node: str
    address: bytes
    port: int
    meta: bytes
    versions: tuple[int, ...]


class Dead(msgspec.Struct, frozen=True):
    """`node` is dead; when `accuser` is the node itself, it has left."""

    incarnation: int
    node: str
    accuser: str


class User(msgspec.Struct, frozen=True):
    """A message of the layer above (Serf)."""

    payload: bytes


class NodeStateEntry(msgspec.Struct, frozen=True):
    """One member in a push-pull."""

    name: str
    address: bytes
    port: int
    meta: bytes
    incarnation: int
    state: NodeState
    versions: tuple[int, ...]


Message = Ping | IndirectPing | Ack | Nack | Suspect | Alive | Dead | User


def encode(message: Message) -> bytes:
    """The message's bytes, type first."""
    match message:
        case Ping():
            fields: dict[str, object] = {"SeqNo": message.sequence, "Node": message.node}
            return bytes((Kind.PING,)) + pack(fields | _source(message))
        case IndirectPing():
            fields = {
                "SeqNo": message.sequence,
                "Target": message.target,
                "Port": message.port,
                "Node": message.node,
                "Nack": message.nack,
            }
            return bytes((Kind.INDIRECT_PING,)) + pack(fields | _source(message))
        case Ack():
            # No payload, no field: an ack must not be longer than the ping it answers (reflection).
            fields = {"SeqNo": message.sequence}
            if message.payload:
                fields["Payload"] = message.payload
            return bytes((Kind.ACK,)) + pack(fields)
        case Nack():
            return bytes((Kind.NACK,)) + pack({"SeqNo": message.sequence})
        case Alive():
            return bytes((Kind.ALIVE,)) + pack(
                {
                    "Incarnation": message.incarnation,
                    "Node": message.node,
                    "Addr": message.address,
                    "Port": message.port,
                    "Meta": message.meta,
                    "Vsn": bytes(message.versions),
                }
            )
        case Suspect() | Dead():
            kind = Kind.SUSPECT if isinstance(message, Suspect) else Kind.DEAD
            accusation = {"Incarnation": message.incarnation, "Node": message.node, "From": message.accuser}
            return bytes((kind,)) + pack(accusation)
        case User():
            return bytes((Kind.USER,)) + message.payload


def decode(data: bytes) -> Message:
    """The message in `data` (type byte first). Raises WireError."""
    if not data:
        raise WireError("empty", "a message of no bytes")
    kind, body = data[0], data[1:]
    match kind:
        case Kind.USER:
            return User(body)
        case Kind.PING:
            fields = Fields("ping", unpack(body))
            address, port, node = _read_source(fields)
            return Ping(
                fields.unsigned(b"SeqNo", _UINT32_MAX), fields.name(b"Node", optional=True), address, port, node
            )
        case Kind.INDIRECT_PING:
            fields = Fields("indirect ping", unpack(body))
            address, port, node = _read_source(fields)
            return IndirectPing(
                sequence=fields.unsigned(b"SeqNo", _UINT32_MAX),
                target=fields.address(b"Target"),
                port=_port(fields),
                node=fields.name(b"Node"),
                nack=fields.boolean(b"Nack"),
                source_address=address,
                source_port=port,
                source_node=node,
            )
        case Kind.ACK:
            fields = Fields("ack", unpack(body))
            return Ack(fields.unsigned(b"SeqNo", _UINT32_MAX), fields.raw(b"Payload", PAYLOAD_BYTES_MAX))
        case Kind.NACK:
            return Nack(Fields("nack", unpack(body)).unsigned(b"SeqNo", _UINT32_MAX))
        case Kind.SUSPECT | Kind.DEAD:
            fields = Fields("accusation", unpack(body))
            incarnation = fields.unsigned(b"Incarnation", ACCUSED_INCARNATION_MAX)
            node, accuser = fields.name(b"Node"), fields.name(b"From", optional=True)
            return Suspect(incarnation, node, accuser) if kind == Kind.SUSPECT else Dead(incarnation, node, accuser)
        case Kind.ALIVE:
            fields = Fields("alive", unpack(body))
            return Alive(
                incarnation=fields.unsigned(b"Incarnation", ALIVE_INCARNATION_MAX),
                node=fields.name(b"Node"),
                address=fields.address(b"Addr"),
                port=_port(fields),
                meta=fields.raw(b"Meta", META_BYTES_MAX),
                versions=fields.versions(b"Vsn"),
            )
        case _:
            raise WireError("type", f"message type {kind} is not one a datagram carries")


def node_state(value: object) -> NodeStateEntry:
    """One decoded push-pull entry as a value. Raises WireError."""
    fields = Fields("node state", value)
    return NodeStateEntry(
        name=fields.name(b"Name"),
        address=fields.address(b"Addr"),
        port=_port(fields),
        meta=fields.raw(b"Meta", META_BYTES_MAX),
        incarnation=fields.unsigned(b"Incarnation", ALIVE_INCARNATION_MAX),
        state=NodeState(fields.unsigned(b"State", NodeState.LEFT)),
        versions=fields.versions(b"Vsn"),
    )


def node_state_fields(entry: NodeStateEntry) -> dict[str, object]:
    """The entry's wire fields."""
    return {
        "Name": entry.name,
        "Addr": entry.address,
        "Port": entry.port,
        "Meta": entry.meta,
        "Incarnation": entry.incarnation,
        "State": int(entry.state),
        "Vsn": bytes(entry.versions),
    }


def _port(fields: Fields) -> int:
    port = fields.unsigned(b"Port", 65_535)
    if port == 0:
        raise WireError("field", "a member's port is 0")
    return port


def _source(message: Ping | IndirectPing) -> dict[str, object]:
    if not message.source_address:
        return {}
    return {
        "SourceAddr": message.source_address,
        "SourcePort": message.source_port,
        "SourceNode": message.source_node,
    }


def _read_source(fields: Fields) -> tuple[bytes, int, str]:
    return (
        fields.address(b"SourceAddr", optional=True),
        fields.unsigned(b"SourcePort", 65_535),
        fields.name(b"SourceNode", optional=True),
    )
