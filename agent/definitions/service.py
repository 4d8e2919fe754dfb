"""The fields of a service or sidecar definition, and what Consul requires of them together."""

import ipaddress
from typing import cast, get_args

import msgspec

from agent.config.loader import meta_problem
from agent.definitions.fields import refuse_tenancy, refuse_unsupported, tagged_addresses
from agent.definitions.proxy import proxy_definition, validate_proxy
from agent.strict_json import Fields
from mesh.errors import InvalidRequest
from mesh.model.catalog import Service, ServiceAddress, ServiceKind, Weights
from mesh.model.check import CheckDefinition
from mesh.names import SERVICE_NAME_BYTES_MAX

_KINDS = get_args(ServiceKind)
SERVICE_FIELDS = (
    "Kind", "ID", "Name", "Tags", "Address", "TaggedAddresses", "Meta", "Port", "Ports", "SocketPath", "Check",
    "Checks", "Weights", "Token", "EnableTagOverride", "Proxy", "Connect", "Locality", "Namespace", "Partition",
)  # fmt: skip


class ServiceDefinition(msgspec.Struct, frozen=True):
    """A service with the checks it brings, IDs assigned. `sidecar` is still without a port when none was asked for."""

    service: Service
    checks: tuple[CheckDefinition, ...] = ()
    sidecar: "ServiceDefinition | None" = None


def read_service(fields: Fields) -> Service:
    """The fields of a service or sidecar definition, not yet validated together."""
    refuse_unsupported(fields, ("Ports", "Locality"), "service")
    refuse_tenancy(fields)
    name = fields.text("Name")
    weights = Fields(fields.raw("Weights"), ("Passing", "Warning"), where="Weights")
    return Service(
        service=name,
        service_id=fields.text("ID") or name,
        kind=cast(ServiceKind, _kind(fields.text("Kind"))),
        tags=fields.texts("Tags"),
        address=fields.text("Address"),
        tagged_addresses=tagged_addresses(fields),
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


def with_default_addresses(service: Service) -> Service:
    """With the tagged addresses that Consul derives from an IP address, unless they are given."""
    try:
        version = ipaddress.ip_address(service.address).version
    except ValueError:
        return service
    own = ServiceAddress(service.address, service.port)
    derived = {f"lan_ipv{version}": own, f"wan_ipv{version}": own}
    return msgspec.structs.replace(service, tagged_addresses=derived | service.tagged_addresses)


def validate_service(service: Service) -> None:
    """What Consul requires of a service as a whole. Raises InvalidRequest with its texts."""
    for what, text in (("name", service.service), ("ID", service.service_id)):
        if len(text.encode()) > SERVICE_NAME_BYTES_MAX:
            raise InvalidRequest(f"Invalid service {what}: longer than {SERVICE_NAME_BYTES_MAX} bytes")
        if any(character < " " or character == "\x7f" for character in text):
            raise InvalidRequest(f"Invalid service {what}: it holds control characters")
    if _is_unspecified(service.address):
        raise InvalidRequest("Invalid service address")
    if any(_is_unspecified(address.address) for address in service.tagged_addresses.values()):
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
        validate_proxy(service)


def _is_unspecified(address: str) -> bool:
    """Whether the text is 0.0.0.0 or ::, an address that nobody can call."""
    try:
        return ipaddress.ip_address(address.strip("[]")).is_unspecified
    except ValueError:
        return False
