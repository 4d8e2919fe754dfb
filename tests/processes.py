"""Real agents as processes, each on a loopback address of its own, as if on hosts: for tests and benchmarks.

An address per agent lets all of them use the standard ports, and no port is ever guessed to be free.
"""

import http.client
import json
import os
import signal
import socket
import struct
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path

from sidecars import cpu_seconds, free_ports, loopback_address

from agent.dataplane.worker_process import WorkerDirectory

__all__ = ["AgentProcess", "Cluster", "cluster_of", "cpu_seconds", "free_ports", "loopback_address", "wait_until"]

_ROOT = Path(__file__).parents[1]
STOP_S = 10.0  # what every agent promises
READY_S = 30.0  # a loaded machine; a healthy agent needs well under one
HTTP_PORT, SERF_PORT, RPC_PORT = 8500, 8301, 8300
_CREDENTIALS = struct.Struct("3i")  # pid, uid, gid


def wait_until(condition: Callable[[], object], *, timeout_s: float = READY_S, why: Callable[[], str] = str) -> None:
    """Polls until the condition holds; `why` is shown when it never does."""
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline, why()
        time.sleep(0.02)


def rss_mib(pid: int) -> float:
    """Resident memory of a process."""
    for line in Path(f"/proc/{pid}/status").read_text().splitlines():
        if line.startswith("VmRSS:"):
            return int(line.split()[1]) / 1024
    raise AssertionError(f"process {pid} has no memory: it has ended")


class AgentProcess:
    """One agent with an address and a data directory of its own; it can be killed and started again."""

    def __init__(
        self,
        name: str,
        folder: Path,
        *flags: str,
        environment: Mapping[str, str] | None = None,
        settings: Mapping[str, object] | None = None,
    ) -> None:
        """`settings` go into a configuration file: the keys that have no flag."""
        self.name = name
        self.address = loopback_address()
        self.data_dir = folder / name
        self.log = folder / f"{name}.log"
        self.http, self.serf, self.rpc = HTTP_PORT, SERF_PORT, RPC_PORT
        self.flags = flags
        self._environment = dict(environment or {})
        self._process: subprocess.Popen[bytes] | None = None
        if settings:
            path = folder / f"{name}.json"
            path.write_text(json.dumps(settings))
            self.flags = (*flags, f"-config-file={path}")

    @property
    def gossip_address(self) -> str:
        return f"{self.address}:{self.serf}"

    @property
    def rpc_address(self) -> str:
        return f"{self.address}:{self.rpc}"

    @property
    def url(self) -> str:
        return f"http://{self.address}:{self.http}"

    # -- life

    def start(self, *more: str) -> None:
        command = [sys.executable, "-m", "agent", "agent", f"-node={self.name}", "-dns-port=-1"]
        command += [f"-bind={self.address}", f"-client={self.address}"]
        command += ["-dev"] if "-dev" in self.flags else [f"-data-dir={self.data_dir}"]
        if not any(flag.startswith("-proxy-workers") for flag in self.flags):
            command.append("-proxy-workers=2")  # whatever machine this is
        command += [*(flag for flag in self.flags if flag != "-dev"), *more]
        with self.log.open("ab") as log:
            self._process = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                cwd=_ROOT,
                env={**os.environ, **self._environment},
            )

    @property
    def running(self) -> subprocess.Popen[bytes]:
        assert self._process is not None
        return self._process

    @property
    def alive(self) -> bool:
        return self._process is not None and self._process.poll() is None

    def kill(self) -> None:
        """SIGKILL to the agent, and wait for its end; its worker serves on."""
        if self._process is not None:
            self._process.kill()
            self._process.wait()

    def worker_pids(self) -> list[int]:
        """The processes that carry this agent's traffic, those that still drain too, the newest first."""
        found = []
        for path in WorkerDirectory(self.data_dir).sockets() if self.data_dir.exists() else ():
            with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as sock:
                try:
                    sock.connect(str(path))
                except OSError:
                    continue
                option = sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _CREDENTIALS.size)
                found.append(int(_CREDENTIALS.unpack(option)[0]))
        return found

    def worker_pid(self) -> int:
        """The newest of them; 0 when there is none."""
        return next(iter(self.worker_pids()), 0)

    def kill_workers(self) -> None:
        for pid in self.worker_pids():
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)

    def stop(self, number: signal.Signals = signal.SIGTERM, *, timeout_s: float = 10.0) -> int:
        """A signal, and the exit status; fails the test when it takes longer."""
        self.running.send_signal(number)
        return self.running.wait(timeout_s)

    # -- its API

    def request(
        self, method: str, path: str, body: bytes | None = None, *, timeout_s: float = 20.0
    ) -> tuple[int, bytes]:
        """Status and body. Raises OSError or HTTPException when the agent does not answer."""
        connection = http.client.HTTPConnection(self.address, self.http, timeout=timeout_s)
        try:
            connection.request(method, path, body)
            response = connection.getresponse()
            return response.status, response.read()
        finally:
            connection.close()

    def get(self, path: str) -> bytes:
        """The body of a 200, else empty."""
        try:
            status, body = self.request("GET", path)
        except (OSError, http.client.HTTPException):
            return b""
        return body if status == 200 else b""

    def put(self, path: str, value: object) -> bytes:
        """The body of the answer to a PUT of JSON, which must be a 200."""
        status, body = self.request("PUT", path, json.dumps(value).encode())
        assert status == 200, f"PUT {path}: {status} {body!r}"
        return body

    def writes(self) -> bool:
        """Whether a write through this agent succeeds now."""
        try:
            return self.request("PUT", f"/v1/kv/ready/{self.name}", b"x")[0] == 200
        except (OSError, http.client.HTTPException):
            return False

    def leader(self) -> str:
        """The leader's address as this agent sees it; empty when there is none or the agent does not answer."""
        return self.get("/v1/status/leader").decode().strip().strip('"')

    def wait_ready(self) -> None:
        """Until a write through this agent succeeds."""

        def ready() -> bool:
            assert self.alive, self.log.read_text()
            return self.writes()

        wait_until(ready, why=self.log.read_text)

    # -- its services

    def register(
        self,
        name: str,
        port: int,
        *,
        sidecar_port: int,
        upstreams: Mapping[str, int] | None = None,
        proxy: Mapping[str, object] | None = None,
    ) -> None:
        """A service on this agent's address, with a sidecar; `upstreams`: the local port of each."""
        declared = [
            {"destination_name": upstream, "local_bind_address": self.address, "local_bind_port": local_port}
            for upstream, local_port in (upstreams or {}).items()
        ]
        given = {"local_service_address": self.address, "upstreams": declared, **(proxy or {})}
        sidecar = {"port": sidecar_port, "proxy": given}
        body = {"name": name, "port": port, "connect": {"sidecar_service": sidecar}}
        self.put("/v1/agent/service/register", body)

    def intend(self, source: str, destination: str, action: str) -> None:
        """Writes an intention here."""
        path = f"/v1/connect/intentions/exact?source={source}&destination={destination}"
        self.put(path, {"SourceType": "consul", "Action": action})


