"""Consul's service-router, service-splitter and service-resolver entries -> routes and targets: the discovery chain.

A chain starts at the service's router if it has one, else its splitter, else its resolver; the route's destination goes
on from there with its own splitter and resolver. Redirects are followed, nested splitters flattened (weights
multiplied), failover becomes priorities of one target. What makes no sense raises ConfigError with what to mend.
"""

from collections.abc import Mapping

import msgspec

from mesh.errors import ConfigError
from mesh.model.config_entry import ConfigEntry
from mesh.model.match import NamedMatch, PathMatch, RouteMatch, StringKind, StringMatch
from mesh.traffic.fields import Table
from mesh.traffic.neutral import SERVICE_TRAFFIC, ServiceTraffic, TargetPolicy, service_traffic, target_names
from mesh.traffic.policy import LoadBalancing, RetryCondition, RetryPolicy, Timeouts
from mesh.traffic.resolver import load_balancing
from mesh.traffic.route import Forward, HeaderEdits, RouteTable, Rule, VirtualHost, WeightedTarget
from mesh.traffic.validation import check_routes

Entries = Mapping[tuple[str, str], ConfigEntry]  # by kind and name

CHAIN_KINDS = (
    "proxy-defaults", "service-defaults", "service-router", "service-splitter", "service-resolver", SERVICE_TRAFFIC,
)  # fmt: skip
REDIRECTS_MAX = 32  # and nested splitters: what is longer is a loop, or should be
_WEIGHT_UNITS = 100  # Consul's weights have two decimals

_PATH_KINDS: tuple[tuple[str, str], ...] = (("PathExact", "exact"), ("PathPrefix", "prefix"), ("PathRegex", "regex"))
_TEXT_KINDS: tuple[tuple[str, StringKind], ...] = (
    ("Exact", "exact"),
    ("Prefix", "prefix"),
    ("Suffix", "suffix"),
    ("Contains", "contains"),
    ("Regex", "regex"),
)
_CONDITIONS: tuple[RetryCondition, ...] = (
    "5xx", "gateway-error", "reset", "connect-failure", "envoy-ratelimited", "retriable-4xx", "refused-stream",
    "cancelled", "deadline-exceeded", "internal", "resource-exhausted", "unavailable",
)  # fmt: skip


class Instances(msgspec.Struct, frozen=True):
    """Some instances of a service: those a filter expression selects (empty: all)."""

    service: str
    filter: str = ""
    only_passing: bool = True


class ChainTarget(msgspec.Struct, frozen=True):
    """Where a chain can end. `instances`: the first are used while enough of them are healthy, then the next, and on.

    Timeouts are in seconds, 0: not said.
    """

    name: str  # `service` or `subset.service`
    instances: tuple[Instances, ...]
    connect_timeout_s: float = 0.0
    request_timeout_s: float = 0.0
    load_balancing: LoadBalancing | None = None


class Chain(msgspec.Struct, frozen=True):
    """All that the entries say about one service. `routes` is empty when everything goes to `target`."""

    service: str
    protocol: str
    target: ChainTarget
    targets: tuple[ChainTarget, ...] = ()  # further ones
    routes: RouteTable = RouteTable()
    policies: dict[str, TargetPolicy] = {}  # by target


def protocol_of(service: str, entries: Entries) -> str:
    """The service's protocol: its service-defaults', else proxy-defaults', else tcp."""
    defaults = entries.get(("service-defaults", service))
    own = _body(defaults).text("Protocol") if defaults is not None else ""
    globally = entries.get(("proxy-defaults", "global"))
    return own or (_body(globally).table("Config").text("protocol") if globally is not None else "") or "tcp"


def compile_chain(service: str, entries: Entries) -> Chain:
    """The chain of one service. Raises ConfigError, naming the entry and field."""
    return _Compiler(service, entries).compile()


def _body(entry: ConfigEntry) -> Table:
    return Table(entry.body, f"{entry.kind} {entry.name}")


