"""/v1/health: services with their checks, the most used reads of all."""

from collections.abc import Sequence
from typing import Literal, cast

from agent.http.family import StateFamily
from agent.http.filtering import filtered
from agent.http.request import ApiRequest, ApiResponse, Route
from agent.http.shapes import check_shape, service_health_shape
from mesh.errors import InvalidRequest
from mesh.model.check import CheckStatus
from mesh.model.query import ListChecksInState, ListNodeChecks, ListServiceChecks, ListServiceHealth

_STATES = frozenset(("any", "passing", "warning", "critical"))


class HealthApi(StateFamily):
    """Reads only; agents and the catalog's register endpoint write checks."""

    def routes(self) -> Sequence[Route]:
        return (
            Route("GET", "/v1/health/node/:node", self._node),
            Route("GET", "/v1/health/checks/:service", self._checks),
            Route("GET", "/v1/health/state/:state", self._state),
            Route("GET", "/v1/health/service/:service", self._service),
            Route("GET", "/v1/health/connect/:service", self._connect),
        )

    async def _node(self, request: ApiRequest) -> ApiResponse:
        rows, result = await self._read(request, ListNodeChecks(request.capture("node", "Missing node name")))
        return result.response(filtered(request, [check_shape(row) for row in rows], "check"))

    async def _checks(self, request: ApiRequest) -> ApiResponse:
        query = ListServiceChecks(
            service=request.capture("service", "Missing service name"), node_meta=request.params.node_meta()
        )
        rows, result = await self._read(request, query)
        return result.response(filtered(request, [check_shape(row) for row in rows], "check"))

    async def _state(self, request: ApiRequest) -> ApiResponse:
        state = request.capture("state", "Missing check state")
        if state not in _STATES:
            raise InvalidRequest(f"Invalid check state {state!r}; use any, passing, warning or critical")
        query = ListChecksInState(state=cast(CheckStatus | Literal["any"], state), node_meta=request.params.node_meta())
        rows, result = await self._read(request, query)
        return result.response(filtered(request, [check_shape(row) for row in rows], "check"))

    async def _service(self, request: ApiRequest) -> ApiResponse:
        return await self._instances(request, connect=False)

    async def _connect(self, request: ApiRequest) -> ApiResponse:
        return await self._instances(request, connect=True)

    async def _instances(self, request: ApiRequest, *, connect: bool) -> ApiResponse:
        query = ListServiceHealth(
            service=request.capture("service", "Missing service name"),
            tags=request.params.all("tag"),
            node_meta=request.params.node_meta(),
            passing_only=request.params.flag("passing"),
            connect=connect,
        )
        rows, result = await self._read(request, query)
        return result.response(filtered(request, [service_health_shape(row) for row in rows], "service-health"))
