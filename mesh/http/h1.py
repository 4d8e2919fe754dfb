"""HTTP/1.1 without I/O, strict (RFC 9112): parsed by httptools (llhttp), with our own checks on top.

A server (one object per accepted connection; works the same for a Trio task and for a reactor callback):

    connection = ServerConnection()
    for event in connection.receive_data(data):       # a flat list, in order; pipelined requests simply follow
        match event:
            case RequestHead():   ...                  # a request begins
            case bytes():         ...                  # a piece of its body, never empty
            case EndOfMessage():  ...                  # it is complete
            case Rejected():      ...                  # malformed: always last, the connection takes no more input
    # if head.expects_continue, and you want the body:  send(CONTINUE)
    send(connection.send_response(ResponseHead(200, ((b"Content-Type", b"text/plain"),), content_length=2), request))
    send(connection.send_body(b"ok"))
    send(connection.end())
    # a Rejected is answered with:                      send(connection.reject(event)); then close
    # after end(): close the connection if connection.must_close

`content_length=None` makes the codec choose: chunked for HTTP/1.1, until-close for HTTP/1.0. For HEAD, 204 and 304 body
bytes are swallowed. Feed the next `receive_data` only when the requests already returned are answered: that bounds
memory, because one call returns no more than its input held. At the peer's end of stream call `receive_eof()`.

A client: `ClientConnection`: `send_request(head) -> bytes`, `send_body`, `end`, and the same receive side with
ResponseHead events; a 1xx head (101 apart) is an event of its own with no EndOfMessage after it.

Messages are always written from their parsed form, never copied. Trailers are read, limited and dropped.
"""

from typing import Final, Generic, NoReturn, TypeVar

import httptools

from mesh.errors import ProtocolError
from mesh.http.head import (
    HOP_BY_HOP,
    NEVER_NOMINATED,
    Headers,
    RequestHead,
    ResponseHead,
    is_authority,
    response_has_body,
    tokens,
)
from mesh.http.path import normalize_path

TARGET_BYTES_MAX = 8 * 1024  # RFC 9112 section 3 asks for at least 8000
HEAD_BYTES_MAX = 60 * 1024  # Envoy's default
HEADERS_MAX = 100  # Envoy's default
CHUNK_OVERHEAD_BYTES_MAX = 16 * 1024  # extensions and trailers of one body, beyond the framing of its chunks
CHUNK_FRAMING_BYTES_MAX = 32  # what one chunk's size line and line ends may fairly need
INFORMATIONAL_MAX = 10  # 1xx heads before a final one
BODY_BYTES_MAX = 2**62

CONTINUE: Final = b"HTTP/1.1 100 Continue\r\n\r\n"

REASONS: Final[dict[int, bytes]] = {
    100: b"Continue", 101: b"Switching Protocols", 200: b"OK", 201: b"Created", 202: b"Accepted", 204: b"No Content",
    206: b"Partial Content", 301: b"Moved Permanently", 302: b"Found", 303: b"See Other", 304: b"Not Modified",
    307: b"Temporary Redirect", 308: b"Permanent Redirect", 400: b"Bad Request", 401: b"Unauthorized",
    403: b"Forbidden", 404: b"Not Found", 405: b"Method Not Allowed", 408: b"Request Timeout", 409: b"Conflict",
    413: b"Payload Too Large", 414: b"URI Too Long", 415: b"Unsupported Media Type", 417: b"Expectation Failed",
    422: b"Unprocessable Content", 426: b"Upgrade Required", 429: b"Too Many Requests",
    431: b"Request Header Fields Too Large", 500: b"Internal Server Error", 501: b"Not Implemented",
    502: b"Bad Gateway", 503: b"Service Unavailable", 504: b"Gateway Timeout", 505: b"HTTP Version Not Supported",
}  # fmt: skip

_STATUS_LINES = {status: b"HTTP/1.1 %d %b" % (status, reason) for status, reason in REASONS.items()}

# Headers the codec reads itself; every other one passes through untouched. Spellings with an underscore are refused:
# some applications fold them into the real ones.
_SPECIAL = HOP_BY_HOP | {b"host", b"expect", b"content_length", b"transfer_encoding"}
_SPECIAL_RESPONSE = HOP_BY_HOP | {b"content_length", b"transfer_encoding"}

_REFUSED_METHODS = frozenset((b"CONNECT", b"TRACE"))


