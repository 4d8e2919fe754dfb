"""Envoy's command operators (envoyproxy docs, "Command operators"), each compiled to what reads its value."""

import re
from collections.abc import Callable
from urllib.parse import unquote_to_bytes

import msgspec

from mesh.errors import ConfigError
from mesh.http.head import Headers, RequestHead, first_value
from mesh.proxy.access_log.flags import long_form
from mesh.proxy.access_log.record import LoggedExchange, Named, Reader, Surroundings, Value
from mesh.proxy.access_log.times import (
    compile_between,
    compile_time,
    duration_ms,
    end_clock,
    service_time_ms,
    start_clock,
)

_Get = Callable[[LoggedExchange], Value]
_Compile = Callable[[str, Surroundings], Reader]

_HEADER_NAME = re.compile(r":?[A-Za-z0-9!#$&'*+.^_`|~-]+")


def _simple(get: _Get) -> _Compile:
    def compile_(argument: str, surroundings: Surroundings) -> Reader:
        if argument:
            raise ConfigError(f"takes no argument, but has {argument!r}")
        return lambda exchange, ended_at, offset_s, named: get(exchange)

    return compile_


def _constant(value: Value) -> Reader:
    return lambda exchange, ended_at, offset_s, named: value


# -- headers


def _names(argument: str) -> tuple[bytes, bytes]:
    """The header and its alternative (empty: none) of `H?ALT`, in lower case."""
    main, _, alternative = argument.partition("?")
    for name in (main, *((alternative,) if alternative else ())):
        if not _HEADER_NAME.fullmatch(name):
            raise ConfigError(f"{name!r} is not a header name")
    return main.lower().encode(), alternative.lower().encode()


def _scheme(exchange: LoggedExchange) -> bytes:
    return b"https" if getattr(exchange.caller, "tls_version", "") else b"http"


def _transfer_encoding(head: RequestHead) -> Value:
    return b"chunked" if head.chunked else None


_REQUEST_PARTS: dict[bytes, _Get] = {
    b":method": lambda exchange: exchange.forwarded.method,
    b":path": lambda exchange: exchange.forwarded.target,
    b":authority": lambda exchange: exchange.forwarded.authority,
    b"host": lambda exchange: exchange.forwarded.authority,
    b":scheme": _scheme,
    b"content-length": lambda exchange: exchange.forwarded.content_length,
    b"transfer-encoding": lambda exchange: _transfer_encoding(exchange.forwarded),
    b"upgrade": lambda exchange: exchange.forwarded.upgrade,
}


def _request_value(name: bytes) -> Reader:
    part = _REQUEST_PARTS.get(name)
    if part is not None:
        get = part
        return lambda exchange, ended_at, offset_s, named: get(exchange)
    if name.startswith(b":"):
        raise ConfigError(f"a request has no {name.decode()!r}")
    return lambda exchange, ended_at, offset_s, named: named.get(name)


def _request_header(argument: str, surroundings: Surroundings) -> Reader:
    main, alternative = _names(argument)
    read = _request_value(main)
    return _either(read, _request_value(alternative)) if alternative else read


def _either(first: Reader, second: Reader) -> Reader:
    def read(exchange: LoggedExchange, ended_at: float, offset_s: float, named: Named) -> Value:
        value = first(exchange, ended_at, offset_s, named)
        return value if value or value == 0 else second(exchange, ended_at, offset_s, named)

    return read


def _without_query(argument: str, surroundings: Surroundings) -> Reader:
    whole = _request_header(argument, surroundings)

    def read(exchange: LoggedExchange, ended_at: float, offset_s: float, named: Named) -> Value:
        value = whole(exchange, ended_at, offset_s, named)
        return value.partition(b"?")[0] if isinstance(value, bytes) else value

    return read


def _response_value(name: bytes) -> _Get:
    if name == b":status":
        return lambda exchange: exchange.status or None
    if name == b"x-envoy-upstream-service-time":
        return service_time_ms  # this hop's, whatever the endpoint says about its own
    if name == b"content-length":
        return lambda exchange: None if exchange.response_head is None else exchange.response_head.content_length
    if name.startswith(b":"):
        raise ConfigError(f"a response has no {name.decode()!r}")
    return lambda exchange: None if exchange.response_head is None else exchange.response_head.header(name)


def _response_header(argument: str, surroundings: Surroundings) -> Reader:
    main, alternative = _names(argument)
    get = _response_value(main)
    if not alternative:
        return lambda exchange, ended_at, offset_s, named: get(exchange)
    other = _response_value(alternative)
    return _either(
        lambda exchange, ended_at, offset_s, named: get(exchange),
        lambda exchange, ended_at, offset_s, named: other(exchange),
    )


