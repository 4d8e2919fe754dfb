"""From what is known about one sidecar to its `SidecarConfig`: no waiting, no I/O, the same facts, the same value."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TypedDict, get_args

import msgspec

from agent.json_fields import integer, milliseconds, table, text
from agent.upstream_render import (
    LOOPBACK,
    Surroundings,
    UpstreamFacts,
    ip_address,
    outbound_listener,
    supported,
)
from mesh.authz import rule_problems, source_rules
from mesh.errors import ConfigError
from mesh.http.path import EscapedSlashes, PathPolicy
from mesh.model.ca import CaRoots
from mesh.model.catalog import Proxy, Service
from mesh.model.config_entry import ConfigEntry
from mesh.model.intention import Intention, is_audit
from mesh.model.match import RouteMatch
from mesh.names import service_spiffe_id
from mesh.proxy.client_cert import ClientCertField, ForwardClientCert
from mesh.proxy.sidecar_config import (
    CONNECT_TIMEOUT_S,
    LOCAL_APPLICATION,
    AccessLogConfig,
    InboundListener,
    MtlsMode,
    OutboundListener,
    SidecarConfig,
)
from mesh.traffic.consul import Entries, path_match
from mesh.traffic.fields import Table
from mesh.traffic.policy import RateLimit
from mesh.traffic.resolver import rate_limit
from mesh.traffic.route import Forward, RouteTable, Rule, VirtualHost, WeightedTarget


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
    entries: Entries
    upstreams: Mapping[str, UpstreamFacts]
    locality: str = ""

    @property
    def service_defaults(self) -> ConfigEntry | None:
        """Those of the service behind the proxy."""
        proxy = self.service.proxy
        return self.entries.get(("service-defaults", proxy.destination_service_name)) if proxy is not None else None

    @property
    def proxy_defaults(self) -> ConfigEntry | None:
        """Those of all proxies."""
        return self.entries.get(("proxy-defaults", "global"))


class Rendered(msgspec.Struct, frozen=True):
    """The configuration, and what of the registration it cannot honour, a sentence each."""

    config: SidecarConfig
    warnings: tuple[str, ...] = ()


def render(facts: SidecarFacts, former: SidecarConfig | None = None) -> Rendered:
    """The sidecar's configuration. Upstreams whose entries make no sense stay as they were in `former`."""
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
        outbound=_outbound(facts, proxy, former, warnings),
        locality=facts.locality,
        service_metadata=tuple(sorted(facts.service.meta.items())),
        access_log=access_log(facts.proxy_defaults, warnings),
    )
    return Rendered(config, tuple(warnings))


# -- inbound


def _inbound(facts: SidecarFacts, proxy: Proxy, warnings: list[str]) -> InboundListener | None:
    port = integer(proxy.config, "bind_port") or facts.service.port
    application_port = proxy.local_service_port or facts.application_port
    if proxy.local_service_socket_path:
        warnings.append("local_service_socket_path is not supported, so nothing is accepted for the application")
        return None
    if not port or not application_port:
        return None  # a sidecar for outgoing connections only
    protocol = (
        text(proxy.config, "protocol") or _protocol(facts.service_defaults) or _default_protocol(facts.proxy_defaults)
    )
    bind_address = ip_address(text(proxy.config, "bind_address") or facts.bind_address)
    local_address = ip_address(proxy.local_service_address or LOOPBACK)
    if bind_address is None or local_address is None:
        warnings.append("bind_address and local_service_address must be IP addresses, so nothing is accepted")
        return None
    protocol = supported(protocol, proxy.destination_service_name, warnings)
    rules = source_rules(facts.intentions)
    warnings.extend(rule_problems(rules, http=protocol == "http", service=proxy.destination_service_name))
    return InboundListener(
        bind_address=bind_address,
        bind_port=port,
        local_address=local_address,
        local_port=application_port,
        protocol=protocol,
        intentions=rules,
        default_allow=facts.default_allow,
        audit=is_audit(_meta(facts.proxy_defaults) | _meta(facts.service_defaults)),
        mtls=_mtls(facts),
        forward_client_cert=_forward_client_cert(facts, proxy, warnings),
        client_cert_fields=_client_cert_fields(facts, proxy, warnings),
        path_policy=_path_policy(facts, warnings),
        connect_timeout_s=milliseconds(proxy.config, "local_connect_timeout_ms") or CONNECT_TIMEOUT_S,
        request_timeout_s=milliseconds(proxy.config, "local_request_timeout_ms") or 0.0,
        connections_max=integer(proxy.config, "max_inbound_connections") or 8192,
        **_rate_limits(facts.service_defaults, warnings),
    )


