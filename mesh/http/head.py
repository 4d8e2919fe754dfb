"""Request and response heads as values, and what belongs in them (RFC 9110 sections 5 and 7.6.1)."""

import functools
import re

import msgspec

Headers = tuple[tuple[bytes, bytes], ...]

# Consumed by each hop (RFC 9110 7.6.1), plus what frames the message: none of these appears in a head's `headers`.
HOP_BY_HOP = frozenset(
    (
        b"connection",
        b"keep-alive",
        b"proxy-connection",
        b"proxy-authenticate",
        b"proxy-authorization",
        b"te",
        b"trailer",
        b"transfer-encoding",
        b"upgrade",
        b"http2-settings",
        b"content-length",
    )
)

# A Connection header may nominate further hop-by-hop names, but never these: stripping them would let a caller shed
# what a trusted hop added, or change how the message is read.
NEVER_NOMINATED = frozenset((b"host", b"authorization", b"cookie", b"x-forwarded-for", b"x-forwarded-client-cert"))

# uri-host [":" port]: registered name or IPv4, or an IPv6 literal. No user, path or space (RFC 9110 7.2).
_AUTHORITY = re.compile(
    rb"(?:[A-Za-z0-9._~!$&'()*+,;=%-]+|\[[0-9A-Fa-f]*:[0-9A-Fa-f]*:[0-9A-Fa-f:.]*\])(?::([0-9]{1,5}))?"
)

AUTHORITY_BYTES_MAX = 512  # a DNS name has 253 at most, and a port 6

IDEMPOTENT_METHODS = frozenset((b"GET", b"HEAD", b"OPTIONS", b"PUT", b"DELETE"))  # RFC 9110 9.2.2


class RequestHead(msgspec.Struct, frozen=True, gc=False):
    """One request's head, already checked.

    `path` is normalised and has no query; `query` is what follows `?`, or None when there is no `?`. `headers` holds
    end-to-end headers only, names in lower case, in the order received: Host is in `authority`, framing is in
    `content_length` and `chunked` (both unset: no body). For `OPTIONS *` the path is `*`.
    """

    method: bytes
    path: bytes
    query: bytes | None
    authority: bytes
    headers: Headers
    content_length: int | None = None
    chunked: bool = False
    keep_alive: bool = True
    http_minor: int = 1
    expects_continue: bool = False
    upgrade: bytes = b""  # `websocket`, or empty
    te_trailers: bool = False

    @property
    def target(self) -> bytes:
        """The request target in origin form: the path, with the query when there is one."""
        return self.path if self.query is None else self.path + b"?" + self.query

    @property
    def has_body(self) -> bool:
        """Whether a body follows; a `Content-Length: 0` is none."""
        return self.chunked or bool(self.content_length)

    def header(self, name: bytes) -> bytes | None:
        """The first value of a lower-case header name, or None."""
        return first_value(self.headers, name)


class ResponseHead(msgspec.Struct, frozen=True, gc=False):
    """One response's head. `headers` as in RequestHead when received; a sender may use any case and must leave framing
    (Content-Length, Transfer-Encoding, Connection) to the codec, which reads `content_length`: None means that the
    length is not known in advance.
    """

    status: int
    headers: Headers = ()
    content_length: int | None = None
    reason: bytes = b""
    keep_alive: bool = True
    upgrade: bytes = b""

    @property
    def informational(self) -> bool:
        """Whether it is a 1xx other than 101: another head follows."""
        return self.status < 200 and self.status != 101

    def header(self, name: bytes) -> bytes | None:
        """The first value of a lower-case header name, or None."""
        return first_value(self.headers, name)


def first_value(headers: Headers, name: bytes) -> bytes | None:
    """The first value of a lower-case header name, or None."""
    for candidate, value in headers:
        if candidate == name:
            return value
    return None


def tokens(value: bytes) -> tuple[bytes, ...]:
    """The members of a comma-separated list, in lower case, without blanks and empty members (RFC 9110 5.6.1)."""
    return tuple(token for token in (part.strip(b" \t").lower() for part in value.split(b",")) if token)


def is_authority(value: bytes) -> bool:
    """Whether a Host value or the authority of a target is `host` or `host:port`, and nothing more."""
    return len(value) <= AUTHORITY_BYTES_MAX and _reads_as_authority(value)


@functools.lru_cache(maxsize=1024)  # clients ask for few hosts, often
def _reads_as_authority(value: bytes) -> bool:
    match = _AUTHORITY.fullmatch(value)
    return match is not None and (match[1] is None or int(match[1]) <= 65535)


def response_has_body(request_method: bytes, status: int) -> bool:
    """Whether this response may carry a body (RFC 9112 section 6.3)."""
    return request_method != b"HEAD" and status >= 200 and status not in (204, 304)
