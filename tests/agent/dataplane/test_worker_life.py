"""A worker's life: configuration, agents that come and go, draining, running out of descriptors."""

import contextlib
import os
import random
import signal
import socket
import stat
import subprocess
import sys
import time

import pytest
from mesh_pair import Pair
from msgspec.structs import replace
from sidecars import REPOSITORY, WorkerProcess, free_ports, loopback_address

from agent.dataplane.control import Ack, Adopt, Configure, Drain, Handover, Nack, Pong, Stats, frame
from mesh.proxy.resources import ListenerKey
from mesh.proxy.sidecar_config import AccessLogConfig, EndpointConfig, SourceRule, WorkerConfig

GET = b"GET / HTTP/1.1\r\nHost: api\r\n\r\n"
OK = b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nok"


def ask_once(hops):
    client = hops.client()
    client.send(GET)
    answer = client.read_message()
    client.close()
    return answer


@pytest.fixture
def own(tmp_path):
    """A worker that the test may end."""
    pair = Pair(tmp_path)
    yield pair
    pair.close()


def test_ping_tells_who_answers(pair):
    hops = pair.hops()
    pong = pair.worker.ping()
    assert isinstance(pong, Pong)
    assert pong.pid == pair.worker.pid
    assert pong.config_version == hops.pair._version
    assert not pong.draining


def test_the_control_socket_is_for_its_owner_only(pair):
    assert stat.S_IMODE(os.stat(pair.worker.path).st_mode) == 0o600


def test_a_refused_configuration_leaves_the_one_before_in_force(pair):
    hops = pair.hops()
    hops.serve()
    taken = socket.create_server((hops.address, 9999))
    good = pair.authority.two_hops(
        outbound_port=9191, inbound_port=21000, app_port=8080, address=hops.address, version=1000
    )
    web, _api = good.sidecars
    bad = [
        (WorkerConfig(1001, (web, web)), "appears twice"),
        (WorkerConfig(1002, (pair.authority.sidecar("x", leaf=("no certificate", "no key")),)), "certificate"),
        (
            pair.authority.two_hops(
                outbound_port=9999, inbound_port=21001, app_port=8080, address=hops.address, version=1003
            ),
            "port 9999",
        ),
    ]
    for config, words in bad:
        reply = pair.worker.configure(config)
        assert isinstance(reply, Nack)
        assert reply.version == config.version
        assert words in reply.error
        assert ask_once(hops)[1] == b"ok"
        with pytest.raises(ConnectionRefusedError):
            socket.create_connection((hops.address, 21001))
    taken.close()
    assert pair.worker.configure(bad[2][0]) == Ack(1003)


def test_listeners_that_leave_the_configuration_stop_accepting(pair):
    hops = pair.hops()
    assert pair.worker.configure(WorkerConfig(pair.next_version())) == Ack(pair._version)
    with pytest.raises(ConnectionRefusedError):
        hops.client()


def test_the_worker_serves_on_without_an_agent_and_a_new_agent_takes_over(pair):
    hops = pair.hops()
    hops.serve()
    pair.worker.disconnect()
    assert ask_once(hops)[1] == b"ok"
    pair.worker.connect()
    assert pair.worker.ping().config_version == pair._version
    assert ask_once(hops)[1] == b"ok"


def test_the_newest_agent_wins(pair):
    pair.hops()
    first = pair.worker._control
    pair.worker.connect()
    pair.worker.ping()
    assert first.recv(1) == b""
    first.close()


def test_noise_on_the_control_socket_only_ends_that_connection(pair):
    hops = pair.hops()
    hops.serve()
    rng = random.Random(5)
    valid = frame(Configure(WorkerConfig(1)))
    for number in range(60):
        with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as sock:
            sock.settimeout(5)
            sock.connect(str(pair.worker.path))
            if number % 3:
                noise = bytearray(valid)
                for _ in range(3):
                    noise[rng.randrange(4, len(noise))] = rng.randrange(256)
                noise = bytes(noise) if number % 2 else valid[: rng.randrange(1, len(valid))]
            else:
                noise = rng.randbytes(100)
            with contextlib.suppress(OSError):
                sock.sendall(noise)
                sock.shutdown(socket.SHUT_WR)
                while sock.recv(65536):
                    pass
    pair.worker.disconnect()
    pair.worker.connect()
    hops.apply()
    assert ask_once(hops)[1] == b"ok"