class _Split(msgspec.Struct, frozen=True):
    """A share of a route, in 1/100 of a percent of its whole, before rounding."""

    share: float
    target: str
    request_headers: HeaderEdits = HeaderEdits()
    response_headers: HeaderEdits = HeaderEdits()


class _Compiler:
    def __init__(self, service: str, entries: Entries) -> None:
        self._service = service
        self._entries = entries
        self._protocol = protocol_of(service, entries)
        self._targets: dict[str, ChainTarget] = {}

    def compile(self) -> Chain:
        neutral = ServiceTraffic()
        entry = self._entries.get((SERVICE_TRAFFIC, self._service))
        if entry is not None:
            neutral = service_traffic(entry)
        if not neutral.routes.hosts:
            return msgspec.structs.replace(self._compiled(), policies=neutral.targets)
        first = self._targets[self._resolve(self._service, "")]
        for name in target_names(neutral.routes):
            subset, _dot, service = name.rpartition(".")
            self._targets[name] = msgspec.structs.replace(self._targets[self._resolve(service, subset)], name=name)
        check_routes(neutral.routes, self._targets.keys())
        others = tuple(target for name, target in sorted(self._targets.items()) if name != first.name)
        return Chain(self._service, self._protocol, first, others, neutral.routes, neutral.targets)

    def _compiled(self) -> Chain:
        """What Consul's own entries say."""
        router = self._layer7("service-router", self._service)
        whole = self._splits(self._service, (), 1.0, ())
        forward = _forward(whole)
        first = self._targets[whole[0].target]
        rules: list[Rule] = []
        if router is not None:
            for number, route in enumerate(_body(router).tables("Routes")):
                rules.append(self._rule(route, number))
        if rules or len(whole) > 1 or whole[0] != _Split(1.0, first.name):
            rules.append(Rule(forward, name=self._service))
        others = tuple(target for name, target in sorted(self._targets.items()) if name != first.name)
        routes = RouteTable((VirtualHost(tuple(rules), name=self._service),), name=self._service)
        return Chain(self._service, self._protocol, first, others, routes if rules else RouteTable())

    def _layer7(self, kind: str, service: str) -> ConfigEntry | None:
        entry = self._entries.get((kind, service))
        if entry is not None and self._protocol == "tcp":
            raise ConfigError(f"{kind} {service} needs protocol http, http2 or grpc; {service} has {self._protocol}")
        return entry

    # -- routes

    def _rule(self, route: Table, number: int) -> Rule:
        match = _route_match(route.table("Match").table("HTTP"))
        destination = route.table("Destination")
        service = destination.text("Service") or self._service
        subset = destination.text("ServiceSubset")
        splits = [_Split(1.0, self._resolve(service, subset))] if subset else self._splits(service, (), 1.0, ())
        request_timeout_s = destination.duration_s("RequestTimeout")
        return Rule(
            _forward(splits, prefix_rewrite=destination.text("PrefixRewrite") or None),
            name=f"{self._service}-{number}",
            matches=(match,) if match is not None else (),
            timeouts=Timeouts(request_timeout_s or None, destination.duration_s("IdleTimeout") or None),
            retry=_retry(destination),
            request_headers=_header_edits(destination.table("RequestHeaders")),
            response_headers=_header_edits(destination.table("ResponseHeaders")),
        )

    # -- splitters

    def _splits(
        self, service: str, above: tuple[str, ...], share: float, edits: tuple[tuple[HeaderEdits, HeaderEdits], ...]
    ) -> list[_Split]:
        """What a service's traffic is shared among; `edits` are those of the splitters above, outermost first."""
        if service in above:
            raise ConfigError(f"service-splitter {service} leads back to itself: {' -> '.join((*above, service))}")
        if len(above) > REDIRECTS_MAX:
            raise ConfigError(f"service-splitter {above[0]} is nested deeper than {REDIRECTS_MAX}")
        splitter = self._layer7("service-splitter", service)
        if splitter is None:
            return [_Split(share, self._resolve(service, ""), *_merged(edits))]
        result: list[_Split] = []
        splits = _body(splitter).tables("Splits")
        total = sum(split.number("Weight") for split in splits)
        if not splits or abs(total - 100.0) > 0.005:
            raise ConfigError(f"service-splitter {service}: the weights add up to {total:g}, not to 100")
        for split in splits:
            weight = split.number("Weight")
            if weight <= 0.0:
                continue
            here = (
                *edits,
                (_header_edits(split.table("RequestHeaders")), _header_edits(split.table("ResponseHeaders"))),
            )
            to, subset = split.text("Service") or service, split.text("ServiceSubset")
            part = share * weight / 100.0
            if subset or to == service:
                result.append(_Split(part, self._resolve(to, subset), *_merged(here)))
            else:
                result.extend(self._splits(to, (*above, service), part, here))
        return result

    # -- resolvers

    def _resolver(self, service: str) -> Table:
        entry = self._entries.get(("service-resolver", service))
        return _body(entry) if entry is not None else Table(None, f"service-resolver {service}")

    def _followed(self, service: str, subset: str) -> tuple[str, str]:
        """The service and subset after redirects and the default subset."""
        seen = [service]
        while True:
            resolver = self._resolver(service)
            redirect = resolver.table("Redirect")
            for unsupported in ("Datacenter", "Peer", "SamenessGroup"):
                if unsupported in redirect and redirect.text(unsupported):
                    raise ConfigError(f"{redirect.where}.{unsupported}: there is only this datacenter")
            if "Redirect" not in resolver:
                return service, subset or resolver.text("DefaultSubset")
            service, subset = redirect.text("Service") or service, redirect.text("ServiceSubset")
            if service == seen[-1]:
                return service, subset
            if service in seen or len(seen) > REDIRECTS_MAX:
                raise ConfigError(f"service-resolver {seen[0]} redirects in a circle: {' -> '.join((*seen, service))}")
            seen.append(service)

    def _instances(self, service: str, subset: str) -> Instances:
        if not subset:
            return Instances(service)
        subsets = self._resolver(service).named_tables("Subsets")
        if subset not in subsets:
            raise ConfigError(f"service-resolver {service} has no subset {subset}, which its chain needs")
        return Instances(service, subsets[subset].text("Filter"), subsets[subset].flag("OnlyPassing"))

    def _resolve(self, service: str, subset: str) -> str:
        """The name of the target that a service and subset lead to, added to the chain's targets."""
        service, subset = self._followed(service, subset)
        name = f"{subset}.{service}" if subset else service
        if name in self._targets:
            return name
        own = protocol_of(service, self._entries)
        if own != self._protocol:
            raise ConfigError(
                f"{self._service} has protocol {self._protocol} and {service}, which it leads to, has {own}: "
                "all members of a chain must agree; set Protocol in their service-defaults"
            )
        resolver = self._resolver(service)
        self._targets[name] = ChainTarget(
            name,
            (self._instances(service, subset), *self._failover(resolver, service, subset)),
            connect_timeout_s=resolver.duration_s("ConnectTimeout"),
            request_timeout_s=resolver.duration_s("RequestTimeout"),
            load_balancing=load_balancing(resolver),
        )
        return name

    def _failover(self, resolver: Table, service: str, subset: str) -> tuple[Instances, ...]:
        policies = resolver.named_tables("Failover")
        policy = policies.get(subset) if subset else None
        policy = policy or policies.get("*")
        if policy is None:
            return ()
        steps = policy.tables("Targets") or (policy,)
        result: list[Instances] = []
        for step in steps:
            if step.text("Datacenter") or step.texts("Datacenters") or step.text("Peer"):
                continue  # they name datacenters that cannot be reached; what can be is still of use
            to = step.text("Service") or service
            to_subset = step.text("ServiceSubset") or (subset if to == service else "")
            to, to_subset = self._followed(to, to_subset)
            if (to, to_subset) == (service, subset):
                continue
            instances = self._instances(to, to_subset)
            if instances not in result:
                result.append(instances)
        return tuple(result)