class EndOfMessage:
    """The message that began with the last head is complete."""

    __slots__ = ()

    def __repr__(self) -> str:
        return "EndOfMessage()"


END: Final = EndOfMessage()


class Rejected:
    """The peer broke the protocol: `status` is what a server answers, `reason` is for the answer and the log."""

    __slots__ = ("reason", "status")

    def __init__(self, status: int, reason: str) -> None:
        self.status = status
        self.reason = reason

    def __repr__(self) -> str:
        return f"Rejected({self.status}, {self.reason!r})"


RequestEvent = RequestHead | bytes | EndOfMessage | Rejected
ResponseEvent = ResponseHead | bytes | EndOfMessage | Rejected


class _Refusal(Exception):
    """Control flow out of a parser callback; callers see its Rejected as an event."""

    def __init__(self, status: int, reason: str) -> None:
        super().__init__(reason)
        self.rejected = Rejected(status, reason)


_Parser = TypeVar("_Parser", httptools.HttpRequestParser, httptools.HttpResponseParser)


class _Receiver(Generic[_Parser]):
    """What both directions share: feeding llhttp, the limits, body and end events."""

    __slots__ = (
        "_body_overhead", "_chunks", "_events", "_fed_in_head", "_in_head", "_large", "_parser", "_plain", "_special",
        "closed", "unparsed", "upgraded",
    )  # fmt: skip

    def __init__(self) -> None:
        self._parser: _Parser
        self._events: list[RequestHead | ResponseHead | bytes | EndOfMessage | Rejected] = []
        self._plain: list[tuple[bytes, bytes]] = []
        self._special: list[tuple[bytes, bytes]] = []
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
        if not self.closed:
            self._check_unfinished()

    def _check_unfinished(self) -> None:
        """The limits of what has begun and not ended yet."""
        if self._in_head:
            if self._fed_in_head > HEAD_BYTES_MAX or len(self._plain) > HEADERS_MAX:
                self._reject(Rejected(431, "the headers are too large"))
        elif self._chunks >= 0 and (
            self._body_overhead > CHUNK_OVERHEAD_BYTES_MAX + CHUNK_FRAMING_BYTES_MAX * self._chunks
        ):
            self._reject(Rejected(400, "chunk extensions or trailers are too large"))

    def _fail(self, error: httptools.HttpParserError) -> None:
        cause = error.__context__
        if self.closed:
            return  # bytes after the last message this connection may carry: never read
        if isinstance(cause, _Refusal):
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

    def _check_head_size(self, first_line_bytes: int) -> None:
        if len(self._plain) + len(self._special) > HEADERS_MAX:
            raise _Refusal(431, f"more than {HEADERS_MAX} headers")
        if self._large:  # only then can the exact sum be over the limit
            size = first_line_bytes + sum(
                len(name) + len(value) + 4 for pairs in (self._plain, self._special) for name, value in pairs
            )
            if size > HEAD_BYTES_MAX:
                raise _Refusal(431, f"the headers are larger than {HEAD_BYTES_MAX} bytes")

    def _nominated_removed(self, connection: tuple[bytes, ...]) -> Headers:
        nominated = frozenset(connection) - NEVER_NOMINATED
        return tuple(pair for pair in self._plain if pair[0] not in nominated)

    def on_body(self, data: bytes) -> None:
        """llhttp callback."""
        if self._chunks >= 0:
            self._body_overhead -= len(data)
        self._events.append(data)

    def on_chunk_header(self) -> None:
        """llhttp callback."""
        self._chunks += 1


def _content_length(value: bytes) -> int:
    length = int(value)  # llhttp has checked that it is all digits
    if length > BODY_BYTES_MAX:
        raise _Refusal(413, "the Content-Length is too large")
    return length


