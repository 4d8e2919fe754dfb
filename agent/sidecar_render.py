"""From what is known about one sidecar to its `SidecarConfig`: no waiting, no I/O, the same facts, the same value."""

import ipaddress
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import msgspec

from mesh.authz import source_rules
from mesh.model.ca import CaRoots
from mesh.model.catalog import Proxy, Service, Upstream
from mesh.model.check import ServiceHealth
from mesh.model.config_entry import ConfigEntry
from mesh.model.intention import Intention
from mesh.names import service_spiffe_id
from mesh.proxy.sidecar_config import (
    CONNECT_TIMEOUT_S,
    AccessLogConfig,
    EndpointConfig,
    InboundListener,
    LimitsConfig,
    OutboundListener,
    SidecarConfig,
    SidecarProtocol,
    TargetConfig,
)

LOOPBACK = "127.0.0.1"


@dataclass(frozen=True)
class UpstreamFacts:
    """What the catalog says about one upstream's service. `instances`: passing, able to speak mTLS."""

    instances: tuple[ServiceHealth, ...] = ()
    service_defaults: ConfigEntry | None = None


@dataclass(frozen=True)
class SidecarFacts:
    """Everything that one sidecar's configuration is made of. `upstreams` is by service name."""

    service: Service
    application_port: int
    datacenter: str
    bind_address: str
    default_allow: bool
    roots: CaRoots
    certificate_chain_pem: str
    private_key_pem: str
    intentions: tuple[Intention, ...]
    service_defaults: ConfigEntry | None
    proxy_defaults: ConfigEntry | None
    upstreams: Mapping[str, UpstreamFacts]


class Rendered(msgspec.Struct, frozen=True):
    """The configuration, and what of the registration it cannot honour, a sentence each."""

    config: SidecarConfig
    warnings: tuple[str, ...] = ()


def render(facts: SidecarFacts) -> Rendered:
    """The sidecar's configuration."""
    proxy = facts.service.proxy
    assert proxy is not None, "only proxies are rendered"
    warnings: list[str] = []
    trust_domain = facts.roots.trust_domain
    config = SidecarConfig(
        proxy_id=facts.service.service_id,
        service=proxy.destination_service_name,
        datacenter=facts.datacenter,
        trust_domain=trust_domain,
        spiffe_id=str(service_spiffe_id(trust_domain, facts.datacenter, proxy.destination_service_name)),
        certificate_chain_pem=facts.certificate_chain_pem,
        private_key_pem=facts.private_key_pem,
        trust_roots_pem=tuple(root.root_cert_pem for root in facts.roots.roots),
        inbound=_inbound(facts, proxy, warnings),
        outbound=tuple(
            listener for upstream in proxy.upstreams if (listener := _outbound(facts, upstream, warnings)) is not None
        ),
        access_log=_access_log(facts.proxy_defaults),
    )
    return Rendered(config, tuple(warnings))


# -- inbound


def _inbound(facts: SidecarFacts, proxy: Proxy, warnings: list[str]) -> InboundListener | None:
    port = _integer(proxy.config, "bind_port") or facts.service.port
    application_port = proxy.local_service_port or facts.application_port
    if proxy.local_service_socket_path:
        warnings.append("local_service_socket_path is not supported, so nothing is accepted for the application")
        return None
    if not port or not application_port:
        return None  # a sidecar for outgoing connections only
    protocol = (
        _text(proxy.config, "protocol") or _protocol(facts.service_defaults) or _default_protocol(facts.proxy_defaults)
    )
    bind_address = _ip_address(_text(proxy.config, "bind_address") or facts.bind_address)
    local_address = _ip_address(proxy.local_service_address or LOOPBACK)
    if bind_address is None or local_address is None:
        warnings.append("bind_address and local_service_address must be IP addresses, so nothing is accepted")
        return None
    return InboundListener(
        bind_address=bind_address,
        bind_port=port,
        local_address=local_address,
        local_port=application_port,
        protocol=_supported(protocol, proxy.destination_service_name, warnings),
        intentions=source_rules(facts.intentions),
        default_allow=facts.default_allow,
        connect_timeout_s=_milliseconds(proxy.config, "local_connect_timeout_ms") or CONNECT_TIMEOUT_S,
        request_timeout_s=_milliseconds(proxy.config, "local_request_timeout_ms") or 0.0,
        connections_max=_integer(proxy.config, "max_inbound_connections") or 8192,
    )


# -- outbound


