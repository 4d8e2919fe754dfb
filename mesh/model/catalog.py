"""Nodes, services and what a registration says: the catalog's rows."""

from typing import Literal

import msgspec

# What JSON can carry: opaque configuration that the mesh stores and passes on.
JsonValue = None | bool | int | float | str | list["JsonValue"] | dict[str, "JsonValue"]

ServiceKind = Literal["", "connect-proxy", "mesh-gateway", "terminating-gateway", "ingress-gateway", "api-gateway"]


class Weights(msgspec.Struct, frozen=True):
    """Share of traffic by health: used by DNS SRV answers and by the balancer."""

    passing: int = 1
    warning: int = 1


class ServiceAddress(msgspec.Struct, frozen=True):
    address: str
    port: int


class Upstream(msgspec.Struct, frozen=True):
    """A declared dependency: the sidecar listens on `local_bind_*` and carries connections to the destination."""

    destination_name: str
    destination_type: Literal["service", "prepared_query"] = "service"
    datacenter: str = ""
    local_bind_address: str = ""  # empty: 127.0.0.1
    local_bind_port: int = 0
    local_bind_socket_path: str = ""
    config: dict[str, object] = {}
    mesh_gateway_mode: str = ""


class Proxy(msgspec.Struct, frozen=True):
    """What a `connect-proxy` service stands before, and where it may go."""

    destination_service_name: str = ""
    destination_service_id: str = ""
    local_service_address: str = ""
    local_service_port: int = 0
    local_service_socket_path: str = ""
    mode: Literal["", "direct", "transparent"] = ""
    config: dict[str, object] = {}
    upstreams: tuple[Upstream, ...] = ()
    mesh_gateway_mode: str = ""


class Node(msgspec.Struct, frozen=True):
    """A host of the catalog. `node_id` is a UUID or empty."""

    node: str
    address: str
    node_id: str = ""
    datacenter: str = ""
    tagged_addresses: dict[str, str] = {}
    meta: dict[str, str] = {}
    create_index: int = 0
    modify_index: int = 0


class Service(msgspec.Struct, frozen=True):
    """One instance of a service on a node. `service_id` is unique per node; `address` empty means the node's."""

    service: str
    service_id: str
    kind: ServiceKind = ""
    tags: tuple[str, ...] = ()
    address: str = ""
    tagged_addresses: dict[str, ServiceAddress] = {}
    meta: dict[str, str] = {}
    port: int = 0
    socket_path: str = ""
    weights: Weights = Weights()
    enable_tag_override: bool = False
    proxy: Proxy | None = None  # present exactly when kind is not ""
    connect_native: bool = False
    create_index: int = 0
    modify_index: int = 0


class ServiceNode(msgspec.Struct, frozen=True):
    """A service instance together with its node: a row of `/v1/catalog/service/:service`."""

    node: Node
    service: Service


class NodeServices(msgspec.Struct, frozen=True):
    """A node and every service on it, by service ID ascending."""

    node: Node
    services: tuple[Service, ...]
