"""/v1/agent over the wire: the real server, local state, checks, gossip and leaves, on loopback."""

import json
import random
from collections.abc import AsyncIterator
from dataclasses import dataclass, field

import consul
import httpx
import pytest
import trio
from certificates import NOW_S
from state_backend import StateBackend, WallClock

from agent.checks import CheckRunner
from agent.config import AgentConfig
from agent.config.values import Telemetry
from agent.gossip_driver import GossipDriver
from agent.http.agent_api import AgentApi
from agent.http.agent_connect import AgentConnectApi
from agent.http.agent_services import AgentServicesApi
from agent.http.connection import HttpSettings
from agent.http.server import HttpServer, TcpListen
from agent.leaves import LeafManager
from agent.local_state import LocalState
from agent.telemetry import Metrics
from mesh.gossip.config import LAN
from mesh.model.catalog import Node
from mesh.model.command import IntentionUpsert
from mesh.model.intention import Intention

NODE_ID = "adf4238a-882b-9ddc-4a9d-5b6758e4159e"


@dataclass
class Agent:
    """One agent's API and what stands behind it."""

    http: httpx.AsyncClient
    backend: StateBackend
    state: LocalState
    gossip: GossipDriver
    metrics: Metrics
    left: list[str] = field(default_factory=list)

    async def get(self, path: str, **params: str) -> httpx.Response:
        return await self.http.get(path, params=params)

    async def put(self, path: str, body: object = None) -> httpx.Response:
        if body is None:
            return await self.http.put(path)
        return await self.http.put(path, content=body if isinstance(body, bytes) else json.dumps(body).encode())


def gossip_driver(name: str) -> GossipDriver:
    return GossipDriver(
        name=name,
        bind=("127.0.0.1", 0),
        advertise=("127.0.0.1", 0),
        tags={"role": "node", "dc": "dc1"},
        config=LAN,
        rng=random.Random(name),
        on_event=lambda event: None,
    )


@pytest.fixture
def config() -> AgentConfig:
    return AgentConfig(
        node_name="node-1",
        data_dir="/tmp",
        bind_address="127.0.0.1",
        advertise_address="10.1.2.3",
        gossip_key=b"secret-gossip-key-32-bytes-long!",
        node_meta={"rack": "7"},
    )


@pytest.fixture
async def agent(config: AgentConfig, nursery: trio.Nursery) -> AsyncIterator[Agent]:
    runtime = WallClock(NOW_S)
    backend = StateBackend(runtime)
    await backend.authority.ensure_root()
    state = LocalState("node-1", runtime)
    checks = CheckRunner(state, backend, runtime, node_name="node-1")
    leaves = LeafManager(backend=backend, runtime=runtime, datacenter="dc1", data_dir=None)
    gossip = gossip_driver("node-1")
    metrics = Metrics(runtime.unix_time_s)
    for run in (checks.run, leaves.run, gossip.run):
        await nursery.start(run)
    left: list[str] = []

    async def leave() -> None:
        left.append("left")

    node = Node("node-1", "10.1.2.3", node_id=NODE_ID, datacenter="dc1", meta={"rack": "7"})
    routes = (
        *AgentServicesApi(state, checks, runtime, "dc1").routes(),
        *AgentConnectApi(backend, "dc1", leaves, default_allow=True).routes(),
        *AgentApi(
            config,
            runtime,
            node=node,
            state=state,
            gossip=gossip,
            metrics=metrics,
            server_statistics=lambda: {"consul": {"server": "false"}, "agent": {"extra": "1"}},
            request_leave=leave,
        ).routes(),
    )
    server = HttpServer(routes, (TcpListen("ports.http", "127.0.0.1", 0),), HttpSettings(), runtime)
    await server.listen()
    nursery.start_soon(server.run)
    host, port = server.addresses[0]
    async with httpx.AsyncClient(base_url=f"http://{host}:{port}", trust_env=False, timeout=20) as http:
        yield Agent(http, backend, state, gossip, metrics, left)


WEB = {"ID": "web-1", "Name": "web", "Port": 80, "Tags": ["a"], "Meta": {"v": "1"}, "Check": {"TTL": "30s"}}


# -- services


