"""HTTP/1.1 without I/O, strict (RFC 9112): parsed by httptools (llhttp), with our own checks on top.

A server (one object per accepted connection; works the same for a Trio task and for a reactor callback):

    connection = ServerConnection()
    for event in connection.receive_data(data):       # a flat list, in order; pipelined requests simply follow
        match event:
            case RequestHead():   ...                  # a request begins
            case bytes():         ...                  # a piece of its body, never empty
            case Trailers():      ...                  # fields behind a chunked body; at most one, just before the end
            case EndOfMessage():  ...                  # it is complete
            case Rejected():      ...                  # malformed: always last, the connection takes no more input
    # if head.expects_continue, and you want the body:  send(CONTINUE)
    send(connection.send_response(ResponseHead(200, ((b"Content-Type", b"text/plain"),), content_length=2), request))
    send(connection.send_body(b"ok"))
    send(connection.end())                             # or end(trailers.headers)
    # a Rejected is answered with:                      send(connection.reject(event)); then close
    # after end(): close the connection if connection.must_close

`content_length=None` makes the codec choose: chunked for HTTP/1.1, until-close for HTTP/1.0. For HEAD, 204 and 304 body
bytes are swallowed. Feed the next `receive_data` only when the requests already returned are answered: that bounds
memory, because one call returns no more than its input held (one piece of body per message, however small its chunks).
At the peer's end of stream call `receive_eof()`.

Paths are normalised as `ServerConnection(path_policy)` says, or `connection.path_policy = ...` at any time; one that
redirects does so by a Rejected with status 307 and a location, which `reject` answers like any other.

A client: `ClientConnection`: `send_request(head) -> bytes`, `send_body`, `end`, and the same receive side with
ResponseHead events; a 1xx head (101 apart) is an event of its own with no EndOfMessage after it.

Trailers: hand the `headers` of a Trailers event to `end` of the other side. What cannot be said there (a body that is
not chunked; a response whose request did not say `TE: trailers`) is dropped by `end`, so callers need not ask.

Messages are always written from their parsed form, never copied. `send_request`, `send_response`, `send_informational`
and `end` raise ProtocolError, before anything is changed or written, for what would not be accepted on receipt: a
header name that is no token, a control character in a value, a path, method, authority or status that is none. Answer
with a 500 then (`send_response` may be called again).
"""

from typing import Final, NoReturn

from mesh.errors import ProtocolError
from mesh.http.events import END, EndOfMessage, Rejected, RequestEvent, ResponseEvent, Trailers
from mesh.http.head import Headers, RequestHead, ResponseHead, response_has_body
from mesh.http.path import DEFAULT_POLICY, PathPolicy
from mesh.http.receive_request import RequestReceiver
from mesh.http.receive_response import ResponseReceiver

__all__ = [
    "CONTINUE", "END", "REASONS", "ClientConnection", "EndOfMessage", "Rejected", "RequestEvent", "RequestHead",
    "ResponseEvent", "ResponseHead", "ServerConnection", "Trailers",
]  # fmt: skip

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

    __slots__ = ("_chunked", "_remaining", "_swallow", "_trailers")

    def __init__(self) -> None:
        self._chunked = False
        self._trailers = True  # whoever reads them takes trailers
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

    def end(self, trailers: Headers) -> bytes:
        """The bytes that complete the message."""
        if self._chunked:
            self._chunked = False
            if trailers and self._trailers:
                return _lines((b"0",), trailers, ())
            return b"0\r\n\r\n"
        assert self._swallow or self._remaining <= 0, "the body is shorter than its Content-Length"
        return b""


class ServerConnection(RequestReceiver):
    """Receives requests, writes responses. One per accepted connection."""

    __slots__ = ("_sender", "must_close")

    def __init__(self, path_policy: PathPolicy = DEFAULT_POLICY) -> None:
        super().__init__(path_policy)
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
        sender._trailers = request.te_trailers
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
        if self.must_close or not request.keep_alive or request.upgrade:
            # After an upgrade that was not taken up, nobody knows what the client's next bytes mean.
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

    def end(self, trailers: Headers = ()) -> bytes:
        """The bytes that complete the response, with trailers where it can have some."""
        return self._sender.end(trailers)

    def reject(self, rejected: Rejected) -> bytes:
        """A complete answer to malformed input; close the connection after it."""
        self.must_close = True
        body = rejected.reason.encode("ascii", "replace") + b"\n"
        headers: Headers = ((b"content-type", b"text/plain"),)
        if rejected.location:
            headers += ((b"location", rejected.location),)
        rest = (b"content-length: %d" % len(body), b"connection: close")
        return _lines((_STATUS_LINES[rejected.status],), headers, rest) + body


class ClientConnection(ResponseReceiver):
    """Writes requests, receives responses, one at a time. One per connection to a server."""

    __slots__ = ("_sender",)

    def __init__(self) -> None:
        super().__init__()
        self._sender = _Sender()

    def send_request(self, head: RequestHead) -> bytes:
        """The head of a request. Raises ProtocolError for an unsendable header."""
        self.expect(head)
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

    def end(self, trailers: Headers = ()) -> bytes:
        """The bytes that complete the request, with trailers where it can have some."""
        return self._sender.end(trailers)
