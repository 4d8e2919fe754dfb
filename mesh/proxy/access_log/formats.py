"""Access log formats compiled: from Envoy's format strings to functions that make a line of an exchange.

A compiled format is called as `line(exchange, ended_at, offset_s)`: the end on the reactor's clock, and what to add to
that clock for Unix time. It returns one line with its line feed, and never more than one.
"""

import re
from collections.abc import Callable

import msgspec

from mesh.errors import ConfigError
from mesh.proxy.access_log.operators import compile_operator
from mesh.proxy.access_log.record import LoggedExchange, Named, Reader, Surroundings
from mesh.proxy.access_log.text import as_text, escaped, json_text, json_value, shown
from mesh.proxy.access_log.times import compile_layout, service_time_ms

Line = Callable[[LoggedExchange, float, float], bytes]

FORMAT_CHARACTERS_MAX = 16 * 1024
JSON_DEPTH_MAX = 8
LENGTH_DIGITS_MAX = 9

_START = (
    '[%START_TIME%] "%REQ(:METHOD)% %REQ(X-ENVOY-ORIGINAL-PATH?:PATH)% %PROTOCOL%" %RESPONSE_CODE% %RESPONSE_FLAGS%'
)
_MIDDLE = '%BYTES_RECEIVED% %BYTES_SENT% %DURATION% %RESP(X-ENVOY-UPSTREAM-SERVICE-TIME)% "%REQ(X-FORWARDED-FOR)%"'
_END = '"%REQ(USER-AGENT)%" "%REQ(X-REQUEST-ID)%" "%REQ(:AUTHORITY)%" "%UPSTREAM_HOST%"'

ENVOY_FORMAT = f"{_START} {_MIDDLE} {_END}\n"

ISTIO_FORMAT = (
    f"{_START} %RESPONSE_CODE_DETAILS% %CONNECTION_TERMINATION_DETAILS% "
    f'"%UPSTREAM_TRANSPORT_FAILURE_REASON%" {_MIDDLE} {_END} %UPSTREAM_CLUSTER_RAW% %UPSTREAM_LOCAL_ADDRESS% '
    "%DOWNSTREAM_LOCAL_ADDRESS% %DOWNSTREAM_REMOTE_ADDRESS% %REQUESTED_SERVER_NAME% %ROUTE_NAME%\n"
)

_CONSUL_KEYS = {
    "start_time": "START_TIME", "route_name": "ROUTE_NAME", "method": "REQ(:METHOD)",
    "path": "REQ(X-ENVOY-ORIGINAL-PATH?:PATH)", "protocol": "PROTOCOL", "response_code": "RESPONSE_CODE",
    "response_flags": "RESPONSE_FLAGS", "response_code_details": "RESPONSE_CODE_DETAILS",
    "connection_termination_details": "CONNECTION_TERMINATION_DETAILS", "bytes_received": "BYTES_RECEIVED",
    "bytes_sent": "BYTES_SENT", "duration": "DURATION",
    "upstream_service_time": "RESP(X-ENVOY-UPSTREAM-SERVICE-TIME)", "x_forwarded_for": "REQ(X-FORWARDED-FOR)",
    "user_agent": "REQ(USER-AGENT)", "request_id": "REQ(X-REQUEST-ID)", "authority": "REQ(:AUTHORITY)",
    "upstream_host": "UPSTREAM_HOST", "upstream_cluster": "UPSTREAM_CLUSTER",
    "upstream_local_address": "UPSTREAM_LOCAL_ADDRESS", "downstream_local_address": "DOWNSTREAM_LOCAL_ADDRESS",
    "downstream_remote_address": "DOWNSTREAM_REMOTE_ADDRESS", "requested_server_name": "REQUESTED_SERVER_NAME",
    "upstream_transport_failure_reason": "UPSTREAM_TRANSPORT_FAILURE_REASON",
}  # fmt: skip

CONSUL_FORMAT = msgspec.json.encode({key: f"%{name}%" for key, name in _CONSUL_KEYS.items()}).decode()

# What may be written instead of a format: no format of use has no operator in it.
TEXT_PRESETS = {"": ENVOY_FORMAT, "envoy": ENVOY_FORMAT, "istio": ISTIO_FORMAT}
JSON_PRESETS = {"consul": CONSUL_FORMAT}