async def test_registering_answers_an_empty_200_and_the_service_is_listed_exactly(agent: Agent) -> None:
    answer = await agent.put("/v1/agent/service/register", WEB)
    assert (answer.status_code, answer.content) == (200, b"")
    assert (await agent.get("/v1/agent/services")).json() == {
        "web-1": {
            "ID": "web-1",
            "Service": "web",
            "Tags": ["a"],
            "Meta": {"v": "1"},
            "Port": 80,
            "Address": "",
            "Weights": {"Passing": 1, "Warning": 1},
            "EnableTagOverride": False,
            "Datacenter": "dc1",
        }
    }
    assert (await agent.get("/v1/agent/checks")).json() == {
        "service:web-1": {
            "Node": "node-1",
            "CheckID": "service:web-1",
            "Name": "Service 'web' check",
            "Status": "critical",
            "Notes": "",
            "Output": "",
            "ServiceID": "web-1",
            "ServiceName": "web",
            "ServiceTags": ["a"],
            "Type": "ttl",
            "Interval": "",
            "Timeout": "",
            "ExposedPort": 0,
            "Definition": {},
            "CreateIndex": 0,
            "ModifyIndex": 0,
        }
    }


async def test_a_sidecar_is_listed_with_its_proxy(agent: Agent) -> None:
    upstream = {"DestinationName": "db", "LocalBindPort": 9191}
    sidecar = {"SidecarService": {"Proxy": {"Upstreams": [upstream]}}}
    await agent.put("/v1/agent/service/register", {**WEB, "Connect": sidecar})
    listed = (await agent.get("/v1/agent/services")).json()["web-1-sidecar-proxy"]
    assert listed["Kind"] == "connect-proxy"
    assert listed["Port"] == 21000
    assert listed["Proxy"]["DestinationServiceID"] == "web-1"
    assert listed["Proxy"]["LocalServicePort"] == 80
    assert listed["Proxy"]["Upstreams"][0]["LocalBindPort"] == 9191
    await agent.put("/v1/agent/service/deregister/web-1")
    assert (await agent.get("/v1/agent/services")).json() == {}
    assert (await agent.get("/v1/agent/checks")).json() == {}


@pytest.mark.parametrize(
    ("path", "body", "text"),
    [
        ("service/register", {"Port": 1}, "Missing service name"),
        ("service/register", {"Name": "a", "Address": "0.0.0.0"}, "Invalid service address"),
        ("service/register", {"Name": "a", "Check": {"TTL": "-1s"}}, "Invalid check: TTL must be > 0 for TTL checks"),
        ("service/register", {"Name": "a", "Bogus": 1}, 'Request decode failed: json: unknown field "Bogus"'),
        ("service/register", b"{", "Request decode failed: "),
        ("service/register", b"", "Request decode failed: EOF"),
        ("service/register", b"[" * 100_000, "Request decode failed: nested deeper than 64 levels"),
        ("service/register", b'{"Name":"a","Name":"b"}', 'Request decode failed: duplicate key "Name"'),
        ("service/register", b'{"Name":"a","name":"b"}', "Request decode failed: json: field Name is given twice"),
        ("service/register", b'{"Name":"\xff"}', "Request decode failed: invalid UTF-8"),
        ("check/register", {"TTL": "1s"}, "Missing check name"),
        ("check/register", {"Name": "a", "Status": "x", "TTL": "1s"}, "Bad check status"),
        ("check/update/a", {"Status": "x"}, "Invalid check status: 'x'"),
        ("service/deregister/", None, "Missing service ID"),
        ("check/pass/", None, "Missing check ID"),
    ],
)
async def test_bad_requests_are_400_with_consuls_text(agent: Agent, path: str, body: object, text: str) -> None:
    answer = await agent.put(f"/v1/agent/{path}", body)
    assert answer.status_code == 400
    assert answer.text.startswith(text)
    assert answer.headers["content-type"].startswith("text/plain")


