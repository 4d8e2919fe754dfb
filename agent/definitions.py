"""Service and check definitions, as API bodies and configuration files write them, into model values.

What JSON cannot be read as a definition raises MalformedJson; what reads well but makes no sense raises InvalidRequest.
Both texts are the HTTP 400 body. What Consul accepts and we cannot honour yet is refused by name, never dropped.
"""

import ipaddress
from collections.abc import Callable, Iterable
from typing import Literal, TypeVar, cast, get_args

import msgspec

from agent.addresses import join_address, split_address
from agent.config.loader import meta_problem
from agent.config.values import RawDefinition
from agent.strict_json import Fields, MalformedJson, format_duration
from mesh.errors import ConfigError, InvalidRequest
from mesh.model.catalog import Proxy, Service, ServiceAddress, ServiceKind, Upstream, Weights
from mesh.model.check import Check, CheckDefinition, CheckStatus
from mesh.names import SERVICE_NAME_BYTES_MAX

SIDECAR_SUFFIX = "-sidecar-proxy"
SIDECAR_CHECK_INTERVAL_S = 10.0
CHECK_INTERVAL_S_MIN = 1.0
DEREGISTER_AFTER_S_MIN = 60.0
CHECKS_MAX = 64  # of one service
UPSTREAMS_MAX = 1024
CHECK_ID_BYTES_MAX = 512

DefinitionT = TypeVar("DefinitionT")

_KINDS = get_args(ServiceKind)
_STATUSES = get_args(CheckStatus)

_SERVICE_FIELDS = (
    "Kind", "ID", "Name", "Tags", "Address", "TaggedAddresses", "Meta", "Port", "Ports", "SocketPath", "Check",
    "Checks", "Weights", "Token", "EnableTagOverride", "Proxy", "Connect", "Locality", "Namespace", "Partition",
)  # fmt: skip
_PROXY_FIELDS = (
    "DestinationServiceName", "DestinationServiceID", "LocalServiceAddress", "LocalServicePort",
    "LocalServiceSocketPath", "Mode", "Config", "Upstreams", "MeshGateway", "TransparentProxy", "Expose", "AccessLogs",
    "EnvoyExtensions", "MutualTLSMode",
)  # fmt: skip
_PROXY_LATER = ("TransparentProxy", "Expose", "AccessLogs", "EnvoyExtensions", "MutualTLSMode")
_UPSTREAM_FIELDS = (
    "DestinationType", "DestinationNamespace", "DestinationPartition", "DestinationPeer", "DestinationName",
    "Datacenter", "LocalBindAddress", "LocalBindPort", "LocalBindSocketPath", "LocalBindSocketMode", "Config",
    "MeshGateway",
)  # fmt: skip
_CHECK_FIELDS = (
    "ID", "CheckID", "Name", "Notes", "ServiceID", "Token", "Status", "ScriptArgs", "Args", "HTTP", "Method", "Header",
    "Body", "DisableRedirects", "H2PING", "H2PingUseTLS", "TCP", "TCPUseTLS", "UDP", "GRPC", "GRPCUseTLS",
    "DockerContainerID", "Shell", "OSService", "TLSServerName", "TLSSkipVerify", "AliasNode", "AliasService",
    "Interval", "Timeout", "TTL", "SuccessBeforePassing", "FailuresBeforeWarning", "FailuresBeforeCritical",
    "DeregisterCriticalServiceAfter", "OutputMaxSize", "ProxyHTTP", "ProxyGRPC", "Namespace", "Partition",
)  # fmt: skip
_CHECK_LATER = (
    "H2PING", "TCPUseTLS", "UDP", "GRPC", "GRPCUseTLS", "DockerContainerID", "Shell", "OSService", "ProxyHTTP",
    "ProxyGRPC",
)  # fmt: skip


class ServiceDefinition(msgspec.Struct, frozen=True):
    """A service with the checks it brings, IDs assigned. `sidecar` is still without a port when none was asked for."""

    service: Service
    checks: tuple[CheckDefinition, ...] = ()
    sidecar: "ServiceDefinition | None" = None


