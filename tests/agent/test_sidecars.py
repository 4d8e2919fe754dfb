"""From registrations and the cluster's state to what the worker serves, through outages, restarts and refusals."""

import contextlib
import functools
import logging
import os
import signal
import ssl

import pytest
import trio
import trio.testing
from certificates import NOW_S
from msgspec.structs import replace
from root_rotation import rotate
from sidecars import loopback_address
from state_backend import StateBackend, WallClock

from agent import tls
from agent.dataplane.supervisor import WorkerSupervisor
from agent.departures import INBOUND_S, OUTBOUND_S
from agent.leaves import LeafManager
from agent.runtime import Runtime
from agent.sidecars import RETRY_S_MAX, SidecarManager
from mesh.errors import Refused, Unreachable
from mesh.model.catalog import Node, Proxy, Service, Upstream, Weights
from mesh.model.check import Check
from mesh.model.command import ConfigEntrySet, Deregister, IntentionDelete, IntentionUpsert, Register
from mesh.model.config_entry import ConfigEntry
from mesh.model.intention import Intention
from mesh.proxy.sidecar_config import AccessLogConfig, WorkerConfig, check


class Services:
    """The agent's own services, as local state shows them."""

    def __init__(self, *services: Service) -> None:
        self._services = list(services)
        self._callbacks = []

    def services(self):
        return tuple(self._services)

    def subscribe(self, callback):
        self._callbacks.append(callback)
        return lambda: self._callbacks.remove(callback)

    def put(self, *services: Service) -> None:
        self._services = list(services)
        for callback in self._callbacks:
            callback()


class Worker:
    """A supervisor that keeps what it is told; `refuses` decides by configuration."""

    def __init__(self) -> None:
        self.fresh = True
        self.running = False
        self.configs: list[WorkerConfig] = []
        self.attempts = 0
        self.refuses = lambda config: ""
        self.unreachable = False
        self._callbacks = []

    def subscribe(self, callback):
        self._callbacks.append(callback)
        return lambda: self._callbacks.remove(callback)

    async def configure(self, config):
        await trio.lowlevel.checkpoint()
        self.attempts += 1
        if self.unreachable:
            raise Unreachable("the worker is away")
        check(config)
        reason = self.refuses(config)
        if reason:
            raise Refused(reason)
        self.running, self.fresh = True, False
        self.configs.append(config)

    def change(self) -> None:
        for callback in self._callbacks:
            callback()

    def sidecar(self, proxy_id):
        return {sidecar.proxy_id: sidecar for sidecar in self.configs[-1].sidecars}.get(proxy_id)


def proxy_of(name: str, *, port: int = 21000, upstreams=(), config=None, **fields) -> Service:
    proxy = Proxy(
        destination_service_name=name, destination_service_id=name, upstreams=tuple(upstreams), config=config or {},
        **fields,
    )  # fmt: skip
    return Service(f"{name}-sidecar-proxy", f"{name}-sidecar-proxy", kind="connect-proxy", port=port, proxy=proxy)


WEB = Service("web", "web", port=8080)
API_UPSTREAM = Upstream("api", local_bind_port=9191)
WEB_PROXY = proxy_of("web", upstreams=[API_UPSTREAM])
ALL_REQUESTS = {"Action": "allow", "HTTP": {"PathPrefix": "/"}}


class Agent:
    """The parts around one manager."""

    def __init__(self, backend, *services, worker=None, **options) -> None:
        self.services = Services(*services)
        self.worker = worker or Worker()
        self.leaves = LeafManager(backend=backend, runtime=WallClock(NOW_S), datacenter="dc1", data_dir=None)
        self.manager = SidecarManager(
            services=self.services,
            leaves=self.leaves,
            backend=backend,
            supervisor=self.worker,
            runtime=WallClock(NOW_S),
            datacenter="dc1",
            bind_address="0.0.0.0",
            default_allow=options.pop("default_allow", True),
            **options,
        )

    async def start(self, nursery) -> None:
        await nursery.start(self.leaves.run)
        await nursery.start(self.manager.run)


@contextlib.asynccontextmanager
async def running(agent):
    async with trio.open_nursery() as nursery:
        await agent.start(nursery)
        yield agent
        nursery.cancel_scope.cancel()