def _forward(splits: list[_Split], *, prefix_rewrite: str | None = None) -> Forward:
    """Shares become whole weights; one that rounds to nothing still gets the smallest."""
    return Forward(
        tuple(
            WeightedTarget(
                split.target,
                max(1, round(split.share * 100 * _WEIGHT_UNITS)),
                request_headers=split.request_headers,
                response_headers=split.response_headers,
            )
            for split in splits
        ),
        prefix_rewrite=prefix_rewrite,
    )


def _merged(edits: tuple[tuple[HeaderEdits, HeaderEdits], ...]) -> tuple[HeaderEdits, HeaderEdits]:
    """Edits of nested splitters as one: the inner one's `set` wins over the outer one's."""
    return _merge([pair[0] for pair in edits]), _merge([pair[1] for pair in edits])


def _merge(edits: list[HeaderEdits]) -> HeaderEdits:
    values: dict[str, str] = {}
    for edit in edits:
        values.update(edit.set)
    return HeaderEdits(
        set=tuple(values.items()),
        add=tuple(pair for edit in edits for pair in edit.add),
        remove=tuple(dict.fromkeys(name for edit in edits for name in edit.remove)),
    )


def _header_edits(table: Table) -> HeaderEdits:
    return HeaderEdits(
        set=tuple((name.lower(), value) for name, value in table.text_map("Set")),
        add=tuple((name.lower(), value) for name, value in table.text_map("Add")),
        remove=tuple(name.lower() for name in table.texts("Remove")),
    )


