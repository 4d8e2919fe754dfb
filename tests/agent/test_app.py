"""An agent's start and end: what it says when it cannot start, whom it tells that it runs, how it stops."""

import os
import signal
import socket
import stat

import pytest
import trio
from processes import AgentProcess, free_ports, wait_until

from agent.app import run_agent
from agent.config import AgentConfig
from agent.config.values import Ports
from agent.process import locked_data_dir, notify_systemd
from agent.runtime import Runtime
from mesh.errors import ConfigError
from mesh.state.fsm import Fsm


def config(**changes) -> AgentConfig:
    http, serf, rpc = free_ports(3)
    settings = {
        "node_name": "n1",
        "server": True,
        "bootstrap_expect": 1,
        "bind_address": "127.0.0.1",
        "advertise_address": "127.0.0.1",
        "ports": Ports(http=http, serf_lan=serf, server=rpc, dns=-1),
    }
    return AgentConfig(**{**settings, **changes})


async def failed_start(capsys, settings: AgentConfig) -> str:
    """The one line that a start that fails leaves on standard error."""
    with trio.fail_after(10):
        assert await run_agent(settings, Runtime()) == 1
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1, lines
    return lines[0]


@pytest.mark.parametrize("key", ["http", "server", "serf_lan"])
async def test_a_port_in_use_is_one_line_naming_key_and_address(capsys, key):
    settings = config()
    port = getattr(settings.ports, key)
    with socket.create_server(("127.0.0.1", port)):
        line = await failed_start(capsys, settings)
    assert f"127.0.0.1:{port}" in line
    assert ("gossip" if key == "serf_lan" else f"ports.{key}") in line or f"ports.{key}" in line


async def test_an_unusable_data_dir_is_one_line_naming_it(capsys, tmp_path):
    (tmp_path / "file").write_text("")
    line = await failed_start(capsys, config(data_dir=str(tmp_path / "file" / "data")))
    assert str(tmp_path / "file" / "data") in line


async def test_a_data_dir_of_another_agent_is_one_line_naming_its_process(capsys, tmp_path):
    with locked_data_dir(str(tmp_path)):
        line = await failed_start(capsys, config(data_dir=str(tmp_path)))
    assert f"another agent (process {os.getpid()})" in line
    assert str(tmp_path) in line


async def test_a_damaged_raft_log_stops_the_start_naming_the_file(capsys, tmp_path):
    (tmp_path / "raft").mkdir()
    for name in ("raft.db", "log.db", "raft.sqlite3"):
        (tmp_path / "raft" / name).write_bytes(b"garbage" * 1000)
    with trio.move_on_after(3) as scope:
        status = await run_agent(config(data_dir=str(tmp_path)), Runtime())
        assert status == 1
        assert str(tmp_path / "raft") in capsys.readouterr().err
    assert not scope.cancelled_caught


async def test_an_address_nobody_answers_at_ends_a_start_that_must_join(capsys):
    (port,) = free_ports(1)
    line = await failed_start(capsys, config(start_join=(f"127.0.0.1:{port}",)))
    assert "start_join" in line
    assert f"127.0.0.1:{port}" in line


async def test_a_false_assertion_in_the_state_stops_the_agent_with_its_reason(capfd, monkeypatch):
    def broken(self, index, data):
        raise AssertionError("the state is not what it was")

    monkeypatch.setattr(Fsm, "apply", broken)
    with trio.fail_after(10):
        assert await run_agent(config(), Runtime()) == 1
    captured = capfd.readouterr()
    assert captured.err == "mesh agent: internal error: AssertionError: the state is not what it was\n"
    assert "[CRITICAL] agent: the agent stops" in captured.out
    assert "Traceback" in captured.out


async def test_the_lock_is_free_again_after_its_holder(tmp_path):
    with locked_data_dir(str(tmp_path)):
        pass
    with locked_data_dir(str(tmp_path)):
        assert stat.S_IMODE((tmp_path / "agent.lock").stat().st_mode) == 0o600
        with pytest.raises(ConfigError), locked_data_dir(str(tmp_path)):
            pass