@pytest.fixture
async def backend():
    backend = StateBackend(WallClock(NOW_S))
    await backend.authority.ensure_root()
    return backend


async def register_api(backend, number: int = 1, *, status="passing", weight=1) -> None:
    name = f"node-{number}"
    node = Node(name, f"10.0.0.{number}")
    proxy = replace(proxy_of("api", port=20000 + number), weights=Weights(weight))
    checks = (Check(name, "c", "c", status, service_id=proxy.service_id),)
    await backend.apply(Register(node, proxy, checks))


async def settle(seconds: float = 0.1) -> None:
    await trio.sleep(seconds)
    await trio.testing.wait_all_tasks_blocked()


async def test_agent_without_proxies_starts_no_worker(autojump_clock, backend):
    async with running(Agent(backend, WEB)) as agent:
        await settle()
        assert agent.worker.attempts == 0


async def test_sidecar_gets_identity_rules_and_passing_endpoints(autojump_clock, backend):
    await register_api(backend, 1, weight=3)
    await register_api(backend, 2)
    await register_api(backend, 3, status="critical")
    await backend.apply(IntentionUpsert(Intention("*", "web", "deny")))
    await backend.apply(IntentionUpsert(Intention("front", "web", "allow")))
    await backend.apply(IntentionUpsert(Intention("front", "*", "deny")))
    await backend.apply(IntentionUpsert(Intention("l7", "web", None, permissions=(ALL_REQUESTS,))))
    async with running(Agent(backend, WEB, WEB_PROXY, default_allow=False)) as agent:
        await settle()
        sidecar = agent.worker.sidecar("web-sidecar-proxy")
        domain = agent.leaves.roots.trust_domain
        assert sidecar.spiffe_id == f"spiffe://{domain}/ns/default/dc/dc1/svc/web"
        assert sidecar.certificate_chain_pem == agent.leaves.current("web").certificate_pem
        assert sidecar.trust_roots_pem == (agent.leaves.roots.roots[0].root_cert_pem,)
        inbound = sidecar.inbound
        assert (inbound.bind_address, inbound.bind_port) == ("0.0.0.0", 21000)
        assert (inbound.local_address, inbound.local_port, inbound.protocol) == ("127.0.0.1", 8080, "tcp")
        assert [(rule.source, rule.action) for rule in inbound.intentions] == [
            ("front", "allow"), ("l7", None), ("*", "deny"), ("front", "deny"),
        ]  # fmt: skip
        assert not inbound.default_allow
        (outbound,) = sidecar.outbound
        assert (outbound.bind_address, outbound.bind_port, outbound.target.name) == ("127.0.0.1", 9191, "api")
        assert outbound.target.expected_spiffe_ids == (f"spiffe://{domain}/ns/default/dc/dc1/svc/api",)
        assert [(point.address, point.port, point.weight) for point in outbound.target.endpoints if point.healthy] == [
            ("10.0.0.1", 20001, 3),
            ("10.0.0.2", 20002, 1),
        ]


async def test_first_configuration_does_not_wait_for_an_upstream_without_instances(autojump_clock, backend):
    async with running(Agent(backend, WEB, WEB_PROXY)) as agent:
        await settle(0.1)
        assert agent.worker.sidecar("web-sidecar-proxy").outbound[0].target.endpoints == ()
        await register_api(backend)
        await settle()
        assert len(agent.worker.sidecar("web-sidecar-proxy").outbound[0].target.endpoints) == 1
        await backend.apply(Deregister("node-1"))
        await settle()
        assert agent.worker.sidecar("web-sidecar-proxy").outbound[0].target.endpoints == ()


async def test_deny_reaches_the_worker_within_200_ms_and_its_removal_too(autojump_clock, backend):
    async with running(Agent(backend, WEB, WEB_PROXY)) as agent:
        await settle()
        for _ in range(20):
            before = len(agent.worker.configs)
            started = trio.current_time()
            await backend.apply(IntentionUpsert(Intention("front", "web", "deny")))
            while len(agent.worker.configs) == before:
                await trio.sleep(0.001)
            assert trio.current_time() - started <= 0.05
            assert agent.worker.sidecar("web-sidecar-proxy").inbound.intentions[0].action == "deny"
            await backend.apply(IntentionDelete("front", "web"))
            await settle()
            assert agent.worker.sidecar("web-sidecar-proxy").inbound.intentions == ()


