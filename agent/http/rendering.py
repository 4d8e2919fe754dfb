"""From an ApiResponse to the headers and bytes that go on the wire."""

import gzip
import re
from collections.abc import Iterable
from email.utils import formatdate
from functools import lru_cache
from urllib.parse import quote

import msgspec
import trio
from msgspec.structs import replace

from agent.http.request import JSON_TYPE, ApiResponse, text_response
from mesh.http.head import Headers, RequestHead, tokens

GZIP_BYTES_MIN = 1024  # below, the answer fits one packet anyway
GZIP_IN_THREAD_BYTES = 256 * 1024  # above, compressing would stall the agent for milliseconds


class Rendered(msgspec.Struct, frozen=True):
    """A response whose body is final."""

    response: ApiResponse
    body: bytes
    compressed: bool = False

    def headers(self, common: Headers, *, now_s: float) -> Headers:
        """Every header but those that frame the message. `common` goes on all answers; `now_s` is Unix time."""
        response = self.response
        headers = [
            (b"Content-Type", response.content_type.encode()),
            (b"Date", _date(int(now_s))),
            (b"Vary", b"Accept-Encoding"),
            (b"X-Content-Type-Options", b"nosniff"),  # a key's value is never run as a page of this agent
            *common,
        ]
        if self.compressed:
            headers.append((b"Content-Encoding", b"gzip"))
        if response.headers:
            headers += encoded(response.headers)
        return tuple(headers)


def encoded(headers: Iterable[tuple[str, str]]) -> Headers:
    """The headers as they go on the wire."""
    return tuple([(name.encode(), value.encode()) for name, value in headers])


def render(response: ApiResponse, *, pretty: bool) -> Rendered:
    """The response as it is, its JSON indented when asked."""
    body = response.body
    if pretty and response.content_type == JSON_TYPE:
        body = msgspec.json.format(body, indent=4) + b"\n"
    return Rendered(response, body)


async def render_compressed(response: ApiResponse, *, pretty: bool) -> Rendered:
    """As `render`, gzipped."""
    rendered = render(response, pretty=pretty)
    if len(rendered.body) > GZIP_IN_THREAD_BYTES:
        body = await trio.to_thread.run_sync(_gzip, rendered.body)
    else:
        body = _gzip(rendered.body)
    return replace(rendered, body=body, compressed=True)


def moved(path: str, query: str) -> ApiResponse:
    """301 to the path without repeated slashes. It begins with one slash only, so it names no other host."""
    clean = quote(re.sub("/{2,}", "/", path), safe="/%:;,=@!$&'()*+~")
    location = f"{clean}?{quote(query, safe='/%:;,=@!$&?+~*')}" if query else clean
    return text_response("Moved Permanently", status=301, headers=(("Location", location),))


def accepts_gzip(head: RequestHead) -> bool:
    """Whether the client takes gzip (RFC 9110 section 12.5.3)."""
    for member in tokens(head.header(b"accept-encoding") or b""):
        coding, _, weight = member.partition(b";")
        if coding.strip() in (b"gzip", b"*"):
            return weight.replace(b" ", b"") not in (b"q=0", b"q=0.0", b"q=0.00", b"q=0.000")
    return False


def _gzip(body: bytes) -> bytes:
    return gzip.compress(body, compresslevel=1, mtime=0)


@lru_cache(maxsize=2)
def _date(unix_s: int) -> bytes:
    return formatdate(unix_s, usegmt=True).encode()