def _meta(entry: ConfigEntry | None) -> dict[str, str]:
    return entry.meta if entry is not None else {}


def _mtls(facts: SidecarFacts) -> MtlsMode:
    """`MutualTLSMode` of the service, else of all proxies. The state takes `permissive` only where `mesh` allows it."""
    mode = text(_body(facts.service_defaults), "MutualTLSMode") or text(_body(facts.proxy_defaults), "MutualTLSMode")
    return "permissive" if mode == "permissive" else "strict"


def _proxy_setting(facts: SidecarFacts, proxy: Proxy, key: str) -> object:
    """A key of the proxy's own opaque configuration, else of proxy-defaults' `Config`."""
    return proxy.config.get(key) or table(_body(facts.proxy_defaults), "Config").get(key)


def _forward_client_cert(facts: SidecarFacts, proxy: Proxy, warnings: list[str]) -> ForwardClientCert:
    """Opaque key `forward_client_cert`; `mesh`'s SanitizeXForwardedClientCert overrules it, as in Consul."""
    if table(_body(facts.entries.get(("mesh", "mesh"))), "HTTP").get("SanitizeXForwardedClientCert") is True:
        return "sanitize"
    given = _proxy_setting(facts, proxy, "forward_client_cert") or "sanitize"
    try:
        mode: ForwardClientCert = msgspec.convert(given, ForwardClientCert)
    except msgspec.ValidationError:
        modes = ", ".join(get_args(ForwardClientCert))
        warnings.append(f"forward_client_cert must be one of {modes}, so x-forwarded-client-cert is dropped")
        return "sanitize"
    return mode


def _client_cert_fields(facts: SidecarFacts, proxy: Proxy, warnings: list[str]) -> tuple[ClientCertField, ...]:
    """Opaque key `forward_client_cert_fields`: what is told beside By and Hash; the URI unless it says otherwise."""
    given = _proxy_setting(facts, proxy, "forward_client_cert_fields")
    if given is None:
        return ("uri",)
    try:
        return msgspec.convert(given, tuple[ClientCertField, ...])
    except msgspec.ValidationError:
        names = ", ".join(get_args(ClientCertField))
        warnings.append(f"forward_client_cert_fields must be a list of {names}; it is taken as [uri]")
        return ("uri",)


_ESCAPED_SLASHES: Mapping[str, EscapedSlashes] = {
    "": "keep",
    "IMPLEMENTATION_SPECIFIC_DEFAULT": "keep",
    "KEEP_UNCHANGED": "keep",
    "REJECT_REQUEST": "reject",
    "UNESCAPE_AND_REDIRECT": "redirect",
    "UNESCAPE_AND_FORWARD": "unescape",
}


def _path_policy(facts: SidecarFacts, warnings: list[str]) -> PathPolicy:
    """`mesh`'s HTTP.Incoming.RequestNormalization, for what differs between applications. The rest is always done."""
    http = table(_body(facts.entries.get(("mesh", "mesh"))), "HTTP")
    given = table(table(http, "Incoming"), "RequestNormalization")
    action = text(given, "PathWithEscapedSlashesAction")
    escaped = _ESCAPED_SLASHES.get(action, "reject")
    if action not in _ESCAPED_SLASHES:
        warnings.append(f"PathWithEscapedSlashesAction {action} is unknown: escaped slashes in paths are refused")
    if given.get("InsecureDisablePathNormalization") is True:
        warnings.append("InsecureDisablePathNormalization is not supported: paths are always normalised")
    if text(given, "HeadersWithUnderscoresAction") not in ("", "ALLOW"):
        warnings.append("HeadersWithUnderscoresAction is not supported: such headers are forwarded")
    return PathPolicy(merge_slashes=given.get("MergeSlashes") is True, escaped_slashes=escaped)