async def test_burst_of_changes_becomes_one_configuration(autojump_clock, backend):
    async with running(Agent(backend, WEB, WEB_PROXY)) as agent:
        await settle()
        before = len(agent.worker.configs)
        for number in range(1, 51):
            await register_api(backend, number)
        await settle()
        assert len(agent.worker.configs) - before == 1
        assert len(agent.worker.sidecar("web-sidecar-proxy").outbound[0].target.endpoints) == 50


async def test_change_that_alters_nothing_is_not_pushed(autojump_clock, backend):
    await register_api(backend)
    async with running(Agent(backend, WEB, WEB_PROXY)) as agent:
        await settle()
        before = agent.worker.attempts
        await register_api(backend)  # the same again
        await backend.apply(IntentionUpsert(Intention("a", "other", "deny")))
        agent.services.put(WEB, WEB_PROXY)
        await settle()
        assert agent.worker.attempts == before


async def test_services_come_and_go_and_so_do_their_watches_and_leaves(autojump_clock, backend):
    async with running(Agent(backend, WEB)) as agent:
        await settle()
        agent.services.put(WEB, WEB_PROXY, proxy_of("db", port=21001, local_service_port=5432))
        await settle()
        assert agent.worker.sidecar("web-sidecar-proxy") is not None
        assert agent.worker.sidecar("db-sidecar-proxy").inbound.local_port == 5432
        agent.services.put(WEB, WEB_PROXY)
        await settle(OUTBOUND_S + 1)
        assert agent.worker.sidecar("db-sidecar-proxy") is None
        agent.services.put(WEB)
        await settle(OUTBOUND_S + 1)
        assert agent.worker.configs[-1].sidecars == ()
        assert len(backend.registry) <= 1  # only the roots are still followed
        assert not agent.manager._holds


async def test_a_deregistered_sidecar_obeys_policy_while_callers_leave_and_its_outbound_side_goes_last(
    autojump_clock, backend
):
    async with running(Agent(backend, WEB, WEB_PROXY)) as agent:
        await settle()
        agent.services.put(WEB)
        await settle()
        await backend.apply(IntentionUpsert(Intention("x", "web", "deny")))
        await settle()
        served = agent.worker.sidecar("web-sidecar-proxy")
        assert [rule.source for rule in served.inbound.intentions] == ["x"]
        await settle(INBOUND_S)
        served = agent.worker.sidecar("web-sidecar-proxy")
        assert served.inbound is None
        assert [listener.bind_port for listener in served.outbound] == [9191]
        await settle(OUTBOUND_S - INBOUND_S)
        assert agent.worker.sidecar("web-sidecar-proxy") is None
        assert not agent.manager._holds


async def test_a_sidecar_that_comes_back_or_needs_the_address_of_one_that_left_is_served_at_once(
    autojump_clock, backend
):
    async with running(Agent(backend, WEB, WEB_PROXY)) as agent:
        await settle()
        agent.services.put(WEB)
        await settle()
        agent.services.put(WEB, WEB_PROXY)
        await settle(OUTBOUND_S + 1)
        assert agent.worker.sidecar("web-sidecar-proxy").inbound is not None
        agent.services.put(WEB, proxy_of("other", upstreams=[API_UPSTREAM]))
        await settle()
        assert [sidecar.proxy_id for sidecar in agent.worker.configs[-1].sidecars] == ["other-sidecar-proxy"]


