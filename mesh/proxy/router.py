"""From a request's head to the route that decides what is done with it; all is compiled when it is configured."""

import random
from bisect import bisect_right
from collections.abc import Callable
from functools import lru_cache
from itertools import accumulate

import msgspec

from mesh.errors import ConfigError
from mesh.http.head import Headers, RequestHead
from mesh.model.match import PathMatch, RouteMatch
from mesh.proxy.conditions import Listener, decide, host_name
from mesh.proxy.cors import CorsRules
from mesh.proxy.header_edits import EditContext, Edits, compile_edits
from mesh.proxy.retry import RetryRules, compile_retry
from mesh.proxy.rewrite import (
    PathRewrite,
    compile_prefix_rewrite,
    compile_redirect,
    compile_regex_rewrite,
    with_query,
)
from mesh.proxy.route_index import RouteIndex
from mesh.traffic.route import (
    DirectResponse,
    Forward,
    Mirror,
    Redirect,
    RouteTable,
    Rule,
    VirtualHost,
    WeightedTarget,
)

ROUTERS_KEPT = 512  # compiled tables kept for the next configuration
HOSTS_REMEMBERED_MAX = 1024  # authorities whose virtual host is remembered, per router

_ORIGINAL_PATH = b"x-envoy-original-path"


class Answer(msgspec.Struct, frozen=True):
    """What a route answers by itself. `details` is Envoy's word for the access log."""

    status: int
    body: bytes
    headers: Headers
    details: str


class RouteTarget:
    """A weighted target with its edits prepared. `edits` False: its requests go on as they came."""

    __slots__ = ("host_rewrite", "name", "request_edits", "response_edits", "weighted")

    def __init__(self, weighted: WeightedTarget, host_rewrite: str, outer: tuple["_Level", ...]) -> None:
        self.weighted = weighted
        self.name = weighted.target
        self.host_rewrite = (weighted.host_rewrite or host_rewrite).encode()
        requests = (weighted.request_headers, *(level.request_headers for level in outer))
        responses = (weighted.response_headers, *(level.response_headers for level in outer))
        self.request_edits: Edits | None = compile_edits(*requests, response=False)
        self.response_edits: Edits | None = compile_edits(*responses, response=True)


_Level = Rule | VirtualHost | RouteTable


class Route:
    """One rule, compiled; immutable. `plain`: it forwards to its one target and there is nothing else to do.

    `targets` is empty exactly when `answer` gives the response. `request_s` and `idle_s` None: the target's.
    `response_edits` are for answers; a forwarded request's are its target's. `reads_context`: some edits hold
    operators, so that an EditContext is needed.
    """

    __slots__ = (
        "_answer", "_bounds", "abort", "cors", "delay", "direct", "host_name", "idle_s", "mirrors", "name",
        "path_rewrite", "plain", "rate_limit", "reads_context", "request_s", "response_edits", "retry", "rule",
        "targets",
    )  # fmt: skip

    def __init__(self, rule: Rule, match: RouteMatch, outer: tuple[VirtualHost | RouteTable, ...], scheme: str) -> None:
        self.rule = rule
        self.name = rule.name
        self.host_name = next((level.name for level in outer if isinstance(level, VirtualHost)), "")
        self.request_s = rule.timeouts.request_s
        self.idle_s = rule.timeouts.idle_s
        self.retry: RetryRules | None = None if rule.retry is None else compile_retry(rule.retry)
        self.mirrors: tuple[Mirror, ...] = rule.mirrors
        self.delay = rule.delay
        self.abort = rule.abort
        self.cors = None if rule.cors is None else CorsRules(rule.cors)
        self.rate_limit = rule.rate_limit
        self.direct: Answer | None = None
        self.targets = tuple[RouteTarget, ...]()  # annotated so: an empty literal would stay empty to a type checker
        self.path_rewrite: PathRewrite | None = None
        self._answer: Callable[[RequestHead], Answer] | None = None
        levels = (rule, *outer)
        self.response_edits = compile_edits(*(level.response_headers for level in levels), response=True)
        match rule.action:
            case Forward() as forward:
                self._forwards(forward, match.path, levels)
            case Redirect() as redirect:
                self._redirects(redirect, compile_redirect(redirect, match.path, scheme))
            case DirectResponse() as direct:
                headers = ((b"content-type", direct.content_type.encode()),) if direct.body else ()
                answer = Answer(direct.status, direct.body.encode(), headers, "direct_response")
                self.direct = answer
                self._answer = lambda _: answer
        edits: list[Edits | None] = [self.response_edits]
        for forwarded in self.targets:
            edits += (forwarded.request_edits, forwarded.response_edits)
        self.reads_context = any(one.reads_context for one in edits if one is not None)
        self.plain = (
            len(self.targets) == 1
            and all(one is None for one in edits)
            and not self.targets[0].host_rewrite
            and self.path_rewrite is None
            and not (rule.mirrors or rule.delay or rule.abort or rule.cors or rule.rate_limit)
        )

    def _forwards(self, forward: Forward, path: PathMatch | None, levels: tuple[_Level, ...]) -> None:
        used = [weighted for weighted in forward.targets if weighted.weight > 0]
        if not used:
            raise ConfigError("it forwards to no target with a weight")
        self.targets = tuple(RouteTarget(weighted, forward.host_rewrite, levels) for weighted in used)
        self._bounds = tuple(accumulate(weighted.weight for weighted in used))
        if forward.prefix_rewrite is not None:
            self.path_rewrite = compile_prefix_rewrite(path, forward.prefix_rewrite)
        elif forward.regex_rewrite is not None:
            self.path_rewrite = compile_regex_rewrite(forward.regex_rewrite)

    def _redirects(self, redirect: Redirect, location: Callable[[RequestHead], bytes]) -> None:
        status = redirect.status
        self._answer = lambda head: Answer(status, b"", ((b"location", location(head)),), "direct_response")

    def choose(self, rng: random.Random) -> RouteTarget:
        """One of the targets, each by its share of the weights. Only for a route that forwards."""
        targets = self.targets
        if len(targets) == 1:
            return targets[0]
        bounds = self._bounds
        return targets[bisect_right(bounds, int(rng.random() * bounds[-1]))]

    def answer(self, head: RequestHead) -> Answer | None:
        """The response when the route gives it by itself (redirect, direct response), before `response_edits`."""
        return None if self._answer is None else self._answer(head)


