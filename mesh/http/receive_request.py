"""Receiving requests: see `h1`."""

import re

import httptools

from mesh.errors import ProtocolError
from mesh.http.chunked import ChunkReader
from mesh.http.events import END, Rejected, RequestEvent
from mesh.http.head import HOP_BY_HOP, RequestHead, is_authority, tokens
from mesh.http.path import DEFAULT_POLICY, PathPolicy, PathRedirect, normalize_path
from mesh.http.receiver import (
    HEAD_BYTES_MAX,
    HEAD_END,
    HEADERS_MAX,
    Receiver,
    Refusal,
    read_content_length,
    too_large,
    without_nominated,
)

TARGET_BYTES_MAX = 8 * 1024  # RFC 9112 section 3 asks for at least 8000
LINE_BYTES_MAX = TARGET_BYTES_MAX + 64  # with the method and the version

# Exactly one space between the parts: lenient readers disagree about more (RFC 9112 section 3).
_REQUEST_LINE = re.compile(rb"[A-Z-]+ [!-~]+ HTTP/1\.[01]\r\n")
_OTHER_VERSION = re.compile(rb"(?!PRI )[A-Z-]+ [!-~]+ HTTP/[0-9]\.[0-9]\r\n")
_BLANK_LINES = b"\r\n\r\n"


def _folded_spellings(name: bytes) -> frozenset[bytes]:
    """The name with underscores for some of its hyphens, in every combination but none."""
    first, *rest = name.split(b"-")
    spellings = [first]
    for part in rest:
        spellings = [start + joint + part for start in spellings for joint in (b"-", b"_")]
    return frozenset(spellings) - {name}


# Headers the codec reads itself; every other one passes through untouched. Spellings with an underscore are refused:
# some applications (CGI, WSGI) fold them into the real ones, which frame the message or say who the caller is.
_FOLDED = frozenset().union(
    *map(_folded_spellings, (b"content-length", b"transfer-encoding", b"x-forwarded-client-cert"))
)
_SPECIAL = HOP_BY_HOP | {b"host", b"expect"} | _FOLDED

_REFUSED_METHODS = frozenset((b"CONNECT", b"TRACE"))


