"""Every listener of a live cluster is attacked in every way that a stranger's bytes can; the cluster goes on as before.

The attacker comes from an address of its own, as it would from another host, so limits per client hit it alone.
"""

import contextlib
import errno
import json
import random
import re
import socket
import struct
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import pytest
from meshed import API_SIDECAR_PORT, TO_API, TO_ECHO, meshed
from peers import TIMEOUT_S, Peer
from processes import HTTP_PORT, RPC_PORT, SERF_PORT, loopback_address, rss_mib, wait_until

from agent.dataplane.control import Ping as WorkerPing
from agent.dataplane.control import frame as control_frame
from agent.dataplane.worker_process import WorkerDirectory
from agent.rpc.frames import Call, Hello, Purpose, message_frame, preface

pytestmark = pytest.mark.e2e

SIDECAR_CONNECTIONS_MAX = 100
MEMORY_MIB_MAX = 40.0  # growth over all attacks together
LINES_MAX = 10  # warnings and errors that one attack, of hundreds of connections, may leave in one log
_LINE = re.compile(r"\[(WARN|ERROR|CRITICAL)\]| (WARNING|ERROR|CRITICAL) ")


@dataclass(frozen=True)
class Target:
    """Where to attack: `connect` opens a connection, `valid` is the start of a conversation, `oversized` announces
    more than anyone may send, `flood` connections are more than fit, `counters` count what is refused."""

    connect: Callable[[], socket.socket]
    valid: bytes
    oversized: bytes
    flood: int
    counters: tuple[str, ...]


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    settings = {"telemetry": {"prometheus_retention_time": "60s"}}
    with meshed(tmp_path_factory.mktemp("bad"), "-proxy-workers=1", clients=1, settings=settings) as made:
        proxy = {"config": {"max_inbound_connections": SIDECAR_CONNECTIONS_MAX}}
        made.web.register("api", 8080, sidecar_port=API_SIDECAR_PORT, proxy=proxy)
        made.wait_instances("c1")
        yield made


def targets(world) -> dict[str, Target]:
    server, client = world.cluster.servers[0], world.web
    stranger = loopback_address()

    def at(address: str, port: int) -> Callable[[], socket.socket]:
        return lambda: socket.create_connection((address, port), TIMEOUT_S, (stranger, 0))

    def control() -> socket.socket:
        sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        sock.settimeout(TIMEOUT_S)
        path = str(WorkerDirectory(client.data_dir).sockets()[0])
        while sock.connect_ex(path) == errno.EAGAIN:  # its backlog is short: nobody but the agent comes here
            time.sleep(0.001)
        return sock

    request = b"PUT /v1/kv/x HTTP/1.1\r\nHost: a\r\nContent-Length: 30\r\n\r\nabc"
    huge_head = b"GET / HTTP/1.1\r\nHost: a\r\nX: " + b"x" * 200_000
    return {
        "gossip": Target(at(server.address, SERF_PORT), b"\x06\x00\x00\x00\x05abc", b"\x06\xff\xff\xff\xff" * 100, 160,
                         ("mesh_gossip_refused",)),
        "rpc calls": Target(at(server.address, RPC_PORT), preface(Purpose.CALLS) + message_frame(Call(1, b"x" * 40)),
                            preface(Purpose.CALLS) + b"\xff" * 4, 130, ("mesh_rpc_connections_malformed",)),
        "rpc raft": Target(at(server.address, RPC_PORT), preface(Purpose.RAFT) + message_frame(Hello("stranger")),
                           preface(Purpose.RAFT) + message_frame(Hello("stranger")) + b"\xff" * 4, 130,
                           ("mesh_rpc_connections_malformed", "mesh_rpc_connections_refused")),
        "http": Target(at(server.address, HTTP_PORT), request, huge_head, 230,
                       ("consul_http_malformed", "consul_http_refused")),
        "sidecar inbound": Target(at(client.address, API_SIDECAR_PORT), b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03",
                                  b"\x16\x03\x01\xff\xff" + b"x" * 70_000, 130,
                                  ("envoy_listener_ssl_connection_error", "envoy_listener_downstream_cx_overflow")),
        "sidecar outbound http": Target(at(client.address, TO_API), request, huge_head, 200,
                                        ("envoy_http_downstream_cx_protocol_error",)),
        "sidecar outbound tcp": Target(at(client.address, TO_ECHO), b"hello", b"x" * 1_000_000, 200, ()),
        "worker control": Target(control, control_frame(WorkerPing()), b"\xff" * 64, 60, ()),
    }  # fmt: skip


def reset(sock: socket.socket) -> None:
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    sock.close()


def send(sock: socket.socket, data: bytes) -> None:
    """Sends what the other side takes: it may have closed already, which is its right."""
    with contextlib.suppress(OSError):
        sock.sendall(data)


