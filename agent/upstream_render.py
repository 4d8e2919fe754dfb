"""From what is known about one upstream to its listener: the chain's routes, its targets, their endpoints."""

import ipaddress
from collections.abc import Mapping
from dataclasses import dataclass, field

from agent.json_fields import integer, milliseconds, table, text
from mesh.errors import ConfigError, InvalidRequest
from mesh.model.catalog import Service, Upstream
from mesh.model.check import ServiceHealth
from mesh.model.config_entry import ConfigEntry
from mesh.names import service_spiffe_id
from mesh.proxy.sidecar_config import (
    CONNECT_TIMEOUT_S,
    REQUEST_TIMEOUT_S,
    EndpointConfig,
    LimitsConfig,
    OutboundListener,
    SidecarProtocol,
    TargetConfig,
)
from mesh.state.filter import Filter
from mesh.traffic.consul import Chain, ChainTarget, Instances
from mesh.traffic.fields import Table
from mesh.traffic.neutral import TargetPolicy
from mesh.traffic.policy import LoadBalancing, OutlierDetection
from mesh.traffic.resolver import passive_health_check
from mesh.traffic.route import RouteTable

LOOPBACK = "127.0.0.1"

# Consul switches Envoy's panic mode off: with no healthy instance there is no healthy upstream.
_BALANCING = LoadBalancing(panic_threshold=0.0)


@dataclass(frozen=True)
class UpstreamFacts:
    """What the cluster says about one upstream. `chain` None: its entries make no sense, so it stays as it was.

    `instances`: by service, of every service of the chain, those able to speak mTLS.
    """

    chain: Chain | None
    instances: Mapping[str, tuple[ServiceHealth, ...]] = field(default_factory=dict)


@dataclass(frozen=True)
class Surroundings:
    """Where the sidecar is, and who asks."""

    datacenter: str
    trust_domain: str
    service_defaults: ConfigEntry | None  # the caller's


def outbound_listener(
    upstream: Upstream, known: UpstreamFacts, here: Surroundings, warnings: list[str]
) -> OutboundListener | None:
    """The listener of one upstream, or None, with a warning, when there cannot be one."""
    name = upstream.destination_name
    if upstream.destination_type != "service":
        warnings.append(f"upstream {name}: prepared queries are not supported")
        return None
    if upstream.datacenter not in ("", here.datacenter):
        warnings.append(f"upstream {name}: datacenter {upstream.datacenter} cannot be reached, there is only this one")
        return None
    if not upstream.local_bind_port:
        warnings.append(f"upstream {name}: only local_bind_port is supported, not a socket path")
        return None
    bind_address = ip_address(upstream.local_bind_address or LOOPBACK)
    if bind_address is None:
        warnings.append(f"upstream {name}: local_bind_address must be an IP address")
        return None
    chain = known.chain
    if chain is None:
        return None
    declared = _upstream_settings(here.service_defaults, name)
    protocol = supported(
        text(upstream.config, "protocol") or text(declared, "Protocol") or chain.protocol, name, warnings
    )
    routed = protocol == "http"
    if chain.routes.hosts and not routed:
        warnings.append(f"upstream {name}: its routes need protocol http, so all of it goes to {chain.target.name}")
    settings = _Settings(upstream, declared, known, chain, here, warnings)
    return OutboundListener(
        bind_address=bind_address,
        bind_port=upstream.local_bind_port,
        target=settings.target(chain.target),
        protocol=protocol,
        routes=chain.routes if routed else RouteTable(),
        targets=tuple(settings.target(target) for target in chain.targets) if routed else (),
    )


class _Settings:
    """What applies to every target of one upstream."""

    def __init__(
        self,
        upstream: Upstream,
        declared: Mapping[str, object],
        known: UpstreamFacts,
        chain: Chain,
        here: Surroundings,
        warnings: list[str],
    ) -> None:
        self._name = upstream.destination_name
        self._known = known
        self._chain = chain
        self._here = here
        self._warnings = warnings
        self._connect_timeout_s = milliseconds(upstream.config, "connect_timeout_ms") or milliseconds(
            declared, "ConnectTimeoutMs"
        )
        self._limits = _limits(table(upstream.config, "limits"), table(declared, "Limits"))
        self._outlier = self._passive(upstream.config.get("passive_health_check"), "passive_health_check") or (
            self._passive(declared.get("PassiveHealthCheck"), "PassiveHealthCheck")
        )

    def _passive(self, given: object, where: str) -> OutlierDetection | None:
        try:
            return passive_health_check(Table(given, where))
        except ConfigError as error:
            self._warnings.append(f"upstream {self._name}: {error}")
            return None

    def target(self, target: ChainTarget) -> TargetConfig:
        here, policy = self._here, self._chain.policies.get(target.name, TargetPolicy())
        services = tuple(dict.fromkeys(instances.service for instances in target.instances))
        first = target.instances[0]
        return TargetConfig(
            name=target.name,
            service=first.service,
            expected_spiffe_ids=tuple(
                str(service_spiffe_id(here.trust_domain, here.datacenter, service)) for service in services
            ),
            endpoints=self._endpoints(target),
            datacenter=here.datacenter,
            sni=f"{target.name}.default.{here.datacenter}.internal.{here.trust_domain}",
            connect_timeout_s=(
                self._connect_timeout_s or target.connect_timeout_s or policy.connect_timeout_s or CONNECT_TIMEOUT_S
            ),
            request_timeout_s=target.request_timeout_s or REQUEST_TIMEOUT_S,
            limits=self._limits,
            load_balancing=policy.load_balancing or _without_panic(target.load_balancing),
            outlier=policy.outlier or self._outlier,
            probation=policy.probation,
            retry=policy.retry,
            retry_budget=policy.retry_budget,
            pool=policy.pool,
        )

    def _endpoints(self, target: ChainTarget) -> tuple[EndpointConfig, ...]:
        """Where the catalog's rows can be reached. Anyone may write a row; one without sense costs only itself."""
        found: dict[str, EndpointConfig] = {}
        strange = 0
        for priority, instances in enumerate(target.instances):
            for row in self._selected(instances):
                given = row.service.address or row.node.address
                if not row.service.port or not given:
                    continue
                address = ip_address(given)
                if address is None or not 1 <= row.service.port <= 65535:
                    strange += 1  # resolving a name would make all other traffic wait
                    continue
                endpoint_id = f"{row.node.node}/{row.service.service_id}"
                endpoint = _endpoint(row, endpoint_id, address, priority, only_passing=instances.only_passing)
                found.setdefault(endpoint_id, endpoint)
        if strange:
            self._warnings.append(
                f"upstream {self._name}: {strange} instances have no IP address or no valid port, and are left out"
            )
        return tuple(found.values())

    def _selected(self, instances: Instances) -> list[ServiceHealth]:
        rows = self._known.instances.get(instances.service, ())
        if not instances.filter:
            return list(rows)
        try:
            wanted = Filter(instances.filter)
            return [row for row in rows if wanted.matches(_filterable(row, self._here.datacenter))]
        except InvalidRequest as error:
            self._warnings.append(
                f"upstream {self._name}: the filter {instances.filter!r} of a subset of {instances.service} "
                f"cannot be applied, so the subset is empty: {error}"
            )
            return []


