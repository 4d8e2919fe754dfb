"""LZW as memberlist's peers write it: least significant bit first, 8-bit literals, codes of 9 to 12 bits.

The variant is GIF's (and Go's compress/lzw): code 256 clears the table, 257 ends the data. Only decoding is here:
compressing in Python costs more than the bytes it saves on a LAN.
"""

from mesh.gossip.wire_error import WireError

_CLEAR = 256
_END = 257
_WIDTH_START = 9
_WIDTH_MAX = 12
_LITERALS: tuple[bytes, ...] = tuple(bytes((value,)) for value in range(256))


def decompress(data: bytes, *, bytes_max: int) -> bytes:
    """The decompressed bytes; at most `bytes_max` of them. Raises WireError for bad codes, no end code, or too much."""
    table: list[bytes | None] = [*_LITERALS, *([None] * ((1 << _WIDTH_MAX) - 256))]
    parts: list[bytes] = []
    produced = 0
    width, high, overflow = _WIDTH_START, _END, 1 << _WIDTH_START
    last: bytes | None = None
    bits = bit_count = 0
    for byte in data:
        bits |= byte << bit_count
        bit_count += 8
        if bit_count < width:
            continue
        code = bits & ((1 << width) - 1)
        bits >>= width
        bit_count -= width
        if code == _CLEAR:
            width, high, overflow, last = _WIDTH_START, _END, 1 << _WIDTH_START, None
            continue
        if code == _END:
            return b"".join(parts)
        if code < _CLEAR:
            piece = _LITERALS[code]
        elif code == high and last is not None:
            # The one code that may be used before it is in the table: its phrase is the last one plus its own head.
            piece = last + last[:1]
        else:
            known = table[code] if code <= high else None
            if known is None:
                raise WireError("compression", f"compressed data uses code {code}, which is not in its table")
            piece = known
        produced += len(piece)
        if produced > bytes_max:
            raise WireError("compression", f"compressed data expands to more than {bytes_max} bytes")
        parts.append(piece)
        if last is not None:
            table[high] = last + piece[:1]
        last, high = piece, high + 1
        if high >= overflow:
            if width == _WIDTH_MAX:
                # The table is full: the encoder sends a clear code before it learns anything new.
                last, high = None, high - 1
            else:
                width, overflow = width + 1, overflow << 1
    raise WireError("compression", "compressed data ends before its end code")
