"""What every family over replicated state does: check the datacenter, read, filter, answer."""

import msgspec

from agent.backend import Backend
from agent.http.request import ApiRequest, ApiResponse, json_response, query_headers
from mesh.model.query import AnswerT, Asks, ReadMeta, ReadOptions


class ReadResult(msgspec.Struct, frozen=True):
    """How a read was made and how fresh its answer is: what the response headers say."""

    meta: ReadMeta
    options: ReadOptions

    @property
    def headers(self) -> tuple[tuple[str, str], ...]:
        """X-Consul-Index and its companions."""
        return query_headers(self.meta, self.options)

    def response(self, value: object) -> ApiResponse:
        """The value as JSON, with the headers."""
        return json_response(value, headers=self.headers)


class StateFamily:
    """A family of the API over the cluster's state, asked through the backend."""

    def __init__(self, backend: Backend, datacenter: str) -> None:
        self._backend = backend
        self._datacenter = datacenter

    async def _read(self, request: ApiRequest, query: Asks[AnswerT]) -> tuple[AnswerT, ReadResult]:
        """Runs a query as the request's parameters say. Raises InvalidRequest, Unreachable, NoLeader."""
        request.check_datacenter(self._datacenter)
        options = request.read_options()
        answer = await self._backend.read(query, options)
        return answer.value, ReadResult(answer.meta, options)