def _endpoint(row: ServiceHealth, name: str, address: str, priority: int, *, only_passing: bool) -> EndpointConfig:
    status = row.status
    weights = row.service.weights
    return EndpointConfig(
        id=name,
        address=address,
        port=row.service.port,
        weight=max(1, weights.warning if status == "warning" else weights.passing),
        healthy=status == "passing" or (status == "warning" and not only_passing),
        priority=priority,
        locality=locality_of(row.node.meta),
        metadata=tuple(sorted(row.service.meta.items())),
    )


def locality_of(node_meta: Mapping[str, str]) -> str:
    """`region/zone`, `region`, or empty: the catalog has no field for it, so nodes say it in their metadata."""
    region, zone = node_meta.get("region", ""), node_meta.get("zone", "")
    return f"{region}/{zone}" if region and zone else region


def _filterable(row: ServiceHealth, datacenter: str) -> dict[str, object]:
    """A row as the API's JSON has it: what subset filters are written against."""
    node, service = row.node, row.service
    return {
        "Node": {"ID": node.node_id, "Node": node.node, "Address": node.address, "Datacenter": datacenter,
                 "Meta": node.meta},
        "Service": _filterable_service(service),
        "Checks": [
            {"CheckID": check.check_id, "Name": check.name, "Status": check.status, "ServiceID": check.service_id}
            for check in row.checks
        ],
    }  # fmt: skip


def _filterable_service(service: Service) -> dict[str, object]:
    return {
        "Kind": service.kind, "ID": service.service_id, "Service": service.service, "Tags": list(service.tags),
        "Address": service.address, "Port": service.port, "Meta": service.meta,
        "Weights": {"Passing": service.weights.passing, "Warning": service.weights.warning},
    }  # fmt: skip


def _without_panic(balancing: LoadBalancing | None) -> LoadBalancing:
    if balancing is None:
        return _BALANCING
    return LoadBalancing(
        balancing.kind,
        choice_count=balancing.choice_count,
        hash_policies=balancing.hash_policies,
        ring_size_min=balancing.ring_size_min,
        ring_size_max=balancing.ring_size_max,
        panic_threshold=0.0,
        locality=balancing.locality,
    )


def ip_address(given: str) -> str | None:
    """The address as it is, `localhost` as what it means; None for other names, which no part of ours resolves."""
    if given == "localhost":
        return LOOPBACK
    try:
        ipaddress.ip_address(given)
    except ValueError:
        return None
    return given


def _limits(given: Mapping[str, object], declared: Mapping[str, object]) -> LimitsConfig:
    """`given` is the upstream's own configuration (snake case), `declared` the config entry's (camel case)."""
    standard = LimitsConfig()
    return LimitsConfig(
        connections_max=integer(given, "max_connections")
        or integer(declared, "MaxConnections")
        or standard.connections_max,
        pending_requests_max=integer(given, "max_pending_requests")
        or integer(declared, "MaxPendingRequests")
        or standard.pending_requests_max,
        requests_max=integer(given, "max_concurrent_requests")
        or integer(declared, "MaxConcurrentRequests")
        or standard.requests_max,
    )


def _upstream_settings(service_defaults: ConfigEntry | None, name: str) -> Mapping[str, object]:
    """What the caller's service-defaults say about one upstream: its override over the defaults for all."""
    settings = table(service_defaults.body if service_defaults is not None else {}, "UpstreamConfig")
    merged = dict(table(settings, "Defaults"))
    overrides = settings.get("Overrides")
    for override in overrides if isinstance(overrides, list) else ():
        if isinstance(override, dict) and override.get("Name") == name:
            merged.update(override)
    return merged


def supported(protocol: str, service: str, warnings: list[str]) -> SidecarProtocol:
    """How a protocol is carried."""
    if protocol == "http":
        return "http"
    if protocol != "tcp":
        warnings.append(f"protocol {protocol} of service {service} is carried as plain tcp")
    return "tcp"
