"""The agent's side of the data plane: keeps its worker processes running and hands them their configuration.

Workers are not part of the agent's life: they serve on when the agent ends, and the next agent takes them over. Only a
graceful leave ends them, or an agent of another version, which starts workers of its own once it knows what to serve.
In dev mode they end with the agent.

Each worker has a place, and each place has its listening sockets, of which the agent keeps copies (see `sockets`): a
worker that follows another one, after its death or in exchange for it, gets the very same sockets, so that connections
that wait to be accepted never notice.
"""

import logging
from collections.abc import Callable, Sequence
from pathlib import Path

import trio
from msgspec.structs import replace

from agent.backoff import backoff_s
from agent.dataplane.control import Drain, Ping
from agent.dataplane.control_client import connect
from agent.dataplane.place import CONFIGURE_TIMEOUT_S, Found, Place, Worker, question
from agent.dataplane.sockets import SocketTable
from agent.dataplane.worker_process import WorkerDirectory, start_worker
from agent.dataplane.worker_statistics import WorkerStatistics
from agent.runtime import Runtime
from mesh.errors import ConfigError, Refused, Unreachable
from mesh.proxy.resources import listeners
from mesh.proxy.sidecar_config import WorkerConfig

_LOG = logging.getLogger("mesh.supervisor")

PING_INTERVAL_S = 5.0
PING_TIMEOUT_S = 15.0  # it may be busy with a large configuration
RESTART_S_MIN = 0.1
RESTART_S_MAX = 30.0
STEADY_S = 10.0  # a worker that lived so long starts the back-off anew
FAILURES_MAX = 3  # in a row; then a place's share of new connections goes to the other places, or is refused
DRAIN_TIMEOUT_S = 10.0  # of a graceful leave
DRAIN_IDLE_S = 1.0
OUTBOUND_S = 5.0  # of a leave: the application on this host shuts down too, and still calls others
REPLACED_TIMEOUT_S = 600.0  # of a worker that another one has replaced, by default: Envoy's drain time
REPLACED_IDLE_S = 30.0  # its idle connections have this long for one more request
QUEUE_S = 10.0  # how long connections wait for the first configuration of an agent that has just started
STOP_PATIENCE_S = 2.0  # for workers being restarted: only the agent holds their sockets


