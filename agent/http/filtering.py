"""The `filter` parameter, on the endpoints that have it.

An expression sees rows with every field present: what the JSON leaves out because it is empty is empty here too, so
that `Kind == ""` selects the services that are no proxies.
"""

from collections.abc import Mapping, Sequence
from typing import Literal

from agent.http.request import ApiRequest
from agent.http.shapes import JsonObject
from mesh.state.filter import Filter

RowKind = Literal["node", "service-node", "node-service", "check", "service-health", "intention", "config-entry"]

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


def filtered(request: ApiRequest, rows: Sequence[JsonObject], kind: RowKind) -> list[JsonObject]:
    """The rows that `?filter=` selects, all without it. Raises InvalidRequest for a bad expression."""
    expression = request.params.get("filter")
    if not expression:
        return list(rows)
    wanted = Filter(expression)
    return [row for row in rows if wanted.matches(_completed(row, kind))]


def filtered_map(request: ApiRequest, rows: Mapping[str, JsonObject], kind: RowKind) -> dict[str, JsonObject]:
    """As `filtered`, for rows by name."""
    expression = request.params.get("filter")
    if not expression:
        return dict(rows)
    wanted = Filter(expression)
    return {name: row for name, row in rows.items() if wanted.matches(_completed(row, kind))}


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
