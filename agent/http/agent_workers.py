"""The worker processes of this agent. Mesh's own; Consul has no such API.

GET /v1/agent/proxy/workers           those that carry traffic now, in the order of their places
PUT /v1/agent/proxy/replace-workers   a new process in the place of each, without a lost connection
"""

from collections.abc import Sequence

from agent.dataplane.supervisor import WorkerSupervisor
from agent.http.request import ApiRequest, ApiResponse, Route, json_response


class AgentWorkersApi:
    """Local: needs no server and no leader."""

    def __init__(self, supervisor: WorkerSupervisor) -> None:
        self._supervisor = supervisor

    def routes(self) -> Sequence[Route]:
        return (
            Route("GET", "/v1/agent/proxy/workers", self._list),
            Route("PUT", "/v1/agent/proxy/replace-workers", self._replace),
        )

    async def _list(self, request: ApiRequest) -> ApiResponse:
        return json_response(
            [{"Pid": worker.pid, "Listeners": len(worker.held)} for worker in self._supervisor.workers]
        )

    async def _replace(self, request: ApiRequest) -> ApiResponse:
        """Answers when the new processes serve; the old ones may take until the drain time to finish."""
        return json_response({"Replaced": await self._supervisor.replace_workers()})