def service_definition(body: object) -> ServiceDefinition:
    """A service definition. Raises MalformedJson, InvalidRequest."""
    fields = Fields(body, _SERVICE_FIELDS)
    if not fields.text("Name"):
        raise InvalidRequest("Missing service name")
    service = _service(fields)
    connect = Fields(fields.raw("Connect"), ("Native", "SidecarService"), where="Connect")
    if connect.boolean("Native"):
        if service.kind == "connect-proxy":
            raise InvalidRequest("A Proxy cannot also be Connect Native, only typical services")
        service = msgspec.structs.replace(service, connect_native=True)
    service = _with_proxy(service)
    _validate(service)
    checks = _embedded_checks(fields, service)
    sidecar = None
    if "SidecarService" in connect:
        if service.kind:
            raise InvalidRequest("Invalid SidecarService: only a typical service can have one, not a proxy or gateway")
        sidecar = _sidecar(connect.raw("SidecarService"), service)
    return ServiceDefinition(_with_default_addresses(service), checks, sidecar)


def _with_default_addresses(service: Service) -> Service:
    """With the tagged addresses that Consul derives from an IP address, unless they are given."""
    try:
        version = ipaddress.ip_address(service.address).version
    except ValueError:
        return service
    own = ServiceAddress(service.address, service.port)
    derived = {f"lan_ipv{version}": own, f"wan_ipv{version}": own}
    return msgspec.structs.replace(service, tagged_addresses=derived | service.tagged_addresses)


def _with_proxy(service: Service) -> Service:
    """A proxy exactly where the kind has one."""
    if not service.kind:
        if service.proxy not in (None, Proxy()):
            raise InvalidRequest("Proxy is only valid for a service whose Kind is connect-proxy or a gateway")
        return msgspec.structs.replace(service, proxy=None)
    proxy = service.proxy or Proxy()
    if proxy.local_service_port and not proxy.local_service_address:
        proxy = msgspec.structs.replace(proxy, local_service_address="127.0.0.1")
    return msgspec.structs.replace(service, proxy=proxy)


def _service(fields: Fields) -> Service:
    """The fields of a service or sidecar definition, not yet validated together."""
    _refuse_later(fields, ("Ports", "Locality"), "service")
    _refuse_tenancy(fields)
    name = fields.text("Name")
    weights = Fields(fields.raw("Weights"), ("Passing", "Warning"), where="Weights")
    return Service(
        service=name,
        service_id=fields.text("ID") or name,
        kind=cast(ServiceKind, _kind(fields.text("Kind"))),
        tags=fields.texts("Tags"),
        address=fields.text("Address"),
        tagged_addresses=_tagged_addresses(fields),
        meta=fields.text_map("Meta"),
        port=fields.integer("Port"),
        socket_path=fields.text("SocketPath"),
        weights=Weights(weights.integer("Passing", 1), weights.integer("Warning", 1)),
        enable_tag_override=fields.boolean("EnableTagOverride"),
        proxy=proxy_definition(fields.raw("Proxy")) if "Proxy" in fields else None,
    )


def _kind(text: str) -> str:
    if text not in _KINDS:
        raise InvalidRequest(f"Invalid service kind {text!r}")
    return text


def _tagged_addresses(fields: Fields) -> dict[str, ServiceAddress]:
    addresses: dict[str, ServiceAddress] = {}
    for tag, value in fields.mapping("TaggedAddresses").items():
        inner = Fields(value, ("Address", "Port"), where=f"TaggedAddresses[{tag}]")
        addresses[tag] = ServiceAddress(inner.text("Address"), inner.integer("Port", low=0, high=65535))
    return addresses


def _refuse_later(fields: Fields, names: Iterable[str], what: str) -> None:
    """Raises InvalidRequest when a field that we cannot honour holds anything but its zero value.

    Go's client sends empty objects for fields that its user never touched.
    """
    for name in names:
        if _holds_something(fields.raw(name)):
            raise InvalidRequest(f"{name} of a {what} is not supported yet")


def _holds_something(value: object) -> bool:
    if isinstance(value, dict):
        return any(_holds_something(inner) for inner in value.values())
    return bool(value)


def _refuse_tenancy(fields: Fields) -> None:
    for name in ("Namespace", "Partition"):
        if fields.text(name) not in ("", "default"):
            raise InvalidRequest(f"Invalid {name.lower()} {fields.text(name)!r}: there is only the default one")


