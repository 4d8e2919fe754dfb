"""Writing messages: heads that would be accepted on receipt and no others, and bodies framed as their heads say."""

import re
from collections.abc import Callable
from operator import itemgetter
from typing import Final, NoReturn

from mesh.errors import ProtocolError
from mesh.http.chunked import is_forbidden_trailer
from mesh.http.head import HOP_BY_HOP, Headers, RequestHead, ResponseHead

REASONS: Final[dict[int, bytes]] = {
    100: b"Continue", 101: b"Switching Protocols", 103: b"Early Hints", 200: b"OK", 201: b"Created", 202: b"Accepted",
    204: b"No Content", 206: b"Partial Content", 301: b"Moved Permanently", 302: b"Found", 303: b"See Other",
    304: b"Not Modified", 307: b"Temporary Redirect", 308: b"Permanent Redirect", 400: b"Bad Request",
    401: b"Unauthorized", 403: b"Forbidden", 404: b"Not Found", 405: b"Method Not Allowed", 408: b"Request Timeout",
    409: b"Conflict", 413: b"Payload Too Large", 414: b"URI Too Long", 415: b"Unsupported Media Type",
    417: b"Expectation Failed", 422: b"Unprocessable Content", 426: b"Upgrade Required", 429: b"Too Many Requests",
    431: b"Request Header Fields Too Large", 500: b"Internal Server Error", 501: b"Not Implemented",
    502: b"Bad Gateway", 503: b"Service Unavailable", 504: b"Gateway Timeout", 505: b"HTTP Version Not Supported",
}  # fmt: skip

STATUS_LINES: Final = {status: b"HTTP/1.1 %d %b" % (status, reason) for status, reason in REASONS.items()}

# One match over the whole head costs no more than counting its line ends would. Possessive: it never backtracks.
_TOKEN = rb"[!#$%&'*+.^_`|~0-9A-Za-z-]++"
_FIELDS = rb"(?:" + _TOKEN + rb": [\t -~\x80-\xff]*+\r\n)*+\r\n"
_REQUEST_HEAD = re.compile(
    rb"[A-Z-]++ (?:/[!\"$-~]*+|\*) HTTP/1\.1\r\nhost: [A-Za-z0-9._~!$&'()*+,;=%:\[\]-]*+\r\n" + _FIELDS
)
_RESPONSE_HEAD = re.compile(rb"HTTP/1\.1 [1-5][0-9]{2} [\t -~\x80-\xff]*+\r\n" + _FIELDS)
_LAST_CHUNK = re.compile(rb"0\r\n" + _FIELDS)
_NAME = re.compile(_TOKEN)

_NAMES_KEPT_MAX = 1000  # names found good; callers decide on most of them, so there is a limit
_FRAMING = HOP_BY_HOP | {b"host", b"expect"}  # the codec writes these, from a head's other fields

_name_of = itemgetter(0)


_good_names: set[bytes] = set()  # header names that may be sent: each is looked at once, and kept while there is room


def _check_names(headers: Headers, refused: Callable[[bytes], bool]) -> None:
    """Raises ProtocolError for a name that is no token, or not the caller's to send."""
    for name, _ in headers:
        if _NAME.fullmatch(name) is None:
            raise ProtocolError(f"{name!r} is not a header name, so the message was not sent")
        if refused(name.lower()):
            raise ProtocolError(f"{name.decode()} is not to be set this way, so the message was not sent")


def _learn_names(headers: Headers) -> None:
    _check_names(headers, _FRAMING.__contains__)
    if len(_good_names) >= _NAMES_KEPT_MAX:
        _good_names.clear()
    _good_names.update(map(_name_of, headers))


def _refuse(what: str) -> NoReturn:
    raise ProtocolError(
        f"the {what} contains a space or control character where none may be, so the message was not sent"
    )


def request_bytes(head: RequestHead, rest: tuple[bytes, ...]) -> bytes:
    """The head, with the framing fields of `rest`. Raises ProtocolError."""
    headers = head.headers
    if not _good_names.issuperset(map(_name_of, headers)):
        _learn_names(headers)
    path = head.path
    if b"?" in path:
        raise ProtocolError("the path contains a question mark, so the message was not sent")
    target = path if head.query is None else path + b"?" + head.query
    start = b"%b %b HTTP/1.1" % (head.method, target)
    data = b"\r\n".join((start, b"host: " + head.authority, *map(b": ".join, headers), *rest, b"\r\n"))
    # The count tells a value that holds a whole further line, which the pattern alone would take.
    if _REQUEST_HEAD.fullmatch(data) is None or data.count(b"\n") != len(headers) + len(rest) + 3:
        _refuse("request")
    return data


def response_bytes(head: ResponseHead, rest: tuple[bytes, ...]) -> bytes:
    """The head, with the framing fields of `rest`. Raises ProtocolError."""
    status = head.status
    start = STATUS_LINES.get(status)
    if start is None or (head.reason and head.reason != REASONS[status]):
        start = b"HTTP/1.1 %d %b" % (status, head.reason)
    headers = head.headers
    if not _good_names.issuperset(map(_name_of, headers)):
        _learn_names(headers)
    data = b"\r\n".join((start, *map(b": ".join, headers), *rest, b"\r\n"))
    if _RESPONSE_HEAD.fullmatch(data) is None or data.count(b"\n") != len(headers) + len(rest) + 2:
        _refuse("response")
    return data


def _last_chunk(trailers: Headers) -> bytes:
    _check_names(trailers, is_forbidden_trailer)
    data = b"\r\n".join((b"0", *map(b": ".join, trailers), b"\r\n"))
    if _LAST_CHUNK.fullmatch(data) is None or data.count(b"\n") != len(trailers) + 2:
        _refuse("trailer")
    return data


class BodySender:
    """Frames one body at a time: by length, by chunks, until close, or not at all."""

    __slots__ = ("_chunked", "_remaining", "_swallow", "_trailers")

    def __init__(self) -> None:
        self._chunked = False
        self._trailers = False  # whether the reader takes any
        self._swallow = False
        self._remaining = -1  # bytes still owed; -1: until close

    def begin_chunks(self, *, trailers: bool) -> None:
        """The next body is chunked."""
        self._chunked = True
        self._trailers = trailers

    def begin_length(self, length: int) -> None:
        """The next body has this many bytes."""
        self._chunked = self._swallow = False
        self._remaining = length

    def begin_until_close(self) -> None:
        """The next body ends with the connection."""
        self._chunked = self._swallow = False
        self._remaining = -1

    def begin_none(self) -> None:
        """The next message has no body, whatever is sent as one."""
        self._chunked = False
        self._swallow = True

    def send(self, data: bytes) -> bytes:
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
        """The bytes that complete the message. Raises ProtocolError for a trailer that must not be sent."""
        if self._chunked:
            data = _last_chunk(trailers) if trailers and self._trailers else b"0\r\n\r\n"
            self._chunked = False
            self._swallow = True
            return data
        assert self._swallow or self._remaining <= 0, "the body is shorter than its Content-Length"
        return b""
