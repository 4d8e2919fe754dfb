"""An agent's answer to who called its services: it waits at the leader for the question. See `agent.edge_board`."""

import logging
import random
from typing import Protocol

import trio
from msgspec.structs import replace

from agent.backoff import backoff_s
from agent.dataplane.control import Observed, ObservedReply
from agent.dataplane.place import Worker
from agent.rpc.calls import EdgesAsked, EdgesPollCall
from mesh.authz.observed import MINUTES, ObservedListener, merged
from mesh.errors import LimitExceeded, MeshError, Unreachable

_LOG = logging.getLogger("mesh.edges")

RETRY_S_MIN = 0.2
RETRY_S_MAX = 30.0
WORKER_TIMEOUT_S = 2.0
WORKER_PROTOCOL = 3  # the first that knows the question
LISTENERS_MAX = 1024  # of one agent, in one answer
EDGES_MAX = 20_000  # likewise: some 4 MB
REFRESH_S = 60.0
HISTORY_S = MINUTES * 60.0
WORKERS_KEPT_MAX = 16  # workers that crash again and again fill no memory


class EdgePolls(Protocol):
    """The part of a backend that is needed here."""

    async def poll_edges(self, call: EdgesPollCall) -> EdgesAsked:
        """Waits at the leader for the next question. Raises what calls to the leader raise."""
        ...


class Workers(Protocol):
    """The part of `agent.dataplane.supervisor.WorkerSupervisor` that is needed here."""

    @property
    def workers(self) -> tuple[Worker, ...]:
        """Those that can be asked now."""
        ...


class TrafficMemory:
    """What this agent's workers saw. What one remembered ends with it, so it is asked now and then and the last answer
    kept: a worker that was replaced, or died, is missing a minute at most.
    """

    def __init__(self, supervisor: Workers) -> None:
        self._supervisor = supervisor
        self._last: dict[int, tuple[float, tuple[ObservedListener, ...]]] = {}  # by process: when, what

    async def run(self) -> None:
        """Until cancelled."""
        while True:
            await trio.sleep(REFRESH_S)
            answers, _ = await self._ask(HISTORY_S)
            now = trio.current_time()
            self._last.update((pid, (now, seen)) for pid, seen in answers.items())
            kept = sorted(self._last.items(), key=lambda item: -item[1][0])[:WORKERS_KEPT_MAX]
            self._last = {pid: last for pid, last in kept if last[0] > now - HISTORY_S}

    async def observed(self, since_s: float) -> tuple[ObservedListener, ...]:
        """The last `since_s` seconds, by service; of a worker that is gone, all of its last hour if it was there within
        that time. Raises Unreachable when there are workers and none of them answers.
        """
        answers, failures = await self._ask(since_s)
        if failures and not answers:
            raise failures[0]
        now = trio.current_time()
        gone = [
            replace(one, observed_s=min(since_s, one.observed_s + now - at))
            for pid, (at, seen) in self._last.items()
            if pid not in answers and at > now - since_s
            for one in seen
        ]
        covered = {(one.service, one.http): one.observed_s for one in gone}
        found = [
            replace(one, observed_s=max(one.observed_s, covered.get((one.service, one.http), 0.0)))
            for seen in answers.values()
            for one in seen
        ]
        return _bounded(merged([*found, *gone]))

    async def _ask(self, since_s: float) -> tuple[dict[int, tuple[ObservedListener, ...]], list[Unreachable]]:
        """What each worker answers, by process, and why the others do not."""
        answers: dict[int, tuple[ObservedListener, ...]] = {}
        failures: list[Unreachable] = []

        async def ask(worker: Worker) -> None:
            try:
                reply = await worker.client.call(Observed(since_s), timeout_s=WORKER_TIMEOUT_S)
            except (Unreachable, LimitExceeded) as error:
                failures.append(Unreachable(str(error)))
                return
            if isinstance(reply, ObservedReply):
                answers[worker.pid] = reply.listeners

        async with trio.open_nursery() as nursery:
            for worker in self._supervisor.workers:
                if worker.protocol >= WORKER_PROTOCOL:
                    nursery.start_soon(ask, worker)
        return answers, failures


def _bounded(listeners: tuple[ObservedListener, ...]) -> tuple[ObservedListener, ...]:
    """What fits one answer: the busiest edges of each listener, fewer where there are many listeners."""
    share = max(1, EDGES_MAX // max(1, len(listeners)))
    result: list[ObservedListener] = []
    for one in listeners[:LISTENERS_MAX]:
        if len(one.edges) > share:
            edges = sorted(one.edges, key=lambda edge: -edge.allowed - edge.denied)
            left_out = sum(edge.allowed + edge.denied for edge in edges[share:])
            one = replace(one, edges=tuple(edges[:share]), left_out=one.left_out + left_out)
        result.append(one)
    return tuple(result)


class EdgeReporter:
    """The agent's side: keeps its call open, and answers."""

    def __init__(self, backend: EdgePolls, traffic: TrafficMemory, rng: random.Random, *, node: str) -> None:
        self._backend = backend
        self._traffic = traffic
        self._rng = rng
        self._node = node

    async def run(self) -> None:
        """Until cancelled."""
        failures = 0
        call = EdgesPollCall(self._node)
        while True:
            try:
                asked = await self._backend.poll_edges(call)
                failures = 0
                call = EdgesPollCall(self._node)
                if asked.question:
                    seen = await self._traffic.observed(asked.since_s)
                    call = EdgesPollCall(self._node, asked.question, seen)
            except MeshError as error:
                failures += 1
                call = EdgesPollCall(self._node)
                _LOG.debug("waiting for questions about traffic: %s", error)
                await trio.sleep(backoff_s(failures, rng=self._rng, first_s=RETRY_S_MIN, last_s=RETRY_S_MAX))