def _trailer(argument: str, surroundings: Surroundings) -> Reader:
    main, alternative = _names(argument)

    def get(exchange: LoggedExchange) -> Value:
        value = first_value(exchange.trailers, main)
        return first_value(exchange.trailers, alternative) if value is None and alternative else value

    return lambda exchange, ended_at, offset_s, named: get(exchange)


# -- paths and queries

_ORIGINAL = b"x-envoy-original-path"


def _target(exchange: LoggedExchange, named: Named, origin: str) -> bytes | None:
    if origin == "PATH":
        return exchange.forwarded.target
    original = named.get(_ORIGINAL)
    return exchange.forwarded.target if original is None and origin == "ORIG_OR_PATH" else original


def _checked_origin(text: str, default: str = "ORIG_OR_PATH") -> str:
    origin = text or default
    if origin not in ("ORIG", "PATH", "ORIG_OR_PATH"):
        raise ConfigError(f"{origin!r} is not one of ORIG, PATH, ORIG_OR_PATH")
    return origin


def _path(argument: str, surroundings: Surroundings) -> Reader:
    query, _, origin = argument.partition(":")
    if query not in ("", "WQ", "NQ"):
        raise ConfigError(f"{query!r} is neither WQ nor NQ")
    chosen = _checked_origin(origin)

    def read(exchange: LoggedExchange, ended_at: float, offset_s: float, named: Named) -> bytes | None:
        target = _target(exchange, named, chosen)
        return target.partition(b"?")[0] if target is not None and query == "NQ" else target

    return read


def _query_parameter(argument: str, surroundings: Surroundings) -> Reader:
    """The first parameter of that name, percent-decoded."""
    if not argument:
        raise ConfigError("needs the parameter's name")
    wanted = argument.encode()

    def read(exchange: LoggedExchange, ended_at: float, offset_s: float, named: Named) -> bytes | None:
        query = exchange.forwarded.query
        if not query:
            return None
        for pair in query.split(b"&"):
            name, _, value = pair.partition(b"=")
            if name == wanted or (b"%" in name and unquote_to_bytes(name) == wanted):
                return unquote_to_bytes(value) if b"%" in value else value
        return None

    return read


def _query(argument: str, surroundings: Surroundings) -> Reader:
    """Everything behind the `?`, as it came (RAW, the default) or percent-decoded (DECODED)."""
    if argument not in ("", "RAW", "DECODED"):
        raise ConfigError(f"{argument!r} is neither RAW nor DECODED")

    def get(exchange: LoggedExchange) -> Value:
        query = exchange.forwarded.query
        return unquote_to_bytes(query) if query and argument == "DECODED" else query

    return lambda exchange, ended_at, offset_s, named: get(exchange)


# -- sizes


def _header_bytes(headers: Headers) -> int:
    return sum([len(name) + len(value) + 4 for name, value in headers])


def _request_bytes(head: RequestHead) -> int:
    """Of the head as HTTP/1.1 has it: request line, Host, headers, the empty line."""
    line = len(head.method) + len(head.target) + 12
    return line + len(head.authority) + 8 + _header_bytes(head.headers) + 2


def _response_bytes(exchange: LoggedExchange) -> int:
    head = exchange.response_head
    return 0 if head is None else 17 + len(head.reason) + _header_bytes(head.headers)


def _sent_upstream(exchange: LoggedExchange) -> int:
    return _request_bytes(exchange.forwarded) if exchange.sent_at else 0


_SIZES: dict[str, _Get] = {
    "BYTES_RECEIVED": lambda exchange: exchange.bytes_received,
    "BYTES_SENT": lambda exchange: exchange.bytes_sent,
    "DOWNSTREAM_HEADER_BYTES_RECEIVED": lambda exchange: _request_bytes(exchange.request),
    "DOWNSTREAM_HEADER_BYTES_SENT": _response_bytes,
    "DOWNSTREAM_WIRE_BYTES_RECEIVED": lambda exchange: _request_bytes(exchange.request) + exchange.bytes_received,
    "DOWNSTREAM_WIRE_BYTES_SENT": lambda exchange: _response_bytes(exchange) + exchange.bytes_sent,
    "UPSTREAM_HEADER_BYTES_SENT": _sent_upstream,
    "UPSTREAM_HEADER_BYTES_RECEIVED": lambda exchange: _response_bytes(exchange) if exchange.response_at else 0,
    "UPSTREAM_WIRE_BYTES_SENT": lambda exchange: (
        _sent_upstream(exchange) + exchange.bytes_received if exchange.sent_at else 0
    ),
    "UPSTREAM_WIRE_BYTES_RECEIVED": lambda exchange: (
        _response_bytes(exchange) + exchange.bytes_sent if exchange.response_at else 0
    ),
}