def _retry(destination: Table) -> RetryPolicy | None:
    """Consul's: any of the fields switches retries on, and their number is 1 unless it is given."""
    conditions: list[RetryCondition] = []
    for text in destination.texts("RetryOn"):
        known = next((condition for condition in _CONDITIONS if condition == text), None)
        if known is None:
            raise ConfigError(f"{destination.where}.RetryOn: {text!r} is not a retry condition")
        conditions.append(known)
    if destination.flag("RetryOnConnectFailure"):
        conditions.append("connect-failure")
    statuses = destination.integers("RetryOnStatusCodes")
    if statuses:
        conditions.append("retriable-status-codes")
    retries = destination.integer("NumRetries")
    if not conditions and not retries:
        return None
    return RetryPolicy(tuple(dict.fromkeys(conditions)), retries=retries or 1, statuses=statuses)


# -- matches


def path_match(table: Table) -> PathMatch | None:
    """The one path condition of a match; None when there is none."""
    given = [(kind, table.text(field)) for field, kind in _PATH_KINDS if table.text(field)]
    if len(given) > 1:
        raise ConfigError(f"{table.where} has more than one of PathExact, PathPrefix and PathRegex")
    ignore_case = table.flag("CaseInsensitive")
    for kind, value in given:
        match kind:
            case "exact":
                return PathMatch("exact", value, ignore_case)
            case "prefix":
                return PathMatch("prefix", value, ignore_case)
            case _:
                return PathMatch("regex", value, ignore_case)
    return None


def text_match(table: Table) -> StringMatch:
    """The one condition of a header or query match."""
    given: list[StringMatch] = []
    invert, ignore_case = table.flag("Invert"), table.flag("IgnoreCase")
    for field, kind in _TEXT_KINDS:
        if table.text(field):
            given.append(StringMatch(kind, table.text(field), ignore_case=ignore_case, invert=invert))
    if table.flag("Present"):
        given.append(StringMatch("present", invert=invert))
    if len(given) != 1:
        raise ConfigError(f"{table.where} needs exactly one of Exact, Prefix, Suffix, Contains, Regex and Present")
    return given[0]


def header_matches(table: Table) -> tuple[NamedMatch, ...]:
    """The conditions of a `Header` list."""
    return tuple(NamedMatch(header.text("Name").lower(), text_match(header)) for header in table.tables("Header"))


def _route_match(http: Table) -> RouteMatch | None:
    match = RouteMatch(
        path=path_match(http),
        headers=header_matches(http),
        query=tuple(NamedMatch(query.text("Name"), text_match(query)) for query in http.tables("QueryParam")),
        methods=tuple(method.upper() for method in http.texts("Methods")),
    )
    return None if match == RouteMatch() else match
