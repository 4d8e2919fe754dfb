"""The conditions of a rule on one listener: what the listener decides is decided here, the rest becomes a function."""

from collections.abc import Callable
from dataclasses import dataclass
from urllib.parse import unquote_to_bytes

import msgspec

from mesh.http.head import RequestHead
from mesh.model.match import NamedMatch, RouteMatch
from mesh.model.matching import compile_headers, compile_string

Check = Callable[[RequestHead, str], bool]  # of a request and its caller's service name


@dataclass(frozen=True)
class Listener:
    """What is the same for all requests of a listener. `source` None: it differs; metadata None: not known."""

    source: str | None
    source_metadata: tuple[tuple[str, str], ...] | None
    port: int
    scheme: str


def decide(match: RouteMatch, listener: Listener) -> RouteMatch | None:
    """The conditions that are left for each request; None when no request of this listener can fulfil them all."""
    if match.schemes and listener.scheme not in match.schemes:
        return None
    if match.ports and listener.port not in match.ports:
        return None
    if match.source_metadata and not set(match.source_metadata) <= set(listener.source_metadata or ()):
        return None
    sources = match.sources
    if sources and listener.source is not None:
        if listener.source not in sources:
            return None
        sources = ()
    return msgspec.structs.replace(match, schemes=(), ports=(), source_metadata=(), sources=sources)


def host_name(authority: bytes) -> bytes:
    """An authority without its port, in lower case."""
    host, colon, port = authority.rpartition(b":")
    return (host if colon and not port.endswith(b"]") else authority).lower()


def query_value(query: bytes | None, name: bytes) -> bytes | None:
    """A parameter's first value, percent-decoded (`+` stays); empty when it has no `=`; None when there is none."""
    if query is None:
        return None
    for part in query.split(b"&"):
        key, _, value = part.partition(b"=")
        if key == name or (b"%" in key and unquote_to_bytes(key) == name):
            return unquote_to_bytes(value) if b"%" in value else value
    return None


def _compile_parameter(match: NamedMatch) -> Check:
    name = match.name.encode()
    check = compile_string(match.match)
    return lambda head, _: check(query_value(head.query, name))


def _compile_method(methods: tuple[str, ...]) -> Check:
    if len(methods) == 1:
        only = methods[0].encode()
        return lambda head, _: head.method == only
    several = frozenset(method.encode() for method in methods)
    return lambda head, _: head.method in several


def _compile_authority(match: RouteMatch) -> Check:
    checks = tuple(map(compile_string, match.authorities))

    def check_authority(head: RequestHead, _source: str) -> bool:
        host = host_name(head.authority)
        return any(check(host) for check in checks)

    return check_authority


def _compile_headers(matches: tuple[NamedMatch, ...]) -> Check:
    check = compile_headers(matches)
    return lambda head, _: check(head.headers)


def compile_conditions(match: RouteMatch, path_check: Check | None = None) -> Check | None:
    """One function for all conditions but the path's, which is `path_check` unless an index has decided it.

    None when there are none. Raises ConfigError for a bad regular expression.
    """
    checks: list[Check] = []
    if match.methods:
        checks.append(_compile_method(match.methods))
    if match.sources:
        sources = frozenset(match.sources)
        checks.append(lambda _, source: source in sources)
    if path_check is not None:
        checks.append(path_check)
    if match.headers:
        checks.append(_compile_headers(match.headers))
    if match.authorities:
        checks.append(_compile_authority(match))
    checks.extend(map(_compile_parameter, match.query))
    if len(checks) <= 1:
        return checks[0] if checks else None
    if len(checks) == 2:
        first, second = checks
        return lambda head, source: first(head, source) and second(head, source)
    return lambda head, source: all(check(head, source) for check in checks)
