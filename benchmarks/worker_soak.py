"""Traffic while workers die, agents restart, and endpoints come and go: what fails, and why.

    load (web's host, c1) -> web's workers -> mTLS -> api's workers (hosts c2 and c3) -> applications

200 requests/s, a tenth of them POST, which nobody may try twice, a tenth of them on new connections. Every 20 s a
worker gets SIGKILL, in turn on each host; every 30 s an agent is restarted, by turns in order and by SIGKILL; every 7 s
an api instance leaves, and comes back. A failed request counts as lost with a worker when it was under way as that was
killed; the bar is that there is no other. Run: `python -m benchmarks worker_soak`, or this file with `--minutes 10`.
"""

import argparse
import contextlib
import os
import random
import select
import signal
import socket
import sys
import tempfile
import threading
import time
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(REPOSITORY), str(REPOSITORY / "tests")]

from peers import Application, Peer  # noqa: E402
from processes import cluster_of, wait_until  # noqa: E402

REQUESTS_PER_S = 200
CONNECTIONS = 16
KILL_INTERVAL_S = 20.0
RESTART_INTERVAL_S = 30.0
LEAVE_INTERVAL_S = 7.0
TIMEOUT_S = 15.0
KILL_SLACK_S = 0.05  # between the kill and our clock
APP_PORT, TO_API = 8080, 9191


@dataclass(frozen=True)
class Failure:
    """One request without a 200."""

    began_s: float
    ended_s: float
    method: str
    reason: str


class Load:
    """A steady stream of requests over connections that are kept, and closed as clients do: between requests."""

    def __init__(self, address: str) -> None:
        self._address = (address, TO_API)
        self._ended = threading.Event()
        self._threads = [
            threading.Thread(target=self._run, args=(number,), daemon=True) for number in range(CONNECTIONS)
        ]
        self.answers: Counter[str] = Counter()
        self.failures: list[Failure] = []
        self.slowest_s = 0.0
        for thread in self._threads:
            thread.start()

    def _run(self, number: int) -> None:
        rng = random.Random(number)
        interval_s = CONNECTIONS / REQUESTS_PER_S
        due = time.monotonic() + rng.random() * interval_s
        peer: Peer | None = None
        while not self._ended.is_set():
            time.sleep(max(0.0, due - time.monotonic()))
            due = max(due + interval_s, time.monotonic() - 1.0)
            if peer is not None and (rng.random() < 0.1 or _is_over(peer)):
                peer.close()
                peer = None
            method = "POST" if rng.random() < 0.1 else "GET"
            began = time.monotonic()
            try:
                if peer is None:
                    peer = Peer(socket.create_connection(self._address, TIMEOUT_S))
                closes, name = _ask(peer, method)
            except (OSError, AssertionError, ValueError) as error:
                self.failures.append(Failure(began, time.monotonic(), method, str(error) or repr(error)))
                closes = True
            else:
                self.answers[name] += 1
            self.slowest_s = max(self.slowest_s, time.monotonic() - began)
            if closes and peer is not None:
                peer.close()
                peer = None

    def end(self) -> None:
        """Stops; the last requests are waited for."""
        self._ended.set()
        for thread in self._threads:
            thread.join(TIMEOUT_S + 5)


def _is_over(peer: Peer) -> bool:
    """Whether the other side has closed a connection on which nothing is expected."""
    return bool(select.select([peer.sock], [], [], 0)[0])


def _ask(peer: Peer, method: str) -> tuple[bool, str]:
    body = b"Content-Length: 4\r\n\r\nbody" if method == "POST" else b"\r\n"
    peer.send(b"%b /x HTTP/1.1\r\nHost: api\r\n%b" % (method.encode(), body))
    head, answer = peer.read_message()
    if head[9:12] != b"200":
        raise ValueError(f"{head.splitlines()[0].decode()}: {answer.decode()}")
    return b"connection: close" in head.lower(), answer.decode()


