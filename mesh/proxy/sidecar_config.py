"""The one immutable value between control and data: everything a data plane needs, and nothing else.

An agent renders a `WorkerConfig` from its catalog, intentions and leaves, and hands it to the worker (msgpack, see
`agent/dataplane/control.py`). The worker swaps its tables in one step. A second data plane would be a second renderer
of the same value. Times are float seconds; names are as in the catalog.
"""

import random
from collections.abc import Iterable
from typing import Literal

import msgspec

from mesh.authz.rules import SourceRule as SourceRule
from mesh.errors import ConfigError
from mesh.http.path import PathPolicy
from mesh.model.permission import Permission as Permission
from mesh.proxy.balancing import check_policy
from mesh.proxy.client_cert import ClientCertField, ForwardClientCert
from mesh.proxy.hashing import compile_hash
from mesh.proxy.retry import compile_retry
from mesh.proxy.router import compile_routes
from mesh.proxy.trace_context import TraceForm
from mesh.traffic.policy import (
    LoadBalancing,
    OutlierDetection,
    PoolPolicy,
    Probation,
    RateLimit,
    RetryBudget,
    RetryPolicy,
)
from mesh.traffic.route import RouteTable
from mesh.traffic.validation import check_routes

SidecarProtocol = Literal["tcp", "http"]

CONNECT_TIMEOUT_S = 5.0  # Envoy's and Consul's default, TLS handshake included
REQUEST_TIMEOUT_S = 15.0  # Envoy's route timeout: from the end of the request to the end of the response; 0 = none
IDLE_TIMEOUT_S = 300.0  # no byte either way on an active exchange, Envoy's stream idle timeout
CONNECTIONS_MAX = 1024  # Envoy's circuit breaker defaults
PENDING_REQUESTS_MAX = 1024
REQUESTS_MAX = 1024
RETRIES_MAX = 3
LOCAL_APPLICATION = "local_app"  # the one target of an inbound listener, by Consul's name
SECONDS_MAX = 366 * 86400.0  # of any duration: what is longer was meant as something else
COUNT_MAX = 2**32
KEEPALIVE_MAX_S = 32767.0  # Linux's
PRIORITY_MAX = 128  # Envoy's
RETRY_BUFFER_BYTES_MAX = 16 * 1024 * 1024
SIDECARS_MAX = 4096
ENDPOINTS_MAX = 65536


class EndpointConfig(msgspec.Struct, frozen=True):
    """One address of a target. `id` is unique within the target and stable across updates (node/service id).

    `healthy` False: its checks fail; it is used only in panic. `locality` is `region/zone/subzone` or a prefix of it.
    `metadata` is what subsets select by. Endpoints of priority N are used when those of N-1 are not healthy enough.
    """

    id: str
    address: str
    port: int
    weight: int = 1
    healthy: bool = True
    priority: int = 0
    locality: str = ""
    metadata: tuple[tuple[str, str], ...] = ()


class LimitsConfig(msgspec.Struct, frozen=True):
    """Circuit breakers, counted per target as in Envoy; an endpoint may always have one connection."""

    connections_max: int = CONNECTIONS_MAX
    pending_requests_max: int = PENDING_REQUESTS_MAX
    requests_max: int = REQUESTS_MAX
    retries_max: int = RETRIES_MAX


class TargetConfig(msgspec.Struct, frozen=True):
    """Where requests can go. `endpoints` are addressed at their sidecars; `name` is unique within a listener.

    A server is accepted only when its SPIFFE ID is one of `expected_spiffe_ids`. `subset`: only endpoints whose
    metadata has all of these are used. `plain`: no mTLS (a destination outside the mesh, or a callee in migration).
    `outlier` and `probation` None: off. `retry` is for routes that say nothing about it; None: only what is always
    safe (mesh/proxy/retry.py).
    """

    name: str
    expected_spiffe_ids: tuple[str, ...]
    endpoints: tuple[EndpointConfig, ...] = ()
    service: str = ""  # the service's name, when it is not the target's
    datacenter: str = ""
    sni: str = ""
    connect_timeout_s: float = CONNECT_TIMEOUT_S
    request_timeout_s: float = REQUEST_TIMEOUT_S
    limits: LimitsConfig = LimitsConfig()
    load_balancing: LoadBalancing = LoadBalancing()
    subset: tuple[tuple[str, str], ...] = ()
    outlier: OutlierDetection | None = None
    probation: Probation | None = None
    retry: RetryPolicy | None = None
    retry_budget: RetryBudget | None = None
    pool: PoolPolicy = PoolPolicy()
    plain: bool = False


