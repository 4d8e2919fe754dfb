"""Receiving responses: see `h1`."""

import re

import httptools

from mesh.http.chunked import ChunkReader
from mesh.http.events import END, Rejected, ResponseEvent
from mesh.http.head import HOP_BY_HOP, RequestHead, ResponseHead, response_has_body, tokens
from mesh.http.receiver import (
    HEAD_BYTES_MAX,
    HEAD_END,
    UNTIL_CLOSE,
    Receiver,
    Refusal,
    read_content_length,
    too_large,
    without_nominated,
)

INFORMATIONAL_MAX = 10  # 1xx heads before a final one

_SPECIAL = HOP_BY_HOP | {b"content_length", b"transfer_encoding"}  # as in receive_request

_BEGIN = b"HTTP/1."
_BLANK_BEFORE_COLON = re.compile(rb"(\r\n[!#$%&'*+.^_`|~0-9A-Za-z-]+)[ \t]+:")


class ResponseReceiver(Receiver[httptools.HttpResponseParser]):
    """The receiving half of a client's connection: one response per request announced with `expect`."""

    __slots__ = (
        "_awaits_continue", "_chunked", "_head", "_http_minor", "_informational", "_method", "_partial", "_upgrade",
        "must_close",
    )  # fmt: skip

    def __init__(self) -> None:
        super().__init__()
        self._method = b""  # of the request in flight; empty: none
        self._partial = b""  # of a head
        self._head: ResponseHead | None = None  # just read
        self._http_minor = 1
        self._chunked = False
        self._awaits_continue = False  # the request in flight asked for a 100, and none has come
        self._informational = 0
        self._upgrade = b""  # what the request in flight offered
        self.must_close = False  # this connection cannot carry another request

    def expect(self, request: RequestHead) -> None:
        """The next response is to this request."""
        self._method = request.method
        self._upgrade = request.upgrade
        self._awaits_continue = request.expects_continue
        self._informational = 0

    @property
    def idle(self) -> bool:
        """Whether another request may be sent."""
        return not self._method and not self.must_close and not self.closed

    def receive_data(self, data: bytes) -> list[ResponseEvent]:
        """The events in these bytes. Bytes outside a response make a Rejected. Never raises for bad input."""
        if self.closed:
            self._receive_after_close(data)
            return []
        if not self._method:
            self.closed = self.must_close = True
            return [Rejected(502, "bytes arrived with no request in flight")]
        if self._partial:
            data, self._partial = self._partial + data, b""
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
        if not self._in_head and self._chunks is None and self._remaining == UNTIL_CLOSE:
            self._method = b""
            return [END]
        return [Rejected(502, "the response ended early")]

    def _reject(self, rejected: Rejected) -> None:
        self.must_close = True
        super()._reject(Rejected(502, rejected.reason))

    def _receive_head(self, data: bytes, position: int) -> int:
        if not self._method:  # bytes follow the response: it is whole, and they are not used
            self.closed = self.must_close = True
            return len(data)
        end = data.find(HEAD_END, position) + 4
        if end < 4:
            self._keep_partial_head(data[position:])
            return len(data)
        if data.startswith(b"1.1 ", position + 5):
            self._http_minor = 1
        elif data.startswith(b"1.0 ", position + 5):
            self._http_minor = 0
        else:
            raise Refusal(502, "the response is not HTTP/1.1 or HTTP/1.0")
        head = data if not position and end == len(data) else data[position:end]
        self._head_bytes = len(head)
        self._raw = []
        self._parser = httptools.HttpResponseParser(self)  # an earlier one waits for the body it was told of
        try:
            self._parser.feed_data(head)
        except httptools.HttpParserUpgrade:
            pass
        except httptools.HttpParserError as error:
            self._parse_again(head, error)
        read = self._head
        if read is None:
            raise Refusal(502, "the head does not end where it seems to")  # as far as we know this cannot be
        self._head = None
        self._finish_head(read)
        return end

    def _keep_partial_head(self, data: bytes) -> None:
        """Keeps it for the next read, unless it can be none."""
        if not data.startswith(_BEGIN[: len(data)]):
            raise Refusal(502, "the response does not begin with HTTP/1")
        if data.count(b"\n") != data.count(b"\r\n"):
            raise Refusal(502, "a line of the response's head ends without CR")
        if len(data) > HEAD_BYTES_MAX:
            raise too_large()
        self._partial = data
        self._head_bytes = len(data)

    def _parse_again(self, head: bytes, error: httptools.HttpParserError) -> None:
        """A proxy strips blanks before colons from responses (RFC 9112 section 5.1), which llhttp has refused."""
        stripped = _BLANK_BEFORE_COLON.sub(rb"\1:", head)
        if stripped == head:
            raise self._refusal(error) from None
        self._raw = []
        self._parser = httptools.HttpResponseParser(self)
        self._feed_parser(stripped)

    def _finish_head(self, head: ResponseHead) -> None:
        """The head is complete: what follows is its body, or a further head."""
        if head.informational:
            self._informational += 1
            if self._informational > INFORMATIONAL_MAX:
                raise Refusal(502, f"more than {INFORMATIONAL_MAX} informational responses")
            self._head_bytes = 0
            if head.status == 100:
                if not self._awaits_continue:
                    return  # nobody asked, or it came before: one is enough (RFC 9110 section 15.2.1)
                self._awaits_continue = False
            self._events.append(head)
            return
        self._events.append(head)
        if not head.keep_alive:
            self.must_close = True
        if not response_has_body(self._method, head.status):
            self._end_message()
            if head.status == 101:
                self.closed = self.upgraded = self.must_close = True
        elif self._chunked:
            self._in_head = False
            self._chunks = ChunkReader()
        elif head.content_length is None:
            self._in_head = False
            self._remaining = UNTIL_CLOSE
            self.must_close = True
        elif head.content_length:
            self._in_head = False
            self._remaining = head.content_length
        else:
            self._end_message()

    def _end_message(self) -> None:
        self._events.append(END)
        self._in_head = True
        self._head_bytes = 0
        self._chunks = None
        self._method = b""

    def on_headers_complete(self) -> None:
        """llhttp callback."""
        status = self._parser.get_status_code()
        if not 100 <= status <= 599:
            raise Refusal(502, f"status {status} is outside 100 to 599")
        self._head = self._read_head(status)

    def _read_head(self, status: int) -> ResponseHead:
        plain, special = self._split_headers(_SPECIAL)
        content_length: int | None = None
        chunked = False
        connection: tuple[bytes, ...] = ()
        upgrade = b""
        for name, raw_value in special:
            value = raw_value.rstrip(b" \t")
            if name == b"content-length":
                content_length = read_content_length(value)
            elif name == b"transfer-encoding":
                if chunked or raw_value.lower() != b"chunked":
                    raise Refusal(502, "the only Transfer-Encoding understood is chunked, once")
                chunked = True
            elif name == b"connection":
                connection += tokens(value)
            elif name == b"upgrade":
                upgrade = value.lower()
            elif b"_" in name:
                raise Refusal(502, f"a header named {name.decode()} is not accepted")
        keep_alive = b"close" not in connection if self._http_minor else b"keep-alive" in connection
        if status == 101 and (not upgrade or upgrade != self._upgrade or b"upgrade" not in connection):
            raise Refusal(502, "a 101 response that does not answer the request's Upgrade")
        self._chunked = chunked
        return ResponseHead(
            status,
            without_nominated(plain, connection) if connection else tuple(plain),
            content_length,
            b"",
            keep_alive,
            upgrade if status == 101 else b"",
        )
