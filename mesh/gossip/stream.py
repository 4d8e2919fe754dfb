"""TCP messages: push-pull (the whole state, both ways), the fallback ping and its ack, user messages, errors.

Nothing on a plain stream says how long it is, so the decoder parses as bytes come; an encrypted one is framed.
"""

import struct

import msgpack
import msgspec

from mesh.gossip.fields import Fields, pack, unique_keys
from mesh.gossip.keyring import ENVELOPE_BYTES, Keyring
from mesh.gossip.messages import (
    PAYLOAD_BYTES_MAX,
    Ack,
    Kind,
    NodeStateEntry,
    Ping,
    decode,
    encode,
    node_state,
    node_state_fields,
)
from mesh.gossip.packet import decompress_body
from mesh.gossip.wire_error import WireError

# memberlist's own caps on what a peer may make us buffer.
STREAM_BYTES_MAX = 20 * 1024 * 1024
DECOMPRESSED_BYTES_MAX = 40 * 1024 * 1024
# Thirteen times the 5,000 agents a pool is advised to hold.
NODES_MAX = 65_536
_FRAME_HEADER_BYTES = 5
_HEADER_SLACK_BYTES = 4096


class PushPull(msgspec.Struct, frozen=True):
    """One side's whole state. `problems` are entries that were left out because no member may look like that."""

    join: bool
    nodes: tuple[NodeStateEntry, ...]
    user_state: bytes
    problems: tuple[WireError, ...] = ()


class StreamError(msgspec.Struct, frozen=True):
    """The peer refused our stream and says why."""

    text: str


class StreamUser(msgspec.Struct, frozen=True):
    """A message of the layer above, sent reliably to us alone."""

    payload: bytes


StreamMessage = PushPull | Ping | Ack | StreamError | StreamUser


def encode_stream(message: PushPull | Ping | Ack | StreamError, *, keyring: Keyring | None, label: str) -> bytes:
    """All bytes to write for `message`."""
    match message:
        case PushPull():
            header = {"Nodes": len(message.nodes), "UserStateLen": len(message.user_state), "Join": message.join}
            parts = [bytes((Kind.PUSH_PULL,)), pack(header)]
            parts += [pack(node_state_fields(entry)) for entry in message.nodes]
            body = b"".join((*parts, message.user_state))
        case StreamError():
            body = bytes((Kind.ERROR,)) + pack({"Error": message.text})
        case Ping() | Ack():
            body = encode(message)
    encoded_label = label.encode()
    prefix = bytes((Kind.LABEL, len(encoded_label))) + encoded_label if label else b""
    if keyring is None:
        return prefix + body
    frame = struct.pack(">BI", Kind.ENCRYPT, ENVELOPE_BYTES + len(body))
    return prefix + frame + keyring.seal(body, frame + encoded_label)


class StreamDecoder:
    """One inbound message of a stream, fed as bytes arrive; never holds more than the caps above.

    `feed` returns the message once it is whole, None before; it raises WireError and must then not be fed again.
    """

    def __init__(self, *, keyring: Keyring | None, label: str) -> None:
        self._keyring = keyring
        self._label = label.encode()
        self._buffer = bytearray()
        self._body: _Body | None = None
        self._label_read = False
        self.received_bytes = 0

    def feed(self, data: bytes) -> StreamMessage | None:
        self.received_bytes += len(data)
        if self.received_bytes > STREAM_BYTES_MAX + 4096:
            raise WireError("oversized", f"a stream message is longer than {STREAM_BYTES_MAX} bytes")
        if self._body is not None:
            return self._body.feed(data)
        self._buffer += data
        if not self._label_read and not self._read_label():
            return None
        if not self._buffer:
            return None
        if self._keyring is not None:
            return self._feed_encrypted(self._keyring)
        if self._buffer[0] == Kind.ENCRYPT:
            raise WireError("decrypt", "the stream is encrypted and this agent has no gossip key (-encrypt)")
        self._body = _Body(self._buffer[0], compressed_allowed=True)
        rest = bytes(self._buffer[1:])
        self._buffer.clear()
        return self._body.feed(rest)

    def _read_label(self) -> bool:
        if not self._buffer:
            return False
        if self._buffer[0] != Kind.LABEL:
            if self._label:
                raise WireError("label", "the stream carries no label, and this pool has one")
            self._label_read = True
            return True
        if len(self._buffer) < 2 or len(self._buffer) < 2 + self._buffer[1]:
            return False
        end = 2 + self._buffer[1]
        if end == 2 or bytes(self._buffer[2:end]) != self._label:
            raise WireError("label", "the stream carries another pool's label")
        del self._buffer[:end]
        self._label_read = True
        return True

    def _feed_encrypted(self, keyring: Keyring) -> StreamMessage | None:
        if self._buffer[0] != Kind.ENCRYPT:
            raise WireError("decrypt", "the stream is not encrypted and this pool is")
        if len(self._buffer) < _FRAME_HEADER_BYTES:
            return None
        frame = bytes(self._buffer[:_FRAME_HEADER_BYTES])
        (length,) = struct.unpack_from(">I", frame, 1)
        if length > STREAM_BYTES_MAX:
            raise WireError("oversized", f"an encrypted stream message of {length} bytes")
        if len(self._buffer) < _FRAME_HEADER_BYTES + length:
            return None
        sealed = bytes(self._buffer[_FRAME_HEADER_BYTES : _FRAME_HEADER_BYTES + length])
        self._buffer.clear()
        return _whole(keyring.open(sealed, frame + self._label), compressed_allowed=True)


