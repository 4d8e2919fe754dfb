"""/v1/config: config entries."""

from collections.abc import Sequence

from agent.backend import Backend
from agent.http.chain_check import check_chains
from agent.http.config_fields import config_entry
from agent.http.family import StateFamily
from agent.http.filtering import filtered
from agent.http.permission_check import check_permissions, check_protocol
from agent.http.request import ApiRequest, ApiResponse, Route, json_response, require_applied
from agent.http.shapes import config_entry_shape
from agent.runtime import Runtime
from mesh.errors import InvalidRequest, NotFound, Refused
from mesh.model.command import ConfigEntryDelete, ConfigEntrySet
from mesh.model.config_entry import SERVICE_INTENTIONS
from mesh.model.query import GetConfigEntry, ListConfigEntries
from mesh.state.validation import CONFIG_KINDS, intentions_of, require_config_entry


class ConfigApi(StateFamily):
    """Central configuration, as users give it; the state refuses what is not valid."""

    def __init__(self, backend: Backend, datacenter: str, runtime: Runtime) -> None:
        super().__init__(backend, datacenter)
        self._runtime = runtime

    def routes(self) -> Sequence[Route]:
        return (
            Route("PUT", "/v1/config", self._put),
            Route("GET", "/v1/config/:kind", self._list),
            Route("DELETE", "/v1/config/:kind", self._delete_kind),
            Route("GET", "/v1/config/:kind/:name", self._get),
            Route("DELETE", "/v1/config/:kind/:name", self._delete),
        )

    async def _put(self, request: ApiRequest) -> ApiResponse:
        request.check_datacenter(self._datacenter)
        cas_index = request.params.unsigned("cas")
        entry = config_entry(request.json())
        require_config_entry(entry)
        await check_chains(self._backend, (entry.kind, entry.name), entry)
        await check_protocol(self._backend, (entry.kind, entry.name), entry)
        if entry.kind == SERVICE_INTENTIONS:
            await check_permissions(self._backend, intentions_of(entry))
        command = ConfigEntrySet(entry=entry, cas_index=cas_index, at_s=self._runtime.unix_time_s())
        return json_response(require_applied(await self._backend.apply(command)))

    async def _list(self, request: ApiRequest) -> ApiResponse:
        kind = _kind(request)
        entries, result = await self._read(request, ListConfigEntries(kind))
        return result.response(filtered(request, [config_entry_shape(entry) for entry in entries], "config-entry"))

    async def _get(self, request: ApiRequest) -> ApiResponse:
        kind, name = _kind(request), request.captures["name"]
        if not name:
            return await self._list(request)
        entry, result = await self._read(request, GetConfigEntry(kind, name))
        if entry is None:
            raise NotFound(f'Config entry not found for "{kind}" / "{name}"')
        return result.response(config_entry_shape(entry))

    async def _delete_kind(self, request: ApiRequest) -> ApiResponse:
        del request
        raise InvalidRequest("Must provide both a kind and name to delete")

    async def _delete(self, request: ApiRequest) -> ApiResponse:
        kind, name = _kind(request), request.capture("name", "Must provide both a kind and name to delete")
        request.check_datacenter(self._datacenter)
        cas_index = request.params.unsigned("cas")
        await check_chains(self._backend, (kind, name), None)
        await check_protocol(self._backend, (kind, name), None)
        applied = require_applied(await self._backend.apply(ConfigEntryDelete(kind, name, cas_index)))
        return json_response({} if cas_index is None else applied)


def _kind(request: ApiRequest) -> str:
    kind = request.capture("kind", "Must provide a kind")
    if kind not in CONFIG_KINDS:
        raise Refused(f"invalid config entry kind: {kind}")
    return kind
