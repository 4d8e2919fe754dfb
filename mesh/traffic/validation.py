"""Whether a route table can be served: everything that would fail, or could never do what it says, is refused here.

Every ConfigError names the table, the host, the rule and the field.
"""

import re
from collections.abc import Collection, Iterable

from mesh.errors import ConfigError, InvalidRequest
from mesh.model.match import NamedMatch, PathMatch, RouteMatch, StringMatch
from mesh.model.pattern import Pattern
from mesh.traffic.policy import RateLimit, RetryPolicy, Timeouts
from mesh.traffic.route import (
    Cors,
    DirectResponse,
    Forward,
    HeaderEdits,
    Redirect,
    RegexRewrite,
    RouteTable,
    Rule,
    VirtualHost,
    WeightedTarget,
)

REDIRECT_STATUSES = (301, 302, 303, 307, 308)
BODY_BYTES_MAX = 64 * 1024  # of a direct response; Envoy's limit is 4 KiB
WEIGHTS_MAX = 2**32 - 1  # their sum, Envoy's limit

_TOKEN = re.compile(r"[!#$%&'*+.^_`|~0-9A-Za-z-]+")  # RFC 9110 5.6.2
_VALUE = re.compile(r"[\t\x20-\x7e\x80-\uffff]*")
_DOMAIN = re.compile(r"\*|\*?[A-Za-z0-9_.-]+|[A-Za-z0-9_.-]+\*|\[[0-9A-Fa-f:.]+\]")
_HOST = re.compile(r"(?:[A-Za-z0-9_.-]+|\[[0-9A-Fa-f:.]+\])(?::[0-9]{1,5})?")
_PATH = re.compile(r"[\x21\x22\x24-\x7e]*")  # visible ASCII; `#` begins what no server sees
_SUBSTITUTED = re.compile(r"\\(.?)")
_PROTECTED = frozenset(
    (
        "host", "connection", "keep-alive", "proxy-connection", "proxy-authenticate", "proxy-authorization", "te",
        "trailer", "transfer-encoding", "upgrade", "http2-settings", "content-length", "expect",
        "x-forwarded-client-cert",
    )
)  # fmt: skip


class _Place:
    """Where in a table something is, for messages."""

    __slots__ = ("_text",)

    def __init__(self, text: str) -> None:
        self._text = text

    def inside(self, text: str) -> "_Place":
        return _Place(f"{self._text}, {text}")

    def require(self, holds: object, problem: str) -> None:
        """Raises ConfigError with the place and the problem unless it holds."""
        if not holds:
            raise ConfigError(f"{self._text}: {problem}")


def _check_pattern(text: str, place: _Place) -> Pattern:
    try:
        return Pattern(text)
    except InvalidRequest as error:
        place.require(None, f"{text!r} is no regular expression that RE2 takes: {error}")
        raise


def _check_text(match: StringMatch, place: _Place) -> None:
    if match.kind == "present":
        place.require(not match.value, f"`present` asks for no value, but {match.value!r} is given")
    elif match.kind == "regex":
        _check_pattern(match.value, place)
    else:
        place.require(match.value or match.kind == "exact", f"`{match.kind}` of nothing would always hold")


def _check_named(matches: tuple[NamedMatch, ...], what: str, place: _Place) -> None:
    for one in matches:
        here = place.inside(f"{what} {one.name!r}")
        if what == "headers":
            here.require(_TOKEN.fullmatch(one.name), "it is not the name of a header (use methods, path, authorities)")
        here.require(one.name, "its name is empty")
        _check_text(one.match, here)


def _check_path(path: PathMatch, place: _Place) -> None:
    if path.kind == "regex":
        _check_pattern(path.value, place)
        return
    place.require(path.value.startswith("/"), f"{path.value!r} does not begin with /")
    place.require(_PATH.fullmatch(path.value), f"{path.value!r} has characters that no path has")
    place.require("?" not in path.value, f"{path.value!r} has a query: paths are matched without it")


def _check_match(match: RouteMatch, place: _Place) -> None:
    if match.path is not None:
        _check_path(match.path, place.inside("path"))
    _check_named(match.headers, "headers", place)
    _check_named(match.query, "query", place)
    for method in match.methods:
        place.inside("methods").require(_TOKEN.fullmatch(method), f"{method!r} is no method")
    for authority in match.authorities:
        _check_text(authority, place.inside("authorities"))
    for scheme in match.schemes:
        place.inside("schemes").require(scheme in ("http", "https"), f"{scheme!r} is neither http nor https")
    for port in match.ports:
        place.inside("ports").require(1 <= port <= 65535, f"{port} is outside 1 to 65535")