def proxy_definition(value: object) -> Proxy:
    """A `Proxy` object. Raises MalformedJson, InvalidRequest."""
    fields = Fields(value, _PROXY_FIELDS, where="Proxy")
    _refuse_later(fields, _PROXY_LATER, "proxy")
    upstreams = fields.items("Upstreams")
    if len(upstreams) > UPSTREAMS_MAX:
        raise InvalidRequest(f"Invalid upstreams: more than {UPSTREAMS_MAX}")
    return Proxy(
        destination_service_name=fields.text("DestinationServiceName"),
        destination_service_id=fields.text("DestinationServiceID"),
        local_service_address=fields.text("LocalServiceAddress"),
        local_service_port=fields.integer("LocalServicePort", low=0, high=65535),
        local_service_socket_path=fields.text("LocalServiceSocketPath"),
        mode=cast(Literal["", "direct", "transparent"], fields.choice("Mode", ("direct", "transparent"))),
        config=fields.mapping("Config"),
        upstreams=tuple(_upstream(upstream, index) for index, upstream in enumerate(upstreams)),
        mesh_gateway_mode=_mesh_gateway_mode(fields),
    )


def _mesh_gateway_mode(fields: Fields) -> str:
    return Fields(fields.raw("MeshGateway"), ("Mode",), where="MeshGateway").choice("Mode", ("none", "local", "remote"))


def _upstream(value: object, index: int) -> Upstream:
    fields = Fields(value, _UPSTREAM_FIELDS, where=f"Upstreams[{index}]")
    for name in ("DestinationNamespace", "DestinationPartition"):
        if fields.text(name) not in ("", "default"):
            raise InvalidRequest(f"Invalid upstream: {name} {fields.text(name)!r}: there is only the default one")
    _refuse_later(fields, ("DestinationPeer", "LocalBindSocketMode"), "upstream")
    upstream = Upstream(
        destination_name=fields.text("DestinationName"),
        destination_type=cast(
            Literal["service", "prepared_query"],
            fields.choice("DestinationType", ("service", "prepared_query")) or "service",
        ),
        datacenter=fields.text("Datacenter"),
        local_bind_address=fields.text("LocalBindAddress"),
        local_bind_port=fields.integer("LocalBindPort", low=0, high=65535),
        local_bind_socket_path=fields.text("LocalBindSocketPath"),
        config=fields.mapping("Config"),
        mesh_gateway_mode=_mesh_gateway_mode(fields),
    )
    if not upstream.destination_name:
        raise InvalidRequest("upstream destination name cannot be empty")
    if upstream.destination_name == "*":
        raise InvalidRequest("upstream destination name cannot be a wildcard")
    if not upstream.local_bind_port and not upstream.local_bind_socket_path:
        raise InvalidRequest("upstream local bind port or local socket path must be defined and nonzero")
    if upstream.local_bind_port and upstream.local_bind_socket_path:
        raise InvalidRequest("only one of upstream local bind port or local socket path can be defined")
    return upstream


def _validate(service: Service) -> None:
    """What Consul requires of a service as a whole. Raises InvalidRequest with its texts."""
    for what, text in (("name", service.service), ("ID", service.service_id)):
        if len(text.encode()) > SERVICE_NAME_BYTES_MAX:
            raise InvalidRequest(f"Invalid service {what}: longer than {SERVICE_NAME_BYTES_MAX} bytes")
        if any(character < " " or character == "\x7f" for character in text):
            raise InvalidRequest(f"Invalid service {what}: it holds control characters")
    if is_unspecified(service.address):
        raise InvalidRequest("Invalid service address")
    if any(is_unspecified(address.address) for address in service.tagged_addresses.values()):
        raise InvalidRequest("Invalid tagged address")
    if not 0 <= service.port <= 65535:
        raise InvalidRequest(f"Invalid service port {service.port}")
    if service.port and service.socket_path:
        raise InvalidRequest("Invalid service: Port and SocketPath cannot both be set")
    problem = meta_problem(service.meta)
    if problem:
        raise InvalidRequest(f"Invalid Service Meta: {problem}")
    if service.weights.passing < 1:
        raise InvalidRequest("Passing must be greater than 0")
    if service.weights.warning < 0:
        raise InvalidRequest("Warning must be greater or equal than 0")
    if service.weights.passing > 65535 or service.weights.warning > 65535:
        raise InvalidRequest("DNS Weight must be between 0 and 65535")
    if service.kind == "connect-proxy":
        _validate_proxy(service)