@pytest.mark.parametrize(
    ("method", "path", "text"),
    [
        ("PUT", "service/deregister/x",
         'Unknown service ID "x". Ensure that the service ID is passed, not the service name.'),
        ("PUT", "check/deregister/x", 'Unknown check ID "x". Ensure that the check ID is passed, not the check name.'),
        ("PUT", "check/pass/x", 'Unknown check ID "x". Ensure that the check ID is passed, not the check name.'),
        ("GET", "service/x", "unknown service ID: x"),
    ],
)  # fmt: skip
async def test_unknown_ids_are_404(agent: Agent, method: str, path: str, text: str) -> None:
    answer = await agent.http.request(method, f"/v1/agent/{path}")
    assert (answer.status_code, answer.text) == (404, text)


async def test_a_check_of_an_unknown_service_is_404(agent: Agent) -> None:
    answer = await agent.put("/v1/agent/check/register", {"Name": "c", "TTL": "1s", "ServiceID": "x"})
    assert (answer.status_code, answer.text) == (404, 'ServiceID "x" does not exist')


async def test_ids_with_slashes_and_spaces_work(agent: Agent) -> None:
    for raw, name in (("a%2Fb", "a/b"), ("my%20app%23127.0.0.1%233000", "my app#127.0.0.1#3000")):
        await agent.put("/v1/agent/service/register", {"Name": name})
        assert (await agent.http.get(f"/v1/agent/service/{raw}")).json()["ID"] == name
        assert (await agent.http.put(f"/v1/agent/service/deregister/{raw}")).status_code == 200


async def test_replace_existing_checks_counts_when_asked_for(agent: Agent) -> None:
    await agent.put("/v1/agent/service/register", WEB)
    other = {**WEB, "Check": {"TTL": "30s", "CheckID": "other"}}
    await agent.put("/v1/agent/service/register", other)
    assert set((await agent.get("/v1/agent/checks")).json()) == {"service:web-1", "other"}
    await agent.put("/v1/agent/service/register?replace-existing-checks", other)
    assert set((await agent.get("/v1/agent/checks")).json()) == {"other"}


async def test_filters_select_services_and_checks(agent: Agent) -> None:
    await agent.put("/v1/agent/service/register", {**WEB, "Connect": {"SidecarService": {}}})
    plain = (await agent.get("/v1/agent/services", filter='Kind == ""')).json()
    assert set(plain) == {"web-1"}
    assert "Proxy" not in plain["web-1"]
    proxies = (await agent.get("/v1/agent/services", filter='Proxy.DestinationServiceName == "web"')).json()
    assert set(proxies) == {"web-1-sidecar-proxy"}
    ttl = (await agent.get("/v1/agent/checks", filter="Type == ttl")).json()
    assert set(ttl) == {"service:web-1"}


async def test_hash_blocking_returns_on_a_change_and_at_the_end_of_the_wait(agent: Agent) -> None:
    await agent.put("/v1/agent/service/register", WEB)
    first = await agent.get("/v1/agent/service/web-1")
    content = first.json()["ContentHash"]
    assert first.headers["x-consul-contenthash"] == content
    assert (await agent.get("/v1/agent/service/web-1", hash="other", wait="10s")).json() == first.json()
    assert (await agent.get("/v1/agent/service/web-1", hash=content, wait="10ms")).json() == first.json()
    answers: list[httpx.Response] = []

    async def wait() -> None:
        answers.append(await agent.get("/v1/agent/service/web-1", hash=content, wait="60s"))

    async with trio.open_nursery() as nursery:
        nursery.start_soon(wait)
        agent.state.update_check("service:web-1", status="passing", output="")  # not part of the service
        with trio.fail_after(10):
            await agent.put("/v1/agent/service/register", {**WEB, "Port": 81})
    assert answers[0].json()["Port"] == 81
    assert answers[0].json()["ContentHash"] != content


async def test_a_waiter_hears_that_its_service_is_gone(agent: Agent) -> None:
    await agent.put("/v1/agent/service/register", WEB)
    content = (await agent.get("/v1/agent/service/web-1")).json()["ContentHash"]
    answers: list[int] = []

    async def wait() -> None:
        answers.append((await agent.get("/v1/agent/service/web-1", hash=content, wait="60s")).status_code)

    async with trio.open_nursery() as nursery:
        nursery.start_soon(wait)
        with trio.fail_after(10):
            await agent.put("/v1/agent/service/deregister/web-1")
    assert answers == [404]