def _check_edits(edits: HeaderEdits, place: _Place) -> None:
    for field, pairs in (("set", edits.set), ("add", edits.add), ("remove", tuple((one, "") for one in edits.remove))):
        for name, value in pairs:
            here = place.inside(f"{field} {name!r}")
            here.require(not name.startswith(":") and name.lower() not in _PROTECTED, "this header cannot be edited")
            here.require(_TOKEN.fullmatch(name), "it is not the name of a header")
            here.require(_VALUE.fullmatch(value), f"{value!r} has characters that no header can carry")


def _check_percent(percent: float, place: _Place) -> None:
    place.require(0.0 <= percent <= 100.0, f"{percent} is outside 0 to 100")


def _check_status(status: int, place: _Place) -> None:
    place.require(200 <= status <= 599, f"{status} is outside 200 to 599")


def _check_not_negative(seconds: float | None, place: _Place) -> None:
    place.require(seconds is None or 0.0 <= seconds < float("inf"), f"{seconds} is no number of seconds from 0")


def _check_host(host: str, place: _Place) -> None:
    place.require(not host or _HOST.fullmatch(host), f"{host!r} is no host")


def _check_replacement(path: str, place: _Place) -> None:
    place.require(_PATH.fullmatch(path), f"{path!r} has characters that no path has")


def _check_regex_rewrite(rewrite: RegexRewrite, place: _Place) -> None:
    pattern = _check_pattern(rewrite.pattern, place)
    for match in _SUBSTITUTED.finditer(rewrite.substitution):
        known = match[1] == "\\" or (match[1] in "0123456789" and match[1] and int(match[1]) <= pattern.groups)
        place.require(known, f"{match[0]} in the substitution is none of the pattern's {pattern.groups} groups")
    _check_replacement(rewrite.substitution, place)


def _check_weighted(weighted: WeightedTarget, targets: Collection[str], place: _Place) -> None:
    place.require(weighted.target in targets, "it is not a target of this listener")
    place.require(weighted.weight >= 0, f"weight {weighted.weight} is negative")
    _check_host(weighted.host_rewrite, place.inside("host_rewrite"))
    _check_edits(weighted.request_headers, place.inside("request_headers"))
    _check_edits(weighted.response_headers, place.inside("response_headers"))


def _check_forward(forward: Forward, targets: Collection[str], place: _Place) -> None:
    place.require(forward.targets, "it has no targets")
    for weighted in forward.targets:
        _check_weighted(weighted, targets, place.inside(f"target {weighted.target!r}"))
    total = sum(weighted.weight for weighted in forward.targets)
    place.inside("targets").require(0 < total <= WEIGHTS_MAX, f"the weights' sum {total} is outside 1 to {WEIGHTS_MAX}")
    both = forward.prefix_rewrite is not None and forward.regex_rewrite is not None
    place.require(not both, "prefix_rewrite and regex_rewrite exclude each other")
    if forward.prefix_rewrite is not None:
        _check_replacement(forward.prefix_rewrite, place.inside("prefix_rewrite"))
    if forward.regex_rewrite is not None:
        _check_regex_rewrite(forward.regex_rewrite, place.inside("regex_rewrite"))
    _check_host(forward.host_rewrite, place.inside("host_rewrite"))


def _check_redirect(redirect: Redirect, place: _Place) -> None:
    status = place.inside("status")
    status.require(redirect.status in REDIRECT_STATUSES, f"{redirect.status} is none of {REDIRECT_STATUSES}")
    scheme = redirect.scheme
    place.inside("scheme").require(scheme in ("", "http", "https"), f"{scheme!r} is neither http nor https")
    _check_host(redirect.host, place.inside("host"))
    place.inside("port").require(0 <= redirect.port <= 65535, f"{redirect.port} is outside 0 to 65535")
    whole = redirect.path
    place.inside("path").require(not whole or whole.startswith("/"), f"{whole!r} does not begin with /")
    _check_replacement(whole, place.inside("path"))
    place.require(not (whole and redirect.prefix_rewrite is not None), "path and prefix_rewrite exclude each other")
    _check_replacement(redirect.prefix_rewrite or "", place.inside("prefix_rewrite"))
    changes = scheme or redirect.host or redirect.port or whole or redirect.strip_query
    place.require(changes or redirect.prefix_rewrite is not None, "it changes nothing: the client would come back")


def _check_direct(direct: DirectResponse, place: _Place) -> None:
    _check_status(direct.status, place.inside("status"))
    size = len(direct.body.encode())
    place.inside("body").require(size <= BODY_BYTES_MAX, f"{size} bytes are more than {BODY_BYTES_MAX}")
    kind = direct.content_type
    place.inside("content_type").require(_VALUE.fullmatch(kind), f"{kind!r} has characters that no header can carry")


