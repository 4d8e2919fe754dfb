"""Anti-entropy: keeps the catalog's rows of this node equal to the local state.

A change is written at once, compared with what the catalog was last known to hold; a full sync, which reads the
catalog first, runs about every minute, and after every failure, as nobody knows then what was written. The loop never
gives up: while servers are away the local state stays right and the catalog follows when they are back.
"""

import logging
import math
from collections.abc import Callable, Collection, Iterable, Sequence
from typing import NoReturn, TypeVar

import trio

from agent.backend import Backend
from agent.backoff import backoff_s
from agent.local_state import LocalState
from agent.runtime import Runtime
from mesh.anti_entropy import plan, same_check
from mesh.errors import MeshError
from mesh.model.catalog import Node, NodeServices, Service
from mesh.model.check import Check
from mesh.model.command import Command, Deregister, Register, Rejected
from mesh.model.query import GetNodeServices, ListNodeChecks, ReadOptions
from mesh.names import fold

FULL_SYNC_INTERVAL_S = 60.0
RETRY_S_MIN = 0.5
RETRY_S_MAX = 15.0
SECOND_SYNC_S = 5.0  # after the first: the leader registers a new member's node at the same time as we do
SERVER_APPEARED_STAGGER_S = 3.0
_SCALE_NODES = 128  # up to so many nodes the intervals are as they stand

_log = logging.getLogger("mesh.synchronizer")


def cluster_scale(nodes: int) -> int:
    """By how much intervals are stretched so that the load on servers grows slower than the cluster: 256 -> 2."""
    if nodes <= _SCALE_NODES:
        return 1
    return math.ceil(math.log2(nodes / _SCALE_NODES)) + 1