# -- checks and health


async def test_heartbeats_set_status_and_output_and_load_balancers_read_codes(agent: Agent) -> None:
    await agent.put("/v1/agent/service/register", WEB)
    seen = []
    for path, body in (
        ("check/pass/service:web-1?note=fine", None),
        ("check/warn/service:web-1", None),
        ("check/fail/service%3Aweb-1?note=down", None),
        ("check/update/service:web-1", {"Status": "passing", "Output": "told"}),
    ):
        assert (await agent.put(f"/v1/agent/{path}", body)).status_code == 200
        check = (await agent.get("/v1/agent/checks")).json()["service:web-1"]
        by_id = await agent.get("/v1/agent/health/service/id/web-1")
        text = await agent.get("/v1/agent/health/service/name/web", format="text")
        assert by_id.status_code == text.status_code
        assert by_id.json()["AggregatedStatus"] == text.text
        seen.append((check["Status"], check["Output"], text.status_code))
    assert seen == [("passing", "fine", 200), ("warning", "", 429), ("critical", "down", 503), ("passing", "told", 200)]


async def test_heartbeats_of_a_check_that_is_no_ttl_check_fail(agent: Agent) -> None:
    await agent.put("/v1/agent/check/register", {"Name": "tcp", "TCP": "127.0.0.1:1", "Interval": "60s"})
    answer = await agent.put("/v1/agent/check/pass/tcp")
    assert (answer.status_code, answer.text) == (500, 'CheckID "tcp" does not have associated TTL')


async def test_health_by_name_is_the_worst_instance_and_counts_node_checks(agent: Agent) -> None:
    for number in (1, 2):
        body = {"Name": "web", "ID": f"web-{number}", "Check": {"TTL": "30s", "Status": "passing"}}
        await agent.put("/v1/agent/service/register", body)
    assert (await agent.get("/v1/agent/health/service/name/web")).status_code == 200
    await agent.put("/v1/agent/check/fail/service:web-2")
    answer = await agent.get("/v1/agent/health/service/name/web")
    assert answer.status_code == 503
    assert [one["AggregatedStatus"] for one in answer.json()] == ["passing", "critical"]
    await agent.put("/v1/agent/check/register", {"Name": "disk", "TTL": "30s", "Status": "warning"})
    assert (await agent.get("/v1/agent/health/service/id/web-1")).status_code == 429
    assert (
        await agent.http.get("/v1/agent/health/service/id/web-1", headers={"Accept": "text/plain"})
    ).text == "warning"


async def test_health_of_an_unknown_service_is_404(agent: Agent) -> None:
    by_id = await agent.get("/v1/agent/health/service/id/x")
    assert (by_id.status_code, by_id.json()["AggregatedStatus"]) == (404, "critical")
    by_name = await agent.get("/v1/agent/health/service/name/x")
    assert (by_name.status_code, by_name.json()) == (404, [])
    text = await agent.get("/v1/agent/health/service/name/x", format="text")
    assert (text.status_code, text.text) == (404, "ServiceName x Not Found")


# -- the agent


async def test_self_says_who_the_agent_is_and_hides_its_key(agent: Agent) -> None:
    answer = await agent.get("/v1/agent/self")
    told = answer.json()
    assert told["Config"]["NodeName"] == "node-1"
    assert told["Config"]["NodeID"] == NODE_ID
    assert told["Config"]["Datacenter"] == "dc1"
    assert told["Config"]["Server"] is False
    assert told["Config"]["Version"].startswith("1.22")
    assert told["DebugConfig"]["SerfAdvertiseAddrLAN"] == "tcp://10.1.2.3:8301"
    assert told["DebugConfig"]["EncryptKey"] == "hidden"
    assert "secret-gossip" not in answer.text
    assert told["Member"]["Name"] == "node-1"
    assert told["Member"]["Status"] == 1
    assert told["Meta"] == {"rack": "7"}
    assert told["Stats"]["consul"] == {"server": "false"}
    assert told["Stats"]["agent"]["extra"] == "1"
    assert told["Stats"]["agent"]["services"] == "0"
    assert all(isinstance(value, str) for section in told["Stats"].values() for value in section.values())


