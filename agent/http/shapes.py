"""Model values as Consul's JSON: exact names, exact places for what may be missing. Lists are never null."""

from datetime import UTC, datetime

from mesh.model.ca import CaRoot, CaRoots
from mesh.model.catalog import Node, Proxy, Service, ServiceAddress, ServiceNode, Upstream
from mesh.model.check import Check, CheckDefinition, ServiceHealth
from mesh.model.config_entry import ConfigEntry
from mesh.model.duration import format_duration
from mesh.model.intention import MODE_KEY, Intention
from mesh.model.kv import KvEntry

JsonObject = dict[str, object]

_NAMESPACE = "default"
_ZERO_TIME = "0001-01-01T00:00:00Z"


def rfc3339(unix_s: float) -> str:
    """A Unix time as Go prints it in UTC: microseconds without trailing zeros; Go's zero time for 0."""
    if unix_s <= 0:
        return _ZERO_TIME
    moment = datetime.fromtimestamp(unix_s, UTC)
    fraction = f".{moment.microsecond:06}".rstrip("0") if moment.microsecond else ""
    return f"{moment:%Y-%m-%dT%H:%M:%S}{fraction}Z"


def node_shape(node: Node) -> JsonObject:
    """A row of /v1/catalog/nodes."""
    return {
        "ID": node.node_id,
        "Node": node.node,
        "Address": node.address,
        "Datacenter": node.datacenter,
        "TaggedAddresses": dict(sorted(node.tagged_addresses.items())),
        "Meta": dict(sorted(node.meta.items())),
        "CreateIndex": node.create_index,
        "ModifyIndex": node.modify_index,
    }


def service_node_shape(row: ServiceNode) -> JsonObject:
    """A row of /v1/catalog/service/:service; the indexes are the service's."""
    node, service = row.node, row.service
    shape: JsonObject = {
        "ID": node.node_id,
        "Node": node.node,
        "Address": node.address,
        "Datacenter": node.datacenter,
        "TaggedAddresses": dict(sorted(node.tagged_addresses.items())),
        "NodeMeta": dict(sorted(node.meta.items())),
        "ServiceKind": service.kind,
        "ServiceID": service.service_id,
        "ServiceName": service.service,
        "ServiceTags": list(service.tags),
        "ServiceAddress": service.address,
        "ServiceWeights": _weights(service),
        "ServiceMeta": dict(sorted(service.meta.items())),
        "ServicePort": service.port,
        "ServiceSocketPath": service.socket_path,
        "ServiceEnableTagOverride": service.enable_tag_override,
        "ServiceProxy": proxy_shape(service.proxy),
        "ServiceConnect": _connect(service),
        "CreateIndex": service.create_index,
        "ModifyIndex": service.modify_index,
    }
    if service.tagged_addresses:
        shape["ServiceTaggedAddresses"] = tagged_addresses_shape(service.tagged_addresses)
    return shape


def node_service_shape(service: Service) -> JsonObject:
    """A service as /v1/catalog/node and /v1/health/service show it."""
    shape: JsonObject = {"Kind": service.kind} if service.kind else {}
    shape |= {"ID": service.service_id, "Service": service.service, "Tags": list(service.tags)}
    shape["Address"] = service.address
    if service.tagged_addresses:
        shape["TaggedAddresses"] = tagged_addresses_shape(service.tagged_addresses)
    shape |= {"Meta": dict(sorted(service.meta.items())), "Port": service.port}
    if service.socket_path:
        shape["SocketPath"] = service.socket_path
    return shape | {
        "Weights": _weights(service),
        "EnableTagOverride": service.enable_tag_override,
        "Proxy": proxy_shape(service.proxy),
        "Connect": _connect(service),
        "PeerName": "",
        "CreateIndex": service.create_index,
        "ModifyIndex": service.modify_index,
    }


def tagged_addresses_shape(addresses: dict[str, ServiceAddress]) -> JsonObject:
    """A service's addresses by tag."""
    return {tag: {"Address": one.address, "Port": one.port} for tag, one in sorted(addresses.items())}


def proxy_shape(proxy: Proxy | None) -> JsonObject:
    """A service's Proxy; of a service that is no proxy, what is always there."""
    proxy = proxy or Proxy()
    shape: JsonObject = {}
    for name, value in (
        ("DestinationServiceName", proxy.destination_service_name),
        ("DestinationServiceID", proxy.destination_service_id),
        ("LocalServiceAddress", proxy.local_service_address),
        ("LocalServicePort", proxy.local_service_port),
        ("LocalServiceSocketPath", proxy.local_service_socket_path),
    ):
        if value:
            shape[name] = value
    shape["Mode"] = proxy.mode
    if proxy.config:
        shape["Config"] = proxy.config
    if proxy.upstreams:
        shape["Upstreams"] = [upstream_shape(upstream) for upstream in proxy.upstreams]
    return shape | {"MeshGateway": _mesh_gateway(proxy.mesh_gateway_mode), "Expose": {}}


def upstream_shape(upstream: Upstream) -> JsonObject:
    """One upstream of a proxy."""
    shape: JsonObject = {
        "DestinationType": upstream.destination_type,
        "DestinationName": upstream.destination_name,
        "Datacenter": upstream.datacenter,
    }
    for name, value in (
        ("LocalBindAddress", upstream.local_bind_address),
        ("LocalBindPort", upstream.local_bind_port),
        ("LocalBindSocketPath", upstream.local_bind_socket_path),
        ("Config", upstream.config),
    ):
        if value:
            shape[name] = value
    return shape | {"MeshGateway": _mesh_gateway(upstream.mesh_gateway_mode)}