def test_drain_finishes_what_is_under_way_and_exits(own):
    hops = own.hops()
    busy, idle = hops.client(), hops.client()
    busy.send(GET)
    app = hops.app()
    app.read_message()
    idle_deadline = time.monotonic() + 5
    while own.worker.counter("mesh_worker_connections_open") < 3 and time.monotonic() < idle_deadline:
        pass
    own.worker.drain(10.0)
    assert idle.at_end()
    with pytest.raises(ConnectionRefusedError):
        hops.client()
    app.send(OK)
    assert busy.read_message()[1] == b"ok"
    assert own.worker.process.wait(5) == 0
    assert not own.worker.path.exists()
    hops.close()


def test_a_worker_that_exits_with_its_agent_waits_a_moment_for_another(tmp_path):
    worker = WorkerProcess(tmp_path, exit_with_agent=True)
    try:
        worker.ping()
        worker.disconnect()
        worker.connect()
        worker.ping()
        worker.disconnect()
        assert worker.process.wait(10) == 0
    finally:
        worker.close()


def test_a_second_worker_on_the_same_socket_says_so(pair, tmp_path):
    result = subprocess.run(
        [sys.executable, "-m", "agent.dataplane.worker", "--control", str(pair.worker.path)],
        capture_output=True, text=True, cwd=REPOSITORY, timeout=20,
    )  # fmt: skip
    assert result.returncode == 1
    assert "another worker already listens" in result.stderr


def test_out_of_descriptors_refuses_new_connections_and_recovers(tmp_path):
    own = Pair(tmp_path, descriptors=64)
    try:
        hops = own.hops()
        hops.serve()
        assert ask_once(hops)[1] == b"ok"
        flood = []
        for _ in range(100):
            with contextlib.suppress(OSError):
                flood.append(socket.create_connection((hops.address, hops.outbound_port), 2))
        deadline = time.monotonic() + 10
        while not own.worker.counter("mesh_listener_accept_failures") and time.monotonic() < deadline:
            time.sleep(0.01)
        assert own.worker.counter("mesh_listener_accept_failures") > 0
        for sock in flood:
            sock.close()
        deadline = time.monotonic() + 10
        answer = None
        while answer != b"ok" and time.monotonic() < deadline:
            with contextlib.suppress(OSError, AssertionError):
                answer = ask_once(hops)[1]
        assert answer == b"ok"
        own.end_test()
    finally:
        own.close()


def test_endpoints_come_and_go_without_a_failed_request(pair):
    hops = pair.hops()
    hops.serve()
    client = hops.client()
    other = loopback_address()
    for number in range(12):
        dead = (EndpointConfig("gone", other, 1),) if number % 2 else ()
        hops.apply(
            target={
                "endpoints": (EndpointConfig("api-1", hops.address, hops.inbound_port), *dead),
                "expected_spiffe_ids": (pair.authority.spiffe_id("api"),),
            }
        )
        for _ in range(3):
            client.send(GET)
            assert client.read_message()[1] == b"ok"


def test_statistics_are_prometheus_text_with_the_names_that_dashboards_ask_for(pair):
    hops = pair.hops()
    hops.serve()
    ask_once(hops)
    text = pair.worker.ask(Stats()).prometheus
    for name in (
        "envoy_listener_http_downstream_rq_xx", "envoy_http_downstream_rq_total", "envoy_cluster_upstream_rq_xx",
        "envoy_cluster_upstream_rq_total", "envoy_cluster_upstream_rq_time_bucket", "envoy_cluster_upstream_cx_active",
        "envoy_cluster_membership_healthy", "envoy_server_live", "envoy_server_uptime",
    ):  # fmt: skip
        assert f"\n{name}" in text
    assert 'envoy_http_conn_manager_prefix="public_listener"' in text


