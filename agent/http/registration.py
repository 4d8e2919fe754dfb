"""Bodies of /v1/catalog/register and deregister -> commands.

Unlike an agent's registrations these are rows as they will stand in the catalog: nothing is defaulted for an agent,
and a check carries its state, not a way to run it.
"""

from typing import Literal, cast

from agent.definitions import proxy_definition
from agent.definitions.fields import refuse_tenancy, tagged_addresses
from agent.strict_json import Fields
from mesh.errors import InvalidRequest, Refused
from mesh.model.catalog import Node, Proxy, Service, ServiceKind, Weights
from mesh.model.check import Check, CheckDefinition, CheckStatus
from mesh.model.command import Deregister, Register

_TENANCY = ("Namespace", "Partition", "PeerName")
_INDEXES = ("CreateIndex", "ModifyIndex")  # sent back by clients that read a row first; never taken
_REGISTER = (
    "Datacenter", "ID", "Node", "Address", "TaggedAddresses", "NodeMeta", "Service", "Check", "Checks",
    "SkipNodeUpdate", "Locality", *_INDEXES, *_TENANCY,
)  # fmt: skip
_DEREGISTER = ("Datacenter", "Node", "Address", "ServiceID", "CheckID", *_TENANCY)
_SERVICE = (
    "Kind", "ID", "Service", "Tags", "Address", "TaggedAddresses", "Meta", "Port", "Ports", "SocketPath", "Weights",
    "EnableTagOverride", "Proxy", "Connect", "ContentHash", "Datacenter", "Locality", *_INDEXES, *_TENANCY,
)  # fmt: skip
_CHECK = (
    "Node", "CheckID", "Name", "Status", "Notes", "Output", "ServiceID", "ServiceName", "ServiceTags", "Type",
    "Interval", "Timeout", "ExposedPort", "Definition", *_INDEXES, *_TENANCY,
)  # fmt: skip
_DEFINITION = (
    "HTTP", "Header", "Method", "Body", "DisableRedirects", "TLSServerName", "TLSSkipVerify", "TCP", "TCPUseTLS",
    "UDP", "GRPC", "GRPCUseTLS", "OSService", "H2PING", "H2PingUseTLS", "AliasNode", "AliasService", "TTL",
    "Interval", "IntervalDuration", "Timeout", "TimeoutDuration", "DeregisterCriticalServiceAfter",
    "DeregisterCriticalServiceAfterDuration",
)  # fmt: skip
_KINDS = ("connect-proxy", "mesh-gateway", "terminating-gateway", "ingress-gateway", "api-gateway")
_STATUSES = ("passing", "warning", "critical")


def register_command(body: object, datacenter: str) -> tuple[Register, str]:
    """The command, and the datacenter that the body names, if any. Raises MalformedJson, InvalidRequest, Refused."""
    fields = Fields(body, _REGISTER)
    _refuse_peers_and_tenancy(fields)
    node_name, address = fields.text("Node"), fields.text("Address")
    skip_node_update = fields.boolean("SkipNodeUpdate")
    if not node_name:
        raise Refused("Must provide node")
    if not address and not skip_node_update:
        raise Refused("Must provide address if SkipNodeUpdate is not set")
    node = Node(
        node=node_name,
        address=address,
        node_id=fields.text("ID"),
        datacenter=datacenter,
        tagged_addresses=fields.text_map("TaggedAddresses"),
        meta=fields.text_map("NodeMeta"),
    )
    service = _service(Fields(fields.raw("Service"), _SERVICE, where="Service")) if "Service" in fields else None
    raw_checks = [*([fields.raw("Check")] if "Check" in fields else []), *fields.items("Checks")]
    checks = tuple(
        _check(Fields(raw, _CHECK, where=f"Checks[{position}]"), node_name, service)
        for position, raw in enumerate(raw_checks)
    )
    return Register(node, service, checks, skip_node_update), fields.text("Datacenter")


def deregister_command(body: object) -> tuple[Deregister, str]:
    """The command, and the datacenter that the body names. Raises MalformedJson, InvalidRequest, Refused."""
    fields = Fields(body, _DEREGISTER)
    _refuse_peers_and_tenancy(fields)
    if not fields.text("Node"):
        raise Refused("Must provide node")
    command = Deregister(fields.text("Node"), fields.text("ServiceID"), fields.text("CheckID"))
    return command, fields.text("Datacenter")