def check_shape(check: Check) -> JsonObject:
    """A row of /v1/health/checks and its like."""
    return {
        "Node": check.node,
        "CheckID": check.check_id,
        "Name": check.name,
        "Status": check.status,
        "Notes": check.notes,
        "Output": check.output,
        "ServiceID": check.service_id,
        "ServiceName": check.service_name,
        "ServiceTags": list(check.service_tags),
        "Type": check.type,
        "Interval": check.interval,
        "Timeout": check.timeout,
        "ExposedPort": check.exposed_port,
        "Definition": {} if check.definition is None else _definition(check.definition),
        "CreateIndex": check.create_index,
        "ModifyIndex": check.modify_index,
    }


def service_health_shape(row: ServiceHealth) -> JsonObject:
    """A row of /v1/health/service/:service."""
    return {
        "Node": node_shape(row.node),
        "Service": node_service_shape(row.service),
        "Checks": [check_shape(check) for check in row.checks],
    }


def kv_shape(entry: KvEntry) -> JsonObject:
    """A key; the value is base64, null when empty."""
    shape: JsonObject = {
        "LockIndex": entry.lock_index,
        "Key": entry.key,
        "Flags": entry.flags,
        "Value": entry.value or None,
    }
    if entry.session:
        shape["Session"] = entry.session
    return shape | {"CreateIndex": entry.create_index, "ModifyIndex": entry.modify_index}


def intention_shape(intention: Intention) -> JsonObject:
    """One rule."""
    shape: JsonObject = {}
    if intention.intention_id:
        shape["ID"] = intention.intention_id
    if intention.description:
        shape["Description"] = intention.description
    shape |= {
        "SourceNS": _NAMESPACE,
        "SourceName": intention.source,
        "DestinationNS": _NAMESPACE,
        "DestinationName": intention.destination,
        "SourceType": "consul",
    }
    if intention.action is not None:
        shape["Action"] = intention.action
    if intention.permissions:
        shape["Permissions"] = list(intention.permissions)
    meta = intention.meta | ({MODE_KEY: "audit"} if intention.audit else {})  # its entry's metadata may say it, too
    if meta:
        shape["Meta"] = dict(sorted(meta.items()))
    return shape | {
        "Precedence": intention.precedence,
        "CreatedAt": rfc3339(intention.created_at_s),
        "UpdatedAt": rfc3339(intention.updated_at_s),
        "CreateIndex": intention.create_index,
        "ModifyIndex": intention.modify_index,
    }


def config_entry_shape(entry: ConfigEntry) -> JsonObject:
    """A config entry: its own fields beside Kind and Name."""
    shape: JsonObject = {"Kind": entry.kind, "Name": entry.name} | entry.body
    if entry.meta:
        shape["Meta"] = dict(sorted(entry.meta.items()))
    return shape | {"CreateIndex": entry.create_index, "ModifyIndex": entry.modify_index}


def ca_roots_shape(roots: CaRoots) -> JsonObject:
    """/v1/connect/ca/roots; never a private key."""
    return {
        "ActiveRootID": roots.active_root_id,
        "TrustDomain": roots.trust_domain,
        "Roots": [_ca_root(root) for root in roots.roots],
    }


def _ca_root(root: CaRoot) -> JsonObject:
    return {
        "ID": root.root_id,
        "Name": root.name,
        "SerialNumber": root.serial_number,
        "SigningKeyID": root.signing_key_id,
        "ExternalTrustDomain": root.external_trust_domain,
        "NotBefore": rfc3339(root.not_before_s),
        "NotAfter": rfc3339(root.not_after_s),
        "RootCert": root.root_cert_pem,
        "IntermediateCerts": list(root.intermediate_certs_pem) or None,  # the one list that Consul leaves null
        "Active": root.active,
        "PrivateKeyType": root.private_key_type,
        "PrivateKeyBits": root.private_key_bits,
        "CreateIndex": root.create_index,
        "ModifyIndex": root.modify_index,
    }


def _weights(service: Service) -> JsonObject:
    return {"Passing": service.weights.passing, "Warning": service.weights.warning}


def _connect(service: Service) -> JsonObject:
    return {"Native": True} if service.connect_native else {}


def _mesh_gateway(mode: str) -> JsonObject:
    return {"Mode": mode} if mode else {}


def _definition(definition: CheckDefinition) -> JsonObject:
    """What a registration through the catalog said about how to run the check (read by external monitors)."""
    shape: JsonObject = {}
    for name, value in (
        ("HTTP", definition.http),
        ("Header", {key: list(values) for key, values in sorted(definition.header.items())}),
        ("Method", definition.method),
        ("Body", definition.body),
        ("DisableRedirects", definition.disable_redirects),
        ("TLSServerName", definition.tls_server_name),
        ("TLSSkipVerify", definition.tls_skip_verify),
        ("TCP", definition.tcp),
        ("AliasNode", definition.alias_node),
        ("AliasService", definition.alias_service),
    ):
        if value:
            shape[name] = value
    for name, seconds in (
        ("TTL", definition.ttl_s),
        ("Interval", definition.interval_s),
        ("Timeout", definition.timeout_s),
        ("DeregisterCriticalServiceAfter", definition.deregister_critical_service_after_s),
    ):
        if seconds:
            shape[name] = format_duration(seconds)
    return shape
