"""The agent's side of the data plane: keeps one worker process running and hands it its configuration.

The worker is not part of the agent's life: it serves on when the agent ends, and the next agent takes it over. Only a
graceful leave ends it, or an agent of another version, which starts a worker of its own once it knows what to serve. In
dev mode it ends with the agent.
"""

import contextlib
import logging
import os
import signal
from collections.abc import AsyncIterator, Callable
from pathlib import Path

import trio
from msgspec.structs import replace

from agent.backoff import backoff_s
from agent.dataplane.control import Ack, Configure, Drain, Nack, Ping, Pong, Stats, StatsReply
from agent.dataplane.control_client import ControlClient, connect
from agent.dataplane.worker_process import WorkerDirectory, start_worker
from agent.runtime import Runtime
from agent.version import VERSION
from mesh.errors import ProtocolError, Refused, Unreachable
from mesh.proxy.sidecar_config import WorkerConfig

_LOG = logging.getLogger("mesh.supervisor")

CONFIGURE_TIMEOUT_S = 15.0  # thousands of contexts may have to be made
CALL_TIMEOUT_S = 5.0
PING_INTERVAL_S = 5.0
PING_TIMEOUT_S = 15.0  # it may be busy with a large configuration
RESTART_S_MIN = 0.1
RESTART_S_MAX = 30.0
STEADY_S = 60.0  # a worker that lived so long starts the back-off anew
DRAIN_TIMEOUT_S = 10.0


