"""A sidecar's definition: what it says, what its parent gives it, and Consul's defaults for the rest."""

import msgspec

from agent.addresses import join_address
from agent.definitions.check import embedded_checks, identified
from agent.definitions.service import (
    SERVICE_FIELDS,
    ServiceDefinition,
    read_service,
    validate_service,
    with_default_addresses,
)
from agent.strict_json import Fields
from mesh.errors import InvalidRequest
from mesh.model.catalog import Proxy, Service
from mesh.model.check import CheckDefinition

SIDECAR_SUFFIX = "-sidecar-proxy"
SIDECAR_CHECK_INTERVAL_S = 10.0


def sidecar_definition(value: object, parent: Service) -> ServiceDefinition:
    """The sidecar's own definition with everything it takes from its parent, except a port not asked for."""
    fields = Fields(value, SERVICE_FIELDS, where="SidecarService")
    connect = Fields(fields.raw("Connect"), ("Native", "SidecarService"), where="SidecarService.Connect")
    if "SidecarService" in connect:
        raise InvalidRequest("Invalid SidecarService: it cannot have a SidecarService of its own")
    if connect.boolean("Native"):
        raise InvalidRequest("A Proxy cannot also be Connect Native, only typical services")
    if fields.text("Kind") not in ("", "connect-proxy"):
        raise InvalidRequest("Invalid SidecarService: its Kind can only be connect-proxy")
    given = read_service(fields)
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
        validate_service(service if service.port or service.socket_path else msgspec.structs.replace(service, port=1))
    except InvalidRequest as error:
        raise InvalidRequest(f"Invalid SidecarService: {error}") from None
    return ServiceDefinition(service, embedded_checks(fields, service))


def with_sidecar_port(sidecar: ServiceDefinition, parent: Service, port: int) -> ServiceDefinition:
    """The sidecar at its port, with Consul's two checks where its definition brings none of its own."""
    service = with_default_addresses(msgspec.structs.replace(sidecar.service, port=port))
    if sidecar.checks:
        return ServiceDefinition(service, sidecar.checks)
    proxy = service.proxy or Proxy()
    host = (service.address or proxy.local_service_address or "127.0.0.1").strip("[]")
    address = join_address((host, port))
    definitions = (
        CheckDefinition(name="Connect Sidecar Listening", tcp=address, interval_s=SIDECAR_CHECK_INTERVAL_S),
        CheckDefinition(name=f"Connect Sidecar Aliasing {parent.service_id}", alias_service=parent.service_id),
    )
    return ServiceDefinition(service, identified(definitions, service))
