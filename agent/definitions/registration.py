"""A whole registration: a service with its checks and its sidecar, from an API body or a configuration file."""

from collections.abc import Callable, Iterable
from typing import TypeVar

import msgspec

from agent.config.values import RawDefinition
from agent.definitions.check import check_definition, embedded_checks
from agent.definitions.service import (
    SERVICE_FIELDS,
    ServiceDefinition,
    read_service,
    validate_service,
    with_default_addresses,
)
from agent.definitions.sidecar import sidecar_definition
from agent.strict_json import Fields, MalformedJson
from mesh.errors import ConfigError, InvalidRequest
from mesh.model.catalog import Proxy, Service
from mesh.model.check import CheckDefinition

DefinitionT = TypeVar("DefinitionT")


def service_definition(body: object) -> ServiceDefinition:
    """A service definition. Raises MalformedJson, InvalidRequest."""
    fields = Fields(body, SERVICE_FIELDS)
    if not fields.text("Name"):
        raise InvalidRequest("Missing service name")
    service = read_service(fields)
    connect = Fields(fields.raw("Connect"), ("Native", "SidecarService"), where="Connect")
    if connect.boolean("Native"):
        if service.kind == "connect-proxy":
            raise InvalidRequest("A Proxy cannot also be Connect Native, only typical services")
        service = msgspec.structs.replace(service, connect_native=True)
    service = _with_proxy(service)
    validate_service(service)
    checks = embedded_checks(fields, service)
    sidecar = None
    if "SidecarService" in connect:
        if service.kind:
            raise InvalidRequest("Invalid SidecarService: only a typical service can have one, not a proxy or gateway")
        sidecar = sidecar_definition(connect.raw("SidecarService"), service)
    return ServiceDefinition(with_default_addresses(service), checks, sidecar)


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