MtlsMode = Literal["strict", "permissive"]


class InboundListener(msgspec.Struct, frozen=True):
    """The public, mTLS side of a sidecar: who may come in, and the local application behind it.

    `intentions` are the rules whose destination is this service, highest precedence first: the first whose source is
    the caller's service or `*` decides; without one `default_allow` does. `audit` evaluates without enforcing.
    `permissive`: plain connections are taken too, from nobody in particular, and only rules for `*` can allow them.
    """

    bind_address: str
    bind_port: int
    local_address: str
    local_port: int
    protocol: SidecarProtocol = "tcp"
    intentions: tuple[SourceRule, ...] = ()
    default_allow: bool = False
    audit: bool = False
    mtls: MtlsMode = "strict"
    forward_client_cert: ForwardClientCert = "sanitize"
    client_cert_fields: tuple[ClientCertField, ...] = ("uri",)  # beside By and Hash
    path_policy: PathPolicy = PathPolicy()  # what is authorised, and forwarded
    routes: RouteTable = RouteTable()  # their targets: `local_app` only
    rate_limit: RateLimit | None = None
    connect_timeout_s: float = CONNECT_TIMEOUT_S
    request_timeout_s: float = 0.0  # the caller's sidecar bounds it
    connections_max: int = 8192


class OutboundListener(msgspec.Struct, frozen=True):
    """A plain listener on the application's side: what connects here reaches `target`, or what `routes` (HTTP) say.

    Routes name `target` or one of `targets`.
    """

    bind_address: str
    bind_port: int
    target: TargetConfig
    protocol: SidecarProtocol = "tcp"
    connections_max: int = 8192
    routes: RouteTable = RouteTable()
    targets: tuple[TargetConfig, ...] = ()
    rate_limit: RateLimit | None = None


class AccessLogConfig(msgspec.Struct, frozen=True):
    """Where access log lines go: a path, `/dev/stdout`, `otlp`, or empty for none. Without a format: Envoy's default.

    `text_format` holds operators such as `%REQ(:METHOD)%`; `json_format` a JSON object of such texts (see docs).
    """

    path: str = ""
    text_format: str = ""
    json_format: str = ""


class SidecarConfig(msgspec.Struct, frozen=True):
    """One service instance's proxy. PEM texts; the private key never leaves memory and the control socket."""

    proxy_id: str
    service: str
    datacenter: str
    trust_domain: str
    spiffe_id: str
    certificate_chain_pem: str
    private_key_pem: str
    trust_roots_pem: tuple[str, ...]
    inbound: InboundListener | None = None
    outbound: tuple[OutboundListener, ...] = ()
    access_log: AccessLogConfig = AccessLogConfig()
    service_metadata: tuple[tuple[str, str], ...] = ()  # what routes match as source metadata
    locality: str = ""  # of this sidecar: `region/zone/subzone` or a prefix of it

    def __repr__(self) -> str:
        """Without the key, as `WorkerConfig`."""
        return f"SidecarConfig(proxy_id={self.proxy_id!r}, inbound={self.inbound}, outbound={self.outbound})"


class WorkerConfig(msgspec.Struct, frozen=True):
    """Everything one worker serves. `version` grows with each change; the worker answers it in its ACK or NACK."""

    version: int
    sidecars: tuple[SidecarConfig, ...] = ()
    tracing_endpoint: str = ""  # OTLP/HTTP base URL; empty: the worker's OTEL_EXPORTER_OTLP_ENDPOINT, if it has one
    trace_sampling: float = 1.0  # share of requests without a traceparent that start a sampled trace, when exporting
    trace_form: TraceForm = "w3c"  # of the headers of traces that begin here; others are passed on in their own

    def __repr__(self) -> str:
        """Without keys: this value ends up in logs and assertion messages."""
        return f"WorkerConfig(version={self.version}, sidecars={[sidecar.proxy_id for sidecar in self.sidecars]})"


