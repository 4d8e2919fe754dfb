"""What receiving requests and responses share: feeding llhttp, limits, bodies, ends. See `h1` for the whole."""

from typing import Generic, TypeVar

import httptools

from mesh.http.events import EndOfMessage, Rejected
from mesh.http.head import NEVER_NOMINATED, Headers, RequestHead, ResponseHead

HEAD_BYTES_MAX = 60 * 1024  # Envoy's default
HEADERS_MAX = 100  # Envoy's default
CHUNK_OVERHEAD_BYTES_MAX = 16 * 1024  # extensions and trailers of one body, beyond the framing of its chunks
CHUNK_FRAMING_BYTES_MAX = 32  # what one chunk's size line and line ends may fairly need
BODY_BYTES_MAX = 2**62


class Refusal(Exception):
    """Control flow out of a parser callback; callers see its Rejected as an event."""

    def __init__(self, status: int, reason: str) -> None:
        super().__init__(reason)
        self.rejected = Rejected(status, reason)


Parser = TypeVar("Parser", httptools.HttpRequestParser, httptools.HttpResponseParser)


class Receiver(Generic[Parser]):
    """What both directions share: feeding llhttp, the limits, body and end events."""

    __slots__ = (
        "_body_overhead", "_chunks", "_events", "_fed_in_head", "_in_head", "_large", "_parser", "_raw", "closed",
        "unparsed", "upgraded",
    )  # fmt: skip

    def __init__(self) -> None:
        self._parser: Parser
        self._events: list[RequestHead | ResponseHead | bytes | EndOfMessage | Rejected] = []
        self._raw: list[tuple[bytes, bytes]] = []  # header lines as llhttp gives them
        self._in_head = True
        self._large = False
        self._fed_in_head = 0
        self._body_overhead = 0
        self._chunks = -1  # -1: the body is not chunked
        self.closed = False  # no further input is read: rejected, upgraded, or the last message has come
        self.upgraded = False  # closed by an upgrade: what follows is not HTTP, and collects in `unparsed`
        self.unparsed = b""

    @property
    def mid_message(self) -> bool:
        """Whether a message has begun and not ended: its peer owes us bytes."""
        return not self._in_head or self._fed_in_head > 0

    def _feed(self, data: bytes) -> None:
        """Feeds llhttp; every failure becomes a Rejected event."""
        size = len(data)
        if self._in_head:
            self._fed_in_head += size
            self._large = self._fed_in_head > HEAD_BYTES_MAX
        elif self._chunks >= 0:
            self._body_overhead += size
        while True:
            try:
                self._parser.feed_data(data)
            except httptools.HttpParserUpgrade as upgrade:
                data = self._receive_upgrade(data[upgrade.args[0] :])
                if data:
                    continue
            except httptools.HttpParserError as error:
                self._fail(error)
            break
        if (self._fed_in_head if self._in_head else self._chunks >= 0) and not self.closed:
            self._check_unfinished()

    def _check_unfinished(self) -> None:
        """The limits of what has begun and not ended yet."""
        if self._in_head:
            if self._fed_in_head > HEAD_BYTES_MAX or len(self._raw) > HEADERS_MAX:
                self._reject(Rejected(431, "the headers are too large"))
        elif self._chunks >= 0 and (
            self._body_overhead > CHUNK_OVERHEAD_BYTES_MAX + CHUNK_FRAMING_BYTES_MAX * self._chunks
        ):
            self._reject(Rejected(400, "chunk extensions or trailers are too large"))

    def _fail(self, error: httptools.HttpParserError) -> None:
        cause = error.__context__
        if self.closed:
            return  # bytes after the last message this connection may carry: never read
        if isinstance(cause, Refusal):
            self._reject(cause.rejected)
        elif isinstance(error, httptools.HttpParserCallbackError) and cause is not None:
            raise cause
        else:
            self._reject(self._rejected_by_parser(str(error)))

    def _rejected_by_parser(self, text: str) -> Rejected:
        if "HTTP version" in text:
            return Rejected(505, "the HTTP version is not supported")
        return Rejected(400, text)

    def _reject(self, rejected: Rejected) -> None:
        self._events.append(rejected)
        self.closed = True

    def _receive_upgrade(self, rest: bytes) -> bytes:
        """llhttp stopped at an upgrade, before `rest`: returns what to go on parsing as HTTP."""
        self.closed = self.upgraded = True
        self.unparsed = rest
        return b""

    def _receive_after_close(self, data: bytes) -> None:
        if self.upgraded:
            self.unparsed += data

    def _split_headers(
        self, special_names: frozenset[bytes], first_line_bytes: int
    ) -> tuple[list[tuple[bytes, bytes]], list[tuple[bytes, bytes]]]:
        """(headers to pass on, headers the codec reads): names in lower case; values of the latter untrimmed."""
        raw = self._raw
        if len(raw) > HEADERS_MAX:
            raise Refusal(431, f"more than {HEADERS_MAX} headers")
        # Only when much has been fed can the exact sum be over the limit.
        if self._large and (first_line_bytes + sum(len(name) + len(value) + 4 for name, value in raw) > HEAD_BYTES_MAX):
            raise Refusal(431, f"the headers are larger than {HEAD_BYTES_MAX} bytes")
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
        """llhttp callback; trailers come here too, and are dropped."""
        if self._in_head:
            self._raw.append((name, value))

    def on_body(self, data: bytes) -> None:
        """llhttp callback."""
        if self._chunks >= 0:
            self._body_overhead -= len(data)
        self._events.append(data)

    def on_chunk_header(self) -> None:
        """llhttp callback."""
        self._chunks += 1


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
