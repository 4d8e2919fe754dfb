"""/v1/agent/proxy, endpoints of our own: what this agent's proxy workers hold, and the requests that they carry."""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Protocol

import msgspec
import trio

from agent.http.request import ApiRequest, ApiResponse, Route, Send, json_response, text_response
from agent.runtime import Runtime
from mesh.errors import ConfigError, InvalidRequest, MeshError
from mesh.proxy.description import Description
from mesh.proxy.tap import TapFilter, TapRecord, compile_filter

TAP_INTERVAL_S = 0.2  # between two questions to the workers
TAP_SILENCE_S = 15.0  # then an empty line, so that the client sees that the connection lives
END_TIMEOUT_S = 1.0
NDJSON_TYPE = "application/x-ndjson"


class Problem(Protocol):
    """The part of `agent.sidecars.Problem` that is needed here."""

    @property
    def proxy_id(self) -> str: ...
    @property
    def service(self) -> str: ...
    @property
    def reason(self) -> str: ...


class Views(Protocol):
    """What this family needs of `agent.dataplane.views.WorkerViews`."""

    async def describe(self, service: str) -> tuple[Description, ...]: ...

    async def tap(self, key: str, wanted: TapFilter) -> tuple[tuple[TapRecord, ...], int]: ...

    async def end_tap(self, key: str) -> None: ...


class AgentProxyApi:
    """Local: it answers without a leader and without servers."""

    def __init__(
        self, views: Views, problems: Callable[[], Sequence[Problem]], runtime: Runtime, datacenter: str
    ) -> None:
        """`problems`: what of a registration or configuration is not served, and why."""
        self._views = views
        self._problems = problems
        self._runtime = runtime
        self._datacenter = datacenter

    def routes(self) -> Sequence[Route]:
        return (
            Route("GET", "/v1/agent/proxy/config", self._config),
            Route("GET", "/v1/agent/proxy/tap", self._tap),
        )

    async def _config(self, request: ApiRequest) -> ApiResponse:
        request.check_datacenter(self._datacenter)
        service = request.params.get("service")
        workers = await self._views.describe(service)
        problems = [
            {"ProxyId": problem.proxy_id, "Service": problem.service, "Reason": problem.reason}
            for problem in self._problems()
            if service in ("", problem.proxy_id, problem.service)
        ]
        if service and not problems and not any(worker.listeners or worker.certificates for worker in workers):
            return text_response(f"This agent serves no sidecar of a service {service!r}", status=404)
        return json_response({"Service": service, "Workers": workers, "Problems": problems})

    async def _tap(self, request: ApiRequest) -> ApiResponse:
        """A line of JSON for each request that ends from now on; `{"Dropped": n}` when there were too many."""
        request.check_datacenter(self._datacenter)
        wanted = _filter(request)
        count_max = request.params.unsigned("max") or 0
        key = self._runtime.new_uuid()
        await self._views.tap(key, wanted)  # it begins now, and what is wrong is said before the answer begins
        return ApiResponse(content_type=NDJSON_TYPE, stream=partial(self._stream, key, wanted, count_max))

    async def _stream(self, key: str, wanted: TapFilter, count_max: int, send: Send) -> None:
        count = dropped = 0
        said_at = trio.current_time()
        try:
            while True:
                lines: list[bytes] = []
                try:
                    records, lost = await self._views.tap(key, wanted)
                except MeshError as error:
                    await send(_line({"Error": str(error)}))
                    return
                if count_max:
                    records = records[: count_max - count]
                count += len(records)
                lines.extend(map(_line, records))
                if lost > dropped:
                    lines.append(_line({"Dropped": lost - dropped}))
                dropped = lost
                if not lines and trio.current_time() - said_at > TAP_SILENCE_S:
                    lines.append(b"\n")
                if lines:
                    said_at = trio.current_time()
                    await send(b"".join(lines))
                if count_max and count >= count_max:
                    return
                await trio.sleep(TAP_INTERVAL_S)
        finally:
            with trio.move_on_after(END_TIMEOUT_S) as scope:
                scope.shield = True
                await self._views.end_tap(key)


def _line(value: object) -> bytes:
    return msgspec.json.encode(value) + b"\n"


def _filter(request: ApiRequest) -> TapFilter:
    """Raises InvalidRequest."""
    params = request.params
    direction = params.get("direction")
    if direction not in ("", "inbound", "outbound"):
        raise InvalidRequest(f"Invalid direction {direction!r}: it is inbound or outbound")
    wanted = TapFilter(
        service=params.get("service"),
        direction="inbound" if direction == "inbound" else "outbound" if direction else None,
        method=params.get("method"),
        path_prefix=params.get("path-prefix"),
        status=params.get("status"),
        source=params.get("source"),
        target=params.get("target"),
        headers=params.flag("headers"),
    )
    try:
        compile_filter(wanted)
    except ConfigError as error:
        raise InvalidRequest(f"Invalid filter: {error}") from error
    return wanted
