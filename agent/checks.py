"""Runs this agent's checks: http, tcp, ttl and alias, each in a task of its own, and writes results to `LocalState`."""

import logging
import math
import random
from collections import defaultdict
from typing import TYPE_CHECKING, NoReturn

import trio

from agent.backend import Backend
from agent.check_runs import CheckResult, http_method, run_tcp
from agent.follow import follow
from agent.local_state import LocalState
from agent.runtime import Runtime
from mesh.errors import MeshError, NotFound, Refused, StorageFailed
from mesh.health import Thresholds, alias_result
from mesh.model.catalog import NodeServices
from mesh.model.check import Check, CheckDefinition, CheckStatus
from mesh.model.query import Answer, GetNodeServices, ListNodeChecks
from mesh.names import fold

if TYPE_CHECKING:
    from agent.check_http import HttpChecker

TIMEOUT_S = 10.0  # of one run of an http or tcp check, where its definition names none
RUNS_MAX = 128  # at one time; each holds a descriptor, and a host full of hanging targets must leave us some
# Consul runs a check first at a random point of its whole interval. A new check waits no longer than this, so that a
# service is not critical for an interval after its registration, and while it has never passed it is run again as soon
# for one interval, as many a service registers before it listens. The run after that is what spreads the load.
FIRST_RUN_S_MAX = 1.0

_log = logging.getLogger("mesh.checks")


class _Job:
    """A check that is being run."""

    def __init__(self, definition: CheckDefinition) -> None:
        self.definition = definition
        self.scope = trio.CancelScope()
        self.expires_at = math.inf  # ttl: when (Trio's clock) the last heartbeat lapses
        self.renewed = trio.Event()


