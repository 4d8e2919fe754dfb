"""Turns this agent's proxy services, and what the cluster says about them, into the worker's configuration.

Every fact has a watch of its own; whatever changes, the configuration is rendered anew and handed over, a few
milliseconds later so that a burst of changes makes one. Servers that are away change nothing: the last facts stand.
"""

import logging
import operator
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple, Protocol, TypeVar, cast

import trio

from agent.backend import Backend
from agent.backoff import backoff_s
from agent.dataplane.supervisor import WorkerSupervisor
from agent.departures import Departures
from agent.follow import follow
from agent.leaves import Leaf, LeafManager
from agent.runtime import Runtime
from agent.sidecar_render import SidecarFacts, render
from agent.upstream_render import UpstreamFacts
from mesh.errors import ConfigError, LimitExceeded, Refused, Unreachable
from mesh.model.catalog import Proxy, Service
from mesh.model.config_entry import ConfigEntry
from mesh.model.query import Answer, AnswerT, Asks, ListConfigEntries, ListServiceHealth, MatchIntentions
from mesh.proxy.sidecar_config import SIDECARS_MAX, SidecarConfig, WorkerConfig, check
from mesh.proxy.trace_context import TraceForm
from mesh.traffic.consul import CHAIN_KINDS, Chain, compile_chain
from mesh.wire import encode

_LOG = logging.getLogger("mesh.sidecars")

COALESCE_S = 0.01  # a burst of changes becomes one configuration; a deny may take 200 ms in all
RETRY_S_MIN = 0.5
RETRY_S_MAX = 30.0
GATE_CHECK_S = 1.0  # a taken-over worker waits for facts; this notices those that nobody announces

# Few entries in all, and a chain can lead from any to any: each kind is followed as a whole.
_KINDS = ("mesh", *CHAIN_KINDS)

ValueT = TypeVar("ValueT")


@dataclass(frozen=True)
class Tracing:
    """Where spans, metrics and OTLP logs go (empty: nowhere), and how traces begin."""

    endpoint: str = ""
    sampling: float = 0.0
    form: TraceForm = "w3c"


class Problem(NamedTuple):
    """Why one sidecar is not, or not quite, served as it was asked for."""

    proxy_id: str
    service: str
    reason: str


class LocalServices(Protocol):
    """The part of `agent.local_state.LocalState` that is needed here."""

    def services(self) -> Sequence[Service]:
        """Every service of this agent."""
        ...

    def subscribe(self, callback: Callable[[], None]) -> Callable[[], None]:
        """Has `callback` called after every change; returns what ends the subscription."""
        ...


class _Watch:
    """One followed query."""

    def __init__(self, query: Asks[object]) -> None:
        self.query = query
        self.scope = trio.CancelScope()
        self.answer: Answer[object] | None = None


@dataclass(frozen=True)
class _Sidecar:
    """One proxy service, and the application port that its registration leaves to its service's."""

    service: Service
    proxy: Proxy
    application_port: int

    def queries(self, datacenter: str, chains: "_Chains") -> Iterable[Asks[object]]:
        """Everything about the cluster that its configuration depends on."""
        yield cast(Asks[object], _intentions(self.proxy.destination_service_name))
        for kind in _KINDS:
            yield cast(Asks[object], ListConfigEntries(kind))
        for name in self.upstreams(datacenter):
            for service in chains.services(name):
                yield cast(Asks[object], _health(service))

    def upstreams(self, datacenter: str) -> tuple[str, ...]:
        """The services it may call."""
        return tuple(
            upstream.destination_name
            for upstream in self.proxy.upstreams
            if upstream.destination_type == "service" and upstream.datacenter in ("", datacenter)
        )


