"""Real agent processes on loopback, for tests of what only a process can show."""

import http.client
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

_ROOT = Path(__file__).parents[1]
READY_S = 30.0  # a loaded machine; a healthy agent needs well under one


def free_ports(count: int) -> list[int]:
    """Ports that nothing listens on now."""
    sockets = [socket.create_server(("127.0.0.1", 0)) for _ in range(count)]
    ports = [each.getsockname()[1] for each in sockets]
    for each in sockets:
        each.close()
    return ports


def wait_until(condition: Callable[[], object], *, timeout_s: float = READY_S, why: Callable[[], str] = str) -> None:
    """Polls until the condition holds; `why` is shown when it never does."""
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline, why()
        time.sleep(0.02)


class AgentProcess:
    """One agent with ports and a data directory of its own; it can be killed and started again."""

    def __init__(self, name: str, folder: Path, *flags: str, environment: dict[str, str] | None = None) -> None:
        self.name = name
        self.data_dir = folder / name
        self.log = folder / f"{name}.log"
        self.http, self.serf, self.rpc = free_ports(3)
        self.flags = flags
        self._environment = environment or {}
        self._process: subprocess.Popen[bytes] | None = None

    def start(self, *more: str) -> None:
        command = [sys.executable, "-m", "agent", "agent", f"-node={self.name}", "-bind=127.0.0.1", "-dns-port=-1"]
        command += [f"-http-port={self.http}", f"-serf-lan-port={self.serf}", f"-server-port={self.rpc}"]
        command += [f"-data-dir={self.data_dir}", *self.flags, *more]
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
        """SIGKILL, and wait for the end."""
        if self._process is not None:
            self._process.kill()
            self._process.wait()

    def stop(self, number: signal.Signals = signal.SIGTERM, *, timeout_s: float = 10.0) -> int:
        """A signal, and the exit status; fails the test when it takes longer."""
        self.running.send_signal(number)
        return self.running.wait(timeout_s)

    def request(
        self, method: str, path: str, body: bytes | None = None, *, timeout_s: float = 20.0
    ) -> tuple[int, bytes]:
        """Status and body. Raises OSError or HTTPException when the agent does not answer."""
        connection = http.client.HTTPConnection("127.0.0.1", self.http, timeout=timeout_s)
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

    def leader(self) -> str:
        """The leader's address as this agent sees it; empty when there is none or the agent does not answer."""
        return self.get("/v1/status/leader").decode().strip().strip('"')

    def wait_ready(self) -> None:
        """Until a write through this agent succeeds."""

        def writes() -> bool:
            assert self.alive, self.log.read_text()
            try:
                return self.request("PUT", f"/v1/kv/ready/{self.name}", b"x")[0] == 200
            except (OSError, http.client.HTTPException):
                return False

        wait_until(writes, why=self.log.read_text)
