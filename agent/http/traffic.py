"""Observed traffic: who calls whom, and what other intentions would change for it. Mesh's own; Consul has no such API.

GET /v1/agent/proxy/edges?since=15m         what this agent's sidecars saw come in
GET /v1/connect/edges?since=15m             the same of every agent
PUT /v1/connect/intentions/dry-run?since=   a service-intentions entry or a list of them; nothing is written
"""

from collections.abc import Awaitable, Callable, Sequence

from msgspec.structs import replace

from agent.backend import Backend
from agent.http.config_fields import config_entry
from agent.http.family import StateFamily
from agent.http.request import ApiRequest, ApiResponse, Route, json_response
from agent.rpc.calls import EdgesGathered
from mesh.authz.dry_run import JudgedEdge, judge, replaced
from mesh.authz.observed import MINUTES, ObservedListener
from mesh.errors import InvalidRequest
from mesh.model.config_entry import SERVICE_INTENTIONS, ConfigEntry
from mesh.model.intention import Intention, is_audit
from mesh.model.query import GetConfigEntry, ListConfigEntries, ListIntentions, ReadOptions
from mesh.state.validation import intentions_of

SINCE_S_DEFAULT = 900.0
SINCE_S_MAX = MINUTES * 60.0
ENTRIES_MAX = 1000  # in one proposal

Gather = Callable[[float], Awaitable[EdgesGathered]]
ObservedHere = Callable[[float], Awaitable[tuple[ObservedListener, ...]]]


class TrafficApi(StateFamily):
    """What was seen, and what would become of it."""

    def __init__(
        self,
        backend: Backend,
        datacenter: str,
        *,
        gather: Gather,
        observed_here: ObservedHere,
        default_allow: bool,
    ) -> None:
        """`gather` asks every agent, `observed_here` the workers of this one."""
        super().__init__(backend, datacenter)
        self._gather = gather
        self._observed_here = observed_here
        self._default_allow = default_allow

    def routes(self) -> Sequence[Route]:
        return (
            Route("GET", "/v1/agent/proxy/edges", self._local),
            Route("GET", "/v1/connect/edges", self._all),
            Route("PUT", "/v1/connect/intentions/dry-run", self._dry_run),
        )

    async def _local(self, request: ApiRequest) -> ApiResponse:
        return json_response([_listener_shape(one) for one in await self._observed_here(_since_s(request))])

    async def _all(self, request: ApiRequest) -> ApiResponse:
        request.check_datacenter(self._datacenter)
        gathered = await self._gather(_since_s(request))
        return json_response(
            {
                "Services": [_listener_shape(one) for one in gathered.listeners],
                "Answered": gathered.answered,
                "Missing": gathered.missing,
            }
        )

    async def _dry_run(self, request: ApiRequest) -> ApiResponse:
        request.check_datacenter(self._datacenter)
        since_s = _since_s(request)
        proposed, destinations = _proposal(request.json())
        current = (await self._backend.read(ListIntentions(), ReadOptions())).value
        audited = await self._audited()
        gathered = await self._gather(since_s)
        judged = judge(
            gathered.listeners,
            current,
            replaced(current, proposed, destinations),
            default_allow=self._default_allow,
            audited=audited,
        )
        return json_response(
            {
                "Since": since_s,
                "Destinations": destinations,
                "Edges": [_judged_shape(one) for one in judged],
                "Observed": [
                    {"Service": one.service, "Seconds": round(one.observed_s, 1), "LeftOut": one.left_out}
                    for one in gathered.listeners
                ],
                "Answered": gathered.answered,
                "Missing": gathered.missing,
            }
        )

    async def _audited(self) -> Callable[[str], bool]:
        """Which services are in audit mode as a whole."""
        options = ReadOptions()
        proxy_defaults = (await self._backend.read(GetConfigEntry("proxy-defaults", "global"), options)).value
        entries = (await self._backend.read(ListConfigEntries("service-defaults"), options)).value
        metas = {entry.name: entry.meta for entry in entries}
        general = proxy_defaults.meta if proxy_defaults is not None else {}
        return lambda service: is_audit(general | metas.get(service, {}))


def _since_s(request: ApiRequest) -> float:
    since_s = request.params.duration_s("since", SINCE_S_DEFAULT)
    if not 0 < since_s <= SINCE_S_MAX:
        raise InvalidRequest(f"since must be above 0 and at most {MINUTES}m, which is as long as traffic is remembered")
    return since_s


def _proposal(body: object) -> tuple[list[Intention], list[str]]:
    """The rules proposed, and the destinations whose rules they replace. An entry without sources proposes that its
    destination has none. Raises InvalidRequest, MalformedJson, Refused.
    """
    items = body if isinstance(body, list) else [body]
    if not 1 <= len(items) <= ENTRIES_MAX:
        raise InvalidRequest(f"a proposal has 1 to {ENTRIES_MAX} service-intentions entries")
    rules: list[Intention] = []
    destinations: list[str] = []
    for item in items:
        entry = config_entry(item)
        if entry.kind != SERVICE_INTENTIONS:
            raise InvalidRequest(f"a proposal has entries of kind {SERVICE_INTENTIONS} only, not {entry.kind}")
        if entry.name in destinations:
            raise InvalidRequest(f"the proposal has two entries for {entry.name!r}")
        destinations.append(entry.name)
        if entry.body.get("Sources"):
            rules.extend(_audited_rules(entry))
    return rules, destinations


def _audited_rules(entry: ConfigEntry) -> list[Intention]:
    return [replace(rule, audit=is_audit(entry.meta, rule.source)) for rule in intentions_of(entry)]


def _listener_shape(listener: ObservedListener) -> dict[str, object]:
    return {
        "Service": listener.service,
        "Protocol": "http" if listener.http else "tcp",
        "Seconds": round(listener.observed_s, 1),
        "LeftOut": listener.left_out,
        "Edges": [
            {
                "Source": edge.source,
                "Method": edge.method,
                "Path": edge.path,
                "Samples": edge.samples,
                "Allowed": edge.allowed,
                "Denied": edge.denied,
            }
            for edge in listener.edges
        ],
    }


def _judged_shape(edge: JudgedEdge) -> dict[str, object]:
    return {
        "Change": edge.change,
        "Source": edge.source,
        "Destination": edge.destination,
        "Method": edge.method,
        "Path": edge.path,
        "Samples": edge.samples,
        "Allowed": edge.allowed,
        "Denied": edge.denied,
        "Now": edge.now,
        "Proposed": edge.proposed,
        "Rules": edge.rules,
    }