class RequestReceiver(Receiver[httptools.HttpRequestParser]):
    """The receiving half of a server's connection."""

    __slots__ = ("_blank", "_head", "_http_minor", "_keep_alive", "_line", "_tail", "_target", "default_authority",
                 "path_policy")  # fmt: skip

    def __init__(self, path_policy: PathPolicy = DEFAULT_POLICY) -> None:
        super().__init__()
        self.path_policy = path_policy  # for the heads still to come
        self.default_authority = b""  # of an HTTP/1.0 request without Host
        self._blank = 0  # bytes of empty lines before the request line
        self._line = b""  # what has come of the request line, until it is judged
        self._tail = b""  # the last bytes read of an unfinished head
        self._target = b""
        self._http_minor = 1
        self._head: RequestHead | None = None  # just read
        self._keep_alive = True  # after the message being received
        self._parser = httptools.HttpRequestParser(self)

    def receive_data(self, data: bytes) -> list[RequestEvent]:
        """The events in these bytes, in order; empty when they complete nothing. Never raises for bad input."""
        if self.closed:
            self._receive_after_close(data)
            return []
        self._feed(data)
        events = self._events
        self._events = []
        return events  # type: ignore[return-value]  # a request parser makes no ResponseHead

    def receive_eof(self) -> list[RequestEvent]:
        """The peer ended its stream: a Rejected when that was in the middle of a message, else nothing."""
        if self.closed or not self.mid_message:
            self.closed = True
            return []
        self.closed = True
        return [Rejected(400, "the request ended early")]

    def _receive_head(self, data: bytes, position: int) -> int:
        if not self._head_bytes:
            if data[position] <= 0x20 or self._blank:
                position = self._skip_blank(data, position)
                if position == len(data):
                    return position
            match = _REQUEST_LINE.match(data, position)
            if match is None:
                self._judge_line(data[position : position + LINE_BYTES_MAX + 1])
            else:
                self._http_minor = data[match.end() - 3] - 0x30
            found = data.find(HEAD_END, position)
        else:
            if self._line:
                self._judge_line(data[: LINE_BYTES_MAX + 1])
            found = (self._tail + data).find(HEAD_END)
        if found < 0:
            return self._receive_partial_head(data, position)
        end = found + 4 - len(self._tail)
        head = data if not position and end == len(data) else data[position:end]
        self._head_bytes += len(head)
        upgrade = self._feed_parser(head)
        read = self._head
        if read is None:
            raise Refusal(400, "the head does not end where it seems to")  # as far as we know this cannot be
        self._head = None
        self._raw = []
        self._target = b""
        if self._blank or self._tail:
            self._blank = 0
            self._tail = b""
        if upgrade or read.chunked or read.content_length:
            self._begin_message(read)
        else:
            self._events += (read, END)
            self._head_bytes = 0
            if not read.keep_alive:
                self.closed = True
        return end

    def _receive_partial_head(self, data: bytes, position: int) -> int:
        piece = data[position:]
        self._head_bytes += len(piece)
        self._feed_parser(piece)
        self._tail = (self._tail + piece)[-3:]
        if self._head_bytes > HEAD_BYTES_MAX or len(self._raw) > HEADERS_MAX:
            raise too_large()
        return len(data)

    def _skip_blank(self, data: bytes, position: int) -> int:
        """Past CRLFs before a request line: some clients send one behind a body (RFC 9112 section 2.2)."""
        while position < len(data) and self._blank < 4 and data[position] == _BLANK_LINES[self._blank]:
            position += 1
            self._blank += 1
        if position < len(data) and (self._blank % 2 or data[position] <= 0x20):
            raise Refusal(400, "the request begins with neither a method nor at most two empty lines")
        return position

    def _judge_line(self, data: bytes) -> None:
        """Looks at a request line that is unusual, or comes in pieces. Raises Refusal."""
        begun = len(self._line)
        line = self._line + data
        end = line.find(b"\n") + 1
        if not end:
            self._line = line
            if len(line) > LINE_BYTES_MAX:
                raise Refusal(414, "the request line is too long")
            return
        self._line = b""
        match = _REQUEST_LINE.match(line)
        if match is not None:
            self._http_minor = line[match.end() - 3] - 0x30
            return
        self._feed_parser(line[begun:end])  # llhttp may know better what is wrong with it
        if _OTHER_VERSION.fullmatch(line, 0, end) is not None:
            raise Refusal(505, "the HTTP version is not supported")
        raise Refusal(400, "the request line is not a method, a target and a version with one space between")

    def _begin_message(self, head: RequestHead) -> None:
        """A body follows, or something else than HTTP."""
        self._events.append(head)
        self._parser = httptools.HttpRequestParser(self)  # the one we have waits for the body, or for nothing any more
        self._keep_alive = head.keep_alive
        if head.chunked:
            self._in_head = False
            self._chunks = ChunkReader()
        elif head.content_length:
            self._in_head = False
            self._remaining = head.content_length
        else:
            self._end_message()
            if head.upgrade:
                self.closed = self.upgraded = True

    def _end_message(self) -> None:
        super()._end_message()
        if not self._keep_alive:
            self.closed = True

    def on_url(self, url: bytes) -> None:
        """llhttp callback."""
        self._target += url
        if len(self._target) > TARGET_BYTES_MAX:
            raise Refusal(414, f"the request target is longer than {TARGET_BYTES_MAX} bytes")

    def on_headers_complete(self) -> None:
        """llhttp callback."""
        self._head = self._read_head()

    def _read_head(self) -> RequestHead:
        method = self._parser.get_method()
        if method in _REFUSED_METHODS:
            raise Refusal(405, f"{method.decode()} is not served here")
        http_minor = self._http_minor
        plain, special = self._split_headers(_SPECIAL)
        authority: bytes | None = None
        content_length: int | None = None
        chunked = expects_continue = te_trailers = False
        connection: tuple[bytes, ...] = ()
        upgrade = b""
        for name, raw_value in special:
            value = raw_value.rstrip(b" \t")
            if name == b"host":
                if authority is not None:
                    raise Refusal(400, "more than one Host header")
                authority = value
            elif name == b"content-length":
                content_length = read_content_length(value)
            elif name == b"transfer-encoding":
                chunked = True
                self._check_transfer_encoding(raw_value, http_minor)
            elif name == b"connection":
                connection += tokens(value)
            elif name == b"upgrade":
                upgrade = value.lower()
            elif name == b"expect":
                if value.lower() != b"100-continue":
                    raise Refusal(417, "only 100-continue can be expected")
                expects_continue = http_minor == 1
            elif name == b"te":
                te_trailers = b"trailers" in tokens(value)
            elif b"_" in name:
                raise Refusal(400, f"a header named {name.decode()} is not accepted")
        if upgrade and (upgrade != b"websocket" or b"upgrade" not in connection or not http_minor):
            upgrade = b""
        if upgrade and (method != b"GET" or chunked or content_length):
            raise Refusal(400, "a WebSocket upgrade is a GET with no body")
        path, query, authority = self._read_target(method, authority, http_minor)
        if method == b"OPTIONS":
            plain = _count_hop(plain)
        if http_minor:
            keep_alive = b"close" not in connection
        else:
            keep_alive = False  # HTTP/1.0 persistence is an extension no peer of ours needs
        return RequestHead(
            method, path, query, authority,
            without_nominated(plain, connection) if connection else tuple(plain),
            content_length, chunked, keep_alive, http_minor, expects_continue, upgrade, te_trailers,
        )  # fmt: skip

    def _check_transfer_encoding(self, value: bytes, http_minor: int) -> None:
        if not http_minor:
            raise Refusal(400, "Transfer-Encoding in an HTTP/1.0 request")
        if value.lower() != b"chunked":
            raise Refusal(501, "the only Transfer-Encoding served is chunked")

    def _read_target(
        self, method: bytes, authority: bytes | None, http_minor: int
    ) -> tuple[bytes, bytes | None, bytes]:
        target = self._target
        if authority is None:
            if http_minor:
                raise Refusal(400, "there is no Host header")
            authority = self.default_authority
        elif not is_authority(authority):
            raise Refusal(400, "the Host header is not a host with an optional port")
        if b"#" in target:
            raise Refusal(400, "the request target has a fragment")
        if target[:1] != b"/":
            if target == b"*":
                if method != b"OPTIONS":
                    raise Refusal(400, "only OPTIONS can ask for *")
                return target, None, authority
            scheme, separator, rest = target.partition(b"://")
            if not separator or scheme.lower() not in (b"http", b"https"):
                raise Refusal(400, "the request target is not a path")
            # Absolute form: the target wins over Host (RFC 9112 section 3.2.2).
            authority, slash, rest = rest.partition(b"/")
            authority, question, _ = authority.partition(b"?")
            if question:
                raise Refusal(400, "the request target has no path")
            if not is_authority(authority):
                raise Refusal(400, "the request target's authority is not a host with an optional port")
            target = b"/" + rest if slash else b"/"
        raw_path, question, query = target.partition(b"?")
        try:
            path = normalize_path(raw_path, self.path_policy)
        except ProtocolError as error:
            raise Refusal(400, str(error)) from error
        except PathRedirect as redirect:
            raise Refusal(307, str(redirect), redirect.path + question + query) from redirect
        return path, query if question else None, authority


def _count_hop(headers: list[tuple[bytes, bytes]]) -> list[tuple[bytes, bytes]]:
    """The headers of an OPTIONS request with its Max-Forwards, if any, one less (RFC 9110 section 7.6.2)."""
    for position, (name, value) in enumerate(headers):
        if name == b"max-forwards":
            if not value.isdigit() or len(value) > 9:
                raise Refusal(400, "Max-Forwards is not a number")
            if int(value) == 0:
                raise Refusal(405, "OPTIONS with Max-Forwards 0 is for the service, which is behind this proxy")
            headers[position] = (name, b"%d" % (int(value) - 1))
    return headers
