"""One L7 permission of an intention: which requests, and whether they may come in.

Permissions are stored as they were written (a JSON object with Consul's field names); `permission_of` is the one
reading of that shape, used to judge a write and to make what a sidecar enforces. What is allowed follows Consul's
service-intentions entry: HTTP is required and says something, at most one kind of path, exactly one kind per header.
"""

from collections.abc import Mapping
from typing import Literal

import msgspec

from mesh.errors import Refused
from mesh.model.match import NamedMatch, PathKind, PathMatch, StringKind, StringMatch

METHODS = frozenset(("GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "CONNECT", "OPTIONS", "TRACE"))

_PATH_KINDS: tuple[tuple[str, PathKind], ...] = (
    ("PathExact", "exact"),
    ("PathPrefix", "prefix"),
    ("PathRegex", "regex"),
)
_HEADER_KINDS: tuple[tuple[str, StringKind], ...] = (
    ("Exact", "exact"),
    ("Prefix", "prefix"),
    ("Suffix", "suffix"),
    ("Contains", "contains"),
    ("Regex", "regex"),
)
_PERMISSION_FIELDS = frozenset(("Action", "HTTP"))
_HTTP_FIELDS = frozenset(("PathExact", "PathPrefix", "PathRegex", "Header", "Methods"))
_HEADER_FIELDS = frozenset(
    ("Name", "Present", "Exact", "Prefix", "Suffix", "Contains", "Regex", "Invert", "IgnoreCase")
)

_PSEUDO_HEADERS = (":authority", ":method", ":path")
# Consumed by each hop before policy sees a request: a rule about one would never hold.
_UNSEEN_HEADERS = frozenset(
    ("connection", "keep-alive", "proxy-connection", "proxy-authenticate", "proxy-authorization", "te", "trailer",
     "http2-settings")
)  # fmt: skip


class Permission(msgspec.Struct, frozen=True):
    """All that is given must hold of a request; the first permission that holds decides. Methods are in upper case."""

    action: Literal["allow", "deny"]
    path: PathMatch | None = None
    methods: tuple[str, ...] = ()
    headers: tuple[NamedMatch, ...] = ()


def permission_of(stored: Mapping[str, object], where: str) -> Permission:
    """The permission that a stored object means. Raises Refused, its text beginning with `where`, when it means none.

    A header name may be a pseudo-header of Envoy's (`:authority`, `:method`, `:path`).
    """
    if stored.get("JWT"):
        raise Refused(f"{where}JWT is not supported")
    _require_known(stored, _PERMISSION_FIELDS, where)
    action = stored.get("Action")
    if action not in ("allow", "deny"):
        raise Refused(f"{where}Action must be set to 'allow' or 'deny'")
    http = stored.get("HTTP")
    if http is None:
        raise Refused(f"{where}HTTP is required")
    if not isinstance(http, dict):
        raise Refused(f"{where}HTTP must be an object")
    where = f"{where}HTTP"
    _require_known(http, _HTTP_FIELDS, f"{where}.")
    path = _path_of(http, where)
    headers = tuple(_header_of(item, f"{where}.Header[{at}]") for at, item in _items(http, "Header", where))
    methods = _methods_of(http, where)
    if path is None and not headers and not methods:
        raise Refused(f"{where} should not be empty")
    return Permission(action, path, methods, headers)


def _require_known(given: Mapping[str, object], known: frozenset[str], where: str) -> None:
    """A condition that is not understood must not be left out: the rule would hold for more than it says."""
    unknown = sorted(str(name) for name in given if name not in known and given[name])
    if unknown:
        raise Refused(f"{where}{unknown[0]} is not supported")


def _items(http: Mapping[str, object], field: str, where: str) -> list[tuple[int, object]]:
    given = http.get(field)
    if given is None:
        return []
    if not isinstance(given, list | tuple):
        raise Refused(f"{where}.{field} must be a list")
    return list(enumerate(given))


def _path_of(http: Mapping[str, object], where: str) -> PathMatch | None:
    found: list[PathMatch] = []
    for field, kind in _PATH_KINDS:
        value = http.get(field)
        if value in (None, ""):
            continue
        if not isinstance(value, str):
            raise Refused(f"{where}.{field} must be a string")
        if kind != "regex" and not value.startswith("/"):
            raise Refused(f"{where}.{field} doesn't start with '/': \"{value}\"")
        found.append(PathMatch(kind, value))
    if len(found) > 1:
        raise Refused(f"{where} should only contain at most one of PathExact, PathPrefix, or PathRegex")
    return found[0] if found else None


def _header_of(item: object, where: str) -> NamedMatch:
    if not isinstance(item, dict):
        raise Refused(f"{where} must be an object")
    _require_known(item, _HEADER_FIELDS, f"{where}.")
    name = item.get("Name")
    if not isinstance(name, str) or not name:
        raise Refused(f"{where} missing required Name field")
    if name.lower() in _UNSEEN_HEADERS or (name.startswith(":") and name.lower() not in _PSEUDO_HEADERS):
        raise Refused(f"{where}.Name {name[:64]!r} cannot be decided on: each hop consumes it")
    flags: dict[str, bool] = {}
    for field in ("Present", "Invert", "IgnoreCase"):
        flag = item.get(field, False)
        if not isinstance(flag, bool):
            raise Refused(f"{where}.{field} must be true or false")
        flags[field] = flag
    found: list[tuple[StringKind, str]] = [("present", "")] if flags["Present"] else []
    for field, kind in _HEADER_KINDS:
        value = item.get(field)
        if value in (None, ""):
            continue
        if not isinstance(value, str):
            raise Refused(f"{where}.{field} must be a string")
        found.append((kind, value))
    if len(found) != 1:
        raise Refused(f"{where} should only contain one of Present, Exact, Prefix, Suffix, Contains, or Regex")
    ((kind, value),) = found
    if flags["IgnoreCase"] and kind in ("present", "regex"):
        raise Refused(f"{where} should set one of Exact, Prefix, Suffix, or Contains when using IgnoreCase")
    return NamedMatch(name.lower(), StringMatch(kind, value, ignore_case=flags["IgnoreCase"], invert=flags["Invert"]))


def _methods_of(http: Mapping[str, object], where: str) -> tuple[str, ...]:
    methods: list[str] = []
    for _, item in _items(http, "Methods", where):
        method = item.upper() if isinstance(item, str) else ""
        if method not in METHODS:
            raise Refused(f"{where}.Methods contains an invalid method {str(item)[:64]!r}")
        if method in methods:
            raise Refused(f'{where}.Methods contains "{method}" more than once')
        methods.append(method)
    return tuple(methods)
