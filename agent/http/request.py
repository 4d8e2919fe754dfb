"""What a handler of the API receives and returns, and the route that leads to it.

A handler is `async (ApiRequest) -> ApiResponse`. It raises the classes of `mesh.errors`; `agent.http.errors` turns
them into a status and Consul's bare text. The server adds what every response has in common.
"""

from collections.abc import Awaitable, Callable, Mapping
from typing import Literal

import msgspec

from agent.http.params import Params
from agent.strict_json import decode
from mesh.errors import InvalidRequest, Refused, Unreachable
from mesh.model.command import CommandResult, Rejected
from mesh.model.query import ReadMeta, ReadOptions

Method = Literal["GET", "PUT", "POST", "DELETE"]

BODY_BYTES_MAX = 512 * 1024  # kv_max_value_size, and far above any registration

JSON_TYPE = "application/json"
TEXT_TYPE = "text/plain; charset=utf-8"

_EFFECTIVE_CONSISTENCY = {"default": "leader", "consistent": "consistent", "stale": "stale"}


class ApiRequest(msgspec.Struct, frozen=True):
    """One request. `path` is as it came on the wire; `captures` are percent-decoded, once, after matching."""

    method: str  # GET for HEAD requests too: no handler ever sees HEAD
    path: str
    params: Params
    headers: Mapping[str, str] = {}  # names in lower case; of equal ones the first
    body: bytes = b""
    captures: Mapping[str, str] = {}
    client_address: str = ""  # IP address, empty on a unix socket

    def capture(self, name: str, missing: str = "") -> str:
        """The path part that `:name` of the pattern stands for. Raises InvalidRequest(missing) when it is empty."""
        value = self.captures[name]
        if not value and missing:
            raise InvalidRequest(missing)
        return value

    def json(self) -> object:
        """The body as strict JSON. Raises MalformedJson, which the server answers with Consul's 400 text."""
        return decode(self.body)

    def read_options(self) -> ReadOptions:
        """index, wait and consistency. Raises InvalidRequest."""
        return self.params.read_options()

    def check_datacenter(self, own: str) -> None:
        """Raises Unreachable (500, Consul's text) when the request is for another datacenter than ours."""
        wanted = self.params.datacenter()
        if wanted and wanted != own:
            raise Unreachable("No path to datacenter")


Send = Callable[[bytes], Awaitable[None]]


class ApiResponse(msgspec.Struct, frozen=True):
    """One answer. The server adds Content-Length, Vary, Date and the headers common to all answers.

    With `stream` the body is what that sends, piece by piece, until it returns; it is cancelled when the client leaves
    or the agent stops, and has no deadline but that the client must read.
    """

    status: int = 200
    body: bytes = b""
    content_type: str = TEXT_TYPE
    headers: tuple[tuple[str, str], ...] = ()
    stream: Callable[[Send], Awaitable[None]] | None = None


Handler = Callable[[ApiRequest], Awaitable[ApiResponse]]


class Route(msgspec.Struct, frozen=True):
    """A method and a path pattern such as `/v1/agent/join/:address`.

    `:name` stands for one segment; as the last one it stands for the whole rest, slashes and emptiness included, as
    IDs may hold slashes. The longest literal part wins, then the pattern with more segments.
    """

    method: Method
    pattern: str
    handler: Handler
    body_bytes_max: int = BODY_BYTES_MAX  # a larger body is answered 413, unread


def json_response(value: object, *, status: int = 200, headers: tuple[tuple[str, str], ...] = ()) -> ApiResponse:
    """The value (dicts, sequences, scalars, Structs) as JSON."""
    return ApiResponse(status, msgspec.json.encode(value), JSON_TYPE, headers)


def empty_response() -> ApiResponse:
    """200 with an empty body: what Consul answers to a write that has nothing to say."""
    return ApiResponse()


def text_response(text: str, *, status: int = 200, headers: tuple[tuple[str, str], ...] = ()) -> ApiResponse:
    """Plain text, as every error is."""
    return ApiResponse(status, text.encode("utf-8", "replace"), TEXT_TYPE, headers)


def query_headers(meta: ReadMeta, options: ReadOptions) -> tuple[tuple[str, str], ...]:
    """What a read of replicated state says about itself; the names are spelled as Consul's server sends them."""
    return (
        *index_header(meta.index),
        ("X-Consul-Knownleader", "true" if meta.known_leader else "false"),
        ("X-Consul-Lastcontact", str(max(0, round(meta.last_contact_s * 1000)))),
        ("X-Consul-Effective-Consistency", _EFFECTIVE_CONSISTENCY[options.consistency]),
        ("X-Consul-Query-Backend", "blocking-query"),
    )


def index_header(index: int) -> tuple[tuple[str, str], ...]:
    """X-Consul-Index, never below 1: clients take 0 to mean "do not block"."""
    return (("X-Consul-Index", str(max(1, index))),)


def require_applied(result: CommandResult) -> bool:
    """Whether the command took effect (False: its compare-and-set did not). Raises Refused with the reason."""
    if isinstance(result, Rejected):
        raise Refused(result.reason)
    return result.ok
