"""The `filter` parameter, on the endpoints that have it.

An expression sees rows with every field present: what the JSON leaves out because it is empty is empty here too, so
that `Kind == ""` selects the services that are no proxies.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Literal

from agent.http.request import ApiRequest
from agent.http.shapes import JsonObject
from mesh.errors import InvalidRequest, Refused
from mesh.state.filter import FieldTree, Filter

RowKind = Literal[
    "node", "service-node", "node-service", "check", "service-health", "intention", "config-entry", "member"
]  # fmt: skip

_PROXY = {
    "DestinationServiceName": "",
    "DestinationServiceID": "",
    "LocalServiceAddress": "",
    "LocalServicePort": 0,
    "LocalServiceSocketPath": "",
    "Upstreams": [],
}
_SERVICE = {"Kind": "", "SocketPath": "", "TaggedAddresses": {}}
_CONNECT = {"Native": False}
_INTENTION = {"ID": "", "Description": "", "Action": "", "Meta": {}}


def _fields(*names: str, **inner: FieldTree | None) -> FieldTree:
    """Fields without known fields inside of them, and those with."""
    return {**dict.fromkeys(names), **inner}


_PROXY_FIELDS = _fields(
    "DestinationServiceName", "DestinationServiceID", "LocalServiceAddress", "LocalServicePort",
    "LocalServiceSocketPath", "Mode",
    MeshGateway=_fields("Mode"),
    Upstreams=_fields(
        "DestinationType", "DestinationName", "Datacenter", "LocalBindAddress", "LocalBindPort", "LocalBindSocketPath",
        MeshGateway=_fields("Mode"),
    ),
)  # fmt: skip
_WEIGHT_FIELDS = _fields("Passing", "Warning")
_NODE_FIELDS = _fields("ID", "Node", "Address", "Datacenter", "TaggedAddresses", "Meta", "PeerName")
_NODE_SERVICE_FIELDS = _fields(
    "Kind", "ID", "Service", "Tags", "Address", "TaggedAddresses", "Meta", "Port", "SocketPath", "EnableTagOverride",
    "PeerName", Weights=_WEIGHT_FIELDS, Proxy=_PROXY_FIELDS, Connect=_fields("Native"),
)  # fmt: skip
_CHECK_FIELDS = _fields(
    "Node", "CheckID", "Name", "Status", "Notes", "Output", "ServiceID", "ServiceName", "ServiceTags", "Type",
    "Interval", "Timeout", "ExposedPort", "PeerName",
)  # fmt: skip

# What a selector may name. As in Consul, a row's indexes, a proxy's opaque configuration, a check's definition and an
# intention's permissions cannot be filtered on.
_SELECTABLE: dict[RowKind, FieldTree | None] = {
    "node": _NODE_FIELDS,
    "service-node": _fields(
        "ID", "Node", "Address", "Datacenter", "TaggedAddresses", "NodeMeta", "ServiceKind", "ServiceID", "ServiceName",
        "ServiceTags", "ServiceAddress", "ServiceTaggedAddresses", "ServiceMeta", "ServicePort", "ServiceSocketPath",
        "ServiceEnableTagOverride", "PeerName",
        ServiceWeights=_WEIGHT_FIELDS, ServiceProxy=_PROXY_FIELDS, ServiceConnect=_fields("Native"),
    ),
    "node-service": _NODE_SERVICE_FIELDS,
    "check": _CHECK_FIELDS,
    "service-health": _fields(Node=_NODE_FIELDS, Service=_NODE_SERVICE_FIELDS, Checks=_CHECK_FIELDS),
    "intention": _fields(
        "ID", "Description", "SourceNS", "SourceName", "SourceType", "DestinationNS", "DestinationName", "Action",
        "Meta", "Precedence",
    ),
    "config-entry": None,  # each kind has fields of its own
    "member": _fields(
        "Name", "Addr", "Port", "Tags", "Status", "ProtocolMin", "ProtocolMax", "ProtocolCur", "DelegateMin",
        "DelegateMax", "DelegateCur",
    ),
}  # fmt: skip


def filtered(request: ApiRequest, rows: Sequence[JsonObject], kind: RowKind) -> list[JsonObject]:
    """The rows that `?filter=` selects, all without it. Raises Refused for a bad expression, as Consul answers 500."""
    wanted = _matcher(request, kind)
    return [row for row in rows if wanted(row)]


def filtered_map(request: ApiRequest, rows: Mapping[str, JsonObject], kind: RowKind) -> dict[str, JsonObject]:
    """As `filtered`, for rows by name."""
    wanted = _matcher(request, kind)
    return {name: row for name, row in rows.items() if wanted(row)}


def _matcher(request: ApiRequest, kind: RowKind) -> Callable[[JsonObject], bool]:
    expression = request.params.get("filter")
    if not expression:
        return lambda row: True
    try:
        wanted = Filter(expression, fields=_SELECTABLE[kind])
    except InvalidRequest as error:
        raise Refused(str(error)) from error

    def matches(row: JsonObject) -> bool:
        try:
            return wanted.matches(_completed(row, kind))
        except InvalidRequest as error:
            raise Refused(str(error)) from error

    return matches


def _completed(row: JsonObject, kind: RowKind) -> JsonObject:
    match kind:
        case "node-service":
            return _completed_service(row)
        case "service-health":
            service = row["Service"]
            return row | {"Service": _completed_service(service)} if isinstance(service, dict) else row
        case "service-node":
            optional: JsonObject = {"ServiceTaggedAddresses": {}}
            for name, fields in (("ServiceProxy", _PROXY), ("ServiceConnect", _CONNECT)):
                inner = row[name]
                optional[name] = fields | inner if isinstance(inner, dict) else inner
            return row | optional | {name: row[name] for name in ("ServiceTaggedAddresses",) if name in row}
        case "intention":
            return _INTENTION | row
        case "config-entry":
            return {"Meta": {}} | row
    return row


def _completed_service(row: JsonObject) -> JsonObject:
    proxy, connect = row["Proxy"], row["Connect"]
    completed = _SERVICE | row
    if isinstance(proxy, dict):
        completed["Proxy"] = _PROXY | proxy
    if isinstance(connect, dict):
        completed["Connect"] = _CONNECT | connect
    return completed