def _outbound(facts: SidecarFacts, upstream: Upstream, warnings: list[str]) -> OutboundListener | None:
    name = upstream.destination_name
    if upstream.destination_type != "service":
        warnings.append(f"upstream {name}: prepared queries are not supported")
        return None
    if upstream.datacenter not in ("", facts.datacenter):
        warnings.append(f"upstream {name}: datacenter {upstream.datacenter} cannot be reached, there is only this one")
        return None
    if not upstream.local_bind_port:
        warnings.append(f"upstream {name}: only local_bind_port is supported, not a socket path")
        return None
    bind_address = _ip_address(upstream.local_bind_address or LOOPBACK)
    if bind_address is None:
        warnings.append(f"upstream {name}: local_bind_address must be an IP address")
        return None
    known = facts.upstreams.get(name, UpstreamFacts())
    declared = _upstream_settings(facts.service_defaults, name)
    protocol = (
        _text(upstream.config, "protocol")
        or _text(declared, "Protocol")
        or _protocol(known.service_defaults)
        or _default_protocol(facts.proxy_defaults)
    )
    connect_timeout_s = _milliseconds(upstream.config, "connect_timeout_ms") or _milliseconds(
        declared, "ConnectTimeoutMs"
    )
    target = TargetConfig(
        name=name,
        expected_spiffe_ids=(str(service_spiffe_id(facts.roots.trust_domain, facts.datacenter, name)),),
        endpoints=_endpoints(name, known.instances, warnings),
        datacenter=facts.datacenter,
        sni=f"{name}.default.{facts.datacenter}.internal.{facts.roots.trust_domain}",
        connect_timeout_s=connect_timeout_s or CONNECT_TIMEOUT_S,
        limits=_limits(_table(upstream.config, "limits"), _table(declared, "Limits")),
    )
    return OutboundListener(
        bind_address=bind_address,
        bind_port=upstream.local_bind_port,
        target=target,
        protocol=_supported(protocol, name, warnings),
    )


def _endpoints(name: str, instances: tuple[ServiceHealth, ...], warnings: list[str]) -> tuple[EndpointConfig, ...]:
    """Where the catalog's rows can be reached. Anyone may write a row; one that makes no sense costs only itself."""
    found: dict[str, EndpointConfig] = {}
    strange = 0
    for row in instances:
        given = row.service.address or row.node.address
        if not row.service.port or not given:
            continue
        address = _ip_address(given)
        if address is None or not 1 <= row.service.port <= 65535:
            strange += 1  # resolving a name would make all other traffic wait
            continue
        endpoint_id = f"{row.node.node}/{row.service.service_id}"
        found.setdefault(endpoint_id, EndpointConfig(endpoint_id, address, row.service.port, _weight(row.service)))
    if strange:
        warnings.append(f"upstream {name}: {strange} instances have no IP address or no valid port, and are left out")
    return tuple(found.values())


def _weight(service: Service) -> int:
    return max(1, service.weights.passing)


def _ip_address(text: str) -> str | None:
    """The address as it is, `localhost` as what it means; None for other names, which no part of ours resolves."""
    if text == "localhost":
        return LOOPBACK
    try:
        ipaddress.ip_address(text)
    except ValueError:
        return None
    return text


def _limits(given: Mapping[str, object], declared: Mapping[str, object]) -> LimitsConfig:
    """`given` is the upstream's own configuration (snake case), `declared` the config entry's (camel case)."""
    standard = LimitsConfig()
    return LimitsConfig(
        connections_max=_integer(given, "max_connections")
        or _integer(declared, "MaxConnections")
        or standard.connections_max,
        pending_requests_max=_integer(given, "max_pending_requests")
        or _integer(declared, "MaxPendingRequests")
        or standard.pending_requests_max,
        requests_max=_integer(given, "max_concurrent_requests")
        or _integer(declared, "MaxConcurrentRequests")
        or standard.requests_max,
    )


# -- config entries: opaque JSON, read without trusting its shape


def _table(values: Mapping[str, object], key: str) -> Mapping[str, object]:
    value = values.get(key)
    return value if isinstance(value, dict) else {}


def _text(values: Mapping[str, object], key: str) -> str:
    value = values.get(key)
    return value if isinstance(value, str) else ""


def _integer(values: Mapping[str, object], key: str) -> int:
    """The value if it is a positive whole number, else 0."""
    value = values.get(key)
    if isinstance(value, bool) or not isinstance(value, int | float) or not 1 <= value < 2**31:
        return 0
    return int(value)


def _milliseconds(values: Mapping[str, object], key: str) -> float:
    return _integer(values, key) / 1000.0


def _body(entry: ConfigEntry | None) -> Mapping[str, object]:
    return entry.body if entry is not None else {}


def _protocol(service_defaults: ConfigEntry | None) -> str:
    return _text(_body(service_defaults), "Protocol")


def _default_protocol(proxy_defaults: ConfigEntry | None) -> str:
    return _text(_table(_body(proxy_defaults), "Config"), "protocol") or "tcp"


def _upstream_settings(service_defaults: ConfigEntry | None, name: str) -> Mapping[str, object]:
    """What the caller's service-defaults say about one upstream: its override over the defaults for all."""
    settings = _table(_body(service_defaults), "UpstreamConfig")
    merged = dict(_table(settings, "Defaults"))
    overrides = settings.get("Overrides")
    for override in overrides if isinstance(overrides, list) else ():
        if isinstance(override, dict) and override.get("Name") == name:
            merged.update(override)
    return merged


def _access_log(proxy_defaults: ConfigEntry | None) -> AccessLogConfig:
    settings = _table(_body(proxy_defaults), "AccessLogs")
    if settings.get("Enabled") is not True:
        return AccessLogConfig()
    kind = _text(settings, "Type")
    if kind == "file":
        return AccessLogConfig(_text(settings, "Path"))
    return AccessLogConfig("/dev/stderr" if kind == "stderr" else "/dev/stdout")


def _supported(protocol: str, service: str, warnings: list[str]) -> SidecarProtocol:
    kind: Literal["tcp", "http"] = "http" if protocol == "http" else "tcp"
    if protocol not in ("http", "tcp"):
        warnings.append(f"protocol {protocol} of service {service} is carried as plain tcp")
    return kind
