"""What receiving requests and responses share: where messages begin and end, limits, bodies. See `h1` for the whole.

llhttp reads heads, exactly one at a time and nothing else; where a head ends, what of a read is its body and where the
next message begins is decided here. So each start line can be judged by stricter rules than llhttp's.
"""

from abc import ABC, abstractmethod
from typing import Generic, TypeVar

import httptools

from mesh.http.chunked import ChunkFault, ChunkReader
from mesh.http.events import END, EndOfMessage, Rejected, Trailers
from mesh.http.head import NEVER_NOMINATED, Headers, RequestHead, ResponseHead

HEAD_BYTES_MAX = 60 * 1024  # Envoy's default
HEADERS_MAX = 100  # Envoy's default
BODY_BYTES_MAX = 2**62

HEAD_END = b"\r\n\r\n"

UNTIL_CLOSE = -1  # as a count of body bytes to come


class Refusal(Exception):
    """Control flow out of a parser; callers see its Rejected as an event."""

    def __init__(self, status: int, reason: str, location: bytes = b"") -> None:
        super().__init__(reason)
        self.rejected = Rejected(status, reason, location)


Parser = TypeVar("Parser", httptools.HttpRequestParser, httptools.HttpResponseParser)


class Receiver(ABC, Generic[Parser]):
    """What both directions share. A subclass reads heads (`_receive_head`) and says what ends a message means."""

    __slots__ = ("_chunks", "_events", "_head_bytes", "_in_head", "_parser", "_raw", "_remaining", "closed", "unparsed",
                 "upgraded")  # fmt: skip

    def __init__(self) -> None:
        self._parser: Parser
        self._events: list[RequestHead | ResponseHead | bytes | Trailers | EndOfMessage | Rejected] = []
        self._raw: list[tuple[bytes, bytes]] = []  # header lines as llhttp gives them
        self._in_head = True
        self._head_bytes = 0  # of the head that has begun
        self._remaining = 0  # bytes of the body still to come, or UNTIL_CLOSE; a chunked body is counted by `_chunks`
        self._chunks: ChunkReader | None = None
        self.closed = False  # no further input is read: rejected, upgraded, or the last message has come
        self.upgraded = False  # closed by an upgrade: what follows is not HTTP, and collects in `unparsed`
        self.unparsed = b""

    @property
    def mid_message(self) -> bool:
        """Whether a message has begun and not ended: its peer owes us bytes."""
        return not self._in_head or self._head_bytes > 0

    def _feed(self, data: bytes) -> None:
        """Makes events of the bytes; every failure becomes a Rejected event."""
        position, size = 0, len(data)
        try:
            while position < size and not self.closed:
                if self._in_head:
                    position = self._receive_head(data, position)
                else:
                    position = self._receive_body(data, position)
        except Refusal as refusal:
            self._reject(refusal.rejected)
        else:
            if self.upgraded:
                self.unparsed += data[position:]

    @abstractmethod
    def _receive_head(self, data: bytes, position: int) -> int:
        """Reads on in a head, or begins one; where reading stopped. Raises Refusal."""

    def _receive_body(self, data: bytes, position: int) -> int:
        chunks = self._chunks
        if chunks is not None:
            try:
                piece, end = chunks.feed(data, position)
            except ChunkFault as fault:
                raise Refusal(431 if fault.too_large else 400, str(fault)) from fault
            if piece:
                self._events.append(piece)
            if chunks.done:
                if chunks.trailers:
                    self._events.append(Trailers(chunks.trailers))
                self._end_message()
            return end
        remaining = self._remaining
        left = len(data) - position
        self._events.append(data[position : position + remaining] if 0 <= remaining < left else data[position:])
        if remaining == UNTIL_CLOSE:
            return len(data)
        if left < remaining:
            self._remaining = remaining - left
            return len(data)
        self._end_message()
        return position + remaining

    def _end_message(self) -> None:
        """The message is complete."""
        self._events.append(END)
        self._in_head = True
        self._head_bytes = 0
        self._chunks = None

    def _feed_parser(self, data: bytes) -> bool:
        """Feeds llhttp; whether it stopped for an upgrade. Raises Refusal."""
        try:
            self._parser.feed_data(data)
        except httptools.HttpParserUpgrade:
            return True
        except httptools.HttpParserError as error:
            raise self._refusal(error) from None
        return False

    def _refusal(self, error: httptools.HttpParserError) -> Exception:
        """What llhttp's refusal, or one of ours from inside its callbacks, is to our callers."""
        cause = error.__context__
        if isinstance(cause, Exception) and (
            isinstance(cause, Refusal) or isinstance(error, httptools.HttpParserCallbackError)
        ):
            return cause
        if "HTTP version" in str(error):
            return Refusal(505, "the HTTP version is not supported")
        return Refusal(400, str(error))

    def _reject(self, rejected: Rejected) -> None:
        self._events.append(rejected)
        self.closed = True

    def _receive_after_close(self, data: bytes) -> None:
        if self.upgraded:
            self.unparsed += data

    def _split_headers(
        self, special_names: frozenset[bytes]
    ) -> tuple[list[tuple[bytes, bytes]], list[tuple[bytes, bytes]]]:
        """(headers to pass on, headers the codec reads): names in lower case; values of the latter untrimmed."""
        raw = self._raw
        if len(raw) > HEADERS_MAX or self._head_bytes > HEAD_BYTES_MAX:
            raise too_large()
        plain: list[tuple[bytes, bytes]] = []
        special: list[tuple[bytes, bytes]] = []
        for name, value in raw:
            name = name.lower()
            if name in special_names:
                special.append((name, value))
            else:
                plain.append((name, value.rstrip(b" \t")))
        return plain, special

    def on_header(self, name: bytes, value: bytes) -> None:
        """llhttp callback."""
        self._raw.append((name, value))


def too_large() -> Refusal:
    """What a head over a limit is answered with."""
    return Refusal(431, f"the headers are more than {HEADERS_MAX} or {HEAD_BYTES_MAX} bytes")


def without_nominated(headers: list[tuple[bytes, bytes]], connection: tuple[bytes, ...]) -> Headers:
    """The headers that a Connection header does not make hop-by-hop."""
    nominated = frozenset(connection) - NEVER_NOMINATED
    return tuple(pair for pair in headers if pair[0] not in nominated)


def read_content_length(value: bytes) -> int:
    """The number; llhttp has checked that it is one. Raises Refusal when it is beyond reason."""
    length = int(value)
    if length > BODY_BYTES_MAX:
        raise Refusal(413, "the Content-Length is too large")
    return length
