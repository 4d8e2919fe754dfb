"""`mesh demo`: the whole of the mesh on one machine, as real processes, in about half a minute."""

import json
import os
import random
import shutil
import signal
import socket
import sys
import tempfile
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from struct import Struct
from subprocess import DEVNULL, STDOUT

import click
import httpx
import trio
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from agent.cli.flags import GoCommand

_SERVERS = ("server-1", "server-2", "server-3")
_CLIENTS = ("client-1", "client-2")
_READY_TIMEOUT_S = 60.0
_POLL_S = 0.05
_STOP_TIMEOUT_S = 12.0
_REQUESTS_PER_S = 200
_LOAD_TASKS = 8
_LOAD_AFTER_FAILOVER_S = 2.0
# Ports come in blocks; each demo that runs holds a block of its own, so that several may run at the same time.
_FIRST_PORT, _LAST_PORT, _BLOCK_PORTS = 18500, 19500, 100
_SIDECAR_PORTS = 4
_PEER_CREDENTIALS = Struct("3i")  # pid, uid, gid: unix(7)


def _print(console: Console, markup: str) -> None:
    """Prints a line, broken only where a terminal ends. That nobody reads any more must not keep us from stopping."""
    try:
        console.print(markup, highlight=False, soft_wrap=not console.is_terminal)
    except (OSError, SystemExit):
        console.quiet = True


class DemoFailed(Exception):
    """The demo could not show what it promises; the text says which step and why."""


@dataclass
class _Agent:
    name: str
    http_port: int
    serf_port: int
    process: trio.Process | None = None

    @property
    def address(self) -> str:
        return f"http://127.0.0.1:{self.http_port}"


@dataclass
class _Load:
    """What a steady stream of requests to `web` met."""

    answers: Counter[str] = field(default_factory=Counter)
    failures: list[str] = field(default_factory=list)


class _Ports:
    """Free ports of one block, held until `close`: the demo's addresses are the same each time, if they can be."""

    def __init__(self) -> None:
        self._next = self._last = 0
        self._guard = self._hold_block()

    def _hold_block(self) -> socket.socket:
        for first in range(_FIRST_PORT, _LAST_PORT, _BLOCK_PORTS):
            guard = socket.socket()
            guard.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                guard.bind(("127.0.0.1", first))
                guard.listen(1)
            except OSError:
                guard.close()
                continue
            self._next, self._last = first + 1, first + _BLOCK_PORTS - 1
            return guard
        raise DemoFailed(f"no free block of ports from {_FIRST_PORT} to {_LAST_PORT}: do other demos still run?")

    def close(self) -> None:
        """Lets another demo have the block."""
        self._guard.close()

    def take(self, count: int = 1) -> int:
        """The first of `count` free ports in a row."""
        while self._next + count - 1 <= self._last:
            first, self._next = self._next, self._next + 1
            if all(self._is_free(port) for port in range(first, first + count)):
                self._next = first + count
                return first
        raise DemoFailed(f"other programs use too many of the ports up to {self._last}; stop them and try again")

    @staticmethod
    def _is_free(port: int) -> bool:
        for kind in (socket.SOCK_STREAM, socket.SOCK_DGRAM):
            with socket.socket(socket.AF_INET, kind) as probe:
                if kind == socket.SOCK_STREAM:
                    probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
                try:
                    probe.bind(("127.0.0.1", port))
                except OSError:
                    return False
        return True