class RequestReceiver(_Receiver[httptools.HttpRequestParser]):
    """The receiving half of a server's connection."""

    __slots__ = ("_last_head", "_resumed", "_skip_end", "_target")

    def __init__(self) -> None:
        super().__init__()
        self._target = b""
        self._resumed = False  # feeding a made-up head, to read the body of a request whose upgrade was stripped
        self._skip_end = False
        self._last_head: RequestHead | None = None
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
        if self.closed or (self._in_head and not self._fed_in_head):
            self.closed = True
            return []
        self.closed = True
        return [Rejected(400, "the request ended early")]

    def on_message_begin(self) -> None:
        """llhttp callback."""
        if self._resumed:
            return
        if self.closed:
            raise _Refusal(400, "the connection takes no further request")
        self._in_head = True
        self._target = b""
        self._plain = []
        self._special = []

    def on_url(self, url: bytes) -> None:
        """llhttp callback."""
        self._target += url
        if len(self._target) > TARGET_BYTES_MAX and not self._resumed:
            raise _Refusal(414, f"the request target is longer than {TARGET_BYTES_MAX} bytes")

    def on_header(self, name: bytes, value: bytes) -> None:
        """llhttp callback; trailers come here too, and are dropped."""
        if self._in_head and not self._resumed:
            name = name.lower()
            if name in _SPECIAL:
                self._special.append((name, value))
            else:
                self._plain.append((name, value.rstrip(b" \t")))

    def on_headers_complete(self) -> None:
        """llhttp callback."""
        if self._resumed:
            return
        self._check_head_size(len(self._target))
        head = self._read_head()
        self._in_head = False
        self._fed_in_head = 0
        self._chunks = 0 if head.chunked else -1
        self._body_overhead = 0
        self._events.append(head)
        self._last_head = head
        if self._parser.should_upgrade() and not head.upgrade and head.has_body:
            self._skip_end = True  # llhttp ends the message here; its body is still to come

    def on_message_complete(self) -> None:
        """llhttp callback."""
        if self._skip_end:
            self._skip_end = False
            return
        self._events.append(END)
        self._in_head = True
        self._fed_in_head = 0
        if self._last_head is not None and not self._last_head.keep_alive:
            self.closed = True

    def _receive_upgrade(self, rest: bytes) -> bytes:
        head = self._last_head
        assert head is not None
        if head.upgrade:
            return super()._receive_upgrade(rest)
        # An upgrade that is not offered (h2c, say) is stripped; llhttp has stopped before the body, so a fresh parser
        # is told the framing in a head of our own.
        self._parser = httptools.HttpRequestParser(self)
        if head.has_body:
            self._resumed = True
            framing = b"transfer-encoding: chunked"
            if head.content_length is not None:
                framing = b"content-length: %d" % head.content_length
            self._parser.feed_data(b"POST / HTTP/1.1\r\n" + framing + b"\r\n\r\n")
            self._resumed = False
            self._in_head = False
        return rest

    def _read_head(self) -> RequestHead:
        method = self._parser.get_method()
        if method in _REFUSED_METHODS:
            raise _Refusal(405, f"{method.decode()} is not served here")
        version = self._parser.get_http_version()
        if version not in ("1.1", "1.0"):
            raise _Refusal(505, f"HTTP version {version} is not supported")
        http_minor = 1 if version == "1.1" else 0
        authority: bytes | None = None
        content_length: int | None = None
        chunked = expects_continue = te_trailers = False
        connection: tuple[bytes, ...] = ()
        upgrade = b""
        for name, raw_value in self._special:
            value = raw_value.rstrip(b" \t")
            if name == b"host":
                if authority is not None:
                    raise _Refusal(400, "more than one Host header")
                authority = value
            elif name == b"content-length":
                content_length = _content_length(value)
            elif name == b"transfer-encoding":
                chunked = True
                self._check_transfer_encoding(raw_value, http_minor)
            elif name == b"connection":
                connection += tokens(value)
            elif name == b"upgrade":
                upgrade = value.lower()
            elif name == b"expect":
                if value.lower() != b"100-continue":
                    raise _Refusal(417, "only 100-continue can be expected")
                expects_continue = http_minor == 1
            elif name == b"te":
                te_trailers = b"trailers" in tokens(value)
            elif b"_" in name:
                raise _Refusal(400, f"a header named {name.decode()} is not accepted")
        if upgrade and (upgrade != b"websocket" or b"upgrade" not in connection or not http_minor):
            upgrade = b""
        if upgrade and (method != b"GET" or chunked or content_length):
            raise _Refusal(400, "a WebSocket upgrade is a GET with no body")
        path, query, authority = self._read_target(method, authority, http_minor)
        if http_minor:
            keep_alive = b"close" not in connection
        else:
            keep_alive = False  # HTTP/1.0 persistence is an extension no peer of ours needs
        return RequestHead(
            method, path, query, authority,
            self._nominated_removed(connection) if connection else tuple(self._plain),
            content_length, chunked, keep_alive, http_minor, expects_continue, upgrade, te_trailers,
        )  # fmt: skip

    def _check_transfer_encoding(self, value: bytes, http_minor: int) -> None:
        if not http_minor:
            raise _Refusal(400, "Transfer-Encoding in an HTTP/1.0 request")
        if value.lower() != b"chunked":
            raise _Refusal(501, "the only Transfer-Encoding served is chunked")

    def _read_target(
        self, method: bytes, authority: bytes | None, http_minor: int
    ) -> tuple[bytes, bytes | None, bytes]:
        target = self._target
        if authority is None:
            if http_minor:
                raise _Refusal(400, "there is no Host header")
            authority = b""
        elif not is_authority(authority):
            raise _Refusal(400, "the Host header is not a host with an optional port")
        if b"#" in target:
            raise _Refusal(400, "the request target has a fragment")
        if target[:1] != b"/":
            if target == b"*":
                if method != b"OPTIONS":
                    raise _Refusal(400, "only OPTIONS can ask for *")
                return target, None, authority
            scheme, separator, rest = target.partition(b"://")
            if not separator or scheme.lower() not in (b"http", b"https"):
                raise _Refusal(400, "the request target is not a path")
            # Absolute form: the target wins over Host (RFC 9112 section 3.2.2).
            authority, slash, rest = rest.partition(b"/")
            authority, question, _ = authority.partition(b"?")
            if question:
                raise _Refusal(400, "the request target has no path")
            if not is_authority(authority):
                raise _Refusal(400, "the request target's authority is not a host with an optional port")
            target = b"/" + rest if slash else b"/"
        raw_path, question, query = target.partition(b"?")
        try:
            path = normalize_path(raw_path)
        except ProtocolError as error:
            raise _Refusal(400, str(error)) from error
        return path, query if question else None, authority


