"""What `mesh tap` shows of a request, and which requests it shows: values and pure functions."""

from collections.abc import Callable
from typing import Literal

import msgspec

from mesh.errors import ConfigError
from mesh.http.head import Headers
from mesh.proxy.access_log.record import LoggedExchange

Direction = Literal["inbound", "outbound"]

HEADERS_SHOWN_MAX = 64
VALUE_BYTES_MAX = 1024  # of a path or header

# Shown as `(hidden)` even when headers are asked for: whoever may look at traffic may not act as its sender.
SENSITIVE = frozenset(
    (b"authorization", b"cookie", b"proxy-authorization", b"set-cookie", b"x-api-key", b"x-consul-token")
)
_HIDDEN = "(hidden)"


class TapFilter(msgspec.Struct, frozen=True):
    """Which requests: what is empty does not matter. `status` is `503` or a class such as `5xx`; 0: no answer.

    `service` is the sidecar's own, `source` the calling service (inbound), `target` where it went. With `headers` the
    records hold them, and the query; values that prove who somebody is are hidden all the same.
    """

    service: str = ""
    direction: Direction | None = None
    method: str = ""
    path_prefix: str = ""
    status: str = ""
    source: str = ""
    target: str = ""
    headers: bool = False


class TapRecord(msgspec.Struct, frozen=True, rename="pascal"):
    """One request that is over. `at_s` is Unix time of its start."""

    at_s: float
    service: str
    direction: Direction
    source: str
    method: str
    path: str
    authority: str
    status: int
    flags: str
    duration_s: float
    bytes_received: int
    bytes_sent: int
    target: str
    endpoint: str
    route: str
    attempts: int
    request_id: str
    decision: str = ""
    request_headers: tuple[tuple[str, str], ...] = ()
    response_headers: tuple[tuple[str, str], ...] = ()


def compile_filter(wanted: TapFilter) -> Callable[[LoggedExchange], bool]:
    """What holds of the requests of a listener that `service` and `direction` fit. Raises ConfigError."""
    low, high = _statuses(wanted.status)
    method, prefix = wanted.method.upper().encode(), wanted.path_prefix.encode()
    source, target = wanted.source, wanted.target

    def matches(exchange: LoggedExchange) -> bool:
        return (
            low <= exchange.status <= high
            and (not method or exchange.request.method == method)
            and exchange.request.path.startswith(prefix)
            and (not source or getattr(exchange.caller, "source", "") == source)
            and (not target or exchange.target_name == target)
        )

    return matches


def _statuses(given: str) -> tuple[int, int]:
    if not given:
        return 0, 999
    if len(given) == 3 and given[0] in "12345" and given[1:].lower() == "xx":
        return int(given[0]) * 100, int(given[0]) * 100 + 99
    if given.isascii() and given.isdigit() and (given == "0" or (len(given) == 3 and given[0] in "12345")):
        return int(given), int(given)
    raise ConfigError(f"status {given!r} is neither a status, such as 503, nor a class, such as 5xx")


def record_of(
    exchange: LoggedExchange, ended_at: float, offset_s: float, *, service: str, direction: Direction, headers: bool
) -> TapRecord:
    """`ended_at` is on the exchange's clock, `offset_s` what to add to it for Unix time."""
    head = exchange.request
    response = exchange.response_head
    return TapRecord(
        at_s=exchange.started_at + offset_s,
        service=service,
        direction=direction,
        source=getattr(exchange.caller, "source", ""),
        method=_text(head.method),
        path=_text(head.target if headers else head.path),
        authority=_text(head.authority),
        status=exchange.status,
        flags=exchange.flags,
        duration_s=ended_at - exchange.started_at,
        bytes_received=exchange.bytes_received,
        bytes_sent=exchange.bytes_sent,
        target=exchange.target_name,
        endpoint=exchange.endpoint_host,
        route=exchange.route_name,
        attempts=exchange.attempts,
        request_id=_text(exchange.forwarded.header(b"x-request-id") or b""),
        decision=exchange.decision,
        request_headers=_shown(head.headers) if headers else (),
        response_headers=_shown(response.headers) if headers and response is not None else (),
    )


def _text(value: bytes) -> str:
    return value[:VALUE_BYTES_MAX].decode("utf-8", "backslashreplace")


def _shown(headers: Headers) -> tuple[tuple[str, str], ...]:
    return tuple(
        (_text(name), _HIDDEN if name.lower() in SENSITIVE else _text(value))
        for name, value in headers[:HEADERS_SHOWN_MAX]
    )