class CheckRunner:
    """Keeps one task per check of the local state, following every change of it."""

    def __init__(self, state: LocalState, backend: Backend, runtime: Runtime, *, node_name: str) -> None:
        """`backend` is asked for the checks of other nodes, which alias checks may name."""
        self._state = state
        self._backend = backend
        self._runtime = runtime
        self._node_name = node_name
        self._rng = runtime.random_source("checks")
        self._jobs: dict[str, _Job] = {}
        self._followed_version = -1  # of the local state's definitions
        self._critical_since: dict[str, float] = {}
        self._changed = trio.Event()
        self._limiter = trio.CapacityLimiter(RUNS_MAX)
        self._runs = CheckRuns()

    async def run(self, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> NoReturn:
        """Runs checks until cancelled."""
        unsubscribe = self._state.subscribe(self._wake)
        self._followed_version = -1
        self._jobs.clear()  # should an earlier run have ended by an error
        try:
            async with trio.open_nursery() as nursery:
                task_status.started()
                while True:
                    self._changed = trio.Event()
                    self._follow_definitions(nursery)
                    self._update_aliases()
                    reap_at = await self._reap()
                    with trio.move_on_at(reap_at):
                        await self._changed.wait()
        finally:
            unsubscribe()
            await self._runs.close()
        raise AssertionError("the loop above ends only by cancellation")

    async def heartbeat(self, check_id: str, *, status: CheckStatus, output: str) -> None:
        """Takes what an application says about its TTL check, good for one TTL.

        Raises NotFound for an unknown check and Refused for one that is no TTL check, with Consul's texts.
        """
        definition = self._state.definition(check_id)
        if definition is None:
            raise NotFound(f'Unknown check ID "{check_id}". Ensure that the check ID is passed, not the check name.')
        if definition.type != "ttl":
            raise Refused(f'CheckID "{check_id}" does not have associated TTL')
        self._state.update_check(check_id, status=status, output=output)
        job = self._jobs.get(fold(check_id))
        if job is not None:
            job.expires_at = self._runtime.now() + definition.ttl_s
            job.renewed.set()
        try:
            expires_at_s = self._runtime.unix_time_s() + definition.ttl_s
            await self._state.keep_result(check_id, expires_at_s=expires_at_s)
        except StorageFailed as error:
            # The result is in force; only a restart within its TTL would miss it.
            _log.warning("check %s: its result is not kept: %s", check_id, error)

    def _wake(self) -> None:
        self._changed.set()

    # -- which checks run

    def _follow_definitions(self, nursery: trio.Nursery) -> None:
        """Starts what is new, restarts what is defined otherwise, stops what is gone."""
        if self._followed_version == self._state.definitions_version:
            return
        self._followed_version = self._state.definitions_version
        wanted: dict[str, CheckDefinition] = {}
        for check in self._state.checks():
            definition = self._state.definition(check.check_id)
            if definition is not None and definition.type:
                wanted[fold(check.check_id)] = definition
        for key in [key for key, job in self._jobs.items() if wanted.get(key) != job.definition]:
            self._jobs.pop(key).scope.cancel()
        for key, definition in wanted.items():
            if key not in self._jobs:
                job = self._jobs[key] = _Job(definition)
                match definition.type:
                    case "http" | "tcp":
                        nursery.start_soon(self._run_timed, job)
                    case "ttl":
                        nursery.start_soon(self._run_ttl, job)
                    case "alias" if not self._is_local(definition):
                        nursery.start_soon(self._run_remote_alias, job)

    def _is_local(self, definition: CheckDefinition) -> bool:
        return fold(definition.alias_node) in ("", fold(self._node_name))

    async def _reap(self) -> float:
        """Deregisters services that were critical for too long; when to look again."""
        now = self._runtime.now()
        next_at = math.inf
        alive: set[str] = set()
        for check in self._state.checks():
            if check.status != "critical":
                continue
            definition = self._state.definition(check.check_id)
            after_s = definition.deregister_critical_service_after_s if definition else 0.0
            if not after_s or not check.service_id:
                continue
            alive.add(check.check_id)
            due = self._critical_since.setdefault(check.check_id, now) + after_s
            if now < due:
                next_at = min(next_at, due)
                continue
            _log.warning(
                "service %s: check %s was critical for %g s; deregistering it", check.service_id, check.name, after_s
            )
            try:
                await self._state.remove_service(check.service_id)
            except NotFound:
                continue  # another of its checks was due as well
            except MeshError as error:
                _log.error("service %s stays registered: %s", check.service_id, error)
                self._critical_since[check.check_id] = now
                next_at = min(next_at, now + after_s)
        for check_id in self._critical_since.keys() - alive:
            del self._critical_since[check_id]
        return next_at

    # -- http and tcp

    async def _run_timed(self, job: _Job) -> None:
        definition = job.definition
        thresholds = Thresholds(
            success_before_passing=definition.success_before_passing,
            failures_before_warning=definition.failures_before_warning,
            failures_before_critical=definition.failures_before_critical,
        )
        with job.scope:
            first_run_s = min(definition.interval_s, FIRST_RUN_S_MAX)
            new_until = self._runtime.now() + definition.interval_s
            await trio.sleep(self._rng.uniform(0.0, first_run_s))
            pause_s = self._rng.uniform(0.0, definition.interval_s)
            while True:
                async with self._limiter:
                    try:
                        result = await self._runs.run(definition)
                    except Exception as error:
                        # Whatever a target's bytes do to a client library, the other checks go on.
                        _log.exception("check %s failed to run", definition.check_id)
                        result = CheckResult("critical", f"the check failed to run: {error!r}")
                status = thresholds.record(result.status)
                if status is not None:
                    self._report(definition, CheckResult(status, result.output))
                row = self._state.check(definition.check_id)
                if row is not None and row.status != "critical":
                    new_until = -math.inf
                if self._runtime.now() + first_run_s < new_until:
                    await trio.sleep(first_run_s)
                    continue
                await trio.sleep(pause_s)
                pause_s = definition.interval_s

    def _report(self, definition: CheckDefinition, result: CheckResult) -> None:
        before = self._state.check(definition.check_id)
        if before is not None and before.status != result.status:
            _log.info("check %s is now %s", definition.check_id, result.status)
        self._state.update_check(definition.check_id, status=result.status, output=result.output)

    # -- ttl

    async def _run_ttl(self, job: _Job) -> None:
        definition = job.definition
        now = self._runtime.now()
        lifetime_s = definition.ttl_s
        restored_s = self._state.restored_expiry_s(definition.check_id)
        if restored_s is not None:
            lifetime_s = min(lifetime_s, max(0.0, restored_s - self._runtime.unix_time_s()))
        job.expires_at = now + lifetime_s
        with job.scope:
            while True:
                with trio.move_on_at(job.expires_at) as waiting:
                    await job.renewed.wait()
                if waiting.cancelled_caught and self._runtime.now() >= job.expires_at:
                    last = self._state.check(definition.check_id)
                    self._report(definition, CheckResult("critical", expired_output(last.output if last else "")))
                    job.expires_at = math.inf
                if job.renewed.is_set():
                    job.renewed = trio.Event()

    # -- alias

    def _update_aliases(self) -> None:
        """Local aliases follow at once: they are a function of the local state."""
        checks = self._state.checks()
        aliases = [job.definition for job in self._jobs.values() if job.definition.type == "alias"]
        aliases = [definition for definition in aliases if self._is_local(definition)]
        if not aliases:
            return
        by_service: dict[str, list[Check]] = defaultdict(list)
        for check in checks:
            by_service[fold(check.service_id)].append(check)
        for definition in sorted(aliases, key=lambda one: one.check_id):
            target = fold(definition.alias_service)
            bearing = [*by_service[""], *by_service[target]] if target else by_service[""]
            others = [check for check in bearing if fold(check.check_id) != fold(definition.check_id)]
            if any(not self._state.is_proven(check.check_id) for check in others):
                continue  # after a restart: nothing is known of them yet, so nothing of their alias
            exists = not target or self._state.service(definition.alias_service) is not None
            result = alias_result(others, target=_alias_target(definition), target_exists=exists)
            self._report(definition, CheckResult(result.status, result.output))

    async def _run_remote_alias(self, job: _Job) -> None:
        """Follows the other node's services and checks through the servers."""
        definition = job.definition
        services: NodeServices | None = None
        checks: tuple[Check, ...] = ()
        known: set[str] = set()

        def report() -> None:
            if known != {"services", "checks"}:
                return
            target = fold(definition.alias_service)
            names = {fold(service.service_id) for service in services.services} if services else set()
            exists = services is not None and (not target or target in names)
            bearing = [check for check in checks if fold(check.service_id) in ("", target)]
            others = [
                check
                for check in bearing
                if (fold(check.node), fold(check.check_id)) != (fold(self._node_name), fold(definition.check_id))
            ]
            result = alias_result(others, target=_alias_target(definition), target_exists=exists)
            self._report(definition, CheckResult(result.status, result.output))

        def take_services(answer: Answer[NodeServices | None]) -> None:
            nonlocal services
            services = answer.value
            known.add("services")
            report()

        def take_checks(answer: Answer[tuple[Check, ...]]) -> None:
            nonlocal checks
            checks = answer.value
            known.add("checks")
            report()

        rng = random.Random(self._rng.random())
        with job.scope:
            async with trio.open_nursery() as nursery:
                for start in (
                    lambda: follow(self._backend, GetNodeServices(definition.alias_node), take_services, rng=rng),
                    lambda: follow(self._backend, ListNodeChecks(definition.alias_node), take_checks, rng=rng),
                ):
                    nursery.start_soon(start)


def _alias_target(definition: CheckDefinition) -> str:
    if not definition.alias_service:
        return f"Node {definition.alias_node}"
    where = f" on node {definition.alias_node}" if definition.alias_node else ""
    return f"Service {definition.alias_service}{where}"


def expired_output(last_output: str) -> str:
    """What a TTL check shows once its heartbeat is overdue, in Consul's words."""
    return f"TTL expired (last output before timeout follows): {last_output}" if last_output else "TTL expired"


class CheckRuns:
    """Runs checks, and owns what several runs share."""

    def __init__(self) -> None:
        self._http: HttpChecker | None = None

    async def close(self) -> None:
        """Frees what the runs shared."""
        if self._http is not None:
            await self._http.close()

    async def run(self, definition: CheckDefinition) -> CheckResult:
        """The result of one run of an http or tcp check."""
        timeout_s = definition.timeout_s or TIMEOUT_S
        with trio.move_on_after(timeout_s):
            if definition.http:
                return await (await self._http_checker()).run(definition)
            return await run_tcp(definition.tcp)
        what = f"{http_method(definition)} {definition.http}" if definition.http else f"TCP connect {definition.tcp}"
        return CheckResult("critical", f"{what}: no answer within {timeout_s:g} s")

    async def _http_checker(self) -> "HttpChecker":
        if self._http is None:
            # The HTTP client takes a tenth of a second and 15 MB to import: only an agent with such checks pays for
            # it, and not on its loop.
            made = await trio.to_thread.run_sync(_import_http_checker)
            self._http = self._http or made
        return self._http


def _import_http_checker() -> "HttpChecker":
    from agent.check_http import HttpChecker

    return HttpChecker()
