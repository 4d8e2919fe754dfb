"""/v1/catalog: nodes and services, and direct registration of what no agent looks after."""

from collections.abc import Sequence

from agent.http.family import StateFamily
from agent.http.filtering import filtered, filtered_map
from agent.http.registration import deregister_command, register_command
from agent.http.request import ApiRequest, ApiResponse, Route, json_response, require_applied
from agent.http.shapes import node_service_shape, node_shape, service_node_shape
from mesh.errors import Unreachable
from mesh.model.query import GetNodeServices, ListNodes, ListServiceNodes, ListServices


class CatalogApi(StateFamily):
    """The catalog as it stands: services whose checks fail are listed here like any other."""

    def routes(self) -> Sequence[Route]:
        return (
            Route("GET", "/v1/catalog/datacenters", self._datacenters),
            Route("GET", "/v1/catalog/nodes", self._nodes),
            Route("GET", "/v1/catalog/services", self._services),
            Route("GET", "/v1/catalog/service/:service", self._service),
            Route("GET", "/v1/catalog/connect/:service", self._connect),
            Route("GET", "/v1/catalog/node/:node", self._node),
            Route("GET", "/v1/catalog/node-services/:node", self._node_services),
            Route("PUT", "/v1/catalog/register", self._register),
            Route("PUT", "/v1/catalog/deregister", self._deregister),
        )

    async def _datacenters(self, request: ApiRequest) -> ApiResponse:
        del request
        return json_response([self._datacenter])

    async def _nodes(self, request: ApiRequest) -> ApiResponse:
        rows, result = await self._read(request, ListNodes(meta=request.params.node_meta()))
        return result.response(filtered(request, [node_shape(row) for row in rows], "node"))

    async def _services(self, request: ApiRequest) -> ApiResponse:
        services, result = await self._read(request, ListServices(node_meta=request.params.node_meta()))
        return result.response({name: list(tags) for name, tags in sorted(services.items())})

    async def _service(self, request: ApiRequest) -> ApiResponse:
        return await self._instances(request, connect=False)

    async def _connect(self, request: ApiRequest) -> ApiResponse:
        return await self._instances(request, connect=True)

    async def _instances(self, request: ApiRequest, *, connect: bool) -> ApiResponse:
        query = ListServiceNodes(
            service=request.capture("service", "Missing service name"),
            tags=request.params.all("tag"),
            node_meta=request.params.node_meta(),
            connect=connect,
        )
        rows, result = await self._read(request, query)
        return result.response(filtered(request, [service_node_shape(row) for row in rows], "service-node"))

    async def _node(self, request: ApiRequest) -> ApiResponse:
        found, result = await self._read(request, GetNodeServices(request.capture("node", "Missing node name")))
        if found is None:
            return result.response(None)
        services = {service.service_id: node_service_shape(service) for service in found.services}
        shape = {"Node": node_shape(found.node), "Services": filtered_map(request, services, "node-service")}
        return result.response(shape)

    async def _node_services(self, request: ApiRequest) -> ApiResponse:
        found, result = await self._read(request, GetNodeServices(request.capture("node", "Missing node name")))
        if found is None:
            return result.response(None)
        services = [node_service_shape(service) for service in found.services]
        shape = {"Node": node_shape(found.node), "Services": filtered(request, services, "node-service")}
        return result.response(shape)

    async def _register(self, request: ApiRequest) -> ApiResponse:
        request.check_datacenter(self._datacenter)
        command, datacenter = register_command(request.json(), self._datacenter)
        self._check_body_datacenter(datacenter)
        return json_response(require_applied(await self._backend.apply(command)))

    async def _deregister(self, request: ApiRequest) -> ApiResponse:
        request.check_datacenter(self._datacenter)
        command, datacenter = deregister_command(request.json())
        self._check_body_datacenter(datacenter)
        return json_response(require_applied(await self._backend.apply(command)))

    def _check_body_datacenter(self, datacenter: str) -> None:
        if datacenter not in ("", self._datacenter):
            raise Unreachable("No path to datacenter")
