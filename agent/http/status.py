"""/v1/status: who leads, who votes."""

from collections.abc import Sequence

from agent.http.family import StateFamily
from agent.http.request import ApiRequest, ApiResponse, Route, json_response


class StatusApi(StateFamily):
    """Answers even without a leader: that is when it is asked."""

    def routes(self) -> Sequence[Route]:
        return (
            Route("GET", "/v1/status/leader", self._leader),
            Route("GET", "/v1/status/peers", self._peers),
        )

    async def _leader(self, request: ApiRequest) -> ApiResponse:
        request.check_datacenter(self._datacenter)
        return json_response(await self._backend.leader_address())

    async def _peers(self, request: ApiRequest) -> ApiResponse:
        request.check_datacenter(self._datacenter)
        return json_response(list(await self._backend.peer_addresses()))
