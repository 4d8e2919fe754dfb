"""Reading a chunked body and its trailers, strictly (RFC 9112 section 7.1).

Our own, not llhttp's: it knows where the body ends, so the first line of the next message can be judged; it counts
extensions and trailers apart; it can drop a framing field among the trailers, where llhttp refuses the message; and one
read makes one piece of body, however small the chunks in it are.
"""

import re
from typing import Final

from mesh.http.head import HOP_BY_HOP, Headers

EXTENSION_BYTES_MAX = 16 * 1024  # of one body, all chunks together
TRAILER_BYTES_MAX = 60 * 1024  # as for heads
TRAILERS_MAX = 100
CHUNK_BYTES_MAX = 2**62

_SIZE_LINE = re.compile(rb"([0-9A-Fa-f]{1,16})(;[\t -~\x80-\xff]*)?\r\n")
_SIZE_LINE_BEGUN = re.compile(rb"[0-9A-Fa-f]{1,16}(?:;[\t -~\x80-\xff]*)?\r?")
_TRAILER = re.compile(rb"([!#$%&'*+.^_`|~0-9A-Za-z-]+):([\t -~\x80-\xff]*)\r\n")

# RFC 9110 section 6.5.1: what frames or routes the message, says who asks, or changes how the body is read comes before
# the body or not at all. Whoever merges trailers into the headers would believe them.
FORBIDDEN_TRAILERS: Final = HOP_BY_HOP | frozenset(
    b"""host max-forwards authorization cookie set-cookie www-authenticate authentication-info proxy-authentication-info
    cache-control expect pragma range if-match if-none-match if-modified-since if-unmodified-since if-range age expires
    date location retry-after vary warning content-encoding content-type content-range content-language
    content-location content-disposition origin referer forwarded via x-real-ip x-request-id x-http-method-override
    traceparent tracestate baggage b3 strict-transport-security""".split()
)
_FORBIDDEN_PREFIXES = (b"x-forwarded-", b"x-envoy-", b"x-consul-", b"x-b3-", b"sec-", b"access-control-", b"l5d-")

_SIZE, _DATA, _TRAILERS, _DONE = range(4)


def is_forbidden_trailer(name: bytes) -> bool:
    """Whether a lower-case name, or what an application folds it into, must not come as a trailer."""
    if b"_" in name:
        name = name.replace(b"_", b"-")
    return name in FORBIDDEN_TRAILERS or name.startswith(_FORBIDDEN_PREFIXES)


class ChunkFault(Exception):
    """The body is not one. `too_large`: its trailers are beyond their limits; else it is malformed."""

    def __init__(self, reason: str, *, too_large: bool = False) -> None:
        super().__init__(reason)
        self.too_large = too_large


class ChunkReader:
    """One body: `feed` until `done`."""

    __slots__ = ("_extension_bytes", "_line", "_remaining", "_state", "_trailer_bytes", "_trailer_count", "trailers")

    def __init__(self) -> None:
        self._state = _SIZE
        self._remaining = 0  # bytes of the current chunk still to come, its CRLF included
        self._line = b""  # a size line or trailer that has begun
        self._extension_bytes = 0
        self._trailer_bytes = 0
        self._trailer_count = 0
        self.trailers: Headers = ()

    @property
    def done(self) -> bool:
        """Whether the body is complete."""
        return self._state == _DONE

    def feed(self, data: bytes, position: int) -> tuple[bytes, int]:
        """(body bytes in `data` from `position` on, where reading stopped): the end of `data` unless the body ended.

        Raises ChunkFault.
        """
        if self._line:
            data = self._line + data[position:]
            # Lines are bounded, so this copies little; positions are given back in the caller's terms.
            offset, position = position - len(self._line), 0
            self._line = b""
        else:
            offset = 0
        pieces: list[bytes] = []
        size = len(data)
        while position < size and self._state != _DONE:
            if self._state == _DATA:
                position = self._read_data(data, position, pieces)
            elif self._state == _TRAILERS:
                position = self._read_trailer(data, position)
            else:
                position = self._read_chunks(data, position, pieces)
        return pieces[0] if len(pieces) == 1 else b"".join(pieces), position + offset

    def _read_chunks(self, data: bytes, position: int, pieces: list[bytes]) -> int:
        """From a size line on: every chunk that is here as a whole, and the beginning of one that is not."""
        size = len(data)
        while position < size:
            match = _SIZE_LINE.match(data, position)
            if match is None:
                return self._keep_size_line(data, position)
            digits, extension = match.groups()
            if extension is not None:
                self._count_extension(len(extension))
            length = int(digits, 16)
            position = match.end()
            end = position + length
            if not length:
                self._state = _TRAILERS
                return position
            if not data.startswith(b"\r\n", end):
                if length > CHUNK_BYTES_MAX:
                    raise ChunkFault("a chunk is too large")
                self._state = _DATA
                self._remaining = length + 2
                return position
            pieces.append(data[position:end])
            position = end + 2
        return position

    def _count_extension(self, count: int) -> None:
        self._extension_bytes += count
        if self._extension_bytes > EXTENSION_BYTES_MAX:
            raise ChunkFault(f"the chunk extensions are longer than {EXTENSION_BYTES_MAX} bytes")

    def _keep_size_line(self, data: bytes, position: int) -> int:
        line = data[position:]
        if _SIZE_LINE_BEGUN.fullmatch(line) is None:
            raise ChunkFault("a chunk does not begin with its size")
        if self._extension_bytes + len(line) > EXTENSION_BYTES_MAX:
            raise ChunkFault(f"the chunk extensions are longer than {EXTENSION_BYTES_MAX} bytes")
        self._line = line
        return len(data)

    def _read_data(self, data: bytes, position: int, pieces: list[bytes]) -> int:
        end = position + self._remaining
        if end <= len(data):
            if self._remaining == 1:  # the CR came with an earlier read
                whole = data[position] == 0x0A
            else:
                whole = data.startswith(b"\r\n", end - 2)
                if self._remaining > 2:
                    pieces.append(data[position : end - 2])
            if not whole:
                raise ChunkFault("a chunk does not end where its size says")
            self._state = _SIZE
            return end
        self._remaining = end - len(data)
        if self._remaining >= 2:
            pieces.append(data[position:])
        else:
            if data[-1] != 0x0D:
                raise ChunkFault("a chunk does not end where its size says")
            if position < len(data) - 1:
                pieces.append(data[position:-1])
        return len(data)

    def _read_trailer(self, data: bytes, position: int) -> int:
        end = data.find(b"\n", position) + 1
        line = data[position:end] if end else data[position:]
        if self._trailer_bytes + len(line) > TRAILER_BYTES_MAX:
            raise ChunkFault(f"the trailers are longer than {TRAILER_BYTES_MAX} bytes", too_large=True)
        if not end:
            self._line = line
            return len(data)
        if line == b"\r\n":
            self._state = _DONE
            return end
        match = _TRAILER.fullmatch(line)
        if match is None:
            raise ChunkFault("a trailer is not a field")
        self._trailer_bytes += len(line)
        self._trailer_count += 1
        if self._trailer_count > TRAILERS_MAX:
            raise ChunkFault(f"more than {TRAILERS_MAX} trailers", too_large=True)
        name = match[1].lower()
        if not is_forbidden_trailer(name):
            self.trailers += ((name, match[2].strip(b" \t")),)
        return end
