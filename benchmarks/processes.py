"""Three-server clusters of real processes on loopback: ours, and etcd's as the peer."""

import json
import os
import shutil
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

_READY_TIMEOUT_S = 30.0


def free_ports(count: int) -> list[int]:
    """Ports that nothing listens on at this moment."""
    sockets = [socket.create_server(("127.0.0.1", 0)) for _ in range(count)]
    ports = [each.getsockname()[1] for each in sockets]
    for each in sockets:
        each.close()
    return ports


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
def mesh_servers(folder: Path, count: int = 3) -> Iterator[list[str]]:
    """`count` servers with durable logs; the URLs of their HTTP APIs, the leader's first."""
    http, serf, rpc = free_ports(count), free_ports(count), free_ports(count)
    commands = {}
    for number in range(count):
        config = {
            "server": True,
            "bootstrap_expect": count,
            "node_name": f"server-{number}",
            "data_dir": str(folder / f"server-{number}"),
            "bind_addr": "127.0.0.1",
            "log_level": "WARN",
            "retry_join": [f"127.0.0.1:{serf[0]}"],
            "retry_interval": "1s",
            "ports": {"http": http[number], "serf_lan": serf[number], "server": rpc[number], "dns": -1, "serf_wan": -1},
        }
        path = folder / f"server-{number}.json"
        path.write_text(json.dumps(config))
        commands[f"server-{number}"] = [sys.executable, "-m", "agent", "agent", "-config-file", str(path)]
    urls = [f"http://127.0.0.1:{port}" for port in http]
    with running(commands, folder):
        wait_until("writes", lambda: all(fetch(f"{url}/v1/kv/ready", method="PUT", body=b"1") for url in urls))
        leader_port = int(json.loads(fetch(f"{urls[0]}/v1/status/leader")).rpartition(":")[2])
        leader = urls[rpc.index(leader_port)]
        yield sorted(urls, key=lambda url: url != leader)


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