async def test_configuration_of_proxies_and_config_entries_is_honoured(autojump_clock, backend, caplog):
    entries = [
        ConfigEntry("proxy-defaults", "global", {"Config": {"protocol": "http"}, "AccessLogs": {"Enabled": True}}),
        ConfigEntry("service-defaults", "api", {"Protocol": "grpc"}),
        ConfigEntry(
            "service-defaults",
            "web",
            {
                "Protocol": "http",
                "UpstreamConfig": {
                    "Defaults": {"ConnectTimeoutMs": 700, "Limits": {"MaxConnections": 3}},
                    "Overrides": [{"Name": "cache", "Protocol": "tcp", "Limits": {"MaxPendingRequests": 4}}],
                },
            },
        ),
    ]
    for entry in entries:
        await backend.apply(ConfigEntrySet(entry))
    upstreams = [
        API_UPSTREAM,
        Upstream("cache", local_bind_port=9192, local_bind_address="127.0.0.9", config={"connect_timeout_ms": 250}),
        Upstream("other", local_bind_port=9193),
        Upstream("far", datacenter="dc2", local_bind_port=9194),
        Upstream("query", destination_type="prepared_query", local_bind_port=9195),
        Upstream("socket", local_bind_socket_path="/run/x.sock"),
    ]
    config = {"bind_address": "127.0.0.7", "bind_port": 3000, "local_connect_timeout_ms": 1500, "protocol": 7,
              "max_inbound_connections": 9, "local_request_timeout_ms": "soon"}  # fmt: skip
    proxy = proxy_of("web", upstreams=upstreams, config=config, local_service_address="127.0.0.8")
    async with running(Agent(backend, WEB, proxy)) as agent:
        await settle()
        sidecar = agent.worker.sidecar("web-sidecar-proxy")
    inbound = sidecar.inbound
    assert (inbound.bind_address, inbound.bind_port, inbound.local_address) == ("127.0.0.7", 3000, "127.0.0.8")
    assert (inbound.protocol, inbound.connect_timeout_s, inbound.connections_max) == ("http", 1.5, 9)
    assert inbound.request_timeout_s == 0.0
    assert sidecar.access_log == AccessLogConfig("/dev/stdout", json_format="consul")
    api, cache, other = sidecar.outbound
    assert (api.protocol, api.target.connect_timeout_s, api.target.limits.connections_max) == ("tcp", 0.7, 3)
    assert (cache.protocol, cache.target.connect_timeout_s, cache.bind_address) == ("tcp", 0.25, "127.0.0.9")
    assert cache.target.limits.pending_requests_max == 4
    assert other.protocol == "http"
    text = caplog.text
    for part in ("grpc of service api", "upstream far", "upstream query", "upstream socket"):
        assert text.count(part) == 1


async def test_outage_of_the_servers_changes_nothing_and_its_end_brings_the_news(autojump_clock, backend):
    await register_api(backend)
    async with running(Agent(backend, WEB, WEB_PROXY)) as agent:
        await settle()
        served = agent.worker.configs[-1]
        backend.down = True
        await settle(3600)
        assert agent.worker.configs[-1] is served
        agent.services.put(WEB, WEB_PROXY, proxy_of("new", port=21005))  # no identity to be had now
        await settle(60)
        assert agent.worker.configs[-1] is served
        backend.down = False
        await register_api(backend, 2)
        await settle(40)
        assert len(agent.worker.sidecar("web-sidecar-proxy").outbound[0].target.endpoints) == 2
        assert agent.worker.sidecar("new-sidecar-proxy") is not None


async def test_taken_over_worker_is_told_nothing_before_every_fact_is_known(autojump_clock, backend):
    await register_api(backend)
    backend.down = True
    worker = Worker()
    worker.fresh, worker.running = False, True  # it serves what the last agent said
    async with running(Agent(backend, WEB, WEB_PROXY, worker=worker)) as agent:
        await settle(600)
        assert worker.attempts == 0
        backend.down = False
        await settle(60)
        assert len(worker.configs) == 1
        assert len(agent.worker.sidecar("web-sidecar-proxy").outbound[0].target.endpoints) == 1


async def test_identity_that_is_refused_does_not_hold_up_a_taken_over_worker(autojump_clock, backend):
    worker = Worker()
    worker.fresh, worker.running = False, True
    async with running(Agent(backend, WEB, WEB_PROXY, proxy_of("bad name", port=21009), worker=worker)):
        await settle(5)
        assert [sidecar.proxy_id for sidecar in worker.configs[-1].sidecars] == ["web-sidecar-proxy"]


