"""Observed traffic and dry runs over the API: proposals, windows, audit, and what is told of the agents asked."""

import json

import pytest
from msgspec.structs import replace
from state_backend import MemoryBackend

from agent.http.params import Params
from agent.http.request import ApiRequest
from agent.http.traffic import TrafficApi
from agent.rpc.calls import EdgesGathered
from agent.strict_json import MalformedJson
from mesh.authz.observed import Edge, ObservedListener
from mesh.errors import InvalidRequest, Refused
from mesh.model.command import ConfigEntrySet, IntentionUpsert
from mesh.model.config_entry import ConfigEntry
from mesh.model.intention import Intention

DRY_RUN, ALL, LOCAL = "/v1/connect/intentions/dry-run", "/v1/connect/edges", "/v1/agent/proxy/edges"
API = ObservedListener("api", True, 300.0, (Edge("web", "GET", "/a", 7, 0, ("/a",)),), 2)
SHAPE = {
    "Service": "api", "Protocol": "http", "Seconds": 300.0, "LeftOut": 2,
    "Edges": [{"Source": "web", "Method": "GET", "Path": "/a", "Samples": ["/a"], "Allowed": 7, "Denied": 0}],
}  # fmt: skip


class Mesh:
    """The API over real state, and agents that saw `API`."""

    def __init__(self, *, default_allow: bool = False) -> None:
        self.backend = MemoryBackend()
        self.asked: list[float] = []
        family = TrafficApi(
            self.backend, "dc1", gather=self.gather, observed_here=self.here, default_allow=default_allow
        )
        self.handlers = {route.pattern: route.handler for route in family.routes()}

    async def gather(self, since_s: float) -> EdgesGathered:
        self.asked.append(since_s)
        return EdgesGathered((API,), ("c1", "c2"), ("c3",))

    async def here(self, since_s: float) -> tuple[ObservedListener, ...]:
        self.asked.append(since_s)
        return (API,)

    async def call(self, path: str, query: str = "", body: object = None) -> object:
        request = ApiRequest("PUT", path, Params(query), body=json.dumps(body).encode())
        response = await self.handlers[path](request)
        return json.loads(response.body)

    async def change(self, body: object) -> str:
        (edge,) = (await self.call(DRY_RUN, body=body))["Edges"]
        return edge["Change"]


def entry(*sources: dict, name: str = "api", **more: object) -> dict:
    return {"Kind": "service-intentions", "Name": name, "Sources": list(sources), **more}


async def test_what_was_seen_here_and_everywhere():
    mesh = Mesh()
    assert await mesh.call(LOCAL, "since=5m") == [SHAPE]
    assert await mesh.call(ALL) == {"Services": [SHAPE], "Answered": ["c1", "c2"], "Missing": ["c3"]}
    assert mesh.asked == [300.0, 900.0]


async def test_a_dry_run_reports_each_edge_and_writes_nothing():
    mesh = Mesh()
    await mesh.backend.apply(IntentionUpsert(Intention("web", "api", "allow")))
    written = len(mesh.backend.commands)
    report = await mesh.call(DRY_RUN, "since=10m", entry({"Name": "web", "Action": "deny"}))
    assert report == {
        "Since": 600.0,
        "Destinations": ["api"],
        "Edges": [
            {
                "Change": "cut", "Source": "web", "Destination": "api", "Method": "GET", "Path": "/a",
                "Samples": ["/a"], "Allowed": 7, "Denied": 0, "Now": "allow", "Proposed": "deny",
                "Rules": ["web=>api deny"],
            }
        ],
        "Observed": [{"Service": "api", "Seconds": 300.0, "LeftOut": 2}],
        "Answered": ["c1", "c2"],
        "Missing": ["c3"],
    }  # fmt: skip
    assert len(mesh.backend.commands) == written


async def test_proposals_take_snake_case_lists_and_entries_that_remove_all_rules():
    mesh = Mesh()
    await mesh.backend.apply(IntentionUpsert(Intention("web", "api", "allow")))
    assert await mesh.change(entry()) == "cut"
    assert await mesh.change([entry(name="other"), entry({"name": "web", "action": "allow"})]) == "none"
    permissions = [{"action": "allow", "http": {"path_prefix": "/a", "methods": ["get"]}}]
    assert await mesh.change(entry({"Name": "web", "Permissions": permissions})) == "none"
    assert await mesh.change(entry({"Name": "*", "Action": "allow"}, name="*")) == "none"


async def test_audit_cuts_nothing():
    mesh = Mesh(default_allow=True)
    deny = entry({"Name": "web", "Action": "deny"})
    assert await mesh.change(deny) == "cut"
    assert await mesh.change(deny | {"Meta": {"mesh-intentions": "audit"}}) == "audited"
    assert await mesh.change(deny | {"Meta": {"mesh-intentions/web": "audit"}}) == "audited"
    whole = ConfigEntry("service-defaults", "api", {"Protocol": "http"}, {"mesh-intentions": "audit"})
    await mesh.backend.apply(ConfigEntrySet(whole))
    assert await mesh.change(deny) == "audited"
    await mesh.backend.apply(ConfigEntrySet(replace(whole, meta={"mesh-intentions": "enforce"})))
    everything = ConfigEntry("proxy-defaults", "global", {}, {"mesh-intentions": "audit"})
    await mesh.backend.apply(ConfigEntrySet(everything))
    assert await mesh.change(deny) == "cut"


@pytest.mark.parametrize(
    ("body", "reason"),
    [
        ([], "1 to 1000 service-intentions entries"),
        ("text", "a config entry is an object"),
        ({"Kind": "service-defaults", "Name": "api"}, "service-intentions only"),
        (entry({"Name": "web", "Permissions": [{"Action": "allow"}]}), "HTTP is required"),
        (entry({"Name": "web"}), "Action must be set"),
        ([entry(), entry()], "two entries for 'api'"),
        (entry({"Name": "web", "Action": "deny"}, Meta={"mesh-intentions": "on"}), "must be one of enforce, audit"),
    ],
)
async def test_a_proposal_that_is_none_says_why(body, reason):
    with pytest.raises((InvalidRequest, MalformedJson, Refused)) as raised:
        await Mesh().call(DRY_RUN, body=body)
    assert reason in str(raised.value)


@pytest.mark.parametrize("since", ["0s", "61m", "-5m", "long"])
async def test_the_window_is_bounded(since):
    with pytest.raises(InvalidRequest):
        await Mesh().call(LOCAL, f"since={since}")