def _check_cors(cors: Cors, place: _Place) -> None:
    for origin in cors.allow_origins:
        _check_text(origin, place.inside("allow_origins"))
    for field, names in (
        ("allow_methods", cors.allow_methods),
        ("allow_headers", cors.allow_headers),
        ("expose_headers", cors.expose_headers),
    ):
        for name in names:
            place.inside(field).require(_TOKEN.fullmatch(name), f"{name!r} is no token")
    age_s = cors.max_age_s
    place.inside("max_age_s").require(age_s is None or age_s >= 0, f"{age_s} is negative")


def _check_retry(retry: RetryPolicy, place: _Place) -> None:
    place.inside("retries").require(retry.retries >= 0, f"{retry.retries} is negative")
    for status in retry.statuses:
        place.inside("statuses").require(100 <= status <= 599, f"{status} is outside 100 to 599")
    _check_named(retry.headers, "headers", place)
    for field, seconds in (
        ("per_try_timeout_s", retry.per_try_timeout_s),
        ("backoff_base_s", retry.backoff_base_s),
        ("backoff_max_s", retry.backoff_max_s),
    ):
        _check_not_negative(seconds, place.inside(field))


def _check_rate_limit(limit: RateLimit, place: _Place) -> None:
    place.inside("tokens_max").require(limit.tokens_max > 0, f"{limit.tokens_max} is not above 0")
    place.inside("tokens_per_fill").require(limit.tokens_per_fill > 0, f"{limit.tokens_per_fill} is not above 0")
    place.inside("fill_interval_s").require(limit.fill_interval_s > 0.0, f"{limit.fill_interval_s} is not above 0")
    _check_status(limit.status, place.inside("status"))
    _check_percent(limit.enforced_percent, place.inside("enforced_percent"))
    _check_edits(HeaderEdits(add=limit.response_headers), place.inside("response_headers"))


def _check_timeouts(timeouts: Timeouts, place: _Place) -> None:
    _check_not_negative(timeouts.request_s, place.inside("request_s"))
    _check_not_negative(timeouts.idle_s, place.inside("idle_s"))


def _check_rule(rule: Rule, targets: Collection[str], place: _Place) -> None:
    for number, match in enumerate(rule.matches):
        _check_match(match, place.inside(f"match {number}"))
    action = place.inside(type(rule.action).__name__)
    match rule.action:
        case Forward() as forward:
            _check_forward(forward, targets, action)
        case Redirect() as redirect:
            _check_redirect(redirect, action)
        case DirectResponse() as direct:
            _check_direct(direct, action)
    _check_timeouts(rule.timeouts, place.inside("timeouts"))
    if rule.retry is not None:
        _check_retry(rule.retry, place.inside("retry"))
    for mirror in rule.mirrors:
        here = place.inside(f"mirror {mirror.target!r}")
        here.require(mirror.target in targets, "it is not a target of this listener")
        _check_percent(mirror.percent, here.inside("percent"))
    if rule.delay is not None:
        _check_not_negative(rule.delay.delay_s, place.inside("delay"))
        _check_percent(rule.delay.percent, place.inside("delay, percent"))
    if rule.abort is not None:
        _check_status(rule.abort.status, place.inside("abort"))
        _check_percent(rule.abort.percent, place.inside("abort, percent"))
    if rule.cors is not None:
        _check_cors(rule.cors, place.inside("cors"))
    if rule.rate_limit is not None:
        _check_rate_limit(rule.rate_limit, place.inside("rate_limit"))
    _check_levels(rule, place)


def _check_levels(level: Rule | VirtualHost | RouteTable, place: _Place) -> None:
    _check_edits(level.request_headers, place.inside("request_headers"))
    _check_edits(level.response_headers, place.inside("response_headers"))


def _check_domains(domains: Iterable[str], taken: set[str], place: _Place) -> None:
    for domain in domains:
        lower = domain.lower()
        place.require(_DOMAIN.fullmatch(domain), f"{domain!r} is neither a host, `*.suffix`, `prefix.*` nor `*`")
        place.require(lower not in taken, f"{domain!r} appears twice in this table")
        taken.add(lower)


def check_routes(table: RouteTable, targets: Collection[str]) -> None:
    """Raises ConfigError for the first thing in the table that cannot be served; `targets` are the listener's names.

    Operators in header values are the proxy's affair: compiling the table refuses those that it does not know.
    """
    whole = _Place(f"route table {table.name!r}")
    _check_levels(table, whole)
    taken: set[str] = set()
    for number, host in enumerate(table.hosts):
        place = whole.inside(f"host {host.name or number!r}")
        place.require(host.domains, "it has no domains")
        _check_domains(host.domains, taken, place.inside("domains"))
        _check_levels(host, place)
        for position, rule in enumerate(host.rules):
            _check_rule(rule, targets, place.inside(f"rule {rule.name or position!r}"))