class Demo:
    """One run of the demo: owns the agents and applications it starts."""

    def __init__(self, folder: Path, console: Console) -> None:
        self._folder = folder
        self._console = console
        self._ports = _Ports()
        self._agents = {name: self._plan_agent(name) for name in (*_SERVERS, *_CLIENTS)}
        self._apps: dict[str, trio.Process] = {}
        self._http = httpx.AsyncClient(timeout=10.0, trust_env=False)
        self._web_port = self._ports.take()
        self._rng = random.Random(0)

    def _plan_agent(self, name: str) -> _Agent:
        return _Agent(name, self._ports.take(), self._ports.take())

    # -- the story -------------------------------------------------------------------------------------------------

    async def run(self) -> None:
        """Shows every step; raises DemoFailed at the first that does not hold."""
        self._say("Starting three server agents and two client agents")
        for agent in self._agents.values():
            await self._start_agent(agent)
        leader = await self._wait_for_leader(set(_SERVERS))
        await self._wait("five members alive", self._all_alive)
        await self._show_members(leader)

        self._say("Starting web and two instances of api, registering them over HTTP")
        await self._start_services()
        await self._wait("both sidecars of api to be healthy", self._both_healthy)
        await self._wait("web to reach api through both sidecars", self._web_works)
        answers = await self._send_requests(200)
        self._note(f"200 requests web → sidecar → mTLS → sidecar → api: {_counted(answers)}")

        await self._show_intention()
        await self._show_failover(leader)

    async def _start_services(self) -> None:
        upstream_port = self._ports.take()
        for number, client in enumerate(_CLIENTS, start=1):
            port = self._ports.take()
            await self._start_app(f"api-{number}", port)
            await self._register(client, _service("api", f"api-{number}", port, {}))
        await self._start_app("web", self._web_port, f"http://127.0.0.1:{upstream_port}")
        upstream = {"destination_name": "api", "local_bind_port": upstream_port}
        await self._register("client-1", _service("web", "web", self._web_port, {"upstreams": [upstream]}))
        # The sidecars carry HTTP, so that a refusal can be told to the caller as one.
        for name in ("web", "api"):
            entry = {"Kind": "service-defaults", "Name": name, "Protocol": "http"}
            await self._put("client-1", "/v1/config", body=entry)

    async def _show_intention(self) -> None:
        self._say("Denying web → api with an intention")
        params = {"source": "web", "destination": "api"}
        path = "/v1/connect/intentions/exact"
        await self._put("server-1", path, params, {"SourceType": "consul", "Action": "deny"})
        start = trio.current_time()
        await self._wait("the refusal", self._web_refused)
        status, text = await self._ask_web()
        self._note(f"refused after {_milliseconds(start)}: api's sidecar answered {status} {text!r}")
        self._say("Removing the intention")
        await self._http.delete(self._agents["server-1"].address + path, params=params)
        start = trio.current_time()
        await self._wait("web reaching api again", self._web_works)
        self._note(f"allowed again after {_milliseconds(start)}")

    async def _show_failover(self, leader: str) -> None:
        self._say(f"Killing the leader, {leader}, under {_REQUESTS_PER_S} requests a second")
        load = _Load()
        async with trio.open_nursery() as nursery:
            for _ in range(_LOAD_TASKS):
                nursery.start_soon(self._load, load)
            await trio.sleep(1.0)
            victim = self._agents[leader].process
            assert victim is not None
            victim.kill()
            await victim.wait()
            self._agents[leader].process = None
            start = trio.current_time()
            new_leader = await self._wait_for_leader(set(_SERVERS) - {leader})
            self._note(f"new leader after {_milliseconds(start)}: {new_leader}")
            await self._wait("writes working again", lambda: self._can_write(new_leader))
            self._note(f"writes work again after {_milliseconds(start)}")
            await trio.sleep(_LOAD_AFTER_FAILOVER_S)
            nursery.cancel_scope.cancel()
        total = load.answers.total() + len(load.failures)
        self._note(f"requests meanwhile: {total}, failed: {len(load.failures)}")
        if load.failures:
            raise DemoFailed(f"{len(load.failures)} requests failed in the election; the first: {load.failures[0]}")

    # -- pieces ----------------------------------------------------------------------------------------------------

    async def _start_agent(self, agent: _Agent) -> None:
        is_server = agent.name in _SERVERS
        sidecar_port = self._ports.take(_SIDECAR_PORTS)
        config: dict[str, object] = {
            "node_name": agent.name,
            "data_dir": str(self._folder / agent.name),
            "bind_addr": "127.0.0.1",
            "log_level": "INFO",
            "proxy_workers": 1,  # five agents share this machine
            "retry_join": [f"127.0.0.1:{self._agents[_SERVERS[0]].serf_port}"],
            "retry_interval": "1s",
            "ports": {
                "http": agent.http_port,
                "serf_lan": agent.serf_port,
                "serf_wan": -1,
                "server": self._ports.take(),
                "dns": -1,
                "sidecar_min_port": sidecar_port,
                "sidecar_max_port": sidecar_port + _SIDECAR_PORTS - 1,
            },
        }
        if is_server:
            config |= {"server": True, "bootstrap_expect": len(_SERVERS)}
        path = self._folder / f"{agent.name}.json"
        path.write_text(json.dumps(config, indent=2))
        agent.process = await self._spawn(agent.name, ["-m", "agent", "agent", "-config-file", str(path)])

    async def _start_app(self, name: str, port: int, *upstream: str) -> None:
        self._apps[name] = await self._spawn(name, ["-m", "agent.cli.demo_app", name, str(port), *upstream])

    async def _spawn(self, name: str, arguments: list[str]) -> trio.Process:
        # A session of its own: Ctrl-C must reach the demo alone, which then stops everything in order.
        with (self._folder / f"{name}.log").open("wb") as log:
            return await trio.lowlevel.open_process(
                [sys.executable, *arguments], stdin=DEVNULL, stdout=log, stderr=STDOUT, start_new_session=True
            )

    async def _register(self, client: str, definition: dict[str, object]) -> None:
        await self._put(client, "/v1/agent/service/register", body=definition)

    async def _put(
        self, agent: str, path: str, params: Mapping[str, str] | None = None, body: Mapping[str, object] | None = None
    ) -> None:
        response = await self._http.put(self._agents[agent].address + path, params=params, json=body)
        if response.status_code != 200:
            raise DemoFailed(f"PUT {path} at {agent} answered {response.status_code}: {response.text}")

    async def _ask_web(self) -> tuple[int, str]:
        response = await self._http.get(f"http://127.0.0.1:{self._web_port}/")
        answer = response.json()["answer"]
        return response.status_code, str(answer)

    async def _web_works(self) -> bool:
        return (await self._ask_web())[0] == 200

    async def _web_refused(self) -> bool:
        return (await self._ask_web())[0] == 403

    async def _send_requests(self, count: int) -> Counter[str]:
        answers: Counter[str] = Counter()
        for _ in range(count):
            status, text = await self._ask_web()
            if status != 200:
                raise DemoFailed(f"web answered {status}: {text}")
            answers[_instance(text)] += 1
        return answers

    async def _load(self, load: _Load) -> None:
        async with httpx.AsyncClient(timeout=10.0, trust_env=False) as http:
            while True:
                try:
                    response = await http.get(f"http://127.0.0.1:{self._web_port}/")
                except httpx.HTTPError as error:
                    load.failures.append(repr(error))
                else:
                    answer = response.json()["answer"]
                    if response.status_code == 200:
                        load.answers[_instance(answer)] += 1
                    else:
                        load.failures.append(f"{response.status_code} {answer}")
                await trio.sleep(self._rng.uniform(0.5, 1.5) * _LOAD_TASKS / _REQUESTS_PER_S)

    async def _wait_for_leader(self, candidates: set[str]) -> str:
        found = ""

        async def elected() -> bool:
            nonlocal found
            agents = [self._agents[name] for name in sorted(candidates)]
            for agent in agents:
                state = (await self._http.get(agent.address + "/v1/agent/self")).json()
                if state["Stats"]["raft"].get("state") == "Leader":
                    found = agent.name
                    return True
            return False

        await self._wait("a leader", elected)
        return found

    async def _can_write(self, agent: str) -> bool:
        response = await self._http.put(self._agents[agent].address + "/v1/kv/demo/leader", content=agent.encode())
        return response.status_code == 200

    async def _all_alive(self) -> bool:
        found = (await self._http.get(self._agents["client-1"].address + "/v1/agent/members")).json()
        return len([member for member in found if member["Status"] == 1]) == len(self._agents)

    async def _both_healthy(self) -> bool:
        response = await self._http.get(self._agents["client-1"].address + "/v1/health/connect/api?passing")
        return len(response.json()) == len(_CLIENTS)

    async def _show_members(self, leader: str) -> None:
        found = (await self._http.get(self._agents["client-1"].address + "/v1/agent/members")).json()
        table = Table(box=None, header_style="bold", pad_edge=False, padding=(0, 3, 0, 2))
        for heading in ("Member", "Gossip", "Type", "HTTP API", ""):
            table.add_column(heading)
        for member in sorted(found, key=lambda m: str(m["Name"])):
            agent = self._agents[member["Name"]]
            role = "server" if member["Tags"].get("role") == "consul" else "client"
            gossip = f"{member['Addr']}:{member['Port']}"
            table.add_row(agent.name, gossip, role, agent.address, "← leader" if agent.name == leader else "")
        self._console.print(table)

    async def _wait(self, what: str, condition: Callable[[], Awaitable[bool]]) -> None:
        """Polls until the condition holds; a dead agent or the deadline ends the demo with the reason."""
        last = ""
        with trio.move_on_after(_READY_TIMEOUT_S):
            while True:
                self._check_processes()
                try:
                    if await condition():
                        return
                except (httpx.HTTPError, KeyError, ValueError) as error:
                    last = repr(error)
                await trio.sleep(_POLL_S)
        raise DemoFailed(f"waited {_READY_TIMEOUT_S:.0f} s for {what}, in vain. {last}")

    def _check_processes(self) -> None:
        agents = {agent.name: agent.process for agent in self._agents.values()}
        for name, process in (agents | self._apps).items():
            if process is not None and process.returncode is not None:
                lines = (self._folder / f"{name}.log").read_text(errors="replace").splitlines()[-5:]
                raise DemoFailed(f"{name} ended with status {process.returncode}:\n" + "\n".join(lines))

    def _say(self, text: str) -> None:
        _print(self._console, f"[bold cyan]▸[/] {escape(text)}")

    def _note(self, text: str) -> None:
        _print(self._console, f"  {escape(text)}")

    def show_where(self) -> None:
        """Where to look while everything runs."""
        client = self._agents["client-1"].address
        mesh = "mesh" if shutil.which("mesh") else os.path.relpath(Path(sys.executable).with_name("mesh"))
        self._say("Everything runs; Ctrl-C stops it. Try:")
        for line in (
            f"curl http://127.0.0.1:{self._web_port}/",
            f"{mesh} members -http-addr={client}",
            f"{mesh} catalog services -tags -http-addr={client}",
            f"{mesh} intention create -deny -http-addr={client} web api",
            f"logs: {self._folder}",
        ):
            self._note(line)

    @asynccontextmanager
    async def stopping_everything(self) -> AsyncIterator[None]:
        """Stops, on the way out, every process that the demo started: applications, clients, then servers."""
        try:
            yield
        finally:
            with trio.CancelScope(shield=True):
                await self._stop(list(self._apps.values()))
                for names in (_CLIENTS, _SERVERS):
                    processes = [self._agents[name].process for name in names]
                    await self._stop([process for process in processes if process is not None])
                self._end_workers()
                await self._http.aclose()
                self._ports.close()

    def _end_workers(self) -> None:
        # An agent that leaves ends its worker; one that was killed or could not leave lets it serve on.
        for path in sorted(self._folder.glob("*/workers/*.sock")):
            with socket.socket(socket.AF_UNIX) as control, suppress(OSError):
                control.connect(str(path))
                credentials = control.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _PEER_CREDENTIALS.size)
                os.kill(_PEER_CREDENTIALS.unpack(credentials)[0], signal.SIGKILL)

    async def _stop(self, processes: list[trio.Process]) -> None:
        async def stop(process: trio.Process) -> None:
            if process.returncode is not None:
                return
            process.send_signal(signal.SIGTERM)
            with trio.move_on_after(_STOP_TIMEOUT_S):
                await process.wait()
                return
            process.kill()
            await process.wait()

        async with trio.open_nursery() as nursery:
            for process in processes:
                nursery.start_soon(stop, process)


