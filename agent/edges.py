"""An agent's answer to who called its services: it waits at the leader for the question. See `agent.edge_board`."""

import logging
import random
from typing import Protocol

import trio

from agent.backoff import backoff_s
from agent.dataplane.control import Observed, ObservedReply
from agent.dataplane.place import Worker
from agent.dataplane.supervisor import WorkerSupervisor
from agent.rpc.calls import EdgesAsked, EdgesPollCall
from mesh.authz.observed import ObservedListener, merged
from mesh.errors import MeshError, Unreachable

_LOG = logging.getLogger("mesh.edges")

RETRY_S_MIN = 0.2
RETRY_S_MAX = 30.0
WORKER_TIMEOUT_S = 2.0
WORKER_PROTOCOL = 3  # the first that knows the question
LISTENERS_MAX = 1024  # of one agent, in one answer


class EdgePolls(Protocol):
    """The part of a backend that is needed here."""

    async def poll_edges(self, call: EdgesPollCall) -> EdgesAsked:
        """Waits at the leader for the next question. Raises what calls to the leader raise."""
        ...


async def observed_here(supervisor: WorkerSupervisor, since_s: float) -> tuple[ObservedListener, ...]:
    """What this agent's workers saw in the last `since_s` seconds. Raises Unreachable when none of them answers."""
    found: list[ObservedListener] = []
    failures: list[Unreachable] = []
    workers = [worker for worker in supervisor.workers if worker.protocol >= WORKER_PROTOCOL]

    async def ask(worker: Worker) -> None:
        try:
            reply = await worker.client.call(Observed(since_s), timeout_s=WORKER_TIMEOUT_S)
        except Unreachable as error:
            failures.append(error)
            return
        if isinstance(reply, ObservedReply):
            found.extend(reply.listeners)

    async with trio.open_nursery() as nursery:
        for worker in workers:
            nursery.start_soon(ask, worker)
    if failures and len(failures) == len(workers):
        raise failures[0]
    return merged(found)[:LISTENERS_MAX]


class EdgeReporter:
    """The agent's side: keeps its call open, and answers."""

    def __init__(self, backend: EdgePolls, supervisor: WorkerSupervisor, rng: random.Random, *, node: str) -> None:
        self._backend = backend
        self._supervisor = supervisor
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
                    seen = await observed_here(self._supervisor, asked.since_s)
                    call = EdgesPollCall(self._node, asked.question, seen)
            except MeshError as error:
                failures += 1
                call = EdgesPollCall(self._node)
                _LOG.debug("waiting for questions about traffic: %s", error)
                await trio.sleep(backoff_s(failures, rng=self._rng, first_s=RETRY_S_MIN, last_s=RETRY_S_MAX))