class Synchronizer:
    """The loop from `LocalState` to `Backend`, on servers and clients alike. It writes nothing when it ends: what
    happens to a node that has left or failed is the leader's."""

    def __init__(
        self,
        state: LocalState,
        backend: Backend,
        runtime: Runtime,
        *,
        node: Callable[[], Node],
        cluster_size: Callable[[], int] = lambda: 1,
        check_update_interval_s: float = 300.0,
    ) -> None:
        """`node` gives this node's own row. `check_update_interval_s`: how long changes of output alone may wait."""
        self._state = state
        self._backend = backend
        self._runtime = runtime
        self._node = node
        self._cluster_size = cluster_size
        self._check_update_interval_s = check_update_interval_s
        self._rng = runtime.random_source("synchronizer")
        # What the catalog holds of this node, as far as we know; None: it must be read first.
        self._known: _Known | None = None
        self._deferred_until: dict[str, float] = {}
        self._changed = trio.Event()
        self._appeared = trio.Event()
        self._full_sync_at = 0.0
        self._has_synced = False
        self.failures = 0  # in a row; for health and metrics

    @property
    def in_sync(self) -> bool:
        """Whether the catalog is known to say what the local state says, deferred outputs aside."""
        if self._known is None:
            return False
        return not self._plan(self._known, self._state.services(), self._state.checks())

    def server_appeared(self) -> None:
        """Has a full sync run soon, spread over a few seconds: a new server may not know this node yet."""
        self._known = None
        stagger_s = self._rng.uniform(0.0, SERVER_APPEARED_STAGGER_S * cluster_scale(self._cluster_size()))
        self._full_sync_at = min(self._full_sync_at, self._runtime.now() + stagger_s)
        self._appeared.set()
        self._changed.set()

    async def run(self, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> NoReturn:
        """Syncs until cancelled."""
        unsubscribe = self._state.subscribe(self._wake)
        try:
            self._full_sync_at = self._runtime.now()
            task_status.started()
            while True:
                self._changed = trio.Event()
                try:
                    await self._sync()
                    self.failures = 0
                except MeshError as error:
                    self._failed(error)
                    await self._pause()
                    continue
                with trio.move_on_at(self._wake_at()):
                    await self._changed.wait()
        finally:
            unsubscribe()

    async def _pause(self) -> None:
        """Until the retry is due. Changes meanwhile are no reason to ask sooner servers that cannot answer."""
        while self._runtime.now() < self._full_sync_at:
            self._appeared = trio.Event()
            with trio.move_on_at(self._full_sync_at):
                await self._appeared.wait()

    def _wake(self) -> None:
        self._changed.set()

    def _wake_at(self) -> float:
        return min((self._full_sync_at, *self._deferred_until.values()))

    def _failed(self, error: MeshError) -> None:
        self.failures += 1
        self._known = None
        pause_s = backoff_s(self.failures, rng=self._rng, first_s=RETRY_S_MIN, last_s=RETRY_S_MAX)
        self._full_sync_at = self._runtime.now() + pause_s
        _log.log(
            logging.WARNING if self.failures in (3, 30) else logging.DEBUG,
            "the catalog does not follow this agent's services: %s; trying again in %.1f s",
            error,
            pause_s,
        )

    async def _sync(self) -> None:
        """Brings the catalog up to date, reading it first where due. Raises MeshError."""
        now = self._runtime.now()
        if self._known is None and now < self._full_sync_at:
            return  # a staggered full sync is coming
        if self._known is None or now >= self._full_sync_at:
            self._known = None
            known = await self._read()
            scale = cluster_scale(self._cluster_size())
            interval_s = FULL_SYNC_INTERVAL_S if self._has_synced else SECOND_SYNC_S
            self._full_sync_at = now + interval_s + self._rng.uniform(0.0, interval_s * scale)
            self._has_synced = True
            self._known = known
            self._state.adopt_results(known.checks.values())
        known = self._known
        self._defer(known)
        services, checks = self._state.services(), self._state.checks()
        for command in self._plan(known, services, checks):
            result = await self._backend.apply(command)
            if isinstance(result, Rejected):
                # Taken as done until the next full sync: asking again at once would be refused again.
                _log.error("the catalog refused a registration of this agent: %s", result.reason)
            known.take(command)
        known.settle(services, checks, deferred=self._deferred_until)

    async def _read(self) -> "_Known":
        node = self._node()
        options = ReadOptions()
        services = await self._backend.read(GetNodeServices(node.node), options)
        checks = await self._backend.read(ListNodeChecks(node.node), options)
        return _Known(services.value, checks.value)

    def _plan(self, known: "_Known", services: Sequence[Service], checks: Sequence[Check]) -> tuple[Command, ...]:
        """What is to be written. Rows that are the very objects known to be in the catalog are not compared again."""
        old_services, old_checks = dict(known.services), dict(known.checks)
        new_services = [one for one in services if not _drop_same(old_services, fold(one.service_id), one)]
        new_checks = [one for one in checks if not _drop_same(old_checks, fold(one.check_id), one)]
        return plan(
            new_services,
            new_checks,
            old_services.values(),
            old_checks.values(),
            self._node(),
            catalog_node=known.node,
            deferred_checks=self._deferred_until,
        )

    def _defer(self, known: "_Known") -> None:
        """Which checks' new output waits, and until when; those that are due wait no longer."""
        now = self._runtime.now()
        interval_s = self._check_update_interval_s
        deferred: dict[str, float] = {}
        if interval_s > 0:
            for check in self._state.checks():
                held = known.checks.get(fold(check.check_id))
                if (
                    held is check
                    or held is None
                    or held.output == check.output
                    or not same_check(check, held, ignore_output=True)
                ):
                    continue
                until = self._deferred_until.get(check.check_id)
                if until is None:
                    until = now + interval_s / 2 + self._rng.uniform(0.0, interval_s)
                if now < until:
                    deferred[check.check_id] = until
        self._deferred_until = deferred


RowT = TypeVar("RowT")


def _drop_same(known: dict[str, RowT], key: str, row: RowT) -> bool:
    """Whether the known row is this very object; then it is dropped from what there is to compare."""
    if known.get(key) is not row:
        return False
    del known[key]
    return True


class _Known:
    """The catalog's rows of one node, kept up by the commands that were applied since they were read."""

    def __init__(self, services: NodeServices | None, checks: tuple[Check, ...]) -> None:
        self.node = services.node if services is not None else None
        rows: tuple[Service, ...] = services.services if services is not None else ()
        self.services = {fold(service.service_id): service for service in rows}
        self.checks = {fold(check.check_id): check for check in checks}

    def settle(self, services: Iterable[Service], checks: Iterable[Check], *, deferred: Collection[str]) -> None:
        """Notes that the catalog now says what these local rows say, so that the next look can be at identity alone.

        Not for rows that it may hold otherwise: overridden tags, deferred outputs.
        """
        for service in services:
            if not service.enable_tag_override:
                self.services[fold(service.service_id)] = service
        for check in checks:
            if check.check_id not in deferred:
                self.checks[fold(check.check_id)] = check

    def take(self, command: Command) -> None:
        """Notes what the command has done."""
        match command:
            case Register(node, service, checks, skip_node_update):
                if self.node is None or not skip_node_update:
                    self.node = node
                if service is not None:
                    self.services[fold(service.service_id)] = service
                for check in checks:
                    self.checks[fold(check.check_id)] = check
            case Deregister(_, service_id, _) if service_id:
                self.services.pop(fold(service_id), None)
                owned = [key for key, check in self.checks.items() if fold(check.service_id) == fold(service_id)]
                for key in owned:
                    del self.checks[key]
            case Deregister(_, _, check_id):
                self.checks.pop(fold(check_id), None)
            case _:
                raise AssertionError(f"anti-entropy does not write {type(command).__name__}")
