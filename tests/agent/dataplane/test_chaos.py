"""Many clients and an application that do anything at any moment: the worker neither fails nor leaks."""

import contextlib
import random
import socket
import threading
import time
from pathlib import Path

from mesh_pair import Peer

REQUESTS = (
    b"GET / HTTP/1.1\r\nHost: api\r\n\r\n",
    b"POST / HTTP/1.1\r\nHost: api\r\nContent-Length: 3\r\n\r\nabc",
    b"POST / HTTP/1.1\r\nHost: api\r\nTransfer-Encoding: chunked\r\n\r\n5\r\nhello\r\n0\r\n\r\n",
    b"HEAD / HTTP/1.1\r\nHost: api\r\n\r\n" * 3,
    b"GET / HTTP/1.1\r\nHost: api\r\nConnection: upgrade\r\nUpgrade: websocket\r\n\r\nframes",
    b"POST / HTTP/1.1\r\nHost: api\r\nContent-Length: 200000\r\n\r\n" + b"x" * 200_000,
    b"PUT / HTTP/1.1\r\nHost: api\r\nExpect: 100-continue\r\nContent-Length: 3\r\n\r\n",
    b"BROKEN\r\n\r\n",
)
RESPONSES = (
    b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nok",
    b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n2\r\nok\r\n0\r\n\r\n",
    b"HTTP/1.1 204 No Content\r\n\r\n",
    b"HTTP/1.1 200 OK\r\n\r\nuntil the end",
    b"HTTP/1.1 100 Continue\r\n\r\nHTTP/1.1 200 OK\r\nContent-Length: 0\r\nConnection: close\r\n\r\n",
    b"HTTP/1.1 101 X\r\nConnection: upgrade\r\nUpgrade: websocket\r\n\r\nframes",
    b"HTTP/1.1 200 OK\r\nContent-Length: 300000\r\n\r\n" + b"y" * 300_000,
    b"nonsense\r\n\r\n",
)


def misbehave(peer, messages, rng):
    """Some messages, cut anywhere, with pauses in reading, ended in one of several ways."""
    peer.sock.settimeout(0.05)
    with contextlib.suppress(OSError, AssertionError):
        for _ in range(rng.randrange(1, 4)):
            if rng.random() < 0.7:
                with contextlib.suppress(TimeoutError):
                    peer.sock.recv(rng.choice((1, 100, 65536)))
            message = rng.choice(messages)
            cut = rng.randrange(len(message) + 1) if rng.random() < 0.4 else len(message)
            peer.send(message[:cut])
            if cut < len(message) and rng.random() < 0.5:
                peer.send(message[cut:])
        with contextlib.suppress(TimeoutError):
            for _ in range(rng.randrange(20)):
                if not peer.sock.recv(65536):
                    break
        if rng.random() < 0.3:
            peer.end()
            with contextlib.suppress(TimeoutError):
                peer.sock.recv(100)
    if rng.random() < 0.5:
        peer.reset()
    else:
        peer.close()


def descriptors(pid):
    return len(list(Path(f"/proc/{pid}/fd").iterdir()))


def run_chaos(pair, protocol, *, clients, visits, seed):
    hops = pair.hops(protocol=protocol)
    applications = []
    before = descriptors(pair.worker.pid)

    def serve(sock, seed):
        misbehave(Peer(sock), RESPONSES, random.Random(seed))

    def accept():
        number = 0
        with contextlib.suppress(OSError):
            while True:
                sock, _address = hops.listener.accept()
                number += 1
                thread = threading.Thread(target=serve, args=(sock, seed + number), daemon=True)
                applications.append(thread)
                thread.start()

    def visit(number):
        rng = random.Random(seed * 1000 + number)
        for _ in range(visits):
            with contextlib.suppress(OSError):
                misbehave(Peer(socket.create_connection((hops.address, hops.outbound_port), 5)), REQUESTS, rng)

    acceptor = threading.Thread(target=accept, daemon=True)
    acceptor.start()
    visitors = [threading.Thread(target=visit, args=(number,)) for number in range(clients)]
    for thread in visitors:
        thread.start()
    for thread in visitors:
        thread.join()
    hops.listener.close()
    for thread in applications:
        thread.join(10)
    deadline = time.monotonic() + 15
    # Our own pooled connections to the inbound listener stay; those to the dead application are found out.
    while descriptors(pair.worker.pid) > before + 2 * clients + 8:
        assert time.monotonic() < deadline, f"{descriptors(pair.worker.pid)} descriptors, {before} at first"
        time.sleep(0.05)
    while pair.worker.counter("envoy_cluster_upstream_rq_active") or any(
        value
        for key, value in pair.worker.counters().items()
        if key.startswith("envoy_listener_downstream_cx_active") and 'consul_upstream_service="api"' in key
    ):
        assert time.monotonic() < deadline, pair.worker.counters()
        time.sleep(0.05)
    counters = pair.worker.counters()
    assert sum(value for key, value in counters.items() if "upstream_rq_pending_active" in key) == 0
    assert all(value >= 0 for value in counters.values())


def test_http_chaos(pair):
    run_chaos(pair, "http", clients=8, visits=25, seed=11)


def test_tcp_chaos(pair):
    run_chaos(pair, "tcp", clients=8, visits=20, seed=12)
