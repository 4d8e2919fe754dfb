from pathlib import Path

import pytest
import trio
import trio.testing
from msgspec.structs import replace
from state_backend import MemoryBackend

from agent.checks import CheckRunner
from agent.definitions import check_definition, service_definition
from agent.local_state import LocalState
from agent.runtime import Runtime
from agent.synchronizer import RETRY_S_MAX, Synchronizer, cluster_scale
from mesh.errors import NoLeader, Unreachable
from mesh.model.catalog import Node, Service
from mesh.model.check import SERF_HEALTH_ID, SERF_HEALTH_NAME, Check
from mesh.model.command import Command, CommandResult, Deregister, Register, Rejected
from mesh.model.query import GetNodeServices, ListNodeChecks, ReadOptions

Clock = trio.testing.MockClock

NODE = Node("node-1", "10.0.0.1", node_id="adf4238a-882b-9ddc-4a9d-5b6758e4159e", datacenter="dc1", meta={"rack": "1"})
SIDECAR = {"Connect": {"SidecarService": {}}}
WEB = {"Name": "web", "ID": "web-1", "Port": 80, "Check": {"TTL": "30s"}}


class Agent:
    """A local state beside a catalog, with the loop between them."""

    def __init__(self, nodes: int = 1) -> None:
        self.runtime = Runtime(seed=3)
        self.state = LocalState("node-1", self.runtime)
        self.backend = MemoryBackend()
        self.nodes = nodes
        self.synchronizer = Synchronizer(
            self.state, self.backend, self.runtime, node=lambda: NODE, cluster_size=lambda: self.nodes
        )

    async def services(self) -> dict[str, Service]:
        failure, self.backend.failure = self.backend.failure, None
        answer = await self.backend.read(GetNodeServices("node-1"), ReadOptions())
        self.backend.failure = failure
        return {service.service_id: service for service in answer.value.services} if answer.value else {}

    async def checks(self) -> dict[str, Check]:
        answer = await self.backend.read(ListNodeChecks("node-1"), ReadOptions())
        return {check.check_id: check for check in answer.value}


@pytest.fixture
async def agent(nursery: trio.Nursery) -> Agent:
    made = Agent()
    await nursery.start(made.synchronizer.run)
    await trio.testing.wait_all_tasks_blocked()
    return made


async def test_the_node_is_registered_as_it_describes_itself(agent: Agent, autojump_clock: Clock) -> None:
    answer = await agent.backend.read(GetNodeServices("node-1"), ReadOptions())
    assert answer.value is not None
    assert replace(answer.value.node, create_index=0, modify_index=0) == NODE


async def test_a_change_is_in_the_catalog_at_once_and_needs_no_read(agent: Agent, autojump_clock: Clock) -> None:
    reads = len(agent.backend.options)
    started = trio.current_time()
    await agent.state.add_service(service_definition({**WEB, "Connect": {"SidecarService": {}}}))
    await trio.testing.wait_all_tasks_blocked()
    assert len(agent.backend.options) == reads
    assert set(await agent.services()) == {"web-1", "web-1-sidecar-proxy"}
    assert len(await agent.checks()) == 3
    agent.state.update_check("service:web-1", status="passing", output="ok")
    await trio.testing.wait_all_tasks_blocked()
    assert (await agent.checks())["service:web-1"].status == "passing"
    await agent.state.remove_service("web-1")
    await trio.testing.wait_all_tasks_blocked()
    assert (await agent.services(), await agent.checks()) == ({}, {})
    assert agent.synchronizer.in_sync
    assert trio.current_time() == started


async def test_a_service_and_its_checks_are_one_command(agent: Agent, autojump_clock: Clock) -> None:
    agent.backend.commands.clear()
    await agent.state.add_service(service_definition(WEB))
    await trio.testing.wait_all_tasks_blocked()
    (command,) = agent.backend.commands
    assert isinstance(command, Register)
    assert [check.check_id for check in command.checks] == ["service:web-1"]