class WorkerSupervisor:
    """The workers of one agent. `run` must be running for anything else to succeed."""

    def __init__(
        self,
        *,
        runtime: Runtime,
        data_dir: Path | None,
        exit_with_agent: bool = False,
        workers: int = 1,
        drain_time_s: float = REPLACED_TIMEOUT_S,
    ) -> None:
        """`data_dir` None implies `exit_with_agent`: nobody could find the workers again. `drain_time_s`: how long a
        replaced worker may take to finish. Raises ConfigError.
        """
        self._directory = WorkerDirectory(data_dir)
        self._exit_with_agent = exit_with_agent or data_dir is None
        self._drain_time_s = drain_time_s
        self._rng = runtime.random_source("supervisor")
        self._places = tuple(Place(number) for number in range(workers))
        self._sockets = SocketTable(workers)
        self._statistics = WorkerStatistics()
        self._ready = trio.Event()  # one that waits sees the next worker that can be configured
        self._wanted = trio.Event()
        self._accepted: WorkerConfig | None = None
        self._version = 0
        self._configuring = trio.Lock()
        self._replacing = trio.Lock()
        self._looked = False  # not before it is known whether a worker serves
        self._stopping = False
        self._scope = trio.CancelScope()
        self._nursery: trio.Nursery | None = None
        self._starts = 0
        self._subscribers: dict[object, Callable[[], None]] = {}

    # -- what others see

    @property
    def running(self) -> bool:
        """Whether a worker answers, be it of another version."""
        return any(place.worker is not None or place.predecessor is not None for place in self._places)

    @property
    def fresh(self) -> bool:
        """Whether nothing is served yet: the workers are new, or it is certain that there are none. False while one
        serves that was found, or that has accepted a configuration.
        """
        return self._looked and not any(place.serves for place in self._places)

    @property
    def workers(self) -> tuple[Worker, ...]:
        """Those that can be asked now, in the order of their places."""
        return tuple(place.worker for place in self._places if place.worker is not None)

    @property
    def pid(self) -> int:
        """The first worker's process; 0 while there is none."""
        workers = self.workers
        return workers[0].pid if workers else 0

    @property
    def starts(self) -> int:
        """How many workers were started by this supervisor."""
        return self._starts

    def subscribe(self, callback: Callable[[], None]) -> Callable[[], None]:
        """Has `callback` called whenever a worker can be configured that could not before, and when it turns out that
        there is none. Returns what ends the subscription.
        """
        token = object()
        self._subscribers[token] = callback

        def unsubscribe() -> None:
            self._subscribers.pop(token, None)

        return unsubscribe

    async def configure(self, config: WorkerConfig) -> None:
        """Has every worker serve `config`, starting them if there are none; its version is set here.

        Returns when all have it in force; one that is being restarted gets it before it accepts a connection. Raises
        Refused with the reason when one keeps the configuration before (the others are given that again), Unreachable
        when no worker answers in time. What was accepted is given to each worker that comes later.
        """
        self._wanted.set()
        await self._wait_ready()
        async with self._configuring:
            await self._configure_all(config)

    async def replace_workers(self) -> int:
        """Puts a new process in the place of every worker, one after the other, without a lost connection; returns how
        many. The old ones finish what they have, within the drain time. Raises Refused when this agent has not
        configured its workers yet, or a new one refuses what the old one serves; Unreachable when one does not start.
        """
        replaced = 0
        async with self._replacing:
            for place in self._places:
                worker = place.worker
                if worker is not None:
                    await self._replace(place, worker)
                    replaced += 1
        return replaced

    async def stats(self) -> str:
        """All workers' counters together as Prometheus text; empty while there are none. Raises Unreachable."""
        texts: dict[int, str] = {}
        failures: list[Unreachable] = []

        async def ask(worker: Worker) -> None:
            try:
                texts[worker.pid] = await worker.statistics()
            except Unreachable as error:
                failures.append(error)

        async with trio.open_nursery() as nursery:
            for worker in self.workers:
                nursery.start_soon(ask, worker)
        if failures and not texts:
            raise failures[0]
        if not texts:
            return ""
        own = f"# TYPE mesh_worker_starts counter\nmesh_worker_starts {self._starts}\n"
        own += f"# TYPE mesh_workers gauge\nmesh_workers {len(texts)}\n"
        return self._statistics.merged(texts.values()) + own

    async def stop(self, *, drain: bool) -> None:
        """Ends the supervision. `drain` (a graceful leave): the workers finish what is open, inbound first, and exit,
        on their own and within DRAIN_TIMEOUT_S; this returns when nothing comes in any more. Otherwise they serve on
        for the next agent, except in dev mode.
        """
        self._stopping = True
        if drain:
            request = Drain(DRAIN_TIMEOUT_S, DRAIN_IDLE_S, OUTBOUND_S)
            async with trio.open_nursery() as nursery:
                for place in self._places:
                    for worker in (place.worker, place.predecessor):
                        if worker is not None:
                            nursery.start_soon(worker.drain, request)
        elif self._accepted is not None and not self._exit_with_agent and self._nursery is not None:
            with trio.move_on_after(STOP_PATIENCE_S):
                while any(place.worker is None for place in self._places):
                    await self._ready.wait()
        self._scope.cancel()
        self._sockets.close_all()
        self._directory.remove()

    # -- configuration

    async def _wait_ready(self) -> None:
        with trio.move_on_after(CONFIGURE_TIMEOUT_S):
            while not self.workers:
                await self._ready.wait()
            return
        raise Unreachable(f"no worker was ready within {CONFIGURE_TIMEOUT_S:g} s")

    async def _configure_all(self, config: WorkerConfig) -> None:
        former = self._accepted
        self._version += 1
        config = replace(config, version=self._version)
        targets = [(place, place.worker) for place in self._places if place.worker is not None]
        keys = {served.key for served in listeners(config)}
        await self._drain_those_without_handover()
        try:
            bound = self._sockets.bind(keys, [place.number for place, _ in targets])
        except ConfigError as error:
            raise Refused(str(error)) from error
        accepted: list[tuple[Place, Worker]] = []
        try:
            rest = await self._convince_one(targets, config, accepted)
            await self._convince_all(rest, config, accepted)
        except (Refused, Unreachable):
            await self._roll_back(accepted, former)
            self._sockets.close(bound)
            raise
        self._accepted = config
        self._sockets.keep_only(keys)
        for place, _ in accepted:
            await self._drain_predecessor(place)

    async def _convince_one(
        self, targets: Sequence[tuple[Place, Worker]], config: WorkerConfig, accepted: list[tuple[Place, Worker]]
    ) -> Sequence[tuple[Place, Worker]]:
        """One worker goes first: what is refused, or kills, reaches no other. Returns the others. A second attempt is
        for the worker that died just then of something else.
        """
        for number, (place, worker) in enumerate(targets[:2]):
            try:
                await self._convince(place, worker, config)
            except Unreachable as error:
                if number or len(targets) == 1:
                    raise
                _LOG.warning("%s; another worker is tried", error)
                continue
            accepted.append((place, worker))
            return targets[number + 1 :]
        raise Unreachable("no worker is ready")

    async def _convince_all(
        self, targets: Sequence[tuple[Place, Worker]], config: WorkerConfig, accepted: list[tuple[Place, Worker]]
    ) -> None:
        refusals: list[Refused] = []

        async def convince(place: Place, worker: Worker) -> None:
            try:
                await self._convince(place, worker, config)
            except Refused as error:
                refusals.append(error)
            except Unreachable as error:
                _LOG.warning("%s; its successor gets the configuration", error)
            else:
                accepted.append((place, worker))

        async with trio.open_nursery() as nursery:
            for place, worker in targets:
                nursery.start_soon(convince, place, worker)
        if refusals:
            raise refusals[0]

    async def _convince(self, place: Place, worker: Worker, config: WorkerConfig) -> None:
        """Raises Refused with the worker's reason, Unreachable: then it is dead, for it must not go by old rules."""
        try:
            reason = await worker.configure(config, self._sockets, place.number)
        except Unreachable:
            worker.client.kill()
            raise
        if reason:
            raise Refused(reason)

    async def _roll_back(self, accepted: Sequence[tuple[Place, Worker]], former: WorkerConfig | None) -> None:
        for place, worker in accepted:
            self._version += 1
            config = replace(former or WorkerConfig(0), version=self._version)
            try:
                await self._convince(place, worker, config)
            except (Refused, Unreachable) as error:
                _LOG.error(
                    "worker %d cannot go back to its former configuration: %s; it is replaced", worker.pid, error
                )
                worker.client.kill()

    # -- the workers' lives

    async def run(self, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Until cancelled, or `stop`. Workers are started only once there is something to configure."""
        with trio.CancelScope() as self._scope:
            async with trio.open_nursery() as nursery:
                self._nursery = nursery
                task_status.started()
                try:
                    await self._take_over(nursery)
                    self._looked = True
                    self._tell()
                    async with trio.open_nursery() as places:
                        for place in self._places:
                            places.start_soon(self._keep, place, nursery)
                finally:
                    self._nursery = None
                    for place in self._places:
                        for worker in (place.worker, place.predecessor):
                            if worker is not None:
                                worker.client.close()
                        place.worker = place.predecessor = None
                    self._sockets.close_all()  # whoever runs next gets copies from the workers

    def _tell(self) -> None:
        for callback in tuple(self._subscribers.values()):
            callback()

    async def _keep(self, place: Place, nursery: trio.Nursery) -> None:
        """Sees to it that a worker is in its place."""
        failures = 0
        while not self._stopping:
            worker = place.worker or await self._found_again(place, nursery)
            if worker is None:
                self._statistics.retire(place.last_statistics)
            place.last_statistics = ""
            if worker is None and self._accepted is None:
                self._tell()
                await self._wait_wanted(place)
            started = trio.current_time()
            try:
                await self._live(place, worker or await self._start(nursery))
            except Unreachable as error:
                _LOG.error("%s", error)
            failures = 1 if trio.current_time() - started > STEADY_S else failures + 1
            if failures >= FAILURES_MAX:
                self._sockets.close_place(place.number)
            pause_s = backoff_s(failures, rng=self._rng, first_s=RESTART_S_MIN, last_s=RESTART_S_MAX)
            if not self._stopping:
                _LOG.warning("worker %d of %d: looking for it in %.1f s", place.number + 1, len(self._places), pause_s)
            await trio.sleep(pause_s)

    async def _wait_wanted(self, place: Place) -> None:
        """Until there is something to configure. What an earlier agent's worker leaves behind waits in its queues only
        as long as it takes an agent to learn what to serve; then callers are to go elsewhere.
        """
        while not self._wanted.is_set():
            with trio.move_on_after(QUEUE_S):
                await self._wanted.wait()
            if not self._wanted.is_set() and not place.serves:
                self._sockets.close_place(place.number)

    async def _live(self, place: Place, worker: Worker) -> None:
        """Until the worker's connection has ended, or that of the last one that has replaced it."""
        try:
            if place.worker is not worker:
                await self._introduce(place, worker)
            while place.worker is not None:
                watched = place.worker
                await self._watch(watched)
                if place.worker is watched:
                    return
        finally:
            last = place.worker or worker
            place.worker = None
            place.last_statistics = last.last_statistics
            last.client.close()
            worker.client.close()

    async def _introduce(self, place: Place, worker: Worker) -> None:
        """A new worker serves what the others do before it is counted among them."""
        async with self._configuring:
            if self._accepted is not None:
                await self._drain_those_without_handover()
                try:
                    self._sockets.bind([served.key for served in listeners(self._accepted)], [place.number])
                    await self._convince(place, worker, self._accepted)
                    await self._drain_predecessor(place)
                except (ConfigError, Refused) as error:
                    _LOG.error("the new worker cannot serve what the last one served: %s", error)
            place.worker, place.path = worker, worker.path
            self._ready.set()
            self._ready = trio.Event()
        self._tell()

    async def _start(self, nursery: trio.Nursery) -> Worker:
        path, client = await start_worker(self._directory, nursery, exit_with_agent=self._exit_with_agent)
        self._starts += 1
        nursery.start_soon(client.run)
        _LOG.info("started worker %d", client.pid)
        return Worker(client, path)

    async def _watch(self, worker: Worker) -> None:
        """Returns when the connection has ended. Raises Unreachable when the worker does not answer."""
        while True:
            with trio.move_on_after(PING_INTERVAL_S):
                await worker.client.over.wait()
                return
            # Silence closes the connection; whoever looks for the worker then asks once more and kills it.
            await worker.client.call(Ping(), timeout_s=PING_TIMEOUT_S)

    async def _replace(self, place: Place, worker: Worker) -> None:
        if self._accepted is None or self._nursery is None:
            raise Refused("this agent has not configured its workers yet; try again in a moment")
        successor = await self._start(self._nursery)
        try:
            async with self._configuring:
                if place.worker is not worker:
                    raise Unreachable(f"worker {worker.pid} has ended by itself; another one follows it")
                await self._convince(place, successor, self._accepted)
                place.worker, place.path = successor, successor.path
        finally:
            if place.worker is not successor:
                successor.client.kill()
        await self._let_go(worker)

    async def _let_go(self, worker: Worker) -> None:
        """It stops accepting, finishes what it has, and ends."""
        idle_s = min(REPLACED_IDLE_S, self._drain_time_s / 2)
        with trio.CancelScope(shield=True):  # its calls have deadlines; not told, it would serve old rules for ever
            await worker.drain(Drain(self._drain_time_s, idle_s))
        self._statistics.retire(worker.last_statistics)

    async def _drain_predecessor(self, place: Place) -> None:
        predecessor, place.predecessor = place.predecessor, None
        if predecessor is not None:
            await self._let_go(predecessor)

    async def _drain_those_without_handover(self) -> None:
        """Workers of the first protocol cannot pass on their sockets: their addresses are free only without them."""
        for place in self._places:
            if place.predecessor is not None and place.predecessor.protocol < 2:
                await self._drain_predecessor(place)

    # -- workers of earlier agents

    async def _take_over(self, nursery: trio.Nursery) -> None:
        """Gives every worker that is found, and serves, a place; dead sockets are removed."""
        found: list[Found] = []
        seen: set[int] = set()
        for path in self._directory.sockets():
            one = await self._ask(path, nursery)
            if one is None:
                continue
            sockets = one.identities()
            if sockets & seen or (one.pong.draining and not sockets):
                if not one.pong.draining:
                    _LOG.info("worker %d has a successor", one.worker.pid)
                    await self._let_go(one.worker)
                one.close()
            elif not one.worker.serving:
                await one.worker.drain(Drain(0.0))
                one.close()
            else:
                seen |= sockets
                found.append(one)
        found.reverse()  # the oldest have the first places
        for place, one in zip(self._places, found, strict=False):
            self._sockets.put(place.number, one.sockets)
            place.path = one.worker.path
            self._version = max(self._version, one.pong.config_version)
            if one.is_ours:
                place.worker = one.worker
                _LOG.info("took over worker %d, which serves configuration %d", one.pong.pid, one.pong.config_version)
            else:
                place.predecessor = one.worker
                _LOG.info("worker %d of version %s is to be replaced", one.pong.pid, one.pong.package_version)
        for one in found[len(self._places) :]:
            _LOG.info("worker %d is one more than there are to be", one.worker.pid)
            await self._let_go(one.worker)
            one.close()
        if self.workers:
            self._ready.set()
            self._ready = trio.Event()

    async def _ask(self, path: Path, nursery: trio.Nursery) -> Found | None:
        try:
            client = await connect(path)
        except Unreachable:
            self._directory.forget(path)
            return None
        await nursery.start(client.run)
        return await question(path, client)

    async def _found_again(self, place: Place, nursery: trio.Nursery) -> Worker | None:
        """The worker that was here, when only its connection had ended; a hung one is killed."""
        path, place.path = place.path, None
        if path is None or place.predecessor is not None:
            return None
        one = await self._ask(path, nursery)
        if one is None:
            return None
        one.close_sockets()
        if not one.is_ours:
            one.close()
            return None
        return one.worker
