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

An HTTP/1.0 request may come without Host; its authority is then `connection.default_authority`, empty unless set.

A client: `ClientConnection`: `send_request(head) -> bytes`, `send_body`, `end`, and the same receive side with
ResponseHead events; a 1xx head (101 apart) is an event of its own with no EndOfMessage after it.

Trailers: hand the `headers` of a Trailers event to `end` of the other side. What cannot be said there (a body that is
not chunked; a response whose request did not say `TE: trailers`) is dropped by `end`, so callers need not ask.

Messages are always written from their parsed form, never copied. `send_request`, `send_response`, `send_informational`
and `end` raise ProtocolError, before anything is changed or written, for what would not be accepted on receipt: a
header name that is no token, a control character in a value, a path, method, authority or status that is none. Answer
with a 500 then (`send_response` may be called again).
"""

from typing import Final

from mesh.http.events import END, EndOfMessage, Rejected, RequestEvent, ResponseEvent, Trailers
from mesh.http.head import Headers, RequestHead, ResponseHead, response_has_body
from mesh.http.path import DEFAULT_POLICY, PathPolicy
from mesh.http.receive_request import RequestReceiver
from mesh.http.receive_response import ResponseReceiver
from mesh.http.send import REASONS, BodySender, request_bytes, response_bytes

__all__ = [
    "CONTINUE", "END", "REASONS", "ClientConnection", "EndOfMessage", "Rejected", "RequestEvent", "RequestHead",
    "ResponseEvent", "ResponseHead", "ServerConnection", "Trailers",
]  # fmt: skip

CONTINUE: Final = b"HTTP/1.1 100 Continue\r\n\r\n"


class ServerConnection(RequestReceiver):
    """Receives requests, writes responses. One per accepted connection."""

    __slots__ = ("_sender", "must_close")

    def __init__(self, path_policy: PathPolicy = DEFAULT_POLICY) -> None:
        super().__init__(path_policy)
        self._sender = BodySender()
        self.must_close = False  # after the current response (set it yourself to close sooner, as when draining)

    def send_response(self, head: ResponseHead, request: RequestHead) -> bytes:
        """The head of the response to `request`; sets `must_close`. Raises ProtocolError, with nothing changed, for a
        head that would not be accepted.
        """
        status, length = head.status, head.content_length
        if status == 101:
            data = response_bytes(head, (b"connection: upgrade", b"upgrade: " + head.upgrade))
            self.must_close = True
            self._sender.begin_until_close()
            return data
        has_body = response_has_body(request.method, status)
        chunked = False
        rest: tuple[bytes, ...] = ()
        # After an upgrade that was not taken up, nobody knows what the client's next bytes mean.
        close = self.must_close or not request.keep_alive or bool(request.upgrade)
        if length is not None:
            if has_body or status != 204:
                rest = (b"content-length: %d" % length,)
        elif has_body:
            chunked = request.http_minor > 0
            if chunked:
                rest = (b"transfer-encoding: chunked",)
            else:
                close = True
        if close:
            rest += (b"connection: close",)
        data = response_bytes(head, rest)
        self.must_close = close
        if not has_body:
            self._sender.begin_none()
        elif length is not None:
            self._sender.begin_length(length)
        elif chunked:
            self._sender.begin_chunks(trailers=request.te_trailers)
        else:
            self._sender.begin_until_close()
        return data

    def send_informational(self, head: ResponseHead) -> bytes:
        """A 1xx head to pass on before the final one. Raises ProtocolError for one that would not be accepted."""
        return response_bytes(head, ())

    def send_body(self, data: bytes) -> bytes:
        """The bytes to put on the wire for a piece of the response's body."""
        return self._sender.send(data)

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
        return response_bytes(ResponseHead(rejected.status, headers), rest) + body


class ClientConnection(ResponseReceiver):
    """Writes requests, receives responses, one at a time. One per connection to a server."""

    __slots__ = ("_sender",)

    def __init__(self) -> None:
        super().__init__()
        self._sender = BodySender()

    def send_request(self, head: RequestHead) -> bytes:
        """The head of a request. Raises ProtocolError, with nothing changed, for one that would not be accepted."""
        rest: tuple[bytes, ...] = ()
        if head.chunked:
            rest = (b"transfer-encoding: chunked",)
        elif head.content_length is not None:
            rest = (b"content-length: %d" % head.content_length,)
        if head.expects_continue:
            rest += (b"expect: 100-continue",)
        if head.te_trailers:
            rest += (b"te: trailers", b"connection: te")
        if head.upgrade:
            rest += (b"connection: upgrade", b"upgrade: " + head.upgrade)
        data = request_bytes(head, rest)
        self.expect(head)
        if head.chunked:
            self._sender.begin_chunks(trailers=True)
        else:
            self._sender.begin_length(head.content_length or 0)
        return data

    def send_body(self, data: bytes) -> bytes:
        """The bytes to put on the wire for a piece of the request's body."""
        return self._sender.send(data)

    def end(self, trailers: Headers = ()) -> bytes:
        """The bytes that complete the request, with trailers when it is chunked."""
        return self._sender.end(trailers)