def _refuse_line_breaks() -> NoReturn:
    raise ProtocolError("a header contains CR, LF or NUL, so the message was not sent")


def _lines(start: tuple[bytes, ...], headers: Headers, rest: tuple[bytes, ...]) -> bytes:
    """The bytes of a head. Raises ProtocolError rather than send a line that would read as two."""
    data = b"\r\n".join((*start, *map(b": ".join, headers), *rest, b"\r\n"))
    breaks = len(start) + len(headers) + len(rest) + 1
    if data.count(b"\n") != breaks or data.count(b"\r") != breaks or b"\0" in data:
        _refuse_line_breaks()
    return data


class _Sender:
    """Frames one body: by length, by chunks, until close, or not at all."""

    __slots__ = ("_chunked", "_remaining", "_swallow")

    def __init__(self) -> None:
        self._chunked = False
        self._swallow = False
        self._remaining = -1  # bytes still owed; -1: until close

    def send_body(self, data: bytes) -> bytes:
        """The bytes to put on the wire for a piece of the body."""
        if self._chunked:
            return b"%x\r\n%b\r\n" % (len(data), data) if data else b""
        if self._swallow:
            return b""
        if self._remaining >= 0:
            self._remaining -= len(data)
            assert self._remaining >= 0, "the body is longer than its Content-Length"
        return data

    def end(self) -> bytes:
        """The bytes that complete the message."""
        if self._chunked:
            self._chunked = False
            return b"0\r\n\r\n"
        assert self._swallow or self._remaining <= 0, "the body is shorter than its Content-Length"
        return b""