class _RateLimits(TypedDict):
    rate_limit: RateLimit | None
    routes: RouteTable


def _rate_limits(service_defaults: ConfigEntry | None, warnings: list[str]) -> _RateLimits:
    """What service-defaults' RateLimits.InstanceLevel say of this instance, and of some of its paths."""
    try:
        limits = Table(_body(service_defaults), "service-defaults").table("RateLimits").table("InstanceLevel")
        rules = []
        for route in limits.tables("Routes"):
            path = path_match(route)
            rules.append(
                Rule(
                    Forward((WeightedTarget(LOCAL_APPLICATION),)),
                    matches=(RouteMatch(path=path),) if path is not None else (),
                    rate_limit=rate_limit(route),
                )
            )
        everything = Rule(Forward((WeightedTarget(LOCAL_APPLICATION),)))
        hosts = (VirtualHost((*rules, everything)),) if rules else ()
        return {"rate_limit": rate_limit(limits), "routes": RouteTable(hosts)}
    except ConfigError as error:
        warnings.append(f"its rate limits are ignored: {error}")
        return {"rate_limit": None, "routes": RouteTable()}


# -- outbound


def _outbound(
    facts: SidecarFacts, proxy: Proxy, former: SidecarConfig | None, warnings: list[str]
) -> tuple[OutboundListener, ...]:
    here = Surroundings(facts.datacenter, facts.roots.trust_domain, facts.service_defaults)
    served = {listener.bind_port: listener for listener in former.outbound} if former is not None else {}
    listeners = []
    for upstream in proxy.upstreams:
        known = facts.upstreams.get(upstream.destination_name, UpstreamFacts(None))
        listener = outbound_listener(upstream, known, here, warnings)
        if listener is None and known.chain is None:
            listener = served.get(upstream.local_bind_port)
        if listener is not None:
            listeners.append(listener)
    return tuple(listeners)


# -- config entries


def _body(entry: ConfigEntry | None) -> Mapping[str, object]:
    return entry.body if entry is not None else {}


def _protocol(service_defaults: ConfigEntry | None) -> str:
    return text(_body(service_defaults), "Protocol")


def _default_protocol(proxy_defaults: ConfigEntry | None) -> str:
    return text(table(_body(proxy_defaults), "Config"), "protocol") or "tcp"


_LOG_PATHS = {"": "/dev/stdout", "stdout": "/dev/stdout", "stderr": "/dev/stderr", "otlp": "otlp"}


def access_log(proxy_defaults: ConfigEntry | None, warnings: list[str]) -> AccessLogConfig:
    """As `AccessLogs` of proxy-defaults has it; `otlp` is a type of ours. Without a format it is Consul's JSON.

    A worker refuses a format that does not compile, and says why. DisableListenerLogs has nothing to turn off here:
    connections that no listener's rules take are not logged.
    """
    settings = table(_body(proxy_defaults), "AccessLogs")
    if settings.get("Enabled") is not True:
        return AccessLogConfig()
    kind = text(settings, "Type")
    path = text(settings, "Path") if kind == "file" else _LOG_PATHS.get(kind, "")
    if not path:
        given = "has no Path" if kind == "file" else f"is of the unknown type {kind!r}"
        warnings.append(f"proxy-defaults: the access log {given}, so nothing is logged")
    text_format, json_format = text(settings, "TextFormat"), text(settings, "JSONFormat")
    return AccessLogConfig(path, text_format, json_format if text_format or json_format else "consul")
