"""Traffic through real sidecars while agents, servers, workers and applications die, and while policy changes."""

import json
import os
import signal
import socket

import pytest
from meshed import TO_API, TO_ECHO, meshed
from peers import TIMEOUT_S, Load, Peer, get
from processes import wait_until

pytestmark = pytest.mark.e2e


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """Every test leaves it complete and healthy."""
    with meshed(tmp_path_factory.mktemp("traffic")) as made:
        yield made


@pytest.fixture
def load(world):
    with Load(world.web.address, TO_API) as running:
        running.wait(50)
        yield running


@pytest.fixture
def stream(world):
    """A TCP stream from web to echo that has carried bytes."""
    peer = Peer(socket.create_connection((world.web.address, TO_ECHO), TIMEOUT_S))
    assert echoes(peer)
    yield peer
    peer.close()


def echoes(peer):
    peer.send(b"ping")
    return peer.read(4) == b"ping"


def new_stream_works(world):
    with socket.create_connection((world.web.address, TO_ECHO), TIMEOUT_S) as sock:
        return echoes(Peer(sock))


def test_the_leaders_death_costs_no_request_and_writes_resume(world, load, stream):
    leader = world.cluster.leader()
    leader.kill()
    # A write that was on its way to the dead leader may be answered with an error: nobody knows what became of it.
    wait_until(world.web.writes)
    load.wait(100)
    leader.start()
    leader.wait_ready()
    load.wait(100)
    assert load.failures == []
    assert echoes(stream)


def test_every_flip_of_an_intention_takes_effect(world):
    for action, status in (("deny", 403), ("allow", 200)) * 4:
        world.cluster.servers[0].intend("web", "api", action)
        wait_until(lambda status=status: {world.ask()[0] for _ in range(10)} == {status}, timeout_s=10)
    assert world.web.request("DELETE", "/v1/connect/intentions/exact?source=web&destination=api")[0] == 200


def test_routes_of_config_entries_take_effect_and_their_removal_restores(world, load):
    """A neutral route with an answer of its own, and a split to a subset that a filter selects."""
    agent = world.web
    teapot = {
        "matches": [{"path": {"kind": "segment", "value": "/teapot"}}],
        "action": {"type": "DirectResponse", "status": 418, "body": "short and stout"},
    }
    rest = {"action": {"type": "Forward", "targets": [{"target": "api"}]}}
    entry = {"Kind": "service-traffic", "Name": "api", "Traffic": {"routes": {"hosts": [{"rules": [teapot, rest]}]}}}
    agent.put("/v1/config", entry)
    wait_until(lambda: get(agent.address, TO_API, path="/teapot/x") == (418, b"short and stout"))
    assert agent.request("DELETE", "/v1/config/service-traffic/api")[0] == 200
    wait_until(lambda: get(agent.address, TO_API, path="/teapot/x")[0] == 200)

    subsets = {"only": {"Filter": 'Node.Node == "c2"'}}
    agent.put("/v1/config", {"Kind": "service-resolver", "Name": "api", "Subsets": subsets})
    splits = [{"Weight": 100, "ServiceSubset": "only"}]
    agent.put("/v1/config", {"Kind": "service-splitter", "Name": "api", "Splits": splits})
    world.wait_instances("c2")
    assert agent.request("DELETE", "/v1/config/service-splitter/api")[0] == 200
    assert agent.request("DELETE", "/v1/config/service-resolver/api")[0] == 200
    world.wait_instances("c1", "c2")
    assert load.failures == []


def test_a_deny_closes_matching_streams_and_leaves_other_traffic_alone(world, load, stream):
    world.cluster.clients[1].intend("web", "echo", "deny")
    assert stream.at_end()
    with socket.create_connection((world.web.address, TO_ECHO), TIMEOUT_S) as refused:
        assert Peer(refused).at_end()
    world.cluster.clients[1].intend("web", "echo", "allow")
    wait_until(lambda: _tries(new_stream_works, world))
    load.wait(50)
    assert load.failures == []


def _tries(check, *arguments):
    try:
        return check(*arguments)
    except (OSError, AssertionError):
        return False


def test_a_killed_worker_is_replaced_and_serves_what_the_last_one_did(world):
    before = world.web.worker_pid()
    world.cluster.clients[0].kill_workers()
    wait_until(lambda: world.ask()[0] == 200)
    assert world.web.worker_pid() not in (0, before)
    assert new_stream_works(world)