class ServerConnection(RequestReceiver):
    """Receives requests, writes responses. One per accepted connection."""

    __slots__ = ("_sender", "must_close")

    def __init__(self) -> None:
        super().__init__()
        self._sender = _Sender()
        self.must_close = False  # after the current response (set it yourself to close sooner, as when draining)

    def send_response(self, head: ResponseHead, request: RequestHead) -> bytes:
        """The head of the response to `request`; sets `must_close`. Raises ProtocolError for an unsendable header."""
        status = head.status
        first = _STATUS_LINES.get(status)
        if first is None or (head.reason and head.reason != REASONS[status]):
            first = b"HTTP/1.1 %d %b" % (status, head.reason)
        sender = self._sender
        sender._chunked = sender._swallow = False
        sender._remaining = -1
        rest: tuple[bytes, ...] = ()
        if status == 101:
            self.must_close = True
            return _lines((first,), head.headers, (b"connection: upgrade", b"upgrade: " + head.upgrade))
        if not response_has_body(request.method, status):
            sender._swallow = True
            if head.content_length is not None and status != 204:
                rest = (b"content-length: %d" % head.content_length,)
        elif head.content_length is not None:
            sender._remaining = head.content_length
            rest = (b"content-length: %d" % head.content_length,)
        elif request.http_minor:
            sender._chunked = True
            rest = (b"transfer-encoding: chunked",)
        else:
            self.must_close = True
        if self.must_close or not request.keep_alive:
            self.must_close = True
            rest += (b"connection: close",)
        return _lines((first,), head.headers, rest)

    def send_informational(self, head: ResponseHead) -> bytes:
        """A 1xx head to pass on before the final one."""
        first = _STATUS_LINES.get(head.status) or b"HTTP/1.1 %d %b" % (head.status, head.reason)
        return _lines((first,), head.headers, ())

    def send_body(self, data: bytes) -> bytes:
        """The bytes to put on the wire for a piece of the response's body."""
        return self._sender.send_body(data)

    def end(self) -> bytes:
        """The bytes that complete the response."""
        return self._sender.end()

    def reject(self, rejected: Rejected) -> bytes:
        """A complete answer to malformed input; close the connection after it."""
        self.must_close = True
        body = rejected.reason.encode("ascii", "replace") + b"\n"
        headers = ((b"content-type", b"text/plain"),)
        rest = (b"content-length: %d" % len(body), b"connection: close")
        return _lines((_STATUS_LINES[rejected.status],), headers, rest) + body


