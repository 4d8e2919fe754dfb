"""Header edits of routes, compiled: what is removed, set and added on the way there and on the way back.

Four levels apply from the most specific outwards (weighted target, rule, virtual host, table), each on the result of
the one before, as in Envoy; within a level removal comes first, then `set`, then `add`. Values may hold access log
operators. An operator without a value is empty text; a value that is empty as a whole is not added, and a header that
was to be *set* to it is removed: a caller's own `x-peer` must not pass for the one that we could not fill in (Envoy
would leave it there).
"""

import re
from collections.abc import Callable
from datetime import UTC, datetime

import msgspec

from mesh.errors import ConfigError
from mesh.http.head import HOP_BY_HOP, Headers, RequestHead
from mesh.model.matching import joined_value
from mesh.traffic.route import HeaderEdits

# Framing belongs to the codec, Host to rewrites, the caller's identity to the inbound listener.
PROTECTED = HOP_BY_HOP | {b"host", b"expect", b"x-forwarded-client-cert"}

_NAME = re.compile(rb"[!#$%&'*+.^_`|~0-9A-Za-z-]+")  # RFC 9110 5.6.2
_VALUE = re.compile(rb"[\t\x20-\x7e\x80-\xff]*")  # RFC 9110 5.5
_OPERATOR = re.compile(r"%(?:%|([A-Z][A-Z0-9_]*)(?:\(([^()]*)\))?(?::([0-9]+))?%)")


class EditContext(msgspec.Struct):
    """What operators read. Addresses are `ip:port`; what is not known is empty.

    `request` is the head as it came; `response_status` 0: none yet. `started_at_s` is Unix time.
    """

    request: RequestHead
    scheme: str = "http"
    remote_address: str = ""
    local_address: str = ""
    peer_uri_san: str = ""
    local_uri_san: str = ""
    requested_server_name: str = ""
    upstream_host: str = ""
    target: str = ""
    route_name: str = ""
    hostname: str = ""
    started_at_s: float = 0.0
    response_status: int = 0


# (the request's headers so far, the response's headers so far, the context) -> the value
_Render = Callable[[Headers, Headers, EditContext], bytes]


def _without_port(address: str) -> str:
    return address.rpartition(":")[0].strip("[]")