def _validate_proxy(service: Service) -> None:
    proxy = service.proxy or Proxy()
    if not proxy.destination_service_name.strip():
        raise InvalidRequest("Proxy.DestinationServiceName must be non-empty for Connect proxy services")
    if proxy.destination_service_name == "*":
        raise InvalidRequest("Proxy.DestinationServiceName must not be a wildcard for Connect proxy services")
    if not service.port and not service.socket_path:
        raise InvalidRequest("Port or SocketPath must be set for a Connect proxy")
    listeners: dict[str, str] = {}
    for upstream in proxy.upstreams:
        where = upstream.local_bind_socket_path
        if not where:
            where = f"{upstream.local_bind_address or '127.0.0.1'}:{upstream.local_bind_port}"
        if where in listeners:
            raise InvalidRequest(
                f"upstreams cannot contain duplicates of local bind address: {upstream.destination_name} and "
                f"{listeners[where]} both use {where}"
            )
        listeners[where] = upstream.destination_name


def is_unspecified(address: str) -> bool:
    """Whether the text is 0.0.0.0 or ::, an address that nobody can call."""
    try:
        return ipaddress.ip_address(address.strip("[]")).is_unspecified
    except ValueError:
        return False


def _sidecar(value: object, parent: Service) -> ServiceDefinition:
    """The sidecar's own definition with everything it takes from its parent, except a port not asked for."""
    fields = Fields(value, _SERVICE_FIELDS, where="SidecarService")
    connect = Fields(fields.raw("Connect"), ("Native", "SidecarService"), where="SidecarService.Connect")
    if "SidecarService" in connect:
        raise InvalidRequest("Invalid SidecarService: it cannot have a SidecarService of its own")
    if connect.boolean("Native"):
        raise InvalidRequest("A Proxy cannot also be Connect Native, only typical services")
    if fields.text("Kind") not in ("", "connect-proxy"):
        raise InvalidRequest("Invalid SidecarService: its Kind can only be connect-proxy")
    given = _service(fields)
    proxy = given.proxy or Proxy()
    local_address = proxy.local_service_address
    if not local_address and not proxy.local_service_socket_path:
        local_address = "127.0.0.1"
    port = proxy.local_service_port
    if not port and not proxy.local_service_socket_path:
        port = parent.port
    service = msgspec.structs.replace(
        given,
        service=given.service or parent.service + SIDECAR_SUFFIX,
        service_id=parent.service_id + SIDECAR_SUFFIX,  # not the user's to choose: removal and tools rely on it
        kind="connect-proxy",
        tags=given.tags or parent.tags,
        meta=given.meta or parent.meta,
        address=given.address or parent.address,
        tagged_addresses=given.tagged_addresses or parent.tagged_addresses,
        proxy=msgspec.structs.replace(
            proxy,
            destination_service_name=proxy.destination_service_name or parent.service,
            destination_service_id=proxy.destination_service_id or parent.service_id,
            local_service_address=local_address,
            local_service_port=port,
        ),
    )
    try:
        # Port 1 stands in for the one that is assigned later.
        _validate(service if service.port or service.socket_path else msgspec.structs.replace(service, port=1))
    except InvalidRequest as error:
        raise InvalidRequest(f"Invalid SidecarService: {error}") from None
    return ServiceDefinition(service, _embedded_checks(fields, service))


def with_sidecar_port(sidecar: ServiceDefinition, parent: Service, port: int) -> ServiceDefinition:
    """The sidecar at its port, with Consul's two checks where its definition brings none of its own."""
    service = _with_default_addresses(msgspec.structs.replace(sidecar.service, port=port))
    if sidecar.checks:
        return ServiceDefinition(service, sidecar.checks)
    proxy = service.proxy or Proxy()
    host = (service.address or proxy.local_service_address or "127.0.0.1").strip("[]")
    address = join_address((host, port))
    definitions = (
        CheckDefinition(name="Connect Sidecar Listening", tcp=address, interval_s=SIDECAR_CHECK_INTERVAL_S),
        CheckDefinition(name=f"Connect Sidecar Aliasing {parent.service_id}", alias_service=parent.service_id),
    )
    return ServiceDefinition(service, _identified(definitions, service))