async def test_version_and_host_have_their_fields(agent: Agent) -> None:
    assert set((await agent.get("/v1/agent/version")).json()) == {"SHA", "BuildDate", "HumanVersion", "FIPS"}
    host = (await agent.get("/v1/agent/host")).json()
    assert host["Memory"]["total"] > host["Memory"]["available"] > 0
    assert host["Disk"]["total"] > 0
    assert host["Errors"] is None


async def test_join_members_and_force_leave(agent: Agent, nursery: trio.Nursery) -> None:
    other = gossip_driver("node-2")
    await nursery.start(other.run)
    host, port = other.address
    answer = await agent.put(f"/v1/agent/join/{host}:{port}")
    assert (answer.status_code, answer.content) == (200, b"")
    members = {member["Name"]: member for member in (await agent.get("/v1/agent/members")).json()}
    assert set(members) == {"node-1", "node-2"}
    assert members["node-2"] == {
        "Name": "node-2", "Addr": "127.0.0.1", "Port": port, "Tags": {"dc": "dc1", "role": "node"}, "Status": 1,
        "ProtocolMin": 1, "ProtocolMax": 5, "ProtocolCur": 2, "DelegateMin": 2, "DelegateMax": 5, "DelegateCur": 4,
    }  # fmt: skip
    filtered = (await agent.get("/v1/agent/members", filter='Name == "node-2"')).json()
    assert [member["Name"] for member in filtered] == ["node-2"]
    missing = await agent.put("/v1/agent/force-leave/nobody")
    assert (missing.status_code, missing.text) == (500, "agent: No node found with name 'nobody'")


async def test_joining_nobody_is_a_500_that_names_the_address(agent: Agent) -> None:
    answer = await agent.put("/v1/agent/join/127.0.0.1:1")
    assert answer.status_code == 500
    assert "127.0.0.1:1" in answer.text


async def test_the_wan_pool_is_refused_not_faked(agent: Agent) -> None:
    for answer in (await agent.get("/v1/agent/members", wan="1"), await agent.put("/v1/agent/join/a?wan=1")):
        assert answer.status_code == 400
        assert "not supported yet" in answer.text


async def test_leave_is_answered_once_the_agent_has_left(agent: Agent) -> None:
    answer = await agent.put("/v1/agent/leave")
    assert (answer.status_code, answer.content, agent.left) == (200, b"", ["left"])
    assert (await agent.get("/v1/agent/leave")).status_code == 405


async def test_prometheus_form_is_415_while_retention_is_off(agent: Agent) -> None:
    agent.metrics.count("consul.api.test")
    told = (await agent.get("/v1/agent/metrics")).json()
    assert set(told) == {"Timestamp", "Gauges", "Points", "Counters", "Samples"}
    answer = await agent.get("/v1/agent/metrics", format="prometheus")
    assert answer.status_code == 415
    assert answer.text == "Prometheus is not enabled since its retention time is not positive"


class TestWithRetention:
    @pytest.fixture
    def config(self) -> AgentConfig:
        return AgentConfig(node_name="node-1", telemetry=Telemetry(prometheus_retention_time_s=60.0))

    async def test_prometheus_form_is_text(self, agent: Agent) -> None:
        agent.metrics.count("consul.api.test")
        answer = await agent.get("/v1/agent/metrics", format="prometheus")
        assert answer.status_code == 200
        assert answer.headers["content-type"].startswith("text/plain; version=0.0.4")
        assert "consul_api_test 1" in answer.text


# -- connect


async def test_roots_and_a_leaf_that_belongs_to_them(agent: Agent) -> None:
    roots = (await agent.get("/v1/agent/connect/ca/roots")).json()
    assert roots["TrustDomain"].endswith(".consul")
    assert "PrivateKey" not in str(sorted(roots["Roots"][0])).replace("PrivateKeyType", "").replace(
        "PrivateKeyBits", ""
    )
    answer = await agent.get("/v1/agent/connect/ca/leaf/web")
    leaf = answer.json()
    assert set(leaf) == {
        "SerialNumber", "CertPEM", "PrivateKeyPEM", "Service", "ServiceURI", "ValidAfter", "ValidBefore",
        "CreateIndex", "ModifyIndex",
    }  # fmt: skip
    assert leaf["Service"] == "web"
    assert leaf["ServiceURI"] == f"spiffe://{roots['TrustDomain']}/ns/default/dc/dc1/svc/web"
    assert leaf["PrivateKeyPEM"].startswith("-----BEGIN")
    assert int(answer.headers["x-consul-index"]) == leaf["ModifyIndex"]
    again = await agent.get("/v1/agent/connect/ca/leaf/web", index=str(leaf["ModifyIndex"]), wait="10ms")
    assert again.json() == leaf