# The argument ends at the first `)` that a `%` or a `:length%` follows: time layouts and COALESCE hold both signs.
_OPERATOR = re.compile(r"%%|%([A-Z][A-Z0-9_]*)(?:\((.*?)\))?(?::([0-9]+))?%", re.DOTALL)


def compile_log(text_format: str, json_format: str, surroundings: Surroundings) -> Line:
    """The format that a configuration asks for; with neither, Envoy's default. Raises ConfigError saying what is wrong
    with it and where.
    """
    if text_format and json_format:
        raise ConfigError("a text format and a JSON format exclude each other")
    if json_format:
        return compile_json(JSON_PRESETS.get(json_format, json_format), surroundings)
    chosen = TEXT_PRESETS.get(text_format, text_format)
    return default_line() if chosen == ENVOY_FORMAT else compile_text(chosen, surroundings)


def _pieces(given: str, surroundings: Surroundings) -> list[str | Reader]:
    """Literal text and compiled operators in turn. Raises ConfigError with the position (from 1) of what is wrong."""
    if len(given) > FORMAT_CHARACTERS_MAX:
        raise ConfigError(f"the format has {len(given)} characters, more than {FORMAT_CHARACTERS_MAX}")
    pieces: list[str | Reader] = []
    literal = ""
    position = 0
    while position < len(given):
        percent = given.find("%", position)
        if percent < 0:
            literal += given[position:]
            break
        literal += given[position:percent]
        match = _OPERATOR.match(given, percent)
        if match is None:
            shown_part = given[percent : percent + 24]
            raise ConfigError(f"position {percent + 1}: {shown_part!r} is not an operator; a percent sign is %%")
        position = match.end()
        if match[1] is None:
            literal += "%"
            continue
        if literal:
            pieces.append(literal)
            literal = ""
        digits = match[3]
        if digits is not None and len(digits) > LENGTH_DIGITS_MAX:
            raise ConfigError(f"position {percent + 1}: the length {digits} is too large")
        try:
            length_max = None if digits is None else int(digits)
            pieces.append(compile_operator(match[1], match[2] or "", length_max, surroundings))
        except ConfigError as error:
            raise ConfigError(f"position {percent + 1}: {error}") from error
    if literal:
        pieces.append(literal)
    return pieces


def compile_text(given: str, surroundings: Surroundings) -> Line:
    """A text format. A line feed is added when it does not end with one. Raises ConfigError."""
    pieces = _pieces(given, surroundings)
    template = "".join(piece.replace("%", "%%") if isinstance(piece, str) else "%b" for piece in pieces).encode()
    if not template.endswith(b"\n"):
        template += b"\n"
    readers = tuple(piece for piece in pieces if not isinstance(piece, str))

    def line(exchange: LoggedExchange, ended_at: float, offset_s: float) -> bytes:
        named = named_headers(exchange)
        return template % tuple([shown(read(exchange, ended_at, offset_s, named)) for read in readers])

    return line


def compile_value(given: str, surroundings: Surroundings) -> Line:
    """As `compile_text` for a part of a line: nothing is added at the end. For header values. Raises ConfigError."""
    whole = compile_text(given + "\n", surroundings)
    return lambda exchange, ended_at, offset_s: whole(exchange, ended_at, offset_s)[:-1]


def named_headers(exchange: LoggedExchange) -> Named:
    """The forwarded request's headers by name; of equal ones the first."""
    return dict(exchange.forwarded.headers[::-1])


# -- JSON

_Part = str | tuple[str | Reader, ...]  # JSON text as it is; or what makes one value


def compile_json(given: str, surroundings: Surroundings) -> Line:
    """A JSON object whose strings hold operators; objects and lists may nest. A string that is one operator and nothing
    else becomes its typed value: a number, a string, or null when it has none. Raises ConfigError naming the key.
    """
    if len(given) > FORMAT_CHARACTERS_MAX:
        raise ConfigError(f"the format has {len(given)} characters, more than {FORMAT_CHARACTERS_MAX}")
    try:
        decoded = msgspec.json.decode(given)
    except (msgspec.MsgspecError, RecursionError) as error:
        raise ConfigError(f"the JSON format is not JSON: {error}") from error
    if not isinstance(decoded, dict):
        raise ConfigError("the JSON format is not an object")
    parts = _merged(_json_parts(decoded, "", 0, surroundings))
    template = "".join(part.replace("%", "%%") if isinstance(part, str) else "%s" for part in parts) + "\n"
    values = tuple(_json_reader(part) for part in parts if not isinstance(part, str))

    def line(exchange: LoggedExchange, ended_at: float, offset_s: float) -> bytes:
        named = named_headers(exchange)
        return (template % tuple([value(exchange, ended_at, offset_s, named) for value in values])).encode()

    return line