def _timestamp(unix_time_s: float) -> str:
    return datetime.fromtimestamp(unix_time_s, UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")


_ATTRIBUTES: dict[str, Callable[[EditContext], str]] = {
    "DOWNSTREAM_REMOTE_ADDRESS": lambda context: context.remote_address,
    "DOWNSTREAM_REMOTE_ADDRESS_WITHOUT_PORT": lambda context: _without_port(context.remote_address),
    "DOWNSTREAM_REMOTE_PORT": lambda context: context.remote_address.rpartition(":")[2],
    "DOWNSTREAM_DIRECT_REMOTE_ADDRESS": lambda context: context.remote_address,
    "DOWNSTREAM_DIRECT_REMOTE_ADDRESS_WITHOUT_PORT": lambda context: _without_port(context.remote_address),
    "DOWNSTREAM_LOCAL_ADDRESS": lambda context: context.local_address,
    "DOWNSTREAM_LOCAL_ADDRESS_WITHOUT_PORT": lambda context: _without_port(context.local_address),
    "DOWNSTREAM_LOCAL_PORT": lambda context: context.local_address.rpartition(":")[2],
    "DOWNSTREAM_PEER_URI_SAN": lambda context: context.peer_uri_san,
    "DOWNSTREAM_LOCAL_URI_SAN": lambda context: context.local_uri_san,
    "REQUESTED_SERVER_NAME": lambda context: context.requested_server_name,
    "PROTOCOL": lambda context: f"HTTP/1.{context.request.http_minor}",
    "ROUTE_NAME": lambda context: context.route_name,
    "START_TIME": lambda context: _timestamp(context.started_at_s),
    "HOSTNAME": lambda context: context.hostname,
    "UPSTREAM_CLUSTER": lambda context: context.target,
}
_RESPONSE_ATTRIBUTES: dict[str, Callable[[EditContext], str]] = {
    "UPSTREAM_HOST": lambda context: context.upstream_host,
    "UPSTREAM_REMOTE_ADDRESS": lambda context: context.upstream_host,
    "RESPONSE_CODE": lambda context: str(context.response_status or ""),
}
_PSEUDO_HEADERS: dict[str, Callable[[EditContext], bytes]] = {
    ":method": lambda context: context.request.method,
    ":path": lambda context: context.request.target,
    ":authority": lambda context: context.request.authority,
    ":scheme": lambda context: context.scheme.encode(),
}
_RESPONSE_PSEUDO_HEADERS: dict[str, Callable[[EditContext], bytes]] = {
    ":status": lambda context: str(context.response_status or "").encode(),
}


def _attribute(read: Callable[[EditContext], str], limit: int | None) -> _Render:
    def render(_request: Headers, _response: Headers, context: EditContext) -> bytes:
        value = read(context).encode()[:limit]
        # A certificate's text can hold anything; what no header can carry counts as not known.
        return value if _VALUE.fullmatch(value) else b""

    return render


def _pseudo_header(read: Callable[[EditContext], bytes]) -> Callable[[Headers, EditContext], bytes | None]:
    return lambda _, context: read(context)


def _plain_header(name: bytes) -> Callable[[Headers, EditContext], bytes | None]:
    return lambda headers, _: joined_value(headers, name)


def _header(operator: str, names: str, limit: int | None) -> _Render:
    """`REQ(NAME?OTHER)` or `RESP(...)`: the first that there is."""
    pseudo = _PSEUDO_HEADERS if operator == "REQ" else _RESPONSE_PSEUDO_HEADERS
    lookups: list[Callable[[Headers, EditContext], bytes | None]] = []
    for name in names.lower().split("?"):
        if name.startswith(":"):
            if name not in pseudo:
                raise ConfigError(f"%{operator}({names})% names {name}, which is no header")
            lookups.append(_pseudo_header(pseudo[name]))
        elif _NAME.fullmatch(name.encode()):
            lookups.append(_plain_header(name.encode()))
        else:
            raise ConfigError(f"%{operator}({names})% names {name!r}, which is no header")
    of_response = operator == "RESP"

    def render(request: Headers, response: Headers, context: EditContext) -> bytes:
        for lookup in lookups:
            value = lookup(response if of_response else request, context)
            if value:
                return value[:limit]
        return b""

    return render


def _operator(text: str, name: str, argument: str | None, limit: int | None, *, response: bool) -> _Render:
    if name == "REQ" or (name == "RESP" and response):
        if argument is None:
            raise ConfigError(f"{text} needs a header's name in parentheses")
        return _header(name, argument, limit)
    read = _ATTRIBUTES.get(name) or (_RESPONSE_ATTRIBUTES.get(name) if response else None)
    if read is None:
        known = sorted((*_ATTRIBUTES, "REQ", *((*_RESPONSE_ATTRIBUTES, "RESP") if response else ())))
        raise ConfigError(f"{text} is not an operator here; known are {', '.join(known)}")
    if argument is not None:
        raise ConfigError(f"{text}: {name} takes nothing in parentheses")
    return _attribute(read, limit)


def compile_value(text: str, *, response: bool) -> bytes | _Render:
    """The value as bytes when it is always the same, or a function that renders it. Raises ConfigError."""
    parts: list[bytes | _Render] = []
    end = 0
    for match in _OPERATOR.finditer(text):
        parts.append(text[end : match.start()].encode())
        end = match.end()
        if match[1] is None:
            parts.append(b"%")
        else:
            limit = int(match[3]) if match[3] else None
            parts.append(_operator(match[0], match[1], match[2], limit, response=response))
    parts.append(text[end:].encode())
    # What _OPERATOR left over must not hold a percent sign of its own.
    if "%" in _OPERATOR.sub("", text):
        raise ConfigError(f"the value {text!r} has a percent sign that begins no operator; write %% for one")
    for part in parts:
        if isinstance(part, bytes) and not _VALUE.fullmatch(part):
            raise ConfigError(f"the value {text!r} has characters that no header can carry")
    fixed = [part for part in parts if isinstance(part, bytes)]
    if len(fixed) == len(parts):
        return b"".join(fixed).strip(b" \t")

    def render(request: Headers, response_headers: Headers, context: EditContext) -> bytes:
        return b"".join(
            part if isinstance(part, bytes) else part(request, response_headers, context) for part in parts
        ).strip(b" \t")

    return render


def compile_name(name: str) -> bytes:
    """The name in lower case. Raises ConfigError for one that is malformed or that edits may not touch."""
    lower = name.lower().encode()
    if lower.startswith(b":") or lower in PROTECTED:
        raise ConfigError(f"header {name!r} cannot be edited: it belongs to framing, routing or identity")
    if not _NAME.fullmatch(lower):
        raise ConfigError(f"header {name!r} is not a valid name")
    return lower


class _Level:
    """One level's edits."""

    __slots__ = ("added", "gone", "removed", "rendered", "replaced")

    def __init__(self, edits: HeaderEdits, *, response: bool) -> None:
        self.removed = frozenset(map(compile_name, edits.remove))
        self.replaced = tuple(
            (compile_name(name), compile_value(value, response=response)) for name, value in edits.set
        )
        self.added = tuple((compile_name(name), compile_value(value, response=response)) for name, value in edits.add)
        self.gone = self.removed | {name for name, _ in self.replaced}
        # Known in advance: everything that is put at the end.
        fixed = [(name, value) for name, value in (*self.replaced, *self.added) if isinstance(value, bytes)]
        self.rendered: Headers | None = None
        if len(fixed) == len(self.replaced) + len(self.added):
            self.rendered = tuple((name, value) for name, value in fixed if value)


class Edits:
    """All levels' edits of one direction. `reads_context`: they hold operators."""

    __slots__ = ("_levels", "_response", "reads_context")

    def __init__(self, levels: tuple[HeaderEdits, ...], *, response: bool) -> None:
        self._levels = tuple(_Level(level, response=response) for level in levels)
        self._response = response
        self.reads_context = any(level.rendered is None for level in self._levels)

    def apply(self, headers: Headers, context: EditContext | None, request: Headers = ()) -> Headers:
        """The edited headers. A response's operators read `request` too. The context is needed with `reads_context`."""
        for level in self._levels:
            rendered = level.rendered
            if rendered is None:
                if level.removed:
                    headers = tuple(header for header in headers if header[0] not in level.removed)
                assert context is not None, "these edits hold operators"
                pair = (request, headers) if self._response else (headers, ())
                values = (
                    (name, value if isinstance(value, bytes) else value(*pair, context))
                    for name, value in (*level.replaced, *level.added)
                )
                rendered = tuple((name, value) for name, value in values if value)
            gone = level.gone
            headers = (
                (*[header for header in headers if header[0] not in gone], *rendered) if gone else headers + rendered
            )
        return headers


def compile_edits(*levels: HeaderEdits, response: bool) -> Edits | None:
    """The levels as one, the most specific first; None when there is nothing to do. Raises ConfigError."""
    used = tuple(level for level in levels if level.set or level.add or level.remove)
    return Edits(used, response=response) if used else None