class WorkerSupervisor:
    """One worker per agent. `run` must be running for anything else to succeed."""

    def __init__(self, *, runtime: Runtime, data_dir: Path | None, exit_with_agent: bool = False) -> None:
        """`data_dir` None implies `exit_with_agent`: nobody could find the worker again. Raises ConfigError."""
        self._directory = WorkerDirectory(data_dir)
        self._exit_with_agent = exit_with_agent or data_dir is None
        self._rng = runtime.random_source("supervisor")
        self._client: ControlClient | None = None
        self._ready = trio.Event()
        self._wanted = trio.Event()
        self._accepted: WorkerConfig | None = None
        self._outdated: list[ControlClient] = []  # workers of another version, serving until there is one of ours
        self._version = 0
        self._configuring = trio.Lock()
        self._fresh = False  # not before it is known that no worker serves
        self._stopping = False
        self._scope = trio.CancelScope()
        self._starts = 0
        self._subscribers: dict[object, Callable[[], None]] = {}

    # -- what others see

    @property
    def running(self) -> bool:
        """Whether a worker answers, be it of another version."""
        return self._client is not None or bool(self._outdated)

    @property
    def fresh(self) -> bool:
        """Whether nothing is served yet: the worker is new, or it is certain that there is none. False once one that
        serves was found, or a configuration was accepted.
        """
        return self._fresh

    @property
    def pid(self) -> int:
        """The worker's process; 0 while there is none."""
        return self._client.pid if self._client is not None else 0

    @property
    def starts(self) -> int:
        """How many workers were started by this supervisor."""
        return self._starts

    def subscribe(self, callback: Callable[[], None]) -> Callable[[], None]:
        """Has `callback` called whenever another worker has become the one, and when it turns out that there is none.
        Returns what ends the subscription.
        """
        token = object()
        self._subscribers[token] = callback

        def unsubscribe() -> None:
            self._subscribers.pop(token, None)

        return unsubscribe

    async def configure(self, config: WorkerConfig) -> None:
        """Has the worker serve `config`, starting a worker if there is none; its version is set here.

        Returns when the worker has it in force. Raises Refused with the worker's reason when it keeps the one before,
        Unreachable when no worker answers in time. What a worker accepted is given to each worker that follows it.
        """
        self._wanted.set()
        async with self._configuring:
            client = await self._wait_client()
            await self._configure(client, config)

    async def stats(self) -> str:
        """The worker's counters as Prometheus text; empty while no worker runs. Raises Unreachable."""
        if self._client is None:
            return ""
        reply = await self._client.call(Stats(), timeout_s=CALL_TIMEOUT_S)
        if not isinstance(reply, StatsReply):
            raise ProtocolError(f"the worker answered {type(reply).__name__} to Stats")
        return reply.prometheus

    async def stop(self, *, drain: bool) -> None:
        """Ends the supervision. `drain` (a graceful leave): the worker finishes what is open and exits, within
        DRAIN_TIMEOUT_S. Otherwise it serves on for the next agent, except in dev mode.
        """
        self._stopping = True
        if drain:
            await self._drain_outdated()
        client = self._client
        if drain and client is not None:
            with contextlib.suppress(Unreachable), trio.move_on_after(DRAIN_TIMEOUT_S + CALL_TIMEOUT_S):
                await client.call(Drain(DRAIN_TIMEOUT_S), timeout_s=CALL_TIMEOUT_S)
                await client.over.wait()
        self._scope.cancel()
        self._directory.remove()

    # -- the worker's life

    async def run(self, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Until cancelled, or `stop`. A worker is started only once there is something to configure."""
        failures = 0
        with trio.CancelScope() as self._scope:
            async with trio.open_nursery() as nursery:
                task_status.started()
                while not self._stopping:
                    started = trio.current_time()
                    try:
                        async with self._worker(nursery) as client:
                            await self._watch(client)
                    except Unreachable as error:
                        _LOG.error("%s", error)
                    failures = 1 if trio.current_time() - started > STEADY_S else failures + 1
                    pause_s = backoff_s(failures, rng=self._rng, first_s=RESTART_S_MIN, last_s=RESTART_S_MAX)
                    if not self._stopping:
                        _LOG.warning("the worker's connection ended; looking for it in %.1f s", pause_s)
                    await trio.sleep(pause_s)

    @contextlib.asynccontextmanager
    async def _worker(self, nursery: trio.Nursery) -> AsyncIterator[ControlClient]:
        """The connection to the one worker, found or started, until it ends."""
        for outdated in self._outdated:
            outdated.close()
        self._outdated.clear()  # found anew if they still are there
        client = await self._take_over(nursery)
        if client is None:
            self._fresh = not self._outdated
            self._tell()
            if self._accepted is None:
                await self._wanted.wait()
            _, client = await start_worker(self._directory, nursery, exit_with_agent=self._exit_with_agent)
            self._starts += 1
            nursery.start_soon(client.run)
            _LOG.info("started worker %d", client.pid)
        try:
            await self._drain_outdated()
            if self._fresh and self._accepted is not None:
                try:
                    await self._configure(client, self._accepted)
                except Refused as error:
                    _LOG.error("the new worker refuses what the last one served: %s", error)
            self._client = client
            self._ready.set()
            self._tell()
            yield client
        finally:
            self._client = None
            self._ready = trio.Event()
            client.close()

    def _tell(self) -> None:
        for callback in tuple(self._subscribers.values()):
            callback()

    async def _take_over(self, nursery: trio.Nursery) -> ControlClient | None:
        """The newest worker of this version that answers; dead sockets are removed. Others become `_outdated`."""
        chosen: ControlClient | None = None
        for path in self._directory.sockets():
            try:
                client = await connect(path)
            except Unreachable:
                path.unlink(missing_ok=True)
                continue
            await nursery.start(client.run)
            pong = await self._ping(client, path)
            if pong is None:
                continue
            if chosen is None and pong.package_version == VERSION and not pong.draining:
                chosen = client
                self._version = max(self._version, pong.config_version)
                self._fresh = pong.config_version < 0
                _LOG.info("took over worker %d, which serves configuration %d", pong.pid, pong.config_version)
                continue
            if pong.draining:
                client.close()
                continue
            _LOG.info("worker %d of version %s is to be replaced", pong.pid, pong.package_version)
            self._outdated.append(client)
        return chosen

    async def _drain_outdated(self) -> None:
        """Returns when the workers that are not ours have given up their listeners."""
        while self._outdated:
            client = self._outdated.pop()
            with contextlib.suppress(Unreachable):
                await client.call(Drain(DRAIN_TIMEOUT_S), timeout_s=CALL_TIMEOUT_S)
                # It answers in order: by the next reply it has closed its listeners.
                await client.call(Ping(), timeout_s=CALL_TIMEOUT_S)
            client.close()

    async def _ping(self, client: ControlClient, path: Path) -> Pong | None:
        """What a found worker says; a hung one is killed."""
        pid = client.pid
        try:
            reply = await client.call(Ping(), timeout_s=CALL_TIMEOUT_S)
        except Unreachable as error:
            _LOG.warning("worker %d at %s: %s; it is replaced", pid, path, error)
            _kill(pid)
            return None
        if isinstance(reply, Pong):
            return reply
        client.close()
        return None

    async def _watch(self, client: ControlClient) -> None:
        """Returns when the connection has ended. Raises Unreachable when the worker does not answer."""
        while True:
            with trio.move_on_after(PING_INTERVAL_S):
                await client.over.wait()
                return
            # Silence closes the connection; the next take-over asks once more and then kills.
            await client.call(Ping(), timeout_s=PING_TIMEOUT_S)

    async def _wait_client(self) -> ControlClient:
        with trio.move_on_after(CONFIGURE_TIMEOUT_S):
            while self._client is None:
                await self._ready.wait()
            return self._client
        raise Unreachable(f"no worker was ready within {CONFIGURE_TIMEOUT_S:g} s")

    async def _configure(self, client: ControlClient, config: WorkerConfig) -> None:
        self._version += 1
        config = replace(config, version=self._version)
        reply = await client.call(Configure(config), timeout_s=CONFIGURE_TIMEOUT_S)
        match reply:
            case Ack():
                self._accepted = config
                self._fresh = False
            case Nack(error=reason):
                raise Refused(reason)
            case _:
                client.close()
                raise Unreachable(f"the worker answered {type(reply).__name__} to Configure; it is replaced")


def _kill(pid: int) -> None:
    if pid > 0:
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.kill(pid, signal.SIGKILL)