def test_an_instance_whose_worker_dies_costs_no_request(world, load):
    other = world.cluster.clients[1]
    before = other.worker_pid()
    os.kill(before, signal.SIGKILL)
    load.wait(200)
    wait_until(lambda: other.worker_pid() not in (0, before))
    assert load.failures == []
    world.wait_instances("c1", "c2")


def test_workers_are_replaced_through_the_api_without_a_failed_request(world, load, stream):
    for agent in (world.web, world.cluster.clients[1]):
        before = {worker["Pid"] for worker in json.loads(agent.get("/v1/agent/proxy/workers"))}
        assert json.loads(agent.put("/v1/agent/proxy/replace-workers", None)) == {"Replaced": len(before)}
        after = {worker["Pid"] for worker in json.loads(agent.get("/v1/agent/proxy/workers"))}
        assert len(after) == len(before)
        assert not after & before
    load.wait(100)
    # The load keeps its connections and takes no notice of `connection: close`: what it finds then is no failure.
    assert [failure for failure in load.failures if failure[1] or b"ended after b''" not in failure[2]] == []
    assert echoes(stream)
    assert new_stream_works(world)


def test_an_instance_that_leaves_in_order_costs_no_request(world, load):
    other = world.cluster.clients[1]
    for service in ("api", "echo"):
        other.put(f"/v1/agent/service/deregister/{service}", None)
    load.wait(100)
    world.wait_instances("c1")
    assert load.failures == []
    world.register()


def test_an_agent_that_leaves_costs_no_request_and_its_own_host_still_calls_others(world, load):
    other = world.cluster.clients[1]
    for agent, waits in ((other, ("c1",)), (world.web, ())):
        assert agent.stop() == 0
        if waits:
            load.wait(100)
            assert load.failures == []
        assert world.ask()[0] == 200  # the worker of the host that left is on its own now, outbound last
        agent.start()
        agent.wait_ready()
        world.wait_instances("c1", "c2")


def test_a_killed_agents_worker_serves_on_and_the_next_agent_takes_it_over(world, load, stream):
    agent, worker = world.web, world.web.worker_pid()
    agent.kill()
    load.wait(200)
    assert new_stream_works(world)
    agent.start()
    agent.wait_ready()
    load.wait(100)
    assert agent.worker_pid() == worker
    assert load.failures == []
    assert echoes(stream)
    # What changes from now on reaches the old worker: its endpoints, and its own intentions.
    world.cluster.clients[1].put("/v1/agent/service/deregister/api", None)
    world.wait_instances("c1")
    assert load.failures == []
    world.register()
    world.cluster.servers[0].intend("*", "api", "deny")
    wait_until(lambda: {world.ask()[0] for _ in range(10)} == {403})
    assert world.web.request("DELETE", "/v1/connect/intentions/exact?source=*&destination=api")[0] == 200
    world.wait_instances("c1", "c2")
    assert agent.worker_pid() == worker


def test_with_all_servers_dead_sidecars_serve_on_and_new_connections_too(world, load, stream):
    for server in world.cluster.servers:
        server.kill()
    load.wait(300)
    assert {get(world.web.address, TO_API)[0] for _ in range(20)} == {200}
    assert new_stream_works(world)
    assert echoes(stream)
    # Nor does an agent that starts knowing nothing, with nobody to ask, take anything from its worker.
    worker = world.web.worker_pid()
    world.web.kill()
    world.web.start()
    wait_until(lambda: world.web.get("/v1/agent/services"))
    load.wait(600)  # longer than it would take the agent to act on what it does not know
    assert new_stream_works(world)
    assert world.web.worker_pid() == worker
    # An agent that does know gives a new worker what the last one had, without the servers.
    world.cluster.clients[1].kill_workers()
    load.wait(200)
    world.wait_instances("c1", "c2")
    wait_until(lambda: _tries(new_stream_works, world))
    for server in world.cluster.servers:
        server.start()
    world.cluster.wait_ready()
    load.wait(100)
    assert load.failures == []
    world.cluster.servers[1].intend("web", "api", "deny")
    wait_until(lambda: world.ask()[0] == 403)
    assert world.web.request("DELETE", "/v1/connect/intentions/exact?source=web&destination=api")[0] == 200
    world.wait_instances("c1", "c2")


def test_everyone_stops_in_time_and_has_logged_no_traceback(world):
    world.cluster.stop()