class Turmoil:
    """What happens to the hosts meanwhile, each kind in a thread of its own."""

    def __init__(self, hosts, leaver) -> None:
        self._hosts = hosts
        self._leaver = leaver
        self._ended = threading.Event()
        self.kills: list[float] = []
        self.restarts = 0
        self.leaves = 0
        self.errors: list[str] = []
        self._threads = [
            threading.Thread(target=self._every, args=(interval_s, act), daemon=True)
            for interval_s, act in (
                (KILL_INTERVAL_S, self._kill),
                (RESTART_INTERVAL_S, self._restart),
                (LEAVE_INTERVAL_S, self._leave),
            )
        ]
        for thread in self._threads:
            thread.start()

    def _every(self, interval_s, act) -> None:
        number = 0
        while not self._ended.wait(interval_s):
            try:
                act(number)
            except (OSError, AssertionError) as error:
                self.errors.append(f"{act.__name__}: {error!r}")
            number += 1

    def _kill(self, number: int) -> None:
        pids = self._hosts[number % len(self._hosts)].worker_pids()
        if pids:
            self.kills.append(time.monotonic())
            with contextlib.suppress(ProcessLookupError):
                os.kill(pids[-1], signal.SIGKILL)

    def _restart(self, number: int) -> None:
        agent = self._hosts[number % len(self._hosts)]
        if number % 2:
            agent.kill()
        else:
            assert agent.stop() == 0
        agent.start()
        agent.wait_ready()
        self.restarts += 1

    def _leave(self, number: int) -> None:
        wait_until(lambda: self._leaver.get("/v1/agent/services"))  # its agent may be restarting
        if number % 2:
            self._leaver.register("api", APP_PORT, sidecar_port=21000)
        else:
            self._leaver.put("/v1/agent/service/deregister/api", None)
            self.leaves += 1

    def end(self) -> None:
        """Stops; what is under way is finished."""
        self._ended.set()
        for thread in self._threads:
            thread.join(60)


def soak(folder: Path, seconds: float) -> tuple[Load, Turmoil]:
    """Runs it; returns what the load met and what was done."""
    with cluster_of(folder, servers=1, clients=3, settings={"leave_on_terminate": False}) as cluster:
        web, *others = cluster.clients
        apps = [Application(agent.address, APP_PORT, name=agent.name) for agent in others]
        for name in ("web", "api"):
            web.put("/v1/config", {"Kind": "service-defaults", "Name": name, "Protocol": "http"})
        for agent in others:
            agent.register("api", APP_PORT, sidecar_port=21000)
        web.register("web", APP_PORT, sidecar_port=21001, upstreams={"api": TO_API})

        def answers() -> bool:
            try:
                with contextlib.closing(Peer(socket.create_connection((web.address, TO_API), 1.0))) as peer:
                    return bool(_ask(peer, "GET"))
            except (OSError, AssertionError, ValueError):
                return False

        wait_until(answers)
        load = Load(web.address)
        turmoil = Turmoil(cluster.clients, others[-1])
        time.sleep(seconds)
        turmoil.end()
        load.end()
        for app in apps:
            app.stop()
        return load, turmoil


def report(load: Load, turmoil: Turmoil) -> int:
    """Prints the account; the number of failures that no killed worker explains."""
    lost, other = [], []
    for failure in load.failures:
        explained = any(
            failure.began_s - KILL_SLACK_S <= kill <= failure.ended_s + KILL_SLACK_S for kill in turmoil.kills
        )
        (lost if explained else other).append(failure)
    answered = sum(load.answers.values())
    print(f"{answered + len(load.failures)} requests; slowest {load.slowest_s:.2f} s; by instance {dict(load.answers)}")
    print(f"{len(turmoil.kills)} workers killed, {turmoil.restarts} agents restarted, {turmoil.leaves} endpoints left")
    print(f"failed in a killed worker: {len(lost)}")
    print(f"failed otherwise: {len(other)} (bar: 0)")
    for failure in (*lost[:10], *other[:30]):
        since = min((failure.began_s - kill for kill in turmoil.kills if kill <= failure.began_s), default=float("nan"))
        print(
            f"  {failure.method} took {failure.ended_s - failure.began_s:.3f} s,"
            f" begun {since:.2f} s after the last kill: {failure.reason[:200]}"
        )
    for error in turmoil.errors:
        print(f"  trouble: {error}")
    return len(other) + len(turmoil.errors)


def main(arguments=()) -> int:
    """Runs the soak; 0 when the bar is met."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--minutes", type=float, default=10.0)
    parser.add_argument("--keep", type=Path, help="folder for the agents' directories and logs, left behind")
    options = parser.parse_args(list(arguments))
    with tempfile.TemporaryDirectory() as name:
        folder = options.keep or Path(name)
        folder.mkdir(parents=True, exist_ok=True)
        load, turmoil = soak(folder, options.minutes * 60)
        return 1 if report(load, turmoil) else 0


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
