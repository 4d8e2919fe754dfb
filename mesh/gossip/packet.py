"""Datagram envelopes: label, encryption, checksum, compression, compound. One legal order, one level of each."""

import struct
import zlib
from collections.abc import Sequence

import msgspec

from mesh.gossip.fields import Fields, unpack
from mesh.gossip.keyring import ENVELOPE_BYTES, Keyring
from mesh.gossip.lzw import decompress
from mesh.gossip.messages import Kind, Message, decode
from mesh.gossip.wire_error import WireError

DATAGRAM_BYTES_MAX = 65_536
COMPOUND_HEADER_BYTES = 2
COMPOUND_PART_BYTES = 2
COMPOUND_PARTS_MAX = 255
_CHECKSUM_BYTES = 5
_LZW = 0


class Datagram(msgspec.Struct, frozen=True):
    """What one packet said: its messages in order, and for each part that was not one, why."""

    messages: tuple[Message, ...]
    problems: tuple[WireError, ...] = ()


class PacketCodec:
    """Seals and opens datagrams of one pool (its keys, its label)."""

    def __init__(self, *, keyring: Keyring | None, label: str) -> None:
        self._keyring = keyring
        self._label = label.encode()
        self._header = bytes((Kind.LABEL, len(self._label))) + self._label if label else b""

    @property
    def overhead_bytes(self) -> int:
        """Bytes that `seal` adds at most to a message."""
        return len(self._header) + (ENVELOPE_BYTES if self._keyring is not None else _CHECKSUM_BYTES)

    def seal(self, message: bytes, *, checksum: bool) -> bytes:
        """The packet for `message`; `checksum` where the receiver knows it (protocol 5). Encryption is one already."""
        if self._keyring is not None:
            return self._header + self._keyring.seal(message, self._label)
        if checksum:
            message = struct.pack(">BI", Kind.CHECKSUM, zlib.crc32(message)) + message
        return self._header + message

    def open(self, data: bytes) -> Datagram:
        """What the packet says. Raises WireError when the whole of it must be dropped."""
        if len(data) > DATAGRAM_BYTES_MAX:
            raise WireError("oversized", f"a packet of {len(data)} bytes")
        data = self._without_label(data)
        if self._keyring is not None:
            data = self._keyring.open(data, self._label)
        if len(data) >= _CHECKSUM_BYTES and data[0] == Kind.CHECKSUM:
            (expected,) = struct.unpack_from(">I", data, 1)
            data = data[_CHECKSUM_BYTES:]
            if zlib.crc32(data) != expected:
                raise WireError("checksum", "the packet's checksum does not match")
        if data[:1] == bytes((Kind.COMPRESS,)):
            data = decompress_body(unpack(data[1:]), bytes_max=DATAGRAM_BYTES_MAX)
        if data[:1] == bytes((Kind.COMPOUND,)):
            return _decode_parts(compound_parts(data))
        return Datagram((decode(data),))

    def _without_label(self, data: bytes) -> bytes:
        if not data.startswith(bytes((Kind.LABEL,))):
            if self._label:
                raise WireError("label", "the packet carries no label, and this pool has one")
            return data
        end = 2 + data[1] if len(data) >= 2 else 2
        if end == 2 or len(data) < end or data[2:end] != self._label:
            raise WireError("label", "the packet carries another pool's label")
        return data[end:]


def compound(messages: Sequence[bytes]) -> bytes:
    """One message around several. Requires 1 to 255 messages of at most 65535 bytes each."""
    assert 1 <= len(messages) <= COMPOUND_PARTS_MAX
    lengths = struct.pack(f">{len(messages)}H", *(len(message) for message in messages))
    return bytes((Kind.COMPOUND, len(messages))) + lengths + b"".join(messages)


def compound_parts(data: bytes) -> list[bytes]:
    """The messages in a compound (type byte first). Raises WireError when it is cut short."""
    if len(data) < COMPOUND_HEADER_BYTES or len(data) < COMPOUND_HEADER_BYTES + data[1] * COMPOUND_PART_BYTES:
        raise WireError("compound", "a compound message is cut in its lengths")
    count = data[1]
    lengths = struct.unpack_from(f">{count}H", data, COMPOUND_HEADER_BYTES)
    start = COMPOUND_HEADER_BYTES + count * COMPOUND_PART_BYTES
    if len(data) < start + sum(lengths):
        raise WireError("compound", "a compound message is shorter than its parts")
    parts = []
    for length in lengths:
        parts.append(data[start : start + length])
        start += length
    return parts


def decompress_body(value: object, *, bytes_max: int) -> bytes:
    """What a decoded compress message holds. Raises WireError, also when that is more than `bytes_max`."""
    fields = Fields("compressed message", value)
    if fields.unsigned(b"Algo", 255) != _LZW:
        raise WireError("compression", "a message is compressed with an unknown algorithm")
    return decompress(fields.raw(b"Buf", bytes_max), bytes_max=bytes_max)


def _decode_parts(parts: list[bytes]) -> Datagram:
    messages: list[Message] = []
    problems: list[WireError] = []
    for part in parts:
        # `decode` knows no compound and no compress, so nesting ends here.
        try:
            messages.append(decode(part))
        except WireError as error:
            problems.append(error)
    return Datagram(tuple(messages), tuple(problems))