def _json_parts(value: object, where: str, depth: int, surroundings: Surroundings) -> list[_Part]:
    if depth > JSON_DEPTH_MAX:
        raise ConfigError(f"{where}: more than {JSON_DEPTH_MAX} levels")
    if isinstance(value, str):
        try:
            pieces = _pieces(value, surroundings)
        except ConfigError as error:
            raise ConfigError(f"{where}, {error}") from error
        if all(isinstance(piece, str) for piece in pieces):
            return [json_text("".join(piece for piece in pieces if isinstance(piece, str)))]
        return [tuple(pieces)]
    if isinstance(value, dict):
        parts: list[_Part] = ["{"]
        for number, (key, inner) in enumerate(value.items()):
            parts.append(f"{',' if number else ''}{json_text(key)}:")
            parts.extend(_json_parts(inner, f"{where}.{key}" if where else key, depth + 1, surroundings))
        return [*parts, "}"]
    if isinstance(value, list):
        parts = ["["]
        for number, inner in enumerate(value):
            if number:
                parts.append(",")
            parts.extend(_json_parts(inner, f"{where}[{number}]", depth + 1, surroundings))
        return [*parts, "]"]
    return [msgspec.json.encode(value).decode()]


def _merged(parts: list[_Part]) -> list[_Part]:
    """With adjoining texts as one."""
    merged: list[_Part] = []
    for part in parts:
        if isinstance(part, str) and merged and isinstance(merged[-1], str):
            merged[-1] += part
        else:
            merged.append(part)
    return merged


_JsonReader = Callable[[LoggedExchange, float, float, Named], str]


def _json_reader(pieces: tuple[str | Reader, ...]) -> _JsonReader:
    if len(pieces) == 1 and not isinstance(pieces[0], str):
        alone = pieces[0]
        return lambda exchange, ended_at, offset_s, named: json_value(alone(exchange, ended_at, offset_s, named))

    def read(exchange: LoggedExchange, ended_at: float, offset_s: float, named: Named) -> str:
        return json_text(
            "".join(
                [
                    piece if isinstance(piece, str) else as_text(piece(exchange, ended_at, offset_s, named))
                    for piece in pieces
                ]
            )
        )

    return read


# -- Envoy's default, by hand: it is what most logs use, on every request

_SAFE = bytes(code for code in range(0x20, 0x7F) if code not in b'"\\')


def default_line() -> Line:
    """What `compile_text(ENVOY_FORMAT)` is, in half of its time: one look at all that came from outside."""
    stamp = compile_layout("[%Y-%m-%dT%H:%M:%S.%3fZ]", local=False)

    def line(exchange: LoggedExchange, ended_at: float, offset_s: float) -> bytes:
        head = exchange.forwarded
        named = dict(head.headers[::-1])
        get = named.get
        started_at = exchange.started_at
        path = get(b"x-envoy-original-path") or head.target
        forwarded_for = get(b"x-forwarded-for") or b"-"
        agent = get(b"user-agent") or b"-"
        request_id = get(b"x-request-id") or b"-"
        method, authority = head.method or b"-", head.authority or b"-"
        if (method + path + forwarded_for + agent + request_id + authority).translate(None, _SAFE):
            method, path, forwarded_for = escaped(method), escaped(path), escaped(forwarded_for)
            agent, request_id, authority = escaped(agent), escaped(request_id), escaped(authority)
        response_at, sent_at = exchange.response_at, exchange.sent_at
        service_time = b"%d" % (service_time_ms(exchange) or 0) if response_at and sent_at else b"-"
        return b'%b "%b %b %b" %d %b %d %d %d %b "%b" "%b" "%b" "%b" "%b"\n' % (
            stamp(started_at + offset_s).encode(),
            method,
            path or b"-",
            b"HTTP/1.1" if exchange.request.http_minor else b"HTTP/1.0",
            exchange.status,
            exchange.flags.encode() or b"-",
            exchange.bytes_received,
            exchange.bytes_sent,
            (ended_at - started_at) * 1000.0,
            service_time,
            forwarded_for,
            agent,
            request_id,
            authority,
            exchange.endpoint_host.encode() or b"-",
        )

    return line