async def test_authorize_follows_intentions_and_trust_domain(agent: Agent) -> None:
    domain = (await agent.get("/v1/agent/connect/ca/roots")).json()["TrustDomain"]

    async def ask(body: dict[str, str]) -> httpx.Response:
        return await agent.http.post("/v1/agent/connect/authorize", json=body)

    uri = f"spiffe://{domain}/ns/default/dc/dc1/svc/web"
    body = {"Target": "db", "ClientCertURI": uri, "ClientCertSerial": "01"}
    assert (await ask(body)).json() == {"Authorized": True, "Reason": "Default behavior configured by ACLs"}
    await agent.backend.apply(IntentionUpsert(Intention("web", "db", "deny")))
    told = (await ask(body)).json()
    assert told["Authorized"] is False
    assert told["Reason"].startswith("Matched L4 intention: ")
    foreign = (await ask({**body, "ClientCertURI": uri.replace(domain, "elsewhere.consul")})).json()
    assert foreign == {"Authorized": False, "Reason": "Identity from an external trust domain: elsewhere.consul"}
    for wrong, text in (
        ({**body, "Target": ""}, "Target service must be specified"),
        ({**body, "ClientCertURI": ""}, "ClientCertURI must be specified"),
        ({**body, "ClientCertURI": "https://x"}, "ClientCertURI is invalid"),
        ({**body, "ClientCertURI": f"spiffe://{domain}/agent/server/dc/dc1"}, "not the identity of a service"),
        ({"Bogus": "1"}, 'unknown field "Bogus"'),
    ):
        answer = await ask(wrong)
        assert answer.status_code == 400
        assert text in answer.text


# -- a real client


@pytest.mark.interop
async def test_py_consul_registers_beats_and_deregisters(agent: Agent) -> None:
    url = agent.http.base_url

    def use() -> None:
        client = consul.Consul(host=url.host, port=url.port)
        assert client.agent.self()["Config"]["NodeName"] == "node-1"
        assert client.agent.members()[0]["Name"] == "node-1"
        check = consul.Check.ttl("10s")
        assert client.agent.service.register(
            "app", service_id="app#127.0.0.1#3000", address="127.0.0.1", port=3000, tags=["a"], check=check,
            enable_tag_override=True, meta={"k": "v"}, weights={"Passing": 2, "Warning": 1},
        )  # fmt: skip
        http = consul.Check.http("http://127.0.0.1:1/", "10s", timeout="1s", deregister="1h", header={"X": ["1"]})
        assert client.agent.check.register("http", http, service_id="app#127.0.0.1#3000")
        assert client.agent.check.register("tcp", consul.Check.tcp("127.0.0.1", 1, "10s"))
        service = client.agent.services()["app#127.0.0.1#3000"]
        assert (service["Port"], service["Meta"], service["Weights"]["Passing"]) == (3000, {"k": "v"}, 2)
        beat = "service:app#127.0.0.1#3000"
        assert client.agent.check.ttl_pass(beat, "fine")
        assert client.agent.checks()[beat]["Status"] == "passing"
        assert client.agent.check.ttl_warn(beat)
        assert client.agent.checks()[beat]["Status"] == "warning"
        assert client.agent.check.ttl_fail(beat)
        assert client.agent.checks()[beat]["Status"] == "critical"
        assert set(client.agent.checks()) == {beat, "http", "tcp"}
        assert client.agent.check.deregister("tcp")
        assert client.agent.service.deregister("app#127.0.0.1#3000")
        assert client.agent.services() == {}
        assert client.agent.checks() == {}

    await trio.to_thread.run_sync(use)