def rewritten(route: Route, target: RouteTarget, head: RequestHead, context: EditContext | None = None) -> RequestHead:
    """The head as it goes to the target: headers edited, then path and host rewritten (Envoy's order).

    The same object when nothing is to be done. `context` is needed when `route.reads_context`.
    """
    edits = target.request_edits
    rewrite = route.path_rewrite
    host = target.host_rewrite
    if edits is None and rewrite is None and not host:
        return head
    headers = head.headers if edits is None else edits.apply(head.headers, context)
    path, query = head.path, head.query
    if rewrite is not None:
        path, query = with_query(rewrite(path), query)
        if path != head.path or query != head.query:
            kept = [header for header in headers if header[0] != _ORIGINAL_PATH]
            headers = (*kept, (_ORIGINAL_PATH, head.target))
    return msgspec.structs.replace(head, path=path, query=query, authority=host or head.authority, headers=headers)


class _Domains:
    """Virtual hosts by authority: exact, then the longest `*suffix`, then the longest `prefix*`, then `*`."""

    __slots__ = ("_any", "_exact", "_prefixes", "_remembered", "_suffixes", "only")

    def __init__(self) -> None:
        self._exact: dict[bytes, RouteIndex[Route]] = {}
        self._suffixes: list[tuple[bytes, RouteIndex[Route]]] = []
        self._prefixes: list[tuple[bytes, RouteIndex[Route]]] = []
        self._any: RouteIndex[Route] | None = None
        self._remembered: dict[bytes, RouteIndex[Route] | None] = {}
        self.only: RouteIndex[Route] | None = None  # every request's

    def add(self, domain: str, index: RouteIndex[Route]) -> None:
        """Raises ConfigError for a domain that is taken or is no domain."""
        text = domain.lower().encode()
        known = {*self._exact, *(b"*" + one for one, _ in self._suffixes), *(one + b"*" for one, _ in self._prefixes)}
        if text in known or (text == b"*" and self._any is not None):
            raise ConfigError(f"domain {domain!r} appears twice")
        if text == b"*":
            self._any = index
        elif text.startswith(b"*"):
            self._suffixes.append((text[1:], index))
        elif text.endswith(b"*"):
            self._prefixes.append((text[:-1], index))
        else:
            self._exact[text] = index

    def complete(self) -> None:
        """To be called after the last `add`."""
        for domains in (self._suffixes, self._prefixes):
            domains.sort(key=lambda domain: (-len(domain[0]), domain[0]))
        if not (self._exact or self._suffixes or self._prefixes):
            self.only = self._any

    def _find(self, host: bytes) -> RouteIndex[Route] | None:
        found = self._exact.get(host)
        if found is not None:
            return found
        for suffix, index in self._suffixes:
            if host.endswith(suffix) and len(host) > len(suffix):
                return index
        for prefix, index in self._prefixes:
            if host.startswith(prefix) and len(host) > len(prefix):
                return index
        return self._any

    def find(self, authority: bytes) -> RouteIndex[Route] | None:
        """The virtual host's rules, or None."""
        try:
            return self._remembered[authority]
        except KeyError:
            found = self._find(host_name(authority))
            if len(self._remembered) >= HOSTS_REMEMBERED_MAX:
                self._remembered.clear()
            self._remembered[authority] = found
            return found