async def test_a_restarting_agent_does_not_take_its_healthy_services_out(tmp_path: Path, autojump_clock: Clock) -> None:
    """A check that passed before the restart stays passing in the catalog until it has run again."""
    tcp = {"TCP": "127.0.0.1:1", "Interval": "30s", "CheckID": "tcp"}  # nobody listens: the first run will fail
    backend, runtime = MemoryBackend(), Runtime(seed=3)
    body = {"Name": "web", "Port": 80, "Checks": [tcp, {"TTL": "60s", "CheckID": "ttl"}], **SIDECAR}

    async def run_once(*, checks_run: bool, passing: bool) -> list[Check]:
        state = LocalState("node-1", runtime, data_dir=tmp_path, sidecar_ports=(1, 1))  # nobody listens there either
        await state.restore()
        await state.add_service(
            service_definition({"Name": "filed", "Check": {**tcp, "CheckID": "f"}}), source="config"
        )
        loop = Synchronizer(state, backend, runtime, node=lambda: NODE)
        runner = CheckRunner(state, backend, runtime, node_name="node-1")
        async with trio.open_nursery() as nursery:
            nursery.start_soon(loop.run)
            if not state.service("web"):
                await state.add_service(service_definition(body))
            if passing:
                for check in state.checks():
                    state.update_check(check.check_id, status="passing", output="ok")
            await trio.sleep(1)
            if checks_run:
                nursery.start_soon(runner.run)
                await trio.sleep(30)
            answer = await backend.read(ListNodeChecks("node-1"), ReadOptions())
            nursery.cancel_scope.cancel()
        return [check for check in answer.value if check.check_id != "ttl"]

    assert {check.status for check in await run_once(checks_run=False, passing=True)} == {"passing"}
    commands = len(backend.commands)
    after = await run_once(checks_run=False, passing=False)
    assert {(check.check_id, check.status) for check in after} == {
        (check_id, "passing") for check_id in ("f", "tcp", "service:web-sidecar-proxy:1", "service:web-sidecar-proxy:2")
    }
    assert [command for command in backend.commands[commands:] if "tcp" in repr(command)] == []
    last = {check.check_id: check.status for check in await run_once(checks_run=True, passing=False)}
    assert last == dict.fromkeys(last, "critical")


async def test_what_others_changed_is_put_right_by_the_next_full_sync(agent: Agent, autojump_clock: Clock) -> None:
    await agent.state.add_service(service_definition(WEB))
    await trio.testing.wait_all_tasks_blocked()
    await agent.backend.apply(Deregister("node-1", service_id="web-1"))
    await agent.backend.apply(Register(NODE, Service("stray", "stray")))
    await agent.backend.apply(Register(NODE, Service("consul", "consul")))
    await agent.backend.apply(Register(NODE, None, (Check("node-1", SERF_HEALTH_ID, SERF_HEALTH_NAME, "passing"),)))
    await trio.sleep(121)
    assert set(await agent.services()) == {"web-1", "consul"}
    assert set(await agent.checks()) == {"service:web-1", SERF_HEALTH_ID}


async def test_full_syncs_without_a_difference_write_nothing(agent: Agent, autojump_clock: Clock) -> None:
    await agent.state.add_service(service_definition(WEB))
    await trio.testing.wait_all_tasks_blocked()
    agent.backend.commands.clear()
    reads = len(agent.backend.options)
    await trio.sleep(600)
    assert agent.backend.commands == []
    assert 2 * 5 <= len(agent.backend.options) - reads <= 2 * 11


async def test_a_node_row_overwritten_at_the_start_is_put_right_within_seconds(
    agent: Agent, autojump_clock: Clock
) -> None:
    await agent.backend.apply(Register(replace(NODE, meta={})))
    await trio.sleep(11)
    answer = await agent.backend.read(GetNodeServices("node-1"), ReadOptions())
    assert answer.value is not None
    assert answer.value.node.meta == NODE.meta