def test_systemd_is_notified_by_path_and_by_abstract_name(tmp_path, monkeypatch):
    for bound, named in ((str(tmp_path / "notify"), str(tmp_path / "notify")), ("\0mesh-test", "@mesh-test")):
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as listener:
            listener.bind(bound)
            monkeypatch.setenv("NOTIFY_SOCKET", named)
            notify_systemd("READY=1")
            assert listener.recv(100) == b"READY=1"
    notify_systemd("READY=1")  # nobody listens any more: no error
    monkeypatch.delenv("NOTIFY_SOCKET")
    notify_systemd("READY=1")


# -- real processes


@pytest.fixture
def agents(tmp_path):
    made: list[AgentProcess] = []

    def make(name: str, *flags: str, **more) -> AgentProcess:
        made.append(AgentProcess(name, tmp_path, *flags, **more))
        return made[-1]

    yield make
    for agent in made:
        agent.kill()


SINGLE = ("-server", "-bootstrap-expect=1")


def test_sigterm_stops_a_server_with_status_0_and_systemd_hears_of_it(agents, tmp_path):
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as listener:
        listener.bind(str(tmp_path / "notify"))
        listener.settimeout(30)
        server = agents("s1", *SINGLE, environment={"NOTIFY_SOCKET": str(tmp_path / "notify")})
        server.start()
        assert listener.recv(100) == b"READY=1"
        server.wait_ready()
        assert server.stop() == 0
        assert listener.recv(100) == b"STOPPING=1"
    log = server.log.read_text()
    assert "caught signal: SIGTERM" in log
    assert "leaving the cluster" not in log
    assert "Traceback" not in log


def test_clients_leave_on_an_interrupt_and_over_the_api_even_if_the_caller_goes_away(agents):
    server = agents("s1", *SINGLE)
    server.start()
    clients = [agents(name, f"-retry-join={server.gossip_address}", "-retry-interval=1s") for name in ("c1", "c2")]
    for client in clients:
        client.start()
    for client in clients:
        client.wait_ready()
    wait_until(lambda: server.get("/v1/catalog/nodes").count(b'"Node":"c') == 2)
    interrupted, asked = clients
    interrupted.running.send_signal(signal.SIGINT)
    with pytest.raises(TimeoutError):
        asked.request("PUT", "/v1/agent/leave", timeout_s=0.3)
    for client in clients:
        assert client.running.wait(10) == 0
        assert "leaving the cluster" in client.log.read_text()
    wait_until(lambda: server.get("/v1/catalog/nodes").count(b'"Node":"c') == 0)


def test_a_second_signal_stops_at_once(agents):
    (port,) = free_ports(1)
    client = agents("c1", f"-retry-join=127.0.0.1:{port}")
    client.start()
    wait_until(lambda: client.log.exists() and "join failed" in client.log.read_text())
    client.running.send_signal(signal.SIGTERM)
    client.running.send_signal(signal.SIGINT)
    assert client.running.wait(10) in (0, 1)


def test_writes_survive_sigkill_and_restart(agents):
    server = agents("s1", *SINGLE)
    server.start()
    server.wait_ready()
    assert server.request("PUT", "/v1/kv/a", b"kept")[0] == 200
    server.kill()
    server.start()
    server.wait_ready()
    assert server.get("/v1/kv/a?raw") == b"kept"


def test_a_blocking_query_waits_no_longer_than_the_configuration_allows(tmp_path):
    agent = AgentProcess("dev", tmp_path, "-dev", settings={"default_query_time": "100ms", "max_query_time": "200ms"})
    agent.start()
    try:
        agent.wait_ready()
        # Far below what Consul waits by itself (5 min); the client gives up after 20 s.
        for wait in ("", "&wait=10m"):
            assert agent.request("GET", f"/v1/catalog/nodes?index=1000000{wait}")[0] == 200
    finally:
        agent.kill()
