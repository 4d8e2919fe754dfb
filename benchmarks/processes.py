"""Three-server clusters of real processes on loopback: ours, and etcd's as the peer."""

import json
import os
import shutil
import subprocess
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from processes import cluster_of, free_ports

_READY_TIMEOUT_S = 30.0


def fetch(url: str, *, method: str = "GET", body: bytes | None = None) -> bytes:
    """The body of the answer. Raises OSError for any failure, HTTP statuses included."""
    request = urllib.request.Request(url, method=method, data=body)
    with urllib.request.urlopen(request, timeout=5) as response:
        return bytes(response.read())


def wait_until(what: str, condition, timeout_s: float = _READY_TIMEOUT_S) -> None:
    """Polls a condition that may raise OSError until it is true."""
    deadline = time.monotonic() + timeout_s
    while time.monotonic() < deadline:
        try:
            if condition():
                return
        except (OSError, ValueError):
            pass
        time.sleep(0.05)
    raise TimeoutError(f"waited {timeout_s} s for {what}")


@contextmanager
def running(commands: dict[str, list[str]], folder: Path) -> Iterator[dict[str, subprocess.Popen[bytes]]]:
    """The processes of the commands by name, logging to folder/<name>.log; ended with SIGKILL on the way out."""
    processes: dict[str, subprocess.Popen[bytes]] = {}
    try:
        for name, command in commands.items():
            with (folder / f"{name}.log").open("wb") as log:
                processes[name] = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=log, stderr=log)
        yield processes
    finally:
        for process in processes.values():
            process.kill()
            process.wait()


@contextmanager
def mesh_servers(folder: Path) -> Iterator[list[str]]:
    """Three servers with durable logs; the URLs of their HTTP APIs, the leader's first."""
    with cluster_of(folder, "-log-level=warn", clients=0) as cluster:
        leader = cluster.leader()
        yield [server.url for server in sorted(cluster.servers, key=lambda server: server is not leader)]


@contextmanager
def etcd_servers(folder: Path, count: int = 3) -> Iterator[list[str]]:
    """`count` etcd members; the URLs of their JSON gateways, the leader's first."""
    etcd = shutil.which("etcd")
    if etcd is None:
        raise FileNotFoundError("etcd is not installed (Debian package etcd-server)")
    clients, peers = free_ports(count), free_ports(count)
    cluster = ",".join(f"m{number}=http://127.0.0.1:{port}" for number, port in enumerate(peers))
    commands = {}
    for number in range(count):
        client, peer = f"http://127.0.0.1:{clients[number]}", f"http://127.0.0.1:{peers[number]}"
        commands[f"m{number}"] = [
            *(etcd, "--name", f"m{number}", "--data-dir", str(folder / f"m{number}")),
            *("--listen-client-urls", client, "--advertise-client-urls", client),
            *("--listen-peer-urls", peer, "--initial-advertise-peer-urls", peer),
            *("--initial-cluster", cluster, "--log-level", "error"),
        ]
    urls = [f"http://127.0.0.1:{port}" for port in clients]
    with running(commands, folder):
        put = b'{"key": "cg==", "value": "MQ=="}'
        wait_until("writes", lambda: all(fetch(f"{url}/v3/kv/put", method="POST", body=put) for url in urls))
        statuses = {url: json.loads(fetch(f"{url}/v3/maintenance/status", method="POST", body=b"{}")) for url in urls}
        urls.sort(key=lambda url: statuses[url]["leader"] != statuses[url]["header"]["member_id"])
        yield urls


def fdatasync_ms(folder: Path, count: int = 200) -> float:
    """Median milliseconds of a 200-byte append with fdatasync in the folder."""
    taken = []
    descriptor = os.open(folder / "probe", os.O_CREAT | os.O_WRONLY, 0o600)
    try:
        for _ in range(count):
            os.write(descriptor, b"x" * 200)
            start = time.perf_counter()
            os.fdatasync(descriptor)
            taken.append(time.perf_counter() - start)
    finally:
        os.close(descriptor)
    return sorted(taken)[count // 2] * 1000