# -- addresses and identities


def _host(address: str) -> str:
    """`10.0.0.1` of `10.0.0.1:80`, `::1` of `[::1]:80`."""
    if address.startswith("["):
        return address[1:].partition("]")[0]
    return address.rpartition(":")[0] or address


def _near(attribute: str) -> _Get:
    def get(exchange: LoggedExchange) -> Value:
        value: str | int | None = getattr(exchange.caller, attribute, None)
        return value

    return get


def _far(attribute: str) -> _Get:
    def get(exchange: LoggedExchange) -> Value:
        value: str | int | None = getattr(exchange.far, attribute, None)
        return value

    return get


def _without_port(get: _Get) -> _Get:
    def host(exchange: LoggedExchange) -> Value:
        value = get(exchange)
        return _host(value) if isinstance(value, str) else value

    return host


def _port(get: _Get) -> _Get:
    def port(exchange: LoggedExchange) -> Value:
        value = get(exchange)
        digits = value.rpartition(":")[2] if isinstance(value, str) else ""
        return int(digits) if digits.isdigit() else None

    return port


def _addresses(prefix: str, get: _Get) -> dict[str, _Get]:
    return {prefix: get, f"{prefix}_WITHOUT_PORT": _without_port(get), f"{prefix[: -len('ADDRESS')]}PORT": _port(get)}


def _upstream_host(exchange: LoggedExchange) -> Value:
    return exchange.endpoint_host


_PLACES: dict[str, _Get] = {
    **_addresses("DOWNSTREAM_LOCAL_ADDRESS", _near("local_address")),
    **_addresses("DOWNSTREAM_REMOTE_ADDRESS", _near("remote_address")),
    **_addresses("DOWNSTREAM_DIRECT_REMOTE_ADDRESS", _near("remote_address")),
    **_addresses("UPSTREAM_LOCAL_ADDRESS", _far("local_address")),
    **_addresses("UPSTREAM_REMOTE_ADDRESS", _upstream_host),
    "DOWNSTREAM_PEER_URI_SAN": _near("peer_uri_san"),
    "DOWNSTREAM_TLS_VERSION": _near("tls_version"),
    "DOWNSTREAM_TLS_CIPHER": _near("tls_cipher"),
    "UPSTREAM_PEER_URI_SAN": _far("peer_uri_san"),
    "UPSTREAM_TLS_VERSION": _far("tls_version"),
    "UPSTREAM_TLS_CIPHER": _far("tls_cipher"),
    "CONNECTION_ID": _near("number"),
    "UPSTREAM_CONNECTION_ID": _far("number"),
    "UPSTREAM_HOST": _upstream_host,
    "UPSTREAM_CLUSTER": lambda exchange: exchange.target_name,
    "UPSTREAM_CLUSTER_RAW": lambda exchange: exchange.target_name,
    "UPSTREAM_REQUEST_ATTEMPT_COUNT": lambda exchange: exchange.attempts,
    "UPSTREAM_HOSTS_ATTEMPTED": lambda exchange: ",".join(exchange.hosts_tried),
    "UPSTREAM_TRANSPORT_FAILURE_REASON": lambda exchange: exchange.upstream_failure,
}

# -- gRPC (codes: grpc.github.io, "Status codes and their use in gRPC")

_GRPC_SNAKE = (
    "OK", "CANCELLED", "UNKNOWN", "INVALID_ARGUMENT", "DEADLINE_EXCEEDED", "NOT_FOUND", "ALREADY_EXISTS",
    "PERMISSION_DENIED", "RESOURCE_EXHAUSTED", "FAILED_PRECONDITION", "ABORTED", "OUT_OF_RANGE", "UNIMPLEMENTED",
    "INTERNAL", "UNAVAILABLE", "DATA_LOSS", "UNAUTHENTICATED",
)  # fmt: skip
_GRPC_CAMEL = tuple(
    "OK" if name == "OK" else "".join(word.capitalize() for word in name.split("_")) for name in _GRPC_SNAKE
)