def attack(target: Target, rng: random.Random) -> Iterator[socket.socket]:
    """Does everything to the target; yields the sockets that are left open."""
    for _ in range(40):
        with target.connect() as sock:
            send(sock, rng.randbytes(rng.randrange(1, 5000)))
    for _ in range(20):  # ends in the middle, begins as it should
        with target.connect() as sock:
            send(sock, target.valid[: rng.randrange(1, len(target.valid))])
    for _ in range(20):  # right at first, then mutated
        with target.connect() as sock:
            mutated = bytearray(target.valid)
            mutated[rng.randrange(len(mutated))] ^= 1 << rng.randrange(8)
            send(sock, bytes(mutated) + rng.randbytes(50))
    for end in range(0, len(target.valid), max(1, len(target.valid) // 20)):
        sock = target.connect()
        send(sock, target.valid[:end])
        reset(sock)
    for _ in range(5):
        with target.connect() as sock:
            send(sock, target.oversized)
    for _ in range(10):  # stalls in the middle
        sock = target.connect()
        send(sock, target.valid[:-1])
        yield sock
    for _ in range(10):  # half open: says that it is done, and stays
        sock = target.connect()
        send(sock, target.valid[:-1])
        with contextlib.suppress(OSError):
            sock.shutdown(socket.SHUT_WR)
        yield sock


def flood(target: Target) -> Iterator[socket.socket]:
    for _ in range(target.flood):
        with contextlib.suppress(OSError):
            yield target.connect()


def counters(agent) -> dict[str, float]:
    """Sums over label sets."""
    found: dict[str, float] = {}
    for line in agent.get("/v1/agent/metrics?format=prometheus").decode().splitlines():
        if line and not line.startswith("#"):
            name, _, value = line.partition(" ") if "{" not in line else (line.split("{")[0], "", line.split("} ")[1])
            found[name] = found.get(name, 0.0) + float(value)
    return found


def log_lines(world, agent) -> list[str]:
    paths = (agent.log, agent.data_dir / "worker.log")
    text = "".join(path.read_text() for path in paths if path.exists())
    assert "Traceback" not in text, text
    return [line for line in text.splitlines() if _LINE.search(line)]


def memory_mib(world) -> dict[str, float]:
    found = {agent.name: rss_mib(agent.running.pid) for agent in world.cluster.agents}
    return {**found, "worker": rss_mib(world.web.worker_pid())}


def assert_works(world, leader) -> None:
    """Both agents answer, traffic flows, and nobody took anybody for dead."""
    for agent in (world.cluster.servers[0], world.web):
        agent.put("/v1/kv/works", "x")
    assert world.cluster.leader() is leader
    members = json.loads(world.web.get("/v1/agent/members"))
    assert [member["Status"] for member in members] == [1] * len(world.cluster.agents)
    assert world.ask() == (200, b"c1")
    with socket.create_connection((world.web.address, TO_ECHO), TIMEOUT_S) as sock:
        peer = Peer(sock)
        peer.send(b"ping")
        assert peer.read(4) == b"ping"


NAMES = (
    "gossip", "rpc calls", "rpc raft", "http", "sidecar inbound", "sidecar outbound http", "sidecar outbound tcp",
    "worker control",
)  # fmt: skip


@pytest.fixture(scope="module")
def memory_before(world):
    world.ask()
    return memory_mib(world)


@pytest.mark.parametrize("name", NAMES)
def test_a_listener_survives_whatever_a_stranger_does(world, memory_before, name):
    target = targets(world)[name]
    agent = world.web if name.startswith(("sidecar", "worker")) else world.cluster.servers[0]
    leader, pid = world.cluster.leader(), world.web.worker_pid()
    counted, logged = counters(agent), len(log_lines(world, agent))
    left = list(attack(target, random.Random(name)))
    assert_works(world, leader)
    left += flood(target)
    if name != "sidecar inbound":  # no new stream fits there, by its limit; what is open goes on
        assert_works(world, leader)
    assert world.ask() == (200, b"c1")
    for sock in left:
        sock.close()
    wait_until(lambda: assert_works(world, leader) is None)
    lines = log_lines(world, agent)[logged:]
    print(name, len(lines), *lines[-6:], sep="\n  ")
    assert len(lines) <= LINES_MAX, "\n".join(lines)
    after = counters(agent)
    for counter in target.counters:
        assert after.get(counter, 0) > counted.get(counter, 0), (counter, sorted(after))
    assert world.web.worker_pid() == pid


def test_gossip_datagrams_of_any_content_change_nothing(world, memory_before):
    server, leader = world.cluster.servers[0], world.cluster.leader()
    rng = random.Random(7)
    before, logged = counters(server), len(log_lines(world, server))
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
        sock.bind((loopback_address(), 0))
        for _ in range(1500):
            sock.sendto(rng.randbytes(rng.randrange(0, 1400)), (server.address, SERF_PORT))
        for kind in range(16):  # the first byte is a message's kind
            for size in (0, 1, 10, 60_000):
                sock.sendto(bytes((kind,)) + rng.randbytes(size), (server.address, SERF_PORT))
    assert_works(world, leader)
    assert counters(server)["mesh_gossip_refused"] > before.get("mesh_gossip_refused", 0)
    assert len(log_lines(world, server)) - logged <= LINES_MAX


def test_after_all_that_memory_is_bounded(world, memory_before):
    after = memory_mib(world)
    for name, before in memory_before.items():
        assert after[name] - before < MEMORY_MIB_MAX, (name, before, after[name])