class ClientConnection(_Receiver[httptools.HttpResponseParser]):
    """Writes requests, receives responses, one at a time. One per connection to a server."""

    __slots__ = (
        "_buffer", "_head_done", "_informational", "_method", "_sender", "_until_close", "_upgrade", "must_close",
    )  # fmt: skip

    def __init__(self) -> None:
        super().__init__()
        self._sender = _Sender()
        self._method = b""  # of the request in flight; empty: none
        self._buffer = b""  # head of a response to HEAD, which llhttp cannot tell from one with a body
        self._head_done = False
        self._informational = 0
        self._until_close = False
        self._upgrade = b""  # what the request in flight offered
        self.must_close = False  # this connection cannot carry another request
        self._parser = httptools.HttpResponseParser(self)

    @property
    def idle(self) -> bool:
        """Whether another request may be sent."""
        return not self._method and not self.must_close and not self.closed

    def send_request(self, head: RequestHead) -> bytes:
        """The head of a request. Raises ProtocolError for an unsendable header."""
        self._method = head.method
        self._upgrade = head.upgrade
        self._head_done = False
        self._informational = 0
        sender = self._sender
        sender._chunked = sender._swallow = False
        sender._remaining = 0
        rest: tuple[bytes, ...] = ()
        if head.chunked:
            sender._chunked = True
            rest = (b"transfer-encoding: chunked",)
        elif head.content_length is not None:
            sender._remaining = head.content_length
            rest = (b"content-length: %d" % head.content_length,)
        if head.expects_continue:
            rest += (b"expect: 100-continue",)
        if head.te_trailers:
            rest += (b"te: trailers", b"connection: te")
        if head.upgrade:
            rest += (b"connection: upgrade", b"upgrade: " + head.upgrade)
        path = head.path if head.query is None else head.path + b"?" + head.query
        return _lines((b"%b %b HTTP/1.1" % (head.method, path), b"host: " + head.authority), head.headers, rest)

    def send_body(self, data: bytes) -> bytes:
        """The bytes to put on the wire for a piece of the request's body."""
        return self._sender.send_body(data)

    def end(self) -> bytes:
        """The bytes that complete the request."""
        return self._sender.end()

    def receive_data(self, data: bytes) -> list[ResponseEvent]:
        """The events in these bytes. Bytes outside a response make a Rejected. Never raises for bad input."""
        if self.closed:
            self._receive_after_close(data)
            return []
        if not self._method:
            self.closed = self.must_close = True
            return [Rejected(502, "bytes arrived with no request in flight")]
        if self._method == b"HEAD":
            self._feed_head_only(data)
        else:
            self._feed(data)
        events = self._events
        self._events = []
        return events  # type: ignore[return-value]  # a response parser makes no RequestHead

    def receive_eof(self) -> list[ResponseEvent]:
        """The server ended its stream: EndOfMessage for a body that lasts until then, Rejected in mid-message."""
        self.must_close = True
        if self.closed or not self._method:
            self.closed = True
            return []
        self.closed = True
        if self._until_close:
            self._method = b""
            return [END]
        return [Rejected(502, "the response ended early")]

    def _feed_head_only(self, data: bytes) -> None:
        self._buffer += data
        while not self.closed:
            end = self._buffer.find(b"\r\n\r\n")
            if end < 0:
                if len(self._buffer) > HEAD_BYTES_MAX:
                    self._reject(Rejected(502, "the response headers are too large"))
                return
            head, self._buffer = self._buffer[: end + 4], self._buffer[end + 4 :]
            self._feed(head)
            if self._head_done and not self.closed:
                self._method = b""
                self._parser = httptools.HttpResponseParser(self)
                self._in_head = True
                self._events.append(END)
                if self._buffer:  # a body where none may be: this connection is out of step
                    self.must_close = self.closed = True
                return

    def _rejected_by_parser(self, text: str) -> Rejected:
        return Rejected(502, text)

    def _reject(self, rejected: Rejected) -> None:
        if self._events and self._events[-1] is END:
            self.must_close = self.closed = True  # the response is whole; what follows it is not used
            return
        self.must_close = True
        super()._reject(Rejected(502, rejected.reason))

    def _receive_upgrade(self, rest: bytes) -> bytes:
        self.must_close = True
        return super()._receive_upgrade(rest)

    def on_message_begin(self) -> None:
        """llhttp callback."""
        if not self._method:
            raise _Refusal(502, "bytes follow the response")
        self._in_head = True
        self._plain = []
        self._special = []

    def on_header(self, name: bytes, value: bytes) -> None:
        """llhttp callback; trailers come here too, and are dropped."""
        if self._in_head:
            name = name.lower()
            if name in _SPECIAL_RESPONSE:
                self._special.append((name, value))
            else:
                self._plain.append((name, value.rstrip(b" \t")))

    def on_headers_complete(self) -> None:
        """llhttp callback."""
        self._check_head_size(0)
        status = self._parser.get_status_code()
        if not 100 <= status <= 599:
            raise _Refusal(502, f"status {status} is outside 100 to 599")
        if self._parser.get_http_version() not in ("1.1", "1.0"):
            raise _Refusal(502, "the HTTP version of the response is not supported")
        self._in_head = False
        self._fed_in_head = 0
        head, chunked = self._read_head(status)
        if head.informational:
            self._informational += 1
            if self._informational > INFORMATIONAL_MAX:
                raise _Refusal(502, f"more than {INFORMATIONAL_MAX} informational responses")
        self._head_done = not head.informational
        body = response_has_body(self._method, status)
        self._chunks = 0 if chunked and body else -1
        self._body_overhead = 0
        self._until_close = body and not chunked and head.content_length is None
        if self._until_close or not head.keep_alive:
            self.must_close = True
        self._events.append(head)

    def on_message_complete(self) -> None:
        """llhttp callback."""
        self._in_head = True
        self._fed_in_head = 0
        if self._head_done and self._method != b"HEAD":
            self._method = b""
            self._events.append(END)

    def _read_head(self, status: int) -> tuple[ResponseHead, bool]:
        content_length: int | None = None
        chunked = False
        connection: tuple[bytes, ...] = ()
        upgrade = b""
        for name, raw_value in self._special:
            value = raw_value.rstrip(b" \t")
            if name == b"content-length":
                content_length = _content_length(value)
            elif name == b"transfer-encoding":
                if raw_value.lower() != b"chunked":
                    raise _Refusal(502, "the only Transfer-Encoding understood is chunked")
                chunked = True
            elif name == b"connection":
                connection += tokens(value)
            elif name == b"upgrade":
                upgrade = value.lower()
            elif b"_" in name:
                raise _Refusal(502, f"a header named {name.decode()} is not accepted")
        http_minor = self._parser.get_http_version() == "1.1"
        keep_alive = b"close" not in connection if http_minor else b"keep-alive" in connection
        if status == 101 and (not upgrade or upgrade != self._upgrade or b"upgrade" not in connection):
            raise _Refusal(502, "a 101 response that does not answer the request's Upgrade")
        head = ResponseHead(
            status,
            self._nominated_removed(connection) if connection else tuple(self._plain),
            content_length,
            b"",
            keep_alive,
            upgrade if status == 101 else b"",
        )
        return head, chunked