def _embedded_checks(fields: Fields, service: Service) -> tuple[CheckDefinition, ...]:
    bodies = fields.items("Checks")
    if _holds_something(fields.raw("Check")):
        bodies = [fields.raw("Check"), *bodies]
    if len(bodies) > CHECKS_MAX:
        raise InvalidRequest(f"Invalid check: more than {CHECKS_MAX} checks")
    return _identified(tuple(_embedded_check(body) for body in bodies), service)


def _embedded_check(body: object) -> CheckDefinition:
    fields = Fields(body, _CHECK_FIELDS, where="Check")
    if fields.text("Status") and fields.text("Status") not in _STATUSES:
        raise InvalidRequest("Status for checks must 'passing', 'warning', 'critical'")
    try:
        return _check(fields)
    except InvalidRequest as error:
        raise InvalidRequest(f"Invalid check: {error}") from None


def _identified(checks: tuple[CheckDefinition, ...], service: Service) -> tuple[CheckDefinition, ...]:
    """With Consul's IDs and names for those that have none, all bound to the service."""
    result: list[CheckDefinition] = []
    for number, check in enumerate(checks, 1):
        generated = f"service:{service.service_id}" + (f":{number}" if len(checks) > 1 else "")
        result.append(
            msgspec.structs.replace(
                check,
                check_id=check.check_id or generated,
                name=check.name or f"Service '{service.service}' check",
                service_id=service.service_id,
            )
        )
    ids = [check.check_id for check in result]
    if len(set(ids)) != len(ids):
        raise InvalidRequest("Invalid check: two checks of the service have the same ID")
    return tuple(result)


def check_definition(body: object) -> CheckDefinition:
    """A check registered by itself, through the API or a configuration file. Raises MalformedJson, InvalidRequest."""
    fields = Fields(body, _CHECK_FIELDS)
    if not fields.text("Name"):
        raise InvalidRequest("Missing check name")
    if fields.text("Status") and fields.text("Status") not in _STATUSES:
        raise InvalidRequest("Bad check status")
    try:
        check = _check(fields)
    except InvalidRequest as error:
        raise InvalidRequest(f"Invalid check: {error}") from None
    return msgspec.structs.replace(check, check_id=check.check_id or check.name)


def _check(fields: Fields) -> CheckDefinition:
    """One check on its own. Raises InvalidRequest without the "Invalid check" prefix."""
    if fields.items("ScriptArgs") or fields.items("Args"):
        raise InvalidRequest("Scripts are disabled on this agent: script checks are not supported yet")
    _refuse_later(fields, _CHECK_LATER, "check")
    _refuse_tenancy(fields)
    if fields.text("ID") and fields.text("CheckID") and fields.text("ID") != fields.text("CheckID"):
        raise InvalidRequest("ID and CheckID differ")
    deregister_s = fields.duration_s("DeregisterCriticalServiceAfter")
    interval_s = fields.duration_s("Interval")
    check = CheckDefinition(
        name=fields.text("Name"),
        check_id=fields.text("CheckID") or fields.text("ID"),
        service_id=fields.text("ServiceID"),
        notes=fields.text("Notes"),
        status=cast(CheckStatus | Literal[""], fields.text("Status")),
        http=fields.text("HTTP"),
        method=fields.text("Method"),
        header=_headers(fields),
        body=fields.text("Body"),
        disable_redirects=fields.boolean("DisableRedirects"),
        tls_server_name=fields.text("TLSServerName"),
        tls_skip_verify=fields.boolean("TLSSkipVerify"),
        tcp=fields.text("TCP"),
        ttl_s=fields.duration_s("TTL"),
        alias_node=fields.text("AliasNode"),
        alias_service=fields.text("AliasService"),
        interval_s=max(interval_s, CHECK_INTERVAL_S_MIN) if interval_s > 0 else interval_s,
        timeout_s=fields.duration_s("Timeout"),
        success_before_passing=fields.integer("SuccessBeforePassing", low=0, high=2**31 - 1),
        failures_before_warning=fields.integer("FailuresBeforeWarning", low=0, high=2**31 - 1),
        failures_before_critical=fields.integer("FailuresBeforeCritical", low=0, high=2**31 - 1),
        deregister_critical_service_after_s=max(deregister_s, DEREGISTER_AFTER_S_MIN) if deregister_s > 0 else 0.0,
        output_bytes_max=fields.integer("OutputMaxSize"),
    )
    _validate_check(check)
    return check