def _refuse_peers_and_tenancy(fields: Fields) -> None:
    refuse_tenancy(fields)
    if fields.text("PeerName"):
        raise InvalidRequest("PeerName is not supported: this cluster has no peers")


def _service(fields: Fields) -> Service:
    _refuse_peers_and_tenancy(fields)
    if fields.items("Ports"):
        raise InvalidRequest("Ports of a service is not supported; give Port")
    name = fields.text("Service")
    if not name and not fields.text("ID"):
        raise Refused("Must provide service name with ID")
    weights = Fields(fields.raw("Weights"), ("Passing", "Warning"), where="Service.Weights")
    connect = Fields(fields.raw("Connect"), ("Native", "SidecarService", "PeerMeta"), where="Service.Connect")
    if "SidecarService" in connect and connect.raw("SidecarService") != {}:
        raise InvalidRequest("Connect.SidecarService belongs in a registration with an agent")
    kind = cast(ServiceKind, fields.choice("Kind", _KINDS))
    proxy = proxy_definition(fields.raw("Proxy")) if "Proxy" in fields else Proxy()
    return Service(
        service=name,
        service_id=fields.text("ID") or name,
        kind=kind,
        tags=fields.texts("Tags"),
        address=fields.text("Address"),
        tagged_addresses=tagged_addresses(fields),
        meta=fields.text_map("Meta"),
        port=fields.integer("Port", low=0, high=65535),
        socket_path=fields.text("SocketPath"),
        weights=Weights(
            weights.integer("Passing", low=0, high=65535) if "Passing" in weights else 1,
            weights.integer("Warning", low=0, high=65535) if "Warning" in weights else 1,
        ),
        enable_tag_override=fields.boolean("EnableTagOverride"),
        proxy=proxy if kind else None,
        connect_native=connect.boolean("Native"),
    )


def _check(fields: Fields, node_name: str, service: Service | None) -> Check:
    _refuse_peers_and_tenancy(fields)
    if fields.text("Node") not in ("", node_name):
        raise Refused(f"Node {fields.text('Node')!r} of a check is not the node {node_name!r} that is registered")
    name = fields.text("Name")
    check_id = fields.text("CheckID") or name
    if not check_id:
        raise Refused("Must provide a CheckID or a Name for each check")
    service_id = fields.text("ServiceID")
    of_service = service if service is not None and service_id == service.service_id else None
    return Check(
        node=node_name,
        check_id=check_id,
        name=name,
        status=cast(CheckStatus, fields.choice("Status", _STATUSES) or "critical"),
        notes=fields.text("Notes"),
        output=fields.text("Output"),
        service_id=service_id,
        service_name=of_service.service if of_service is not None else fields.text("ServiceName"),
        service_tags=of_service.tags if of_service is not None else fields.texts("ServiceTags"),
        type=fields.text("Type"),
        interval=fields.text("Interval"),
        timeout=fields.text("Timeout"),
        exposed_port=fields.integer("ExposedPort", low=0, high=65535),
        definition=_definition(fields.raw("Definition")) if fields.mapping("Definition") else None,
    )


def _definition(value: object) -> CheckDefinition:
    """For external monitors to read; of the kinds of check, those that an agent could run too."""
    fields = Fields(value, _DEFINITION, where="Definition")
    for name in ("UDP", "GRPC", "OSService", "H2PING"):
        if fields.text(name):
            raise InvalidRequest(f"Definition.{name} is not supported")
    header: dict[str, tuple[str, ...]] = {}
    for key in fields.mapping("Header"):
        header[key] = Fields(fields.mapping("Header"), tuple(fields.mapping("Header")), snake=False).texts(key)

    def duration_s(name: Literal["Interval", "Timeout", "DeregisterCriticalServiceAfter"]) -> float:
        return fields.duration_s(name) or fields.duration_s(f"{name}Duration")

    return CheckDefinition(
        http=fields.text("HTTP"),
        method=fields.text("Method"),
        header=header,
        body=fields.text("Body"),
        disable_redirects=fields.boolean("DisableRedirects"),
        tls_server_name=fields.text("TLSServerName"),
        tls_skip_verify=fields.boolean("TLSSkipVerify"),
        tcp=fields.text("TCP"),
        ttl_s=fields.duration_s("TTL"),
        alias_node=fields.text("AliasNode"),
        alias_service=fields.text("AliasService"),
        interval_s=duration_s("Interval"),
        timeout_s=duration_s("Timeout"),
        deregister_critical_service_after_s=duration_s("DeregisterCriticalServiceAfter"),
    )