def _check_address(where: str, address: str, port: int) -> None:
    if not address or any(character.isspace() for character in address):
        raise ConfigError(f"{where}: {address!r} is not an address")
    if not 1 <= port <= 65535:
        raise ConfigError(f"{where}: port {port} is outside 1 to 65535")


def _check_unique(where: str, names: Iterable[object]) -> None:
    seen = set()
    for name in names:
        if name in seen:
            raise ConfigError(f"{where}: {name} appears twice")
        seen.add(name)


def _check_numbers(where: str, numbers: Iterable[tuple[str, float, float, float]]) -> None:
    """(name, value, least, most) each; a value that is no number is outside of anything."""
    for name, value, least, most in numbers:
        if not least <= value <= most:
            raise ConfigError(f"{where}: {name} {value:g} is outside {least:g} to {most:g}")


def _check_rate_limit(where: str, policy: RateLimit | None) -> None:
    if policy is not None:
        _check_numbers(
            f"{where}, rate limit",
            (
                ("tokens_max", policy.tokens_max, 1, COUNT_MAX),
                ("tokens_per_fill", policy.tokens_per_fill, 1, COUNT_MAX),
                ("fill_interval_s", policy.fill_interval_s, 0.001, SECONDS_MAX),
                ("status", policy.status, 400, 599),
                ("enforced_percent", policy.enforced_percent, 0, 100),
            ),
        )


def _check_retry(where: str, policy: RetryPolicy | None) -> None:
    if policy is None:
        return
    _check_numbers(
        f"{where}, retries",
        (
            ("retries", policy.retries, 0, COUNT_MAX),
            ("per_try_timeout_s", policy.per_try_timeout_s, 0, SECONDS_MAX),
            ("backoff_base_s", policy.backoff_base_s, 0, SECONDS_MAX),
            ("backoff_max_s", policy.backoff_max_s, 0, SECONDS_MAX),
            ("buffer_bytes_max", policy.buffer_bytes_max, 0, RETRY_BUFFER_BYTES_MAX),
        ),
    )
    compile_retry(policy)


def _check_health(where: str, target: TargetConfig) -> None:
    outlier, probation, budget = target.outlier, target.probation, target.retry_budget
    if outlier is not None:
        names = [name for name in outlier.__struct_fields__ if name.startswith("enforcing_")]
        _check_numbers(
            f"{where}, outlier detection",
            (
                ("interval_s", outlier.interval_s, 0.001, SECONDS_MAX),
                ("base_ejection_time_s", outlier.base_ejection_time_s, 0, SECONDS_MAX),
                ("max_ejection_time_s", outlier.max_ejection_time_s, 0, SECONDS_MAX),
                ("max_ejection_percent", outlier.max_ejection_percent, 0, 100),
                *((name, getattr(outlier, name), 0, 100) for name in names),
            ),
        )
    if probation is not None:
        _check_numbers(
            f"{where}, probation",
            (
                ("failures", probation.failures, 0, COUNT_MAX),
                ("penalty_min_s", probation.penalty_min_s, 0.001, SECONDS_MAX),
                ("penalty_max_s", probation.penalty_max_s, probation.penalty_min_s, SECONDS_MAX),
                ("success_rate_min", probation.success_rate_min, 0, 1),
            ),
        )
    if budget is not None:
        _check_numbers(
            f"{where}, retry budget",
            (
                ("percent", budget.percent, 0, 100),
                ("min_concurrency", budget.min_concurrency, 0, COUNT_MAX),
                ("ratio", budget.ratio, 0, 1000),
                ("min_retries_per_s", budget.min_retries_per_s, 0, COUNT_MAX),
                ("ttl_s", budget.ttl_s, 1, 60),
            ),
        )