class _Chains:
    """The discovery chains under the config entries of the moment, compiled when they are first asked for."""

    def __init__(self, entries: Mapping[tuple[str, str], ConfigEntry]) -> None:
        self.entries = entries
        self._chains: dict[str, Chain | None] = {}
        self.problems: dict[str, str] = {}  # by service: why it has no chain

    def of(self, service: str) -> Chain | None:
        """The service's chain; None when its entries make no sense."""
        if service not in self._chains:
            try:
                self._chains[service] = compile_chain(service, self.entries)
            except ConfigError as error:
                self._chains[service] = None
                self.problems[service] = str(error)
        return self._chains[service]

    def services(self, service: str) -> tuple[str, ...]:
        """Every service whose instances the chain needs."""
        chain = self.of(service)
        if chain is None:
            return ()
        targets = (chain.target, *chain.targets)
        return tuple(dict.fromkeys(part.service for target in targets for part in target.instances))


def _health(service: str) -> ListServiceHealth:
    return ListServiceHealth(service, connect=True)


def _intentions(service: str) -> MatchIntentions:
    return MatchIntentions("destination", service)


class SidecarManager:
    """Serves every `connect-proxy` service of this agent through one worker."""

    def __init__(
        self,
        *,
        services: LocalServices,
        leaves: LeafManager,
        backend: Backend,
        supervisor: WorkerSupervisor,
        runtime: Runtime,
        datacenter: str,
        bind_address: str,
        default_allow: bool,
        locality: str = "",
        tracing: Tracing = Tracing(),
    ) -> None:
        """`bind_address`: where public listeners bind unless a proxy's configuration says otherwise."""
        self._services = services
        self._leaves = leaves
        self._backend = backend
        self._supervisor = supervisor
        self._rng = runtime.random_source("sidecars")
        self._datacenter = datacenter
        self._locality = locality
        self._bind_address = bind_address
        self._default_allow = default_allow
        self._tracing = tracing
        self._sidecars: dict[str, _Sidecar] = {}
        self._departures = Departures()  # deregistered ones, still among the sidecars
        self._chains = _Chains({})
        self._watches: dict[bytes, _Watch] = {}
        self._holds: dict[str, Callable[[], None]] = {}
        self._last_leaves: dict[str, Leaf] = {}  # also after expiry: a worker keeps what it has
        self._accepted: dict[str, SidecarConfig] = {}  # what the worker serves, as far as this agent told it
        self._refused: dict[str, SidecarConfig] = {}
        self._told = False  # the worker of now has what is in `_accepted`
        self._caught_up = False  # this manager knows at least as much as the worker; see _may_push
        self._rendered: dict[str, tuple[tuple[object, ...], SidecarConfig | None]] = {}
        self._refusals: dict[str, tuple[SidecarConfig, str]] = {}  # and why, for those who ask
        self._warned: dict[str, tuple[str, ...]] = {}
        self._dirty = trio.Event()
        self._stale = trio.Event()  # the local services changed
        self._retry_at = float("inf")
        self._failures = 0

    async def run(self, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Until cancelled."""
        unsubscribes = (
            self._services.subscribe(self._services_changed),
            self._leaves.subscribe(lambda _service, _leaf: self._changed()),
            self._leaves.subscribe_roots(lambda _roots: self._changed()),
            self._supervisor.subscribe(self._worker_changed),
        )
        self._caught_up = False
        try:
            async with trio.open_nursery() as nursery:
                self._reconcile(nursery)
                nursery.start_soon(self._follow_services, nursery)
                task_status.started()
                await self._push_for_ever()
        finally:
            for unsubscribe in unsubscribes:
                unsubscribe()
            self._watches.clear()
            for release in self._holds.values():
                release()
            self._holds.clear()

    def problems(self) -> tuple[Problem, ...]:
        """What is not served as it was asked for, now, by proxy ID."""
        found: list[Problem] = []
        for proxy_id, sidecar in sorted(self._sidecars.items()):
            service = sidecar.proxy.destination_service_name
            reasons = list(self._warned.get(proxy_id, ()))
            config, refusal = self._refusals.get(proxy_id, (None, ""))
            wanted = self._rendered.get(proxy_id)
            if config is not None and wanted is not None and wanted[1] == config != self._accepted.get(proxy_id):
                former = ", and serves the one before" if proxy_id in self._accepted else ""
                reasons.append(f"a worker refuses its configuration{former}: {refusal}")
            elif proxy_id not in self._accepted:
                refused = self._leaves.refusal(service)
                reasons.append(f"it has no certificate: {refused}" if refused else "it is not served yet")
            found.extend(Problem(proxy_id, service, reason) for reason in reasons)
        return tuple(found)

    # -- what changed

    def _changed(self) -> None:
        self._dirty.set()

    def _services_changed(self) -> None:
        self._stale.set()

    def _worker_changed(self) -> None:
        """Another worker: what the last one refused, or accepted, says nothing about this one."""
        self._told = False
        self._refused.clear()
        self._changed()

    async def _follow_services(self, nursery: trio.Nursery) -> None:
        while True:
            with trio.move_on_at(self._departures.next_end(trio.current_time())):
                await self._stale.wait()
            self._stale = trio.Event()
            self._reconcile(nursery)

    def _reconcile(self, nursery: trio.Nursery) -> None:
        """Starts the watches and holds the leaves that the local services need now, and ends the others."""
        services = {service.service_id: service for service in self._services.services()}
        former, self._sidecars = self._sidecars, {}
        for service_id, service in sorted(services.items()):
            if service.kind == "connect-proxy" and service.proxy is not None:
                sidecar = _Sidecar(service, service.proxy, _application_port(service.proxy, services))
                # The same object as before where nothing changed: see _render_one.
                self._sidecars[service_id] = former[service_id] if former.get(service_id) == sidecar else sidecar
        served, now = former.keys() & self._accepted.keys(), trio.current_time()
        for proxy_id in sorted(self._departures.update(served=served, registered=self._sidecars, now=now)):
            self._sidecars[proxy_id] = former[proxy_id]
        for proxy_id in self._rendered.keys() - self._sidecars.keys():
            del self._rendered[proxy_id]
            self._warned.pop(proxy_id, None)
            self._refusals.pop(proxy_id, None)
        wanted = {
            encode(query): query
            for sidecar in self._sidecars.values()
            for query in sidecar.queries(self._datacenter, self._chains)
        }
        for key in [key for key in self._watches if key not in wanted]:
            self._watches.pop(key).scope.cancel()
        for key, query in wanted.items():
            if key not in self._watches:
                watch = self._watches[key] = _Watch(query)
                nursery.start_soon(self._watch, watch)
        self._hold_leaves({sidecar.proxy.destination_service_name for sidecar in self._sidecars.values()})
        self._changed()

    def _hold_leaves(self, wanted: set[str]) -> None:
        for service in [service for service in self._holds if service not in wanted]:
            self._holds.pop(service)()
            self._last_leaves.pop(service, None)
        for service in sorted(wanted - self._holds.keys()):
            try:
                self._holds[service] = self._leaves.hold(service)
            except LimitExceeded as error:
                _LOG.error("the sidecar of service %s cannot be served: %s", service, error)

    async def _watch(self, watch: _Watch) -> None:
        def deliver(answer: Answer[object]) -> None:
            former, watch.answer = watch.answer, answer
            if isinstance(watch.query, ListConfigEntries) and (former is None or former.value != answer.value):
                self._entries_changed()
            self._changed()

        with watch.scope:
            await follow(self._backend, watch.query, deliver, rng=self._rng)

    def _entries_changed(self) -> None:
        """Chains may lead elsewhere now, to services that are not followed yet."""
        entries: dict[tuple[str, str], ConfigEntry] = {}
        for kind in _KINDS:
            entries.update(((kind, entry.name), entry) for entry in self._value(ListConfigEntries(kind), ()))
        self._chains = _Chains(entries)
        self._stale.set()

    def _answer(self, query: Asks[AnswerT]) -> Answer[AnswerT] | None:
        watch = self._watches.get(encode(query))
        return None if watch is None else cast("Answer[AnswerT] | None", watch.answer)

    def _value(self, query: Asks[AnswerT], otherwise: AnswerT) -> AnswerT:
        answer = self._answer(query)
        return otherwise if answer is None else answer.value

    # -- what is served

    def _may_push(self) -> bool:
        """A worker that serves already must not be told less than it knows: after an agent's restart nothing is pushed
        before every fact has arrived once. A new worker has nothing to lose.
        """
        if self._caught_up or self._supervisor.fresh:
            return True
        if self._stale.is_set():
            return False  # what the entries just said may need further facts
        return all(watch.answer is not None for watch in self._watches.values()) and all(
            self._leaf(service) is not None or self._leaves.refusal(service) is not None for service in self._holds
        )

    def _leaf(self, service: str) -> Leaf | None:
        leaf = self._leaves.current(service)
        if leaf is not None:
            self._last_leaves[service] = leaf
        return self._last_leaves.get(service)

    def _render(self) -> dict[str, SidecarConfig]:
        """The sidecars that can be served, by proxy ID. One that cannot be just now stays as the worker has it."""
        rendered: dict[str, SidecarConfig] = {}
        for proxy_id, sidecar in self._sidecars.items():
            leaf = self._leaf(sidecar.proxy.destination_service_name)
            answers = [self._answer(query) for query in sidecar.queries(self._datacenter, self._chains)]
            config = None
            # Without an identity or the rules it would serve nobody, or everybody.
            if leaf is not None and all(answers):
                config = self._render_one(proxy_id, sidecar, leaf, (sidecar, leaf, self._leaves.roots, *answers))
            config = config or self._accepted.get(proxy_id)
            if config is not None:
                rendered[proxy_id] = config
        rendered = self._departures.trim(rendered, trio.current_time())
        return dict(list(rendered.items())[:SIDECARS_MAX])

    def _render_one(
        self, proxy_id: str, sidecar: _Sidecar, leaf: Leaf, sources: tuple[object, ...]
    ) -> SidecarConfig | None:
        """The configuration, or None when it cannot be served. `sources` is all that it is made of: while each is the
        same object as last time so is the result, and a host with many sidecars renders only what has changed.
        """
        former = self._rendered.get(proxy_id)
        if former is not None and len(former[0]) == len(sources) and all(map(operator.is_, former[0], sources)):
            return former[1]
        result = render(self._facts(sidecar, leaf), self._accepted.get(proxy_id))
        config: SidecarConfig | None = result.config
        problems = self._chains.problems
        unclear = [name for name in sidecar.upstreams(self._datacenter) if name in problems]
        warnings = (*result.warnings, *(f"upstream {name} stays as it was: {problems[name]}" for name in unclear))
        try:
            check(WorkerConfig(0, (result.config,)))
        except ConfigError as error:
            config = None
            warnings = (*warnings, f"its registration cannot be served: {error}")
        self._warn(proxy_id, warnings)
        self._rendered[proxy_id] = (sources, config)
        return config

    def _facts(self, sidecar: _Sidecar, leaf: Leaf) -> SidecarFacts:
        destination = sidecar.proxy.destination_service_name
        upstreams: Mapping[str, UpstreamFacts] = {
            name: UpstreamFacts(
                self._chains.of(name),
                {service: self._value(_health(service), ()) for service in self._chains.services(name)},
            )
            for name in sidecar.upstreams(self._datacenter)
        }
        return SidecarFacts(
            service=sidecar.service,
            application_port=sidecar.application_port,
            datacenter=self._datacenter,
            bind_address=self._bind_address,
            default_allow=self._default_allow,
            roots=self._leaves.roots,
            certificate_chain_pem=leaf.certificate_pem,
            private_key_pem=leaf.private_key_pem,
            intentions=self._value(_intentions(destination), ()),
            entries=self._chains.entries,
            locality=self._locality,
            upstreams=upstreams,
        )

    def _warn(self, proxy_id: str, warnings: tuple[str, ...]) -> None:
        """Says each thing once, until it changes."""
        if self._warned.get(proxy_id, ()) != warnings:
            self._warned[proxy_id] = warnings
            for warning in warnings:
                _LOG.warning("sidecar %s: %s", proxy_id, warning)

    # -- handing it over

    async def _push_for_ever(self) -> None:
        while True:
            timeout_s = max(0.0, self._retry_at - trio.current_time())
            if not self._may_push():
                timeout_s = min(timeout_s, GATE_CHECK_S)
            with trio.move_on_after(timeout_s):
                await self._dirty.wait()
            await trio.sleep(COALESCE_S)
            self._dirty = trio.Event()
            if trio.current_time() >= self._retry_at:
                self._retry_at = float("inf")
                self._refused.clear()
            if self._may_push():
                await self._push()

    async def _push(self) -> None:
        wanted = self._render()
        if not wanted and not self._accepted and not self._supervisor.running:
            return  # no sidecars, no worker
        # One that was refused as it stands is not tried with every change of the others, only now and then.
        candidate = {
            proxy_id: self._accepted_or(proxy_id, config)
            for proxy_id, config in wanted.items()
            if self._refused.get(proxy_id) != config or proxy_id in self._accepted
        }
        if self._told and candidate == self._accepted:
            return
        try:
            try:
                await self._configure(candidate)
            except Refused as error:
                _LOG.warning("the worker refused a configuration: %s; handing over one sidecar at a time", error)
                await self._push_one_by_one(candidate)
        except Unreachable as error:
            _LOG.error("the worker could not be configured: %s", error)
            self._retry_later()
            return
        if self._refused:
            self._retry_later()
        else:
            self._failures = 0

    def _accepted_or(self, proxy_id: str, config: SidecarConfig) -> SidecarConfig:
        """What to send of a sidecar: its new form, unless the worker has refused just that."""
        if self._refused.get(proxy_id) == config and proxy_id in self._accepted:
            return self._accepted[proxy_id]
        return config

    async def _configure(self, sidecars: Mapping[str, SidecarConfig]) -> None:
        tracing = self._tracing
        await self._supervisor.configure(
            WorkerConfig(0, tuple(sidecars.values()), tracing.endpoint, tracing.sampling, tracing.form)
        )
        self._accepted = dict(sidecars)
        self._told = self._caught_up = True

    async def _push_one_by_one(self, wanted: Mapping[str, SidecarConfig]) -> None:
        """So that one sidecar whose port is taken does not keep the others from their next deny. What it had before
        stays in force for it. Raises Unreachable.
        """
        current = {proxy_id: config for proxy_id, config in self._accepted.items() if proxy_id in wanted}
        if current != self._accepted or not self._told:
            try:
                await self._configure(current)
            except Refused:
                current = {}  # a new worker that cannot bind what the last one had: begin with nothing
        for proxy_id, config in wanted.items():
            if current.get(proxy_id) == config:
                continue
            try:
                await self._configure({**current, proxy_id: config})
                current[proxy_id] = config
                self._refused.pop(proxy_id, None)
            except Refused as error:
                self._refused[proxy_id] = config
                self._refusals[proxy_id] = config, str(error)
                _LOG.error("sidecar %s: the worker refuses its configuration: %s", proxy_id, error)

    def _retry_later(self) -> None:
        if self._retry_at != float("inf"):
            return  # other changes in between do not put it off
        self._failures += 1
        pause_s = backoff_s(self._failures, rng=self._rng, first_s=RETRY_S_MIN, last_s=RETRY_S_MAX)
        self._retry_at = trio.current_time() + pause_s


def _application_port(proxy: Proxy, services: Mapping[str, Service]) -> int:
    """The port of the service behind the proxy, 0 when it is not registered here."""
    service = services.get(proxy.destination_service_id)
    return service.port if service is not None else 0
