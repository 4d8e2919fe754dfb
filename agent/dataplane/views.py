"""What an agent's workers hold and see, asked of all of them together."""

import contextlib

import trio

from agent.dataplane.control import Describe, DescribeReply, EndTap, Nack, Reply, Request, Tap, TapReply
from agent.dataplane.place import Worker
from agent.dataplane.supervisor import WorkerSupervisor
from mesh.errors import Refused, Unreachable
from mesh.proxy.description import Description
from mesh.proxy.tap import TapFilter, TapRecord

CALL_TIMEOUT_S = 5.0
WORKER_PROTOCOL = 4  # the first that knows the questions


async def _ask_all(workers: tuple[Worker, ...], request: Request) -> dict[int, Reply]:
    """The answers, by process. Raises Unreachable when there are none."""
    replies: dict[int, Reply] = {}
    failures: list[Unreachable] = []

    async def ask(worker: Worker) -> None:
        try:
            replies[worker.pid] = await worker.client.call(request, timeout_s=CALL_TIMEOUT_S)
        except Unreachable as error:
            failures.append(error)

    async with trio.open_nursery() as nursery:
        for worker in workers:
            nursery.start_soon(ask, worker)
    if failures and not replies:
        raise failures[0]
    return dict(sorted(replies.items()))


class WorkerViews:
    """The workers of one supervisor, those that are starting or of another version left out."""

    def __init__(self, supervisor: WorkerSupervisor) -> None:
        self._supervisor = supervisor

    @property
    def _workers(self) -> tuple[Worker, ...]:
        workers = self._supervisor.workers
        if not workers:
            raise Unreachable("No proxy worker is running: this agent serves no sidecar")
        return tuple(worker for worker in workers if worker.protocol >= WORKER_PROTOCOL)

    async def describe(self, service: str) -> tuple[Description, ...]:
        """What each worker holds for a service's sidecars, or one proxy ID's; for all when it is empty. Raises
        Unreachable when none of them answers.
        """
        replies = await _ask_all(self._workers, Describe(service))
        return tuple(reply.description for reply in replies.values() if isinstance(reply, DescribeReply))

    async def tap(self, key: str, wanted: TapFilter) -> tuple[tuple[TapRecord, ...], int]:
        """The requests that ended since the last call with this key, oldest first, and how many were dropped in all by
        the workers of now. Raises Unreachable when none of them answers, Refused with a worker's reason.
        """
        records: list[TapRecord] = []
        dropped = 0
        for reply in (await _ask_all(self._workers, Tap(key, wanted))).values():
            match reply:
                case TapReply(records=some, dropped=lost):
                    records.extend(some)
                    dropped += lost
                case Nack(error=reason):
                    raise Refused(reason)
        records.sort(key=lambda record: record.at_s + record.duration_s)
        return tuple(records), dropped

    async def end_tap(self, key: str) -> None:
        """Has the workers look no more. One that does not hear of it stops by itself."""
        with contextlib.suppress(Unreachable):
            await _ask_all(self._workers, EndTap(key))
