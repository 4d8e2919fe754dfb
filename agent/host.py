"""This host's own part of an agent: its services and checks, their way into the catalog, identities and sidecars.

None of it is needed for the cluster to work, so none of it can stop the agent: a part that crashes is logged and
started again.
"""

import logging
import os
from collections.abc import Awaitable, Callable
from ipaddress import IPv4Address, ip_address
from pathlib import Path

import trio

from agent.backend import Backend
from agent.checks import CheckRunner
from agent.config import AgentConfig
from agent.dataplane.supervisor import WorkerSupervisor
from agent.dataplane.worker_process import default_workers
from agent.definitions import configured_checks, configured_services
from agent.edges import EdgePolls, EdgeReporter, TrafficMemory
from agent.leaves import LeafManager
from agent.local_state import LocalState
from agent.membership import parse_server
from agent.runtime import Runtime
from agent.sidecars import SidecarManager, Tracing
from agent.synchronizer import Synchronizer
from agent.upstream_render import locality_of
from agent.version import CONSUL_API_VERSION
from mesh.errors import ConfigError, MeshError
from mesh.gossip.events import GossipEvent, MemberJoined
from mesh.model.catalog import Node
from mesh.proxy.trace_context import TraceForm

_LOG = logging.getLogger("mesh.agent")

RESTART_PAUSE_S = 1.0
RESTART_PAUSE_S_MAX = 60.0
_TRACE_FORMS: dict[str, TraceForm] = {"tracecontext": "w3c", "b3": "b3", "b3multi": "b3multi"}
_STEADY_S = 300.0  # a part that ran this long before it crashed is started again at once


def own_node(config: AgentConfig, node_id: str) -> Node:
    """This agent's row of the catalog, as Consul's agents fill it."""
    address = config.advertise_address
    tagged = {"lan": address, "wan": address}
    if isinstance(ip_address(address), IPv4Address):
        tagged |= {"lan_ipv4": address, "wan_ipv4": address}
    else:
        tagged |= {"lan_ipv6": address, "wan_ipv6": address}
    return Node(
        node=config.node_name,
        address=address,
        node_id=node_id,
        datacenter=config.datacenter,
        tagged_addresses=tagged,
        meta={"consul-network-segment": "", "consul-version": CONSUL_API_VERSION, **config.node_meta},
    )


def tracing_from_environment() -> Tracing:
    """Where telemetry goes (OTEL_EXPORTER_OTLP_ENDPOINT; empty: nowhere), the share of new traces that is sampled, and
    the form in which they are passed on.

    OTEL_TRACES_SAMPLER_ARG sets the share, everything by default, as the OpenTelemetry specification has it; the first
    of OTEL_PROPAGATORS that is one of tracecontext, b3, b3multi sets the form.
    """
    endpoint = os.environ.get("OTEL_EXPORTER_OTLP_ENDPOINT", "")
    try:
        share = float(os.environ.get("OTEL_TRACES_SAMPLER_ARG", "1"))
    except ValueError:
        share = 1.0
    wanted = os.environ.get("OTEL_PROPAGATORS", "").split(",")
    forms = [_TRACE_FORMS[name.strip()] for name in wanted if name.strip() in _TRACE_FORMS]
    return Tracing(endpoint, min(1.0, max(0.0, share)) if endpoint else 0.0, forms[0] if forms else "w3c")