def _grpc_number(exchange: LoggedExchange) -> int | None:
    head = exchange.response_head
    if head is None or not (head.header(b"content-type") or b"").startswith(b"application/grpc"):
        return None
    given = first_value(exchange.trailers, b"grpc-status") or head.header(b"grpc-status")
    if given is None or not given.isdigit() or len(given) > 3:
        return None
    return int(given)


def _grpc_status(argument: str, surroundings: Surroundings) -> Reader:
    if argument not in ("", "CAMEL_STRING", "SNAKE_STRING", "NUMBER", "CAMEL", "SNAKE"):
        raise ConfigError(f"{argument!r} is not one of CAMEL_STRING, SNAKE_STRING, NUMBER")
    names = _GRPC_SNAKE if argument.startswith("SNAKE") else _GRPC_CAMEL

    def get(exchange: LoggedExchange) -> Value:
        number = _grpc_number(exchange)
        if number is None or argument == "NUMBER":
            return number
        return names[number] if number < len(names) else str(number)

    return lambda exchange, ended_at, offset_s, named: get(exchange)


# -- traces

_TRACEPARENT = re.compile(rb"[0-9a-f]{2}-([0-9a-f]{32})-([0-9a-f]{16})-")
_B3_SINGLE = re.compile(rb"([0-9a-f]{16}|[0-9a-f]{32})-([0-9a-f]{16})(?:-|$)")


def _trace(position: int, multi: bytes) -> Reader:
    """From the headers as they were forwarded: they name this hop where it takes part in the trace."""

    def read(exchange: LoggedExchange, ended_at: float, offset_s: float, named: Named) -> bytes | None:
        for header, shape in ((b"traceparent", _TRACEPARENT), (b"b3", _B3_SINGLE)):
            match = shape.match(named.get(header, b""))
            if match is not None:
                return match[position]
        return named.get(multi)

    return read


# -- everything else


def _environment(argument: str, surroundings: Surroundings) -> Reader:
    if not argument:
        raise ConfigError("needs the variable's name")
    return _constant(surroundings.environment.get(argument, ""))


def _nothing(argument: str, surroundings: Surroundings) -> Reader:
    return _constant(None)


def _protocol(exchange: LoggedExchange) -> Value:
    return "HTTP/1.1" if exchange.request.http_minor else "HTTP/1.0"


_OTHERS: dict[str, _Get] = {
    "PROTOCOL": _protocol,
    "UPSTREAM_PROTOCOL": lambda exchange: "HTTP/1.1" if exchange.sent_at else None,
    "RESPONSE_CODE": lambda exchange: exchange.status,
    "RESPONSE_CODE_DETAILS": lambda exchange: exchange.details,
    "RESPONSE_FLAGS": lambda exchange: exchange.flags,
    "RESPONSE_FLAGS_LONG": lambda exchange: long_form(exchange.flags),
    "LOCAL_REPLY_BODY": lambda exchange: exchange.reply_body,
    "ROUTE_NAME": lambda exchange: exchange.route_name,
    "FILTER_CHAIN_NAME": lambda exchange: getattr(exchange.dispatcher, "name", None),
    "POLICY_DECISION": lambda exchange: exchange.decision,  # ours: why policy let it in, or did not
    "SOURCE_SERVICE": _near("source"),  # ours: who called, by its certificate
}


def _time(argument: str, surroundings: Surroundings) -> Reader:
    return compile_time(start_clock, argument)


def _time_local(argument: str, surroundings: Surroundings) -> Reader:
    return compile_time(start_clock, argument, local=True)


def _emit_time(argument: str, surroundings: Surroundings) -> Reader:
    return compile_time(end_clock, argument)


def _emit_time_local(argument: str, surroundings: Surroundings) -> Reader:
    return compile_time(end_clock, argument, local=True)


def _between(first: str, last: str) -> _Compile:
    return lambda argument, surroundings: compile_between(first, last)


def _common_duration(argument: str, surroundings: Surroundings) -> Reader:
    parts = argument.split(":")
    if len(parts) not in (2, 3):
        raise ConfigError("needs START:END or START:END:PRECISION")
    return compile_between(*parts)


def _duration(argument: str, surroundings: Surroundings) -> Reader:
    return duration_ms


