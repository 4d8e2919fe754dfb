"""/v1/agent/services, /v1/agent/checks and what registers them: this agent's own services, not the catalog."""

import hashlib
from collections.abc import Sequence
from typing import cast, get_args

import msgspec
import trio

from agent.checks import CheckRunner
from agent.definitions import check_definition, service_definition
from agent.http.filtering import filtered_map
from agent.http.request import ApiRequest, ApiResponse, Route, empty_response, json_response, text_response
from agent.http.shapes import JsonObject, check_shape, proxy_shape, tagged_addresses_shape
from agent.local_state import LocalState
from agent.runtime import Runtime
from agent.strict_json import Fields
from mesh.errors import InvalidRequest, NotFound
from mesh.health import AggregatedStatus, aggregate
from mesh.model.catalog import Service
from mesh.model.check import CheckStatus

WAIT_JITTER_SHARE = 1 / 16  # of the wait asked for is added at random, so that waits do not all end together

_HEALTH_CODES: dict[AggregatedStatus, int] = {"passing": 200, "warning": 429, "critical": 503, "maintenance": 503}
_WORSE: dict[AggregatedStatus, int] = {"passing": 0, "warning": 1, "critical": 2, "maintenance": 3}
_HASH_CHARACTERS = 16


def agent_service_shape(service: Service, datacenter: str) -> JsonObject:
    """A service as its own agent shows it, without its hash."""
    shape: JsonObject = {"Kind": service.kind} if service.kind else {}
    shape |= {
        "ID": service.service_id,
        "Service": service.service,
        "Tags": list(service.tags),
        "Meta": dict(sorted(service.meta.items())),
        "Port": service.port,
        "Address": service.address,
    }
    if service.socket_path:
        shape["SocketPath"] = service.socket_path
    if service.tagged_addresses:
        shape["TaggedAddresses"] = tagged_addresses_shape(service.tagged_addresses)
    shape |= {
        "Weights": {"Passing": service.weights.passing, "Warning": service.weights.warning},
        "EnableTagOverride": service.enable_tag_override,
    }
    if service.proxy is not None:
        shape["Proxy"] = proxy_shape(service.proxy)
    if service.connect_native:
        shape["Connect"] = {"Native": True}
    return shape | {"Datacenter": datacenter}


def content_hash(shape: JsonObject) -> str:
    """What identifies the content of a service: equal exactly when the shape is."""
    data = msgspec.json.encode(shape, order="deterministic")
    return hashlib.sha256(data).hexdigest()[:_HASH_CHARACTERS]