class Cluster:
    """Servers s1.. and clients c1.., who find each other."""

    def __init__(self, servers: list[AgentProcess], clients: list[AgentProcess]) -> None:
        self.servers = servers
        self.clients = clients

    @property
    def agents(self) -> list[AgentProcess]:
        return [*self.servers, *self.clients]

    def leader(self) -> AgentProcess:
        """Waits until the living agents agree on a living one."""
        found: list[AgentProcess] = []

        def agreed() -> bool:
            addresses = {agent.leader() for agent in self.agents if agent.alive}
            found[:] = [one for one in self.servers if one.alive and {one.rpc_address} == addresses]
            return bool(found)

        wait_until(agreed)
        return found[0]

    def wait_ready(self) -> None:
        for agent in self.agents:
            agent.wait_ready()

    def stop(self) -> None:
        """Ends everybody as an operator would, the clients first; fails when one takes too long or ends badly."""
        for group in (self.clients, self.servers):
            for agent in group:
                agent.running.send_signal(signal.SIGTERM)
            deadline = time.monotonic() + STOP_S
            for agent in group:
                status = agent.running.wait(max(0.0, deadline - time.monotonic()))
                assert status == 0, f"{agent.name} ended with status {status}"
                assert "Traceback" not in agent.log.read_text(), agent.log.read_text()

    def close(self) -> None:
        """Ends every process, workers too."""
        for agent in self.agents:
            agent.kill()
            agent.kill_workers()


@contextmanager
def cluster_of(
    folder: Path, *flags: str, servers: int = 3, clients: int = 2, server_flags: tuple[str, ...] = (), **options: object
) -> Iterator[Cluster]:
    """A ready cluster; `flags` and `options` are every agent's."""
    made = Cluster(
        [
            AgentProcess(
                f"s{number}", folder, "-server", f"-bootstrap-expect={servers}", *server_flags, *flags, **options
            )
            for number in range(1, servers + 1)
        ],
        [AgentProcess(f"c{number}", folder, *flags, **options) for number in range(1, clients + 1)],
    )
    joins = [f"-retry-join={server.gossip_address}" for server in made.servers]
    try:
        for agent in made.agents:
            agent.flags = (*agent.flags, *joins, "-retry-interval=1s")
            agent.start()
        made.wait_ready()
        yield made
    finally:
        made.close()