class _Body:
    """The message behind the envelopes: type byte known, fields to come."""

    def __init__(self, kind: int, *, compressed_allowed: bool) -> None:
        allowed = {Kind.PUSH_PULL, Kind.PING, Kind.ACK, Kind.ERROR, Kind.USER}
        if kind not in allowed and not (kind == Kind.COMPRESS and compressed_allowed):
            raise WireError("type", f"message type {kind} is not one a stream carries")
        self._kind = kind
        length_max = STREAM_BYTES_MAX if kind == Kind.COMPRESS else PAYLOAD_BYTES_MAX
        self._length_max = length_max
        self._fed = 0
        self._unpacker = msgpack.Unpacker(
            raw=True,
            strict_map_key=True,
            object_pairs_hook=unique_keys,
            max_buffer_size=DECOMPRESSED_BYTES_MAX + 4096,
            max_str_len=length_max,
            max_bin_len=length_max,
            max_array_len=1024,
            max_map_len=1024,
            max_ext_len=64,
        )
        self._nodes: list[NodeStateEntry] = []
        self._problems: list[WireError] = []
        self._header: Fields | None = None
        self._nodes_left = 0
        self._tail = bytearray()
        self._tail_left = 0

    def feed(self, data: bytes) -> StreamMessage | None:
        self._fed += len(data)
        try:
            self._unpacker.feed(data)
            return self._advance()
        except msgpack.OutOfData:
            # msgpack checks a string's length once it has all of it: do not collect what will be refused anyway.
            if self._fed - self._unpacker.tell() > self._length_max + _HEADER_SLACK_BYTES:
                raise WireError("oversized", "a field of a stream message is too long") from None
            return None
        except WireError:
            raise
        except (ValueError, TypeError, OverflowError, msgpack.UnpackException) as error:
            raise WireError("msgpack", f"malformed msgpack in a stream: {error}") from error

    def _advance(self) -> StreamMessage | None:
        if self._header is None:
            value: object = self._unpacker.unpack()
            if self._kind == Kind.COMPRESS:
                return _whole(decompress_body(value, bytes_max=DECOMPRESSED_BYTES_MAX), compressed_allowed=False)
            self._header = Fields("stream message", value)
            if self._kind in (Kind.PING, Kind.ACK):
                return _small(self._kind, value)
            if self._kind == Kind.ERROR:
                return StreamError(self._header.raw(b"Error", PAYLOAD_BYTES_MAX).decode("utf-8", "replace"))
            length_name = b"UserMsgLen" if self._kind == Kind.USER else b"UserStateLen"
            self._tail_left = self._header.unsigned(length_name, STREAM_BYTES_MAX)
            self._nodes_left = self._header.unsigned(b"Nodes", NODES_MAX)
        while self._nodes_left:
            entry: object = self._unpacker.unpack()
            self._nodes_left -= 1
            # One member with an odd name must not keep us out of its pool; something that is no map is no push-pull.
            if not isinstance(entry, dict):
                raise WireError("field", "a node state is not a map")
            try:
                self._nodes.append(node_state(entry))
            except WireError as problem:
                self._problems.append(problem)
        if self._tail_left:
            piece = bytes(self._unpacker.read_bytes(self._tail_left))
            self._tail += piece
            self._tail_left -= len(piece)
        if self._tail_left:
            return None
        if self._kind == Kind.USER:
            return StreamUser(bytes(self._tail))
        return PushPull(
            self._header.boolean(b"Join"), tuple(self._nodes), bytes(self._tail), tuple(self._problems[:16])
        )


def _whole(data: bytes, *, compressed_allowed: bool) -> StreamMessage:
    """The message in `data`, which is all there will be of it."""
    if not data:
        raise WireError("empty", "a stream message of no bytes")
    message = _Body(data[0], compressed_allowed=compressed_allowed).feed(data[1:])
    if message is None:
        raise WireError("msgpack", "a stream message is cut short inside its envelope")
    return message


def _small(kind: int, value: object) -> Ping | Ack:
    message = decode(bytes((kind,)) + pack(value))
    assert isinstance(message, Ping | Ack)
    return message
