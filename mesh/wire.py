"""One way to turn values into bytes between agents: msgspec Structs <-> msgpack, size-limited and strict.

Raft entries, RPC payloads, snapshots and the worker's configuration all pass through here. JSON shapes live only in
`agent/http`. A tagged union (`msgspec.Struct` with `tag=True`) carries its own kind.
"""

from typing import Generic, TypeVar

import msgspec

from mesh.errors import LimitExceeded, ProtocolError

T = TypeVar("T")

# Largest value any peer may send in one piece: a KV value is at most 512 KiB and a snapshot chunk 256 KiB; a read of a
# whole KV tree is what needs the room.
WIRE_BYTES_MAX = 64 * 1024 * 1024

_ENCODER = msgspec.msgpack.Encoder()


def encode(value: object) -> bytes:
    """The msgpack bytes of a value. Raises LimitExceeded when larger than WIRE_BYTES_MAX."""
    data = _ENCODER.encode(value)
    if len(data) > WIRE_BYTES_MAX:
        raise LimitExceeded(f"a value of {len(data)} bytes is larger than the wire limit of {WIRE_BYTES_MAX}")
    return data


class Codec(Generic[T]):
    """Encodes and strictly decodes one type (usually a tagged union)."""

    def __init__(self, value_type: type[T] | object) -> None:
        self._decoder: msgspec.msgpack.Decoder[T] = msgspec.msgpack.Decoder(value_type)

    def encode(self, value: T) -> bytes:
        """As the module's `encode`."""
        return encode(value)

    def decode(self, data: bytes | memoryview, *, bytes_max: int = WIRE_BYTES_MAX) -> T:
        """The value. Raises ProtocolError for anything that is not exactly one well-formed value of the type."""
        if len(data) > bytes_max:
            raise ProtocolError(f"a message of {len(data)} bytes is larger than the limit of {bytes_max}")
        try:
            return self._decoder.decode(data)
        except (msgspec.DecodeError, ValueError, RecursionError) as error:
            raise ProtocolError(f"undecodable message of {len(data)} bytes: {error}") from error