async def test_a_failed_sync_is_retried_with_growing_pauses_and_then_catches_up(
    agent: Agent, autojump_clock: Clock
) -> None:
    agent.backend.failure = NoLeader("no leader")
    await agent.state.add_service(service_definition(WEB))
    await trio.sleep(300)
    assert agent.synchronizer.failures >= 300 / RETRY_S_MAX
    assert agent.synchronizer.failures <= 60
    assert not agent.synchronizer.in_sync
    agent.backend.failure = None
    await trio.sleep(RETRY_S_MAX)
    assert set(await agent.services()) == {"web-1"}
    assert agent.synchronizer.failures == 0


async def test_a_server_that_appears_ends_the_pause_after_a_failure(agent: Agent, autojump_clock: Clock) -> None:
    agent.backend.failure = Unreachable("no server")
    await agent.state.add_service(service_definition(WEB))
    await trio.sleep(200)
    agent.backend.failure = None
    agent.synchronizer.server_appeared()
    await trio.sleep(3.01)
    assert set(await agent.services()) == {"web-1"}


async def test_changes_of_output_alone_wait_and_a_change_of_status_does_not(
    agent: Agent, autojump_clock: Clock
) -> None:
    await agent.state.add_check(check_definition({"Name": "c", "TTL": "10s", "Status": "passing"}))
    await trio.testing.wait_all_tasks_blocked()
    agent.backend.commands.clear()
    for count in range(100):
        agent.state.update_check("c", status="passing", output=f"run {count}")
        await trio.sleep(1)
    assert agent.backend.commands == []
    agent.state.update_check("c", status="warning", output="hot")
    await trio.testing.wait_all_tasks_blocked()
    assert ((await agent.checks())["c"].status, (await agent.checks())["c"].output) == ("warning", "hot")
    agent.state.update_check("c", status="warning", output="still hot")
    await trio.sleep(149)
    assert (await agent.checks())["c"].output == "hot"
    await trio.sleep(302)
    assert (await agent.checks())["c"].output == "still hot"


async def test_tags_that_may_be_overridden_stay_as_the_catalog_has_them(agent: Agent, autojump_clock: Clock) -> None:
    await agent.state.add_service(service_definition({**WEB, "Tags": ["mine"], "EnableTagOverride": True}))
    await trio.testing.wait_all_tasks_blocked()
    service = (await agent.services())["web-1"]
    await agent.backend.apply(Register(NODE, replace(service, tags=("theirs",), create_index=0, modify_index=0)))
    await trio.sleep(200)
    await agent.state.add_service(service_definition({**WEB, "Port": 81, "Tags": ["mine"], "EnableTagOverride": True}))
    await trio.testing.wait_all_tasks_blocked()
    service = (await agent.services())["web-1"]
    assert (service.tags, service.port) == (("theirs",), 81)


async def test_a_refused_registration_is_asked_again_only_by_a_full_sync_and_holds_up_nothing(
    autojump_clock: Clock, caplog: pytest.LogCaptureFixture
) -> None:
    class Refusing(MemoryBackend):
        async def apply(self, command: Command) -> CommandResult:
            result = await super().apply(command)
            if isinstance(command, Register) and command.service and command.service.service == "bad":
                return Rejected(result.index, "it is bad")
            return result

    made = Agent()
    made.backend = Refusing()
    loop = Synchronizer(made.state, made.backend, made.runtime, node=lambda: NODE)
    async with trio.open_nursery() as nursery:
        await nursery.start(loop.run)
        await made.state.add_service(service_definition({"Name": "bad"}))
        await made.state.add_service(service_definition({"Name": "good"}))
        await trio.sleep(10)
        assert "good" in await made.services()
        bad = [command for command in made.backend.commands if "bad" in repr(command)]
        nursery.cancel_scope.cancel()
    assert len(bad) == 1
    assert "refused a registration of this agent: it is bad" in caplog.text


@pytest.mark.parametrize(("nodes", "scale"), [(1, 1), (128, 1), (129, 2), (256, 2), (257, 3), (8192, 7)])
def test_intervals_stretch_with_the_cluster(nodes: int, scale: int) -> None:
    assert cluster_scale(nodes) == scale