async def test_crashed_manager_that_starts_again_does_not_empty_the_worker(autojump_clock, backend):
    await register_api(backend)
    agent = Agent(backend, WEB, WEB_PROXY)
    async with trio.open_nursery() as nursery:
        await nursery.start(agent.leaves.run)
        async with trio.open_nursery() as first:
            await first.start(agent.manager.run)
            await settle()
            first.cancel_scope.cancel()
        backend.down = True
        before = agent.worker.attempts
        await nursery.start(agent.manager.run)
        await settle(60)
        assert agent.worker.attempts == before
        backend.down = False
        await register_api(backend, 2)
        await settle(60)
        assert len(agent.worker.sidecar("web-sidecar-proxy").outbound[0].target.endpoints) == 2
        nursery.cancel_scope.cancel()


async def test_new_worker_is_told_everything_again(autojump_clock, backend):
    async with running(Agent(backend, WEB, WEB_PROXY)) as agent:
        await settle()
        before = len(agent.worker.configs)
        agent.worker.change()
        await settle()
        assert len(agent.worker.configs) == before + 1
        assert agent.worker.configs[-1].sidecars == agent.worker.configs[-2].sidecars


async def test_worker_that_is_away_is_tried_again_with_back_off(autojump_clock, backend):
    agent = Agent(backend, WEB, WEB_PROXY)
    agent.worker.unreachable = True
    async with running(agent):
        await settle(300)
        assert 10 < agent.worker.attempts < 40
        agent.worker.unreachable = False
        await settle(RETRY_S_MAX + 1)
        assert agent.worker.sidecar("web-sidecar-proxy") is not None


def port_taken(port):
    def refuses(config):
        taken = [one.proxy_id for one in config.sidecars if one.inbound and one.inbound.bind_port == port]
        return f"cannot listen on port {port}: {taken[0]}" if taken else ""

    return refuses


async def test_one_refused_sidecar_keeps_no_other_from_its_next_deny(autojump_clock, backend):
    taken = proxy_of("a", port=21666, local_service_port=8081)
    agent = Agent(backend, WEB, WEB_PROXY, taken, proxy_of("z", port=21003))
    agent.worker.refuses = port_taken(21666)
    async with running(agent):
        await settle(1)
        served = {sidecar.proxy_id for sidecar in agent.worker.configs[-1].sidecars}
        assert served == {"web-sidecar-proxy", "z-sidecar-proxy"}
        before = agent.worker.attempts
        started = trio.current_time()
        assert agent.manager._retry_at - started <= RETRY_S_MAX
        await backend.apply(IntentionUpsert(Intention("front", "web", "deny")))
        while not agent.worker.sidecar("web-sidecar-proxy").inbound.intentions:
            await trio.sleep(0.001)
        assert trio.current_time() - started <= 0.05
        assert agent.worker.attempts - before == 1  # the refused one was not tried along
        agent.worker.refuses = lambda config: ""  # the port is free again
        await settle(RETRY_S_MAX + 1)
        assert agent.worker.sidecar("a-sidecar-proxy") is not None


async def test_refused_change_of_a_sidecar_leaves_its_former_configuration(autojump_clock, backend):
    agent = Agent(backend, WEB, WEB_PROXY)
    async with running(agent):
        await settle()
        agent.worker.refuses = port_taken(21777)
        agent.services.put(WEB, replace(WEB_PROXY, port=21777), proxy_of("z", port=21003))
        await settle(1)
        assert agent.worker.sidecar("web-sidecar-proxy").inbound.bind_port == 21000
        assert agent.worker.sidecar("z-sidecar-proxy") is not None


async def test_registration_that_no_worker_could_serve_is_named_and_left_out(autojump_clock, backend, caplog):
    bad = proxy_of("bad", port=21004, upstreams=[Upstream("api", local_bind_port=99999)])
    async with running(Agent(backend, WEB, WEB_PROXY, bad)) as agent:
        await settle(1)
        assert agent.worker.sidecar("bad-sidecar-proxy") is None
        assert agent.worker.sidecar("web-sidecar-proxy") is not None
    assert caplog.text.count("port 99999 is outside") == 1