def _service(name: str, service_id: str, port: int, proxy: dict[str, object]) -> dict[str, object]:
    check = {"http": f"http://127.0.0.1:{port}/health", "interval": "2s", "timeout": "1s", "status": "passing"}
    sidecar = {"proxy": proxy} if proxy else {}
    return {"id": service_id, "name": name, "port": port, "check": check, "connect": {"sidecar_service": sidecar}}


def _instance(answer: str) -> str:
    return str(json.loads(answer)["service"])


def _counted(answers: Counter[str]) -> str:
    return ", ".join(f"{name} {count}" for name, count in sorted(answers.items()))


def _milliseconds(start: float) -> str:
    return f"{(trio.current_time() - start) * 1000:.0f} ms"


async def _play(folder: Path, console: Console, *, once: bool) -> int:
    """The exit status: 0 all of it held, 1 something did not, 128 + n stopped by signal n before the end."""
    status: int | None = None
    # SIGHUP, too: when the terminal goes away, nothing of the demo may be left behind.
    with trio.open_signal_receiver(signal.SIGINT, signal.SIGTERM, signal.SIGHUP) as signals:
        play = Demo(folder, console)
        async with trio.open_nursery() as nursery:
            show = trio.CancelScope()

            async def wait_for_signals() -> None:
                nonlocal status
                async for number in signals:  # the second one changes nothing: stopping has its own deadlines
                    if not show.cancel_called:
                        status = 128 + number if status is None else status
                        _print(console, "Stopping everything ...")
                        show.cancel()

            nursery.start_soon(wait_for_signals)
            async with play.stopping_everything():
                with show:
                    try:
                        await play.run()
                        status = 0
                        if not once:
                            play.show_where()
                            await trio.sleep_forever()
                    except DemoFailed as error:
                        status = 1
                        _complain(error)
                show.cancel()
            nursery.cancel_scope.cancel()
    words = {0: "All of it held; everything is stopped.", 1: "Everything is stopped."}
    _print(console, words.get(status or 0, "Stopped before the end."))
    return status or 0


def _complain(error: DemoFailed) -> None:
    console = Console(stderr=True)
    _print(console, f"[bold red]The demo failed:[/] {escape(str(error))}")


async def _run(*, once: bool) -> int:
    with tempfile.TemporaryDirectory(prefix="mesh-demo-", ignore_cleanup_errors=True) as folder:
        try:
            return await _play(Path(folder), Console(), once=once)
        except DemoFailed as error:
            _complain(error)
            return 1


@click.command(cls=GoCommand)
@click.option("-once", is_flag=True, help="Stop when everything has been shown; status 0 if all of it held, else 1.")
def demo(*, once: bool) -> None:
    """Starts five agents and two services on this machine and shows discovery, mTLS, intentions and failover."""
    raise SystemExit(trio.run(lambda: _run(once=once)))