def _headers(fields: Fields) -> dict[str, tuple[str, ...]]:
    headers: dict[str, tuple[str, ...]] = {}
    for name, values in fields.mapping("Header").items():
        inner = Fields({"values": values}, ("values",), where=f"Header[{name}]")
        headers[name] = inner.texts("values")
        if not name or any(character in "\r\n\0" for text in (name, *headers[name]) for character in text):
            raise InvalidRequest(f"header {name!r} is malformed")
    return headers


def _validate_check(check: CheckDefinition) -> None:
    kinds = [bool(check.http), bool(check.tcp), bool(check.alias_node or check.alias_service)]
    timed = bool(check.http or check.tcp)
    if sum(kinds) > 1:
        raise InvalidRequest("a check has one type: HTTP, TCP, TTL or alias")
    if len(check.check_id.encode()) > CHECK_ID_BYTES_MAX or any(character < " " for character in check.check_id):
        raise InvalidRequest(f"CheckID is longer than {CHECK_ID_BYTES_MAX} bytes or holds control characters")
    if check.output_bytes_max < 0:
        raise InvalidRequest("OutputMaxSize must be positive")
    if check.timeout_s < 0 or check.interval_s < 0:
        raise InvalidRequest("Interval and Timeout must not be negative")
    if check.alias_node or check.alias_service:
        if check.interval_s:
            raise InvalidRequest("Interval cannot be set for Alias checks")
        if check.ttl_s:
            raise InvalidRequest("TTL cannot be set for Alias checks")
    elif timed:
        if check.ttl_s:
            raise InvalidRequest("Interval and TTL cannot both be specified")
        if check.interval_s <= 0:
            raise InvalidRequest("Interval must be > 0 for HTTP, H2PING, or TCP checks")
    else:
        if check.interval_s and check.ttl_s:
            raise InvalidRequest("Interval and TTL cannot both be specified")
        if check.ttl_s <= 0:
            raise InvalidRequest("TTL must be > 0 for TTL checks")
    if check.http and not check.http.startswith(("http://", "https://")):
        raise InvalidRequest(f"HTTP {check.http!r} is not an http or https URL")
    if check.tcp and split_address(check.tcp) is None:
        raise InvalidRequest(f"TCP {check.tcp!r} is not host:port")
    if check.failures_before_warning > check.failures_before_critical:
        raise InvalidRequest("FailuresBeforeWarning can't be higher than FailuresBeforeCritical")


def check_row(definition: CheckDefinition, *, node: str, service: Service | None, status: CheckStatus) -> Check:
    """The catalog row of a check that has just been defined; how to run it (headers, bodies) stays on this host."""
    return Check(
        node=node,
        check_id=definition.check_id,
        name=definition.name,
        status=status,
        notes=definition.notes,
        service_id=definition.service_id,
        service_name=service.service if service else "",
        service_tags=service.tags if service else (),
        type=definition.type,
        interval=format_duration(definition.interval_s) if definition.interval_s else "",
        timeout=format_duration(definition.timeout_s) if definition.timeout_s else "",
    )


def configured_services(raw: Iterable[RawDefinition]) -> tuple[ServiceDefinition, ...]:
    """The services of the configuration files. Raises ConfigError naming file and entry."""
    return tuple(_configured(each, service_definition) for each in raw)


def configured_checks(raw: Iterable[RawDefinition]) -> tuple[CheckDefinition, ...]:
    """The checks of the configuration files. Raises ConfigError naming file and entry."""
    return tuple(_configured(each, check_definition) for each in raw)


def _configured(raw: RawDefinition, read: Callable[[object], DefinitionT]) -> DefinitionT:
    try:
        return read(raw.body)
    except (MalformedJson, InvalidRequest) as error:
        raise ConfigError(f"{raw.source}: {error}") from error