class Router:
    """A listener's compiled table. `constant` is the route of every request when there is no other, else None."""

    __slots__ = ("_domains", "_only", "constant", "name", "routes")

    def __init__(
        self,
        table: RouteTable,
        *,
        default_target: str,
        source: str | None,
        source_metadata: tuple[tuple[str, str], ...] | None,
        port: int,
        scheme: str,
    ) -> None:
        """`source` is the caller's service when all callers are one, else None; `source_metadata` None: not known.

        Raises ConfigError, naming table, host and rule.
        """
        self.name = table.name
        self.constant: Route | None = None
        self.routes: tuple[Route, ...] = ()  # of all rules, in order
        self._domains = _Domains()
        listener = Listener(source, source_metadata, port, scheme)
        if not table.hosts:
            rule = Rule(Forward((WeightedTarget(default_target),)))
            self.constant = Route(rule, RouteMatch(), (table,), scheme)
            self.routes = (self.constant,)
        for host in table.hosts:
            index = self._index(table, host, listener)
            for domain in host.domains:
                try:
                    self._domains.add(domain, index)
                except ConfigError as error:
                    raise ConfigError(f"route table {table.name!r}, host {host.name!r}: {error}") from error
        self._domains.complete()
        self._only = self._domains.only
        if self._only is not None:
            self.constant = self._only.always

    def _index(self, table: RouteTable, host: VirtualHost, listener: Listener) -> RouteIndex[Route]:
        where = f"route table {table.name!r}, host {host.name or host.domains[0]!r}"
        pairs: list[tuple[RouteMatch, Route]] = []
        for position, rule in enumerate(host.rules):
            try:
                pairs.extend(self._pairs(rule, (host, table), listener))
            except ConfigError as error:
                raise ConfigError(f"{where}, rule {rule.name or position}: {error}") from error
        try:
            return RouteIndex(pairs)
        except ConfigError as error:
            raise ConfigError(f"{where}: {error}") from error

    def _pairs(
        self, rule: Rule, outer: tuple[VirtualHost, RouteTable], listener: Listener
    ) -> list[tuple[RouteMatch, Route]]:
        """The rule's matches that can hold, each with its route: one for all, unless it rewrites what was matched."""
        by_path = not isinstance(rule.action, DirectResponse) and rule.action.prefix_rewrite is not None
        pairs: list[tuple[RouteMatch, Route]] = []
        shared: Route | None = None
        for match in rule.matches or (RouteMatch(),):
            if shared is None or by_path:
                shared = Route(rule, match, outer, listener.scheme)
                self.routes += (shared,)
            left = decide(match, listener)
            if left is not None:
                pairs.append((left, shared))
        return pairs

    def route(self, head: RequestHead, source: str) -> Route | None:
        """The first route whose conditions hold, or None: 404 with flag NR. `source` is the caller's service."""
        if self.constant is not None:
            return self.constant
        rules = self._only
        if rules is None:
            rules = self._domains.find(head.authority)
            if rules is None:
                return None
        return rules.first(head, source)


@lru_cache(maxsize=ROUTERS_KEPT)
def compile_routes(
    table: RouteTable, default_target: str, source: str | None, metadata: tuple[tuple[str, str], ...] | None, port: int
) -> Router:
    """The router of a listener, the same object for the same table: a change of endpoints compiles no routes.

    Arguments and errors as Router's.
    """
    return Router(
        table, default_target=default_target, source=source, source_metadata=metadata, port=port, scheme="http"
    )
