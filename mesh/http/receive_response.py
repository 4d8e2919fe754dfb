"""Receiving responses: see `h1`."""

import httptools

from mesh.http.events import END, Rejected, ResponseEvent
from mesh.http.head import HOP_BY_HOP, RequestHead, ResponseHead, response_has_body, tokens
from mesh.http.receiver import HEAD_BYTES_MAX, Receiver, Refusal, read_content_length, without_nominated

INFORMATIONAL_MAX = 10  # 1xx heads before a final one

_SPECIAL = HOP_BY_HOP | {b"content_length", b"transfer_encoding"}  # as in receive_request


class ResponseReceiver(Receiver[httptools.HttpResponseParser]):
    """The receiving half of a client's connection: one response per request announced with `expect`."""

    __slots__ = (
        "_buffer", "_head_done", "_informational", "_method", "_until_close", "_upgrade", "must_close",
    )  # fmt: skip

    def __init__(self) -> None:
        super().__init__()
        self._method = b""  # of the request in flight; empty: none
        self._buffer = b""  # head of a response to HEAD, which llhttp cannot tell from one with a body
        self._head_done = False
        self._informational = 0
        self._until_close = False
        self._upgrade = b""  # what the request in flight offered
        self.must_close = False  # this connection cannot carry another request
        self._parser = httptools.HttpResponseParser(self)

    def expect(self, request: RequestHead) -> None:
        """The next response is to this request."""
        self._method = request.method
        self._upgrade = request.upgrade
        self._head_done = False
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
            raise Refusal(502, "bytes follow the response")
        self._in_head = True
        self._raw = []

    def on_headers_complete(self) -> None:
        """llhttp callback."""
        status = self._parser.get_status_code()
        if not 100 <= status <= 599:
            raise Refusal(502, f"status {status} is outside 100 to 599")
        self._in_head = False
        self._fed_in_head = 0
        head, chunked = self._read_head(status)
        if head.informational:
            self._informational += 1
            if self._informational > INFORMATIONAL_MAX:
                raise Refusal(502, f"more than {INFORMATIONAL_MAX} informational responses")
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
        version = self._parser.get_http_version()
        if version not in ("1.1", "1.0"):
            raise Refusal(502, "the HTTP version of the response is not supported")
        plain, special = self._split_headers(_SPECIAL, 0)
        content_length: int | None = None
        chunked = False
        connection: tuple[bytes, ...] = ()
        upgrade = b""
        for name, raw_value in special:
            value = raw_value.rstrip(b" \t")
            if name == b"content-length":
                content_length = read_content_length(value)
            elif name == b"transfer-encoding":
                if raw_value.lower() != b"chunked":
                    raise Refusal(502, "the only Transfer-Encoding understood is chunked")
                chunked = True
            elif name == b"connection":
                connection += tokens(value)
            elif name == b"upgrade":
                upgrade = value.lower()
            elif b"_" in name:
                raise Refusal(502, f"a header named {name.decode()} is not accepted")
        keep_alive = b"close" not in connection if version == "1.1" else b"keep-alive" in connection
        if status == 101 and (not upgrade or upgrade != self._upgrade or b"upgrade" not in connection):
            raise Refusal(502, "a 101 response that does not answer the request's Upgrade")
        head = ResponseHead(
            status,
            without_nominated(plain, connection) if connection else tuple(plain),
            content_length,
            b"",
            keep_alive,
            upgrade if status == 101 else b"",
        )
        return head, chunked
