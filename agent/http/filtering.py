"""The `filter` parameter, on the endpoints that have it."""

from collections.abc import Mapping, Sequence
from typing import Literal

from agent.http.request import ApiRequest
from agent.http.shapes import JsonObject

RowKind = Literal["node", "service-node", "node-service", "check", "service-health", "intention", "config-entry"]


def filtered(request: ApiRequest, rows: Sequence[JsonObject], kind: RowKind) -> list[JsonObject]:
    return list(rows)


def filtered_map(request: ApiRequest, rows: Mapping[str, JsonObject], kind: RowKind) -> dict[str, JsonObject]:
    return dict(rows)