def test_access_log_lines_are_written_in_envoys_format(pair, tmp_path):
    hops = pair.hops()
    hops.serve()
    path = tmp_path / "access.log"
    base = pair.authority.two_hops(
        outbound_port=9191, inbound_port=21000, app_port=8080, address=hops.address, version=pair.next_version()
    )
    web, api = base.sidecars
    logged = replace(base, sidecars=(replace(web, access_log=AccessLogConfig(str(path))), api))
    assert pair.worker.configure(logged) == Ack(base.version)
    client = hops.client()
    client.send(b'GET /x?y HTTP/1.1\r\nHost: api\r\nUser-Agent: a"b\r\nX-Request-Id: id-1\r\n\r\n')
    assert client.read_message()[1] == b"ok"
    deadline = time.monotonic() + 10
    while not path.exists() or not path.read_text():
        assert time.monotonic() < deadline
        time.sleep(0.02)
    line = path.read_text()
    assert '"GET /x?y HTTP/1.1" 200 - 0 2 ' in line
    assert f'"-" "a\\"b" "id-1" "api" "{hops.address}:21000"\n' in line


def test_endpoints_may_have_names(pair):
    hops = pair.hops()
    hops.serve()
    named = {"expected_spiffe_ids": (pair.authority.spiffe_id("api"),)}
    hops.apply(target={"endpoints": (EndpointConfig("named", "no-such-host.invalid", 21000),), **named})
    assert ask_once(hops)[0].startswith(b"HTTP/1.1 503 ")
    client = hops.client()
    local = pair.authority.two_hops(
        outbound_port=9191, inbound_port=21000, app_port=8080, address=hops.address, version=pair.next_version(),
        target={"endpoints": (EndpointConfig("named", "localhost", 21000),), **named},
    )  # fmt: skip
    web, api = local.sidecars
    public = replace(api.inbound, bind_address="127.0.0.1", bind_port=free_ports(1)[0])
    outbound = replace(web.outbound[0], target=replace(
        web.outbound[0].target, endpoints=(EndpointConfig("named", "localhost", public.bind_port),)
    ))  # fmt: skip
    config = replace(local, sidecars=(replace(web, outbound=(outbound,)), replace(api, inbound=public)))
    assert pair.worker.configure(config) == Ack(config.version)
    client.send(GET)
    assert client.read_message()[1] == b"ok"


def accepts(address, port):
    try:
        socket.create_connection((address, port), 5).close()
    except (ConnectionRefusedError, ConnectionResetError):  # reset: it closed while we were connecting
        return False
    return True


def until(condition):
    deadline = time.monotonic() + 10
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_a_drain_ends_inbound_first_and_outbound_when_inbound_is_over(own):
    hops = own.hops()
    direct = hops.tls_client()
    direct.send(GET)
    app = hops.app()
    app.read_message()
    assert own.worker.ask(Drain(30.0, idle_s=1.0, outbound_s=0.01)) == Ack(own._version)
    until(lambda: not accepts(hops.address, hops.inbound_port))
    for _ in range(100):  # longer than outbound_s: the request under way may still need to call others
        assert accepts(hops.address, hops.outbound_port)
    app.send(OK)
    head, body = direct.read_message()
    assert body == b"ok"
    assert b"connection: close" in head
    until(lambda: not accepts(hops.address, hops.outbound_port))
    assert own.worker.process.wait(5) == 0
    hops.close()


def test_a_more_urgent_drain_ends_the_one_before(own):
    hops = own.hops()
    assert own.worker.ask(Drain(60.0, outbound_s=50.0)) == Ack(own._version)
    until(lambda: not accepts(hops.address, hops.inbound_port))
    assert accepts(hops.address, hops.outbound_port)
    assert own.worker.drain(60.0) == Ack(own._version)
    assert own.worker.process.wait(5) == 0
    hops.close()