async def test_new_leaf_and_new_roots_reach_the_worker(autojump_clock, backend):
    async with running(Agent(backend, WEB, WEB_PROXY)) as agent:
        await settle()
        old = agent.worker.sidecar("web-sidecar-proxy")
        await rotate(backend)
        await settle()
        between = agent.worker.sidecar("web-sidecar-proxy")
        assert len(between.trust_roots_pem) == 2  # trusted by everyone before anyone shows a leaf of it
        assert between.certificate_chain_pem == old.certificate_chain_pem
        await settle(45)
        assert agent.worker.sidecar("web-sidecar-proxy").certificate_chain_pem != old.certificate_chain_pem


async def test_keys_are_not_logged(autojump_clock, backend, caplog):
    caplog.set_level(logging.DEBUG)
    async with running(Agent(backend, WEB, WEB_PROXY)) as agent:
        await settle(1)
        secret = agent.leaves.current("web").private_key_pem.splitlines()[1]
        assert secret not in repr(agent.worker.configs[-1].sidecars)
        assert secret not in repr(agent.manager._watches)
    assert secret not in caplog.text
    assert "PRIVATE KEY" not in caplog.text


# --- with a real worker -----------------------------------------------------------------------------------------------


@contextlib.contextmanager
def ending(supervisor):
    """A test that fails leaves no worker behind: it would serve on."""
    try:
        yield
    except BaseException:
        if supervisor.pid:
            os.kill(supervisor.pid, signal.SIGKILL)
        raise


@pytest.mark.filterwarnings("ignore::ResourceWarning")  # the worker's process object is dropped while it drains
async def test_traffic_between_two_services_and_a_deny_with_a_real_worker(tmp_path):
    """api and web on one agent: through web's outbound listener, mTLS, api's inbound listener, to the application."""
    runtime = Runtime(seed=1)
    backend = StateBackend(runtime)
    await backend.authority.ensure_root()
    address = loopback_address()
    api = Service("api", "api", port=8080)
    api_proxy = replace(proxy_of("api", port=21000, local_service_address=address), address=address)
    web_proxy = proxy_of("web", port=0, upstreams=[replace(API_UPSTREAM, local_bind_address=address)])
    supervisor = WorkerSupervisor(runtime=runtime, data_dir=tmp_path)
    leaves = LeafManager(backend=backend, runtime=runtime, datacenter="dc1", data_dir=tmp_path)
    manager = SidecarManager(
        services=Services(api, api_proxy, web_proxy), leaves=leaves, backend=backend, supervisor=supervisor,
        runtime=runtime, datacenter="dc1", bind_address=address, default_allow=True,
    )  # fmt: skip
    await backend.apply(Register(Node("n", address), api_proxy, ()))

    async def echo(stream):
        with contextlib.suppress(trio.BrokenResourceError):  # the sidecar resets what it no longer carries
            async for data in stream:
                await stream.send_all(data)

    async def ask() -> bytes:
        try:
            async with await trio.open_tcp_stream(address, 9191) as stream:
                await stream.send_all(b"hello")
                return await stream.receive_some(100)
        except (OSError, trio.BrokenResourceError):
            return b""

    async def ask_directly(host: str, context: ssl.SSLContext) -> bytes:
        async with await trio.open_tcp_stream(host, 21000) as plain:
            stream = trio.SSLStream(plain, context)
            try:
                await stream.send_all(b"hello")
                return await stream.receive_some(100)
            except trio.BrokenResourceError:
                return b""

    async with trio.open_nursery() as nursery:
        await nursery.start(functools.partial(trio.serve_tcp, echo, 8080, host=address))
        for run in (leaves.run, supervisor.run, manager.run):
            await nursery.start(run)
        with trio.fail_after(20), ending(supervisor):
            while await ask() != b"hello":
                await trio.sleep(0.02)
            await backend.apply(IntentionUpsert(Intention("web", "api", "deny")))
            while await ask() != b"":
                await trio.sleep(0.002)
            web = leaves.current("web")
            roots = [root.root_cert_pem for root in leaves.roots.roots]
            context = tls.client_context(web.certificate_pem, web.private_key_pem, roots)
            assert await ask_directly(address, context) == b""  # past its own sidecar it fares no better
            await backend.apply(IntentionDelete("web", "api"))
            while await ask() != b"hello":
                await trio.sleep(0.01)
        await supervisor.stop(drain=True)
        nursery.cancel_scope.cancel()