class Host:
    """Local state, checks, anti-entropy, leaves and sidecars of one agent."""

    def __init__(
        self,
        config: AgentConfig,
        runtime: Runtime,
        backend: Backend,
        *,
        polls: EdgePolls,
        node: Node,
        cluster_size: Callable[[], int],
    ) -> None:
        self._config = config
        self.node = node
        data_dir = Path(config.data_dir) if config.data_dir else None
        self.state = LocalState(
            config.node_name,
            runtime,
            data_dir=data_dir,
            sidecar_ports=(config.ports.sidecar_min_port, config.ports.sidecar_max_port),
            check_output_bytes_max=config.check_output_max_size,
        )
        self.leaves = LeafManager(backend=backend, runtime=runtime, datacenter=config.datacenter, data_dir=data_dir)
        self.checks = CheckRunner(self.state, backend, runtime, node_name=config.node_name)
        self._synchronizer = Synchronizer(
            self.state,
            backend,
            runtime,
            node=lambda: self.node,
            cluster_size=cluster_size,
            check_update_interval_s=config.check_update_interval_s,
        )
        # In dev mode nothing is kept, so nobody could find a worker that outlived its agent.
        self.supervisor = WorkerSupervisor(
            runtime=runtime,
            data_dir=data_dir,
            exit_with_agent=config.dev_mode,
            workers=config.proxy_workers or default_workers(),
            drain_time_s=config.proxy_drain_time_s,
        )
        self.sidecars = SidecarManager(
            services=self.state,
            leaves=self.leaves,
            backend=backend,
            supervisor=self.supervisor,
            runtime=runtime,
            datacenter=config.datacenter,
            bind_address=config.bind_address,
            default_allow=config.default_intention_policy == "allow",
            locality=locality_of(config.node_meta),
            tracing=tracing_from_environment(),
        )
        self.traffic = TrafficMemory(self.supervisor)
        self._edges = EdgeReporter(polls, self.traffic, runtime.random_source("edges"), node=config.node_name)
        self._is_stopping = False
        self._syncing = trio.CancelScope()

    async def load(self) -> None:
        """Brings back what was registered before, then adds what the configuration files define.

        Raises ConfigError naming what is wrong with a definition or the data directory.
        """
        services, checks = configured_services(self._config.services), configured_checks(self._config.checks)
        try:
            await self.state.restore()
            for service in services:
                await self.state.add_service(service, source="config")
            for check in checks:
                await self.state.add_check(check, source="config")
        except MeshError as error:
            raise ConfigError(f"cannot set up this agent's services: {error}") from error

    def handle_event(self, event: GossipEvent) -> None:
        """A server that appears may not know this node yet."""
        if isinstance(event, MemberJoined) and parse_server(event.member, self._config.datacenter) is not None:
            self._synchronizer.server_appeared()

    async def run(self, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Until cancelled."""
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self._keep_running, "leaves", self.leaves.run)
            nursery.start_soon(self._keep_running, "checks", self.checks.run)
            nursery.start_soon(self._run_synchronizer)
            nursery.start_soon(self._keep_running, "worker supervisor", self.supervisor.run)
            nursery.start_soon(self._keep_running, "sidecars", self.sidecars.run)
            nursery.start_soon(self._keep_running, "edge reporter", self._edges.run)
            nursery.start_soon(self._keep_running, "traffic memory", self.traffic.run)
            task_status.started()

    async def _run_synchronizer(self) -> None:
        with self._syncing:
            await self._keep_running("synchronizer", self._synchronizer.run)

    def stop_syncing(self) -> None:
        """Before leaving: the leader removes this node from the catalog, and a late sync must not bring it back."""
        self._syncing.cancel()

    async def stop(self, *, drain: bool) -> None:
        """Lets go of the worker: with `drain` it finishes what is open and exits, else it serves on for the
        next agent.
        """
        self._is_stopping = True
        await self.supervisor.stop(drain=drain)

    async def _keep_running(self, name: str, run: Callable[[], Awaitable[object]]) -> None:
        """Runs a part until the agent stops: a crash of it is logged with its reason, and it starts again."""
        await keep_running(name, run, is_over=lambda: self._is_stopping)


async def keep_running(name: str, run: Callable[[], Awaitable[object]], *, is_over: Callable[[], bool]) -> None:
    """Runs an optional part again and again, until it ends when `is_over`, or for ever."""
    pause_s = RESTART_PAUSE_S
    while True:
        started = trio.current_time()
        try:
            await run()
            if is_over():
                return
            _LOG.error("%s ended by itself; starting it again in %g s", name, pause_s)
        except Exception:
            _LOG.exception("%s crashed; starting it again in %g s", name, pause_s)
        if trio.current_time() - started > _STEADY_S:
            pause_s = RESTART_PAUSE_S
        await trio.sleep(pause_s)
        pause_s = min(RESTART_PAUSE_S_MAX, pause_s * 2)