class AgentServicesApi:
    """Reads and writes of the local state; a write is on disk when it is answered, and in the catalog soon after."""

    def __init__(self, state: LocalState, checks: CheckRunner, runtime: Runtime, datacenter: str) -> None:
        self._state = state
        self._checks = checks
        self._datacenter = datacenter
        self._rng = runtime.random_source("agent-api")

    def routes(self) -> Sequence[Route]:
        return (
            Route("GET", "/v1/agent/services", self._list_services),
            Route("GET", "/v1/agent/checks", self._list_checks),
            Route("GET", "/v1/agent/service/:id", self._service),
            Route("PUT", "/v1/agent/service/register", self._register_service),
            Route("PUT", "/v1/agent/service/deregister/:id", self._deregister_service),
            Route("PUT", "/v1/agent/check/register", self._register_check),
            Route("PUT", "/v1/agent/check/deregister/:id", self._deregister_check),
            Route("PUT", "/v1/agent/check/pass/:id", self._pass),
            Route("PUT", "/v1/agent/check/warn/:id", self._warn),
            Route("PUT", "/v1/agent/check/fail/:id", self._fail),
            Route("PUT", "/v1/agent/check/update/:id", self._update),
            Route("GET", "/v1/agent/health/service/id/:id", self._health_by_id),
            Route("GET", "/v1/agent/health/service/name/:name", self._health_by_name),
        )

    # -- reads

    async def _list_services(self, request: ApiRequest) -> ApiResponse:
        services = {one.service_id: agent_service_shape(one, self._datacenter) for one in self._state.services()}
        # Filter expressions see every field of a service; what is shown leaves the empty ones out.
        complete = {key: {"Proxy": {}, "Connect": {}} | shape for key, shape in services.items()}
        wanted = filtered_map(request, complete, "node-service")
        return json_response({key: shape for key, shape in services.items() if key in wanted})

    async def _list_checks(self, request: ApiRequest) -> ApiResponse:
        checks = {check.check_id: check_shape(check) for check in self._state.checks()}
        return json_response(filtered_map(request, checks, "check"))

    async def _service(self, request: ApiRequest) -> ApiResponse:
        """Waits while the content still has the hash that the caller knows."""
        service_id = request.capture("id", "Missing service ID")
        known = request.params.get("hash")
        wait_s = request.params.wait_s()
        until = trio.current_time() + wait_s + self._rng.uniform(0.0, wait_s * WAIT_JITTER_SHARE)
        changed = trio.Event()

        def wake() -> None:
            changed.set()

        unsubscribe = self._state.subscribe(wake)
        try:
            while True:
                changed = trio.Event()
                service = self._state.service(service_id)
                if service is None:
                    raise NotFound(f"unknown service ID: {service_id}")
                shape = agent_service_shape(service, self._datacenter)
                content = content_hash(shape)
                if not known or known != content or trio.current_time() >= until:
                    break
                with trio.move_on_at(until):
                    await changed.wait()
        finally:
            unsubscribe()
        shape["ContentHash"] = content
        return json_response(shape, headers=(("X-Consul-ContentHash", content),))

    # -- writes

    async def _register_service(self, request: ApiRequest) -> ApiResponse:
        definition = service_definition(request.json())
        await self._state.add_service(definition, replace_checks=request.params.flag("replace-existing-checks"))
        return empty_response()

    async def _deregister_service(self, request: ApiRequest) -> ApiResponse:
        await self._state.remove_service(request.capture("id", "Missing service ID"))
        return empty_response()

    async def _register_check(self, request: ApiRequest) -> ApiResponse:
        await self._state.add_check(check_definition(request.json()))
        return empty_response()

    async def _deregister_check(self, request: ApiRequest) -> ApiResponse:
        await self._state.remove_check(request.capture("id", "Missing check ID"))
        return empty_response()

    async def _pass(self, request: ApiRequest) -> ApiResponse:
        return await self._heartbeat(request, "passing")

    async def _warn(self, request: ApiRequest) -> ApiResponse:
        return await self._heartbeat(request, "warning")

    async def _fail(self, request: ApiRequest) -> ApiResponse:
        return await self._heartbeat(request, "critical")

    async def _heartbeat(self, request: ApiRequest, status: CheckStatus) -> ApiResponse:
        check_id = request.capture("id", "Missing check ID")
        await self._checks.heartbeat(check_id, status=status, output=request.params.get("note"))
        return empty_response()

    async def _update(self, request: ApiRequest) -> ApiResponse:
        check_id = request.capture("id", "Missing check ID")
        fields = Fields(request.json(), ("Status", "Output"), snake=False)
        status = fields.text("Status")
        if status not in get_args(CheckStatus):
            raise InvalidRequest(f"Invalid check status: '{status}'")
        await self._checks.heartbeat(check_id, status=cast(CheckStatus, status), output=fields.text("Output"))
        return empty_response()

    # -- health as a status code, for load balancers

    async def _health_by_id(self, request: ApiRequest) -> ApiResponse:
        service_id = request.capture("id", "Missing serviceID")
        service = self._state.service(service_id)
        if service is None:
            if _wants_text(request):
                return text_response(f"ServiceId {service_id} not found", status=404)
            return json_response({"AggregatedStatus": "critical", "Service": None, "Checks": []}, status=404)
        status, shape = self._health(service)
        if _wants_text(request):
            return text_response(status, status=_HEALTH_CODES[status])
        return json_response(shape, status=_HEALTH_CODES[status])

    async def _health_by_name(self, request: ApiRequest) -> ApiResponse:
        name = request.capture("name", "Missing service Name")
        found = [self._health(service) for service in self._state.services() if service.service == name]
        if not found:
            if _wants_text(request):
                return text_response(f"ServiceName {name} Not Found", status=404)
            return json_response([], status=404)
        worst = max((status for status, _ in found), key=lambda status: _WORSE[status])
        if _wants_text(request):
            return text_response(worst, status=_HEALTH_CODES[worst])
        return json_response([shape for _, shape in found], status=_HEALTH_CODES[worst])

    def _health(self, service: Service) -> tuple[AggregatedStatus, JsonObject]:
        """The service's own checks and the node's, and what they add up to."""
        node_checks = [check for check in self._state.checks() if not check.service_id]
        checks = [*self._state.checks_of(service.service_id), *node_checks]
        status = aggregate(checks)
        shape: JsonObject = {
            "AggregatedStatus": status,
            "Service": agent_service_shape(service, self._datacenter),
            "Checks": [check_shape(check) for check in checks],
        }
        return status, shape


def _wants_text(request: ApiRequest) -> bool:
    wanted = request.params.get("format")
    return wanted == "text" or (not wanted and request.headers.get("accept", "").startswith("text/plain"))
