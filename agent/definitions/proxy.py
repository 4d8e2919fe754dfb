"""The `Proxy` of a definition: what a sidecar stands for, and its upstreams."""

from typing import Literal, cast

from agent.definitions.fields import refuse_unsupported
from agent.strict_json import Fields
from mesh.errors import InvalidRequest
from mesh.model.catalog import Proxy, Service, Upstream

UPSTREAMS_MAX = 1024
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


def proxy_definition(value: object) -> Proxy:
    """A `Proxy` object. Raises MalformedJson, InvalidRequest."""
    fields = Fields(value, _PROXY_FIELDS, where="Proxy")
    refuse_unsupported(fields, _PROXY_LATER, "proxy")
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
    refuse_unsupported(fields, ("DestinationPeer", "LocalBindSocketMode"), "upstream")
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


def validate_proxy(service: Service) -> None:
    """What Consul requires of a connect-proxy. Raises InvalidRequest with its texts."""
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