_COMPILERS: dict[str, _Compile] = {
    **{name: _simple(get) for name, get in {**_SIZES, **_PLACES, **_OTHERS}.items()},
    "START_TIME": _time,
    "START_TIME_LOCAL": _time_local,
    "EMIT_TIME": _emit_time,
    "EMIT_TIME_LOCAL": _emit_time_local,
    "DURATION": _duration,
    "REQUEST_DURATION": _between("DS_RX_BEG", "DS_RX_END"),
    "REQUEST_TX_DURATION": _between("DS_RX_BEG", "US_TX_END"),
    "RESPONSE_DURATION": _between("DS_RX_BEG", "US_RX_BEG"),
    "RESPONSE_TX_DURATION": _between("US_RX_BEG", "DS_TX_END"),
    "COMMON_DURATION": _common_duration,
    "REQ": _request_header,
    "REQUEST_HEADER": _request_header,
    "REQ_WITHOUT_QUERY": _without_query,
    "RESP": _response_header,
    "RESPONSE_HEADER": _response_header,
    "TRAILER": _trailer,
    "RESPONSE_TRAILER": _trailer,
    "PATH": _path,
    "QUERY_PARAM": _query_parameter,
    "QUERY_PARAMS": _query,
    "GRPC_STATUS": _grpc_status,
    "GRPC_STATUS_NUMBER": lambda argument, surroundings: _grpc_status("NUMBER", surroundings),
    "TRACE_ID": lambda argument, surroundings: _trace(1, b"x-b3-traceid"),
    "SPAN_ID": lambda argument, surroundings: _trace(2, b"x-b3-spanid"),
    "STREAM_ID": lambda argument, surroundings: _request_value(b"x-request-id"),
    "ENVIRONMENT": _environment,
    "HOSTNAME": lambda argument, surroundings: _constant(surroundings.hostname),
    "ACCESS_LOG_TYPE": lambda argument, surroundings: _constant("DownstreamEnd"),
    # Nothing of ours sets these; formats written for Envoy name them, and get what Envoy prints when they are unset.
    "CONNECTION_TERMINATION_DETAILS": _nothing,
    "REQUESTED_SERVER_NAME": _nothing,
    "VIRTUAL_CLUSTER_NAME": _nothing,
    "DYNAMIC_METADATA": _nothing,
    "CLUSTER_METADATA": _nothing,
    "UPSTREAM_METADATA": _nothing,
    "METADATA": _nothing,
    "FILTER_STATE": _nothing,
    "UPSTREAM_FILTER_STATE": _nothing,
}  # fmt: skip

_REFUSED = {"CEL": "there is no CEL engine here", "SECRET": "secrets do not belong in a log",
            "FILE_CONTENT": "files are not read for it"}  # fmt: skip


class _Coalesced(msgspec.Struct):
    command: str
    param: str = ""
    max_length: int | None = None


class _Coalesce(msgspec.Struct):
    operators: list[str | _Coalesced]


def compile_operator(name: str, argument: str, length_max: int | None, surroundings: Surroundings) -> Reader:
    """What reads `%name(argument):length_max%`. Raises ConfigError naming the operator."""
    if name in _REFUSED:
        raise ConfigError(f"%{name}%: {_REFUSED[name]}")
    if name == "COALESCE":
        read = _coalesce(argument, surroundings)
    else:
        compiler = _COMPILERS.get(name)
        if compiler is None:
            raise ConfigError(f"there is no operator %{name}%")
        try:
            read = compiler(argument, surroundings)
        except ConfigError as error:
            raise ConfigError(f"%{name}%: {error}") from error
    return read if length_max is None else _truncated(read, length_max)


def _truncated(whole: Reader, length_max: int) -> Reader:
    def read(exchange: LoggedExchange, ended_at: float, offset_s: float, named: Named) -> Value:
        value = whole(exchange, ended_at, offset_s, named)
        return value[:length_max] if isinstance(value, bytes | str) else value

    return read


def _coalesce(argument: str, surroundings: Surroundings) -> Reader:
    """The first of several operators that has a value."""
    try:
        given = msgspec.json.decode(argument, type=_Coalesce).operators
    except msgspec.MsgspecError as error:
        raise ConfigError(f"%COALESCE%: its argument is not an object with operators: {error}") from error
    if not given:
        raise ConfigError("%COALESCE%: it needs at least one operator")
    chain: list[Reader] = []
    for item in given:
        part = _Coalesced(item) if isinstance(item, str) else item
        if part.command == "COALESCE":
            raise ConfigError("%COALESCE%: it cannot hold another one")
        chain.append(compile_operator(part.command, part.param, part.max_length, surroundings))

    def read(exchange: LoggedExchange, ended_at: float, offset_s: float, named: Named) -> Value:
        for one in chain:
            value = one(exchange, ended_at, offset_s, named)
            if value or value == 0:
                return value
        return None

    return read
