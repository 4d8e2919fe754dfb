"""What a worker says about what it holds: values for `mesh proxy-config`, and routes in words. Never a private key."""

from collections.abc import Iterable

import msgspec

from mesh.model.match import NamedMatch, PathMatch, RouteMatch, StringMatch
from mesh.traffic.route import DirectResponse, Forward, Redirect, RouteTable, Rule

ENDPOINTS_DESCRIBED_MAX = 20_000  # in one answer; the counts of targets are of all


class ListenerDescription(msgspec.Struct, frozen=True, rename="pascal"):
    """One listener, and what it has seen."""

    proxy_id: str
    service: str
    direction: str
    address: str
    port: int
    protocol: str
    target: str
    hosts: int
    rules: int
    mtls: str
    intentions: int
    default_allow: bool
    connections_max: int
    connections: int  # open now
    requests: int  # since the worker began to serve it; of a tcp listener its connections
    denied: int
    access_log: str


class RouteDescription(msgspec.Struct, frozen=True, rename="pascal"):
    """One rule of one listener, in the order in which they are tried."""

    proxy_id: str
    listener: str
    host: str
    domains: tuple[str, ...]
    rule: str
    matches: tuple[str, ...]
    action: str
    extras: tuple[str, ...]


class TargetDescription(msgspec.Struct, frozen=True, rename="pascal"):
    """One target of one listener."""

    proxy_id: str
    listener: str
    target: str
    spiffe_ids: tuple[str, ...]
    balancer: str
    endpoints: int
    usable: int
    ejected: int
    requests: int  # under way
    pending: int
    retries: int
    connections: int
    requests_max: int
    pending_max: int
    connections_max: int
    policies: tuple[str, ...]


class EndpointDescription(msgspec.Struct, frozen=True, rename="pascal"):
    """One endpoint. `state`: `healthy`, or why it gets no requests: `unhealthy`, `ejected`, `probation`, `shut`."""

    proxy_id: str
    listener: str
    target: str
    endpoint: str
    address: str
    state: str
    weight: int
    priority: int
    locality: str
    active: int
    connections: int
    idle: int
    waiting: int
    ejections: int = 0
    ejection: str = ""  # what for, the last time
    ejected_s: float = 0.0  # for how long by now


class CertificateDescription(msgspec.Struct, frozen=True, rename="pascal"):
    """One certificate of a sidecar's chain (`leaf`, `intermediate`) or of what it trusts (`root`). Unix times."""

    proxy_id: str
    service: str
    kind: str
    subject: str
    spiffe_id: str
    serial_number: str
    valid_after_s: float
    valid_before_s: float
    sha256: str


class Refusal(msgspec.Struct, frozen=True, rename="pascal"):
    """The last configuration that was refused. `at_s` is Unix time."""

    version: int
    reason: str
    at_s: float


class Description(msgspec.Struct, frozen=True, rename="pascal"):
    """One worker. `version` is that of the configuration in force, -1 before the first."""

    pid: int
    version: int
    refused: Refusal | None = None
    listeners: tuple[ListenerDescription, ...] = ()
    routes: tuple[RouteDescription, ...] = ()
    targets: tuple[TargetDescription, ...] = ()
    endpoints: tuple[EndpointDescription, ...] = ()
    certificates: tuple[CertificateDescription, ...] = ()


# -- routes in words


def described_routes(table: RouteTable, *, proxy_id: str, listener: str, target: str) -> Iterable[RouteDescription]:
    """The rules of a listener; without any, the one that it has by default."""
    if not table.hosts:
        yield RouteDescription(proxy_id, listener, "", ("*",), "", (), f"to {target}", ())
    for host in table.hosts:
        for number, rule in enumerate(host.rules, 1):
            yield RouteDescription(
                proxy_id, listener, host.name, host.domains, rule.name or f"#{number}",
                tuple(_match(match) for match in rule.matches), _action(rule), tuple(_extras(rule)),
            )  # fmt: skip


def _text(match: StringMatch) -> str:
    sign = {"exact": "=", "prefix": "^=", "suffix": "$=", "contains": "*=", "regex": "~"}
    said = "present" if match.kind == "present" else f"{sign[match.kind]} {match.value}"
    return f"{'not ' if match.invert else ''}{said}{' (any case)' if match.ignore_case else ''}"


def _path(match: PathMatch) -> str:
    return f"path {match.kind} {match.value}{' (any case)' if match.ignore_case else ''}"


def _named(kind: str, matches: Iterable[NamedMatch]) -> Iterable[str]:
    return (f"{kind} {match.name} {_text(match.match)}" for match in matches)


def _match(match: RouteMatch) -> str:
    parts = [_path(match.path)] if match.path is not None else []
    if match.methods:
        parts.append(f"method {','.join(match.methods)}")
    parts.extend(_named("header", match.headers))
    parts.extend(_named("query", match.query))
    parts.extend(f"authority {_text(authority)}" for authority in match.authorities)
    for name, values in (
        ("scheme", match.schemes),
        ("port", tuple(map(str, match.ports))),
        ("source", match.sources),
        ("source metadata", tuple(f"{key}={value}" for key, value in match.source_metadata)),
    ):
        if values:
            parts.append(f"{name} {','.join(values)}")
    return ", ".join(parts) or "every request"


def _action(rule: Rule) -> str:
    match rule.action:
        case Forward(targets=targets, prefix_rewrite=prefix, regex_rewrite=regex, host_rewrite=host):
            whole = sum(target.weight for target in targets)
            shares = [
                target.target if len(targets) == 1 else f"{target.target} {target.weight}/{whole}" for target in targets
            ]
            said = f"to {', '.join(shares)}"
            if prefix is not None:
                said += f", prefix becomes {prefix or '(empty)'}"
            if regex is not None:
                said += f", {regex.pattern} becomes {regex.substitution}"
            return f"{said}, host becomes {host}" if host else said
        case Redirect(status=status, scheme=scheme, host=host, path=path, prefix_rewrite=prefix):
            where = " ".join(part for part in (scheme, host, path, prefix or "") if part)
            return f"redirect {status} {where}".rstrip()
        case DirectResponse(status=status):
            return f"answer {status}"


def _extras(rule: Rule) -> Iterable[str]:
    """What else happens to its requests."""
    if rule.timeouts.request_s is not None:
        yield f"timeout {rule.timeouts.request_s:g}s"
    if rule.timeouts.idle_s is not None:
        yield f"idle timeout {rule.timeouts.idle_s:g}s"
    if rule.retry is not None:
        yield f"retries {rule.retry.retries} on {','.join(rule.retry.conditions)}"
    for mirror in rule.mirrors:
        yield f"mirror {mirror.percent:g}% to {mirror.target}"
    if rule.delay is not None:
        yield f"delay {rule.delay.delay_s:g}s for {rule.delay.percent:g}%"
    if rule.abort is not None:
        yield f"abort {rule.abort.status} for {rule.abort.percent:g}%"
    if rule.cors is not None:
        yield "cors"
    if rule.rate_limit is not None:
        yield f"rate limit {rule.rate_limit.tokens_per_fill} per {rule.rate_limit.fill_interval_s:g}s"
    for name, edits in (("request", rule.request_headers), ("response", rule.response_headers)):
        count = len(edits.set) + len(edits.add) + len(edits.remove)
        if count:
            yield f"{count} {name} header edits"