def _check_target(where: str, target: TargetConfig) -> None:
    if not target.expected_spiffe_ids and not target.plain:
        raise ConfigError(f"{where}: no SPIFFE ID is expected, so no server could be accepted")
    limits, pool = target.limits, target.pool
    _check_numbers(
        where,
        (
            ("the number of endpoints", len(target.endpoints), 0, ENDPOINTS_MAX),
            ("connect_timeout_s", target.connect_timeout_s, 0.001, SECONDS_MAX),
            ("request_timeout_s", target.request_timeout_s, 0, SECONDS_MAX),
            ("connections_max", limits.connections_max, 0, COUNT_MAX),
            ("pending_requests_max", limits.pending_requests_max, 0, COUNT_MAX),
            ("requests_max", limits.requests_max, 0, COUNT_MAX),
            ("retries_max", limits.retries_max, 0, COUNT_MAX),
            ("pool requests_max", pool.requests_max, 0, COUNT_MAX),
            ("pool age_max_s", pool.age_max_s, 0, SECONDS_MAX),
            ("pool idle_timeout_s", pool.idle_timeout_s, 0, SECONDS_MAX),
            ("pool keepalive_s", pool.keepalive_s, 0, KEEPALIVE_MAX_S),
        ),
    )
    _check_retry(where, target.retry)
    _check_health(where, target)
    try:
        check_policy(target.load_balancing)
        if target.load_balancing.hash_policies:
            compile_hash(target.load_balancing.hash_policies, random.Random(0))
    except ConfigError as error:
        raise ConfigError(f"{where}: {error}") from error
    _check_unique(f"{where}, endpoint id", (endpoint.id for endpoint in target.endpoints))
    for endpoint in target.endpoints:
        _check_address(f"{where}, endpoint {endpoint.id}", endpoint.address, endpoint.port)
        _check_numbers(
            f"{where}, endpoint {endpoint.id}",
            (("weight", endpoint.weight, 1, COUNT_MAX), ("priority", endpoint.priority, 0, PRIORITY_MAX)),
        )


def _check_routes(
    where: str, table: RouteTable, targets: frozenset[str], default: str, sidecar: SidecarConfig | None, port: int
) -> None:
    """`sidecar` is the caller's, None on the callee's side."""
    try:
        check_routes(table, targets)
        if sidecar is None:
            compile_routes(table, default, None, None, port)
        else:
            compile_routes(table, default, sidecar.service, sidecar.service_metadata, port)
    except ConfigError as error:
        raise ConfigError(f"{where}: {error}") from error


def _check_sidecar(sidecar: SidecarConfig) -> None:
    where = f"sidecar {sidecar.proxy_id}"
    if not sidecar.certificate_chain_pem or not sidecar.private_key_pem or not sidecar.trust_roots_pem:
        raise ConfigError(f"{where}: it has no certificate, key or trust roots")
    inbound = sidecar.inbound
    if inbound is not None:
        _check_address(f"{where}, inbound", inbound.bind_address, inbound.bind_port)
        _check_address(f"{where}, local application", inbound.local_address, inbound.local_port)
        _check_rate_limit(f"{where}, inbound", inbound.rate_limit)
        local = frozenset((LOCAL_APPLICATION,))
        _check_routes(f"{where}, inbound", inbound.routes, local, LOCAL_APPLICATION, None, inbound.bind_port)
    for listener in sidecar.outbound:
        outbound = f"{where}, outbound to {listener.target.name}"
        _check_address(outbound, listener.bind_address, listener.bind_port)
        _check_rate_limit(outbound, listener.rate_limit)
        targets = (listener.target, *listener.targets)
        _check_unique(f"{outbound}, target", (target.name for target in targets))
        for target in targets:
            _check_target(f"{where}, target {target.name}", target)
        names = frozenset(target.name for target in targets)
        _check_routes(outbound, listener.routes, names, listener.target.name, sidecar, listener.bind_port)


def check(config: WorkerConfig) -> None:
    """Raises ConfigError, naming the sidecar and field, when a worker could not serve this configuration."""
    if len(config.sidecars) > SIDECARS_MAX:
        raise ConfigError(f"{len(config.sidecars)} sidecars are more than one worker's {SIDECARS_MAX}")
    if not 0.0 <= config.trace_sampling <= 1.0:
        raise ConfigError(f"trace_sampling {config.trace_sampling} is outside 0 to 1")
    _check_unique("sidecars, proxy id", (sidecar.proxy_id for sidecar in config.sidecars))
    binds: list[tuple[str, int]] = []
    for sidecar in config.sidecars:
        _check_sidecar(sidecar)
        if sidecar.inbound is not None:
            binds.append((sidecar.inbound.bind_address, sidecar.inbound.bind_port))
        binds.extend((listener.bind_address, listener.bind_port) for listener in sidecar.outbound)
    _check_unique("listeners, address and port", binds)
