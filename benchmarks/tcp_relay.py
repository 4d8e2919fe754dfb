"""TCP relay of 64 KiB blocks, one plain hop and two hops with mTLS: bytes per second of our worker against Envoy's.

Client and sink are one Python process on core 1, the proxies are on core 0; see sidecar_pairs.py for the rest.
"""

import selectors
import socket
import subprocess
import sys
import threading
import time

from benchmarks.sidecar_pairs import (
    ADDRESS,
    Result,
    alternate,
    cpu_seconds,
    envoy_one_hop,
    envoy_two_hops,
    one_hop,
    parse,
    report,
    rss_mib,
    serving,
    two_hops,
    verdict,
)

BLOCK = b"\xa5" * 65536
CONNECTIONS = 4


def sink(port):
    """Reads and drops; answers each connection's end with its count. A process of its own: see `start_sink`."""
    listener = socket.create_server((ADDRESS, port), backlog=128)

    def serve(connection):
        buffer = bytearray(256 * 1024)
        total = 0
        with connection:
            while count := connection.recv_into(buffer):
                total += count
            connection.sendall(b"%d\n" % total)

    while True:
        connection, _address = listener.accept()
        threading.Thread(target=serve, args=(connection,), daemon=True).start()


def start_sink(_directory, port):
    """The application of this benchmark."""
    return subprocess.Popen(["taskset", "-c", "1", sys.executable, "-m", "benchmarks.tcp_relay", "sink", str(port)])


def wait_relaying(port, within_s=20):
    """Until bytes arrive through this port and are counted."""
    deadline = time.monotonic() + within_s
    while True:
        try:
            with socket.create_connection((ADDRESS, port), timeout=5) as connection:
                connection.sendall(b"x")
                connection.shutdown(socket.SHUT_WR)
                if connection.recv(16) == b"1\n":
                    return
        except OSError:
            pass
        if time.monotonic() > deadline:
            raise TimeoutError(f"nothing is relayed on port {port}")
        time.sleep(0.05)


def pour(port, seconds, pid):
    """Sends blocks on CONNECTIONS connections; MiB per second that arrived, by the sink's count."""
    selector = selectors.DefaultSelector()
    connections = [socket.create_connection((ADDRESS, port), timeout=20) for _ in range(CONNECTIONS)]
    for connection in connections:
        connection.setblocking(False)
        selector.register(connection, selectors.EVENT_WRITE)
    before, began = cpu_seconds(pid), time.perf_counter()
    block = memoryview(BLOCK)
    while time.perf_counter() - began < seconds:
        for key, _mask in selector.select(1.0):
            try:
                key.fileobj.send(block)
            except BlockingIOError:
                continue
    arrived = 0
    errors = 0
    for connection in connections:
        connection.setblocking(True)
        connection.settimeout(20)
        connection.shutdown(socket.SHUT_WR)
        with connection, connection.makefile("rb") as answer:
            try:
                arrived += int(answer.readline())
            except (OSError, ValueError):
                errors += 1
    elapsed = time.perf_counter() - began
    mib = arrived / 2**20
    spent = cpu_seconds(pid) - before
    return Result(mib / elapsed, 0.0, 0.0, spent / max(1.0, mib) * 1e6, rss_mib(pid), errors)


def main(arguments=()):
    """Runs both comparisons; 0 when the bar is met."""
    options = parse(__doc__, arguments, rounds=3, seconds=3, tools=("taskset",))
    status = 0
    for title, ours, theirs in (
        ("TCP relay, one plain hop", one_hop, envoy_one_hop),
        ("TCP relay, two hops with mTLS", two_hops, envoy_two_hops),
    ):
        with serving(ours, theirs, application=start_sink, check=wait_relaying, protocol="tcp") as proxies:
            pairs = alternate(proxies, lambda port, pid: pour(port, options.seconds, pid), options.rounds)
        ratios = report(f"{title}, {CONNECTIONS} connections", pairs, unit="MiB/s", cpu="CPU us/MiB")
        status |= verdict("bytes/s >= 0.7 of Envoy's", met=ratios["per_s"] >= 0.7)
    return status


if __name__ == "__main__":
    if sys.argv[1:2] == ["sink"]:
        sink(int(sys.argv[2]))
    raise SystemExit(main(sys.argv[1:]))
