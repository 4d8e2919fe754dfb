"""Receiving requests: see `h1`."""

import httptools

from mesh.errors import ProtocolError
from mesh.http.events import END, Rejected, RequestEvent
from mesh.http.head import HOP_BY_HOP, RequestHead, is_authority, tokens
from mesh.http.path import normalize_path
from mesh.http.receiver import Receiver, Refusal, read_content_length, without_nominated

TARGET_BYTES_MAX = 8 * 1024  # RFC 9112 section 3 asks for at least 8000


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
            raise Refusal(400, "the connection takes no further request")
        self._in_head = True
        self._target = b""
        self._raw = []

    def on_url(self, url: bytes) -> None:
        """llhttp callback."""
        self._target += url
        if len(self._target) > TARGET_BYTES_MAX and not self._resumed:
            raise Refusal(414, f"the request target is longer than {TARGET_BYTES_MAX} bytes")

    def on_headers_complete(self) -> None:
        """llhttp callback."""
        if self._resumed:
            return
        head = self._read_head()
        self._in_head = False
        self._fed_in_head = 0
        self._chunks = 0 if head.chunked else -1
        self._body_overhead = 0
        self._events.append(head)
        self._last_head = head
        if head.has_body and self._parser.should_upgrade():
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
            raise Refusal(405, f"{method.decode()} is not served here")
        version = self._parser.get_http_version()
        if version not in ("1.1", "1.0"):
            raise Refusal(505, f"HTTP version {version} is not supported")
        http_minor = 1 if version == "1.1" else 0
        plain, special = self._split_headers(_SPECIAL, len(self._target))
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
            authority = b""
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
            path = normalize_path(raw_path)
        except ProtocolError as error:
            raise Refusal(400, str(error)) from error
        return path, query if question else None, authority