def test_a_draining_worker_answers_one_more_request_on_an_idle_connection(own):
    hops = own.hops()
    hops.serve()
    client, idle = hops.tls_client(), hops.tls_client()
    for peer in (client, idle):
        peer.send(GET)
        assert peer.read_message()[1] == b"ok"
    assert own.worker.ask(Drain(30.0, idle_s=1.0)) == Ack(own._version)
    client.send(GET)
    head, body = client.read_message()
    assert body == b"ok"
    assert b"connection: close" in head
    assert client.at_end()
    assert idle.at_end()  # nothing came within its second
    assert own.worker.process.wait(5) == 0
    hops.close()


def test_what_waits_at_a_listener_that_goes_is_served(pair):
    hops = pair.hops()
    hops.serve()
    os.kill(pair.worker.pid, signal.SIGSTOP)
    waiting = []
    try:
        for _ in range(40):  # more than one turn accepts
            waiting.append(hops.client())
            waiting[-1].send(GET)
        data = frame(Configure(WorkerConfig(pair.next_version())))
        pair.worker._control.sendall(data)
    finally:
        os.kill(pair.worker.pid, signal.SIGCONT)
    assert pair.worker.receive_reply() == Ack(pair._version)
    # Inbound has gone as well, so there is nothing behind: an answer all the same, and no reset.
    assert all(client.read_message()[0].startswith(b"HTTP/1.1 ") for client in waiting)
    assert not accepts(hops.address, hops.outbound_port)


def test_an_upgraded_connection_goes_on_through_policy_changes_until_one_forbids_it(pair):
    hops = pair.hops()
    client = hops.client()
    client.send(b"GET /ws HTTP/1.1\r\nHost: api\r\nConnection: Upgrade\r\nUpgrade: websocket\r\n\r\n")
    app = hops.app()
    app.read_head()
    app.send(b"HTTP/1.1 101 Switching Protocols\r\nConnection: Upgrade\r\nUpgrade: websocket\r\n\r\n")
    assert client.read_head().startswith(b"HTTP/1.1 101 ")
    for number in range(3):
        hops.apply(intentions=(SourceRule(f"other-{number}", "deny"),), connections_max=70 + number)
        client.send(b"ping%d" % number)
        assert app.read(5) == b"ping%d" % number
        app.send(b"pong%d" % number)
        assert client.read(5) == b"pong%d" % number
    hops.apply(default_allow=False)
    assert client.at_end()


def test_sockets_pass_from_worker_to_worker_and_unused_ones_are_let_go(own, tmp_path):
    hops = own.hops()
    hops.serve()
    config = hops.apply()
    reply, sockets = own.worker.ask_for_sockets(Handover())
    assert [(key.address, key.port) for key in reply.keys] == [(hops.address, 9191), (hops.address, 21000)]
    assert reply.remaining == 0
    rest, others = own.worker.ask_for_sockets(Handover(1))
    assert rest.keys == reply.keys[1:]
    others[0].close()
    (tmp_path / "successor").mkdir()
    successor = WorkerProcess(tmp_path / "successor")
    stray = socket.create_server((hops.address, 7777))
    try:
        keys = (*reply.keys, ListenerKey(hops.address, 7777))
        assert successor.ask_with_sockets(Adopt(keys), [*sockets, stray]) == Ack(-1)
        assert successor.configure(config) == Ack(config.version)
        stray.close()
        with pytest.raises(ConnectionRefusedError):
            socket.create_connection((hops.address, 7777), 5)
        own.worker.drain(5.0)
        assert own.worker.process.wait(10) == 0
        for _ in range(5):
            assert ask_once(hops)[1] == b"ok"
    finally:
        for sock in sockets:
            sock.close()
        successor.close()
        hops.close()


def test_an_adopt_without_its_sockets_ends_that_connection_only(pair):
    hops = pair.hops()
    hops.serve()
    with pytest.raises((EOFError, ConnectionResetError)):
        pair.worker.ask(Adopt((ListenerKey(hops.address, 7777),)))
    pair.worker.disconnect()
    pair.worker.connect()
    assert pair.worker.ping().config_version == pair._version
    assert ask_once(hops)[1] == b"ok"
