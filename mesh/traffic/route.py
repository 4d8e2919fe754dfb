"""The neutral route model: ordered rules from a request to what is done with it. Resources compile to it.

A table has virtual hosts, a host has rules. The host is chosen by authority (exact, then longest `*.suffix`, then
longest `prefix.*`, then `*`), within it the first rule whose match holds decides; none: 404 with flag NR. Header edits
apply from the most specific level outwards: weighted target, rule, host, table.
"""

import msgspec

from mesh.model.match import RouteMatch, StringMatch
from mesh.traffic.policy import RateLimit, RetryPolicy, Timeouts


class HeaderEdits(msgspec.Struct, frozen=True):
    """`remove` first, then `set` (replaces), then `add`. Names in lower case; framing, Host and `:`-names are refused.

    Values may hold access log operators (`%DOWNSTREAM_PEER_URI_SAN%`); a literal percent sign is `%%`.
    """

    set: tuple[tuple[str, str], ...] = ()
    add: tuple[tuple[str, str], ...] = ()
    remove: tuple[str, ...] = ()


class RegexRewrite(msgspec.Struct, frozen=True):
    """Every match of `pattern` (RE2) is replaced; `\\1` to `\\9` in the substitution are its groups."""

    pattern: str
    substitution: str


class WeightedTarget(msgspec.Struct, frozen=True):
    """One destination of a rule: `target` names a target of the listener; its share is weight over the sum."""

    target: str
    weight: int = 1
    host_rewrite: str = ""
    request_headers: HeaderEdits = HeaderEdits()
    response_headers: HeaderEdits = HeaderEdits()


class Forward(msgspec.Struct, frozen=True, tag=True):
    """To a target, chosen by weight. `prefix_rewrite` replaces the matched prefix or segment prefix (an exact match:
    the whole path); None leaves it. The query is kept by both rewrites.
    """

    targets: tuple[WeightedTarget, ...]
    prefix_rewrite: str | None = None
    regex_rewrite: RegexRewrite | None = None
    host_rewrite: str = ""


class Redirect(msgspec.Struct, frozen=True, tag=True):
    """Answered with a Location; what is empty stays as the request had it. `port` 0 keeps the port."""

    status: int = 301
    scheme: str = ""
    host: str = ""
    port: int = 0
    path: str = ""
    prefix_rewrite: str | None = None
    strip_query: bool = False


class DirectResponse(msgspec.Struct, frozen=True, tag=True):
    """Answered here."""

    status: int
    body: str = ""
    content_type: str = "text/plain"


Action = Forward | Redirect | DirectResponse


class Mirror(msgspec.Struct, frozen=True):
    """A copy of the request to another target; its answer is dropped. Its Host gets `-shadow` appended, as Envoy's."""

    target: str
    percent: float = 100.0


class Delay(msgspec.Struct, frozen=True):
    """Waits before the request goes on (flag DI)."""

    delay_s: float
    percent: float = 100.0


class Abort(msgspec.Struct, frozen=True):
    """Answers instead of the target (flag FI, body `fault filter abort`)."""

    status: int
    percent: float = 100.0


class Cors(msgspec.Struct, frozen=True):
    """Cross-origin rules: preflights are answered here, other answers get the headers. `max_age_s` None: not said."""

    allow_origins: tuple[StringMatch, ...]
    allow_methods: tuple[str, ...] = ()
    allow_headers: tuple[str, ...] = ()
    expose_headers: tuple[str, ...] = ()
    max_age_s: int | None = None
    allow_credentials: bool = False


class Rule(msgspec.Struct, frozen=True):
    """Any of `matches` (none given: every request) leads to the action. `retry` None: the target's policy."""

    action: Action
    name: str = ""
    matches: tuple[RouteMatch, ...] = ()
    timeouts: Timeouts = Timeouts()
    retry: RetryPolicy | None = None
    mirrors: tuple[Mirror, ...] = ()
    delay: Delay | None = None
    abort: Abort | None = None
    cors: Cors | None = None
    rate_limit: RateLimit | None = None
    request_headers: HeaderEdits = HeaderEdits()
    response_headers: HeaderEdits = HeaderEdits()


class VirtualHost(msgspec.Struct, frozen=True):
    """Rules for some authorities (without port): `a.b`, `*.b`, `a.*` or `*`."""

    rules: tuple[Rule, ...]
    name: str = ""
    domains: tuple[str, ...] = ("*",)
    request_headers: HeaderEdits = HeaderEdits()
    response_headers: HeaderEdits = HeaderEdits()


class RouteTable(msgspec.Struct, frozen=True):
    """All of a listener's routes. Without hosts every request goes to the listener's own target."""

    hosts: tuple[VirtualHost, ...] = ()
    name: str = ""
    request_headers: HeaderEdits = HeaderEdits()
    response_headers: HeaderEdits = HeaderEdits()
