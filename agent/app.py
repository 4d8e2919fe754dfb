"""The composition root: builds every part of one agent, starts them in order, and stops them in order."""

import logging
import signal
import ssl
import sys
from collections.abc import AsyncIterator, Sequence
from functools import partial
from pathlib import Path

import trio

from agent.addresses import join_address
from agent.backend import Backend
from agent.cluster import ClientCluster, ServerCluster, open_server
from agent.config import PORT_OFF, AgentConfig, node_id, prepare_data_dir
from agent.dataplane.views import WorkerViews
from agent.host import Host, own_node
from agent.http.agent_api import AgentApi
from agent.http.agent_connect import AgentConnectApi
from agent.http.agent_proxy import AgentProxyApi
from agent.http.agent_services import AgentServicesApi
from agent.http.agent_workers import AgentWorkersApi
from agent.http.catalog import CatalogApi
from agent.http.config_entries import ConfigApi
from agent.http.connect_ca import ConnectCaApi
from agent.http.connection import HttpLimits, HttpSettings
from agent.http.health import HealthApi
from agent.http.intentions import IntentionsApi
from agent.http.kv import KvApi
from agent.http.request import Route
from agent.http.server import HttpServer, TcpListen, UnixListen
from agent.http.status import StatusApi
from agent.http.traffic import TrafficApi
from agent.join import KnownPeers, join_at_start, retry_join, without_own
from agent.logs import LineWriter, logging_to_stdout
from agent.process import locked_data_dir, notify_systemd, raise_descriptor_limit, stop_signals
from agent.runtime import Runtime
from agent.server import WAIT_JITTER
from agent.telemetry import MergedMetrics, Metrics
from agent.version import CONSUL_API_VERSION, VERSION
from mesh.errors import ConfigError, MeshError

_LOG = logging.getLogger("mesh.agent")

STOP_DEADLINE_S = 9.0  # from the first signal to the end, whatever does not answer
HTTP_DRAIN_S = 1.0
HANDLER_MARGIN_S = 80.0  # beyond the longest blocking query: the reads around it, and a leader to wait for
WORKER_DRAIN_S = 3.0  # the agent waits no longer; the worker itself takes what it needs to finish
_CONSUL_DNS_PORT = 8600
_UNIX_PREFIX = "unix://"


async def run_agent(config: AgentConfig, runtime: Runtime) -> int:
    """Runs one agent until a signal or `/v1/agent/leave` ends it; returns the exit status.

    0 after an orderly stop. 1 when it could not start (one line on standard error names the key, address or path) or
    when a part that must be right was not: its reason is logged and on standard error.
    """
    with logging_to_stdout(config.log_level, as_json=config.log_json) as output:
        try:
            raise_descriptor_limit()
            prepare_data_dir(config)
            with locked_data_dir(config.data_dir):
                agent = Agent(config, runtime, output, node_id=node_id(config, runtime.new_uuid))
                return await agent.run()
        except* ConfigError as group:
            _say_why(_first(group))
        except* Exception as group:
            _LOG.critical("the agent stops: %s", _first(group), exc_info=group)
            _say_why(_first(group))
    return 1


def _say_why(error: BaseException) -> None:
    text = str(error) or type(error).__name__
    if not isinstance(error, MeshError):
        text = f"internal error: {type(error).__name__}: {text}"
    print(f"mesh agent: {' '.join(text.split())}", file=sys.stderr, flush=True)


def _first(error: BaseException) -> BaseException:
    while isinstance(error, BaseExceptionGroup):
        error = error.exceptions[0]
    return error


class Agent:
    """One agent of either role."""

    def __init__(self, config: AgentConfig, runtime: Runtime, output: LineWriter, *, node_id: str) -> None:
        self._config = config
        self._runtime = runtime
        self._output = output
        self._node_id = node_id
        self.metrics = Metrics(runtime.unix_time_s)
        self._stop_asked = trio.Event()
        self._has_left = False
        self._is_leaving = False
        self._nursery: trio.Nursery | None = None  # while this agent is a member of its cluster
        self._scope = trio.CancelScope()  # everything; replaced when `run` begins
        self._cluster: ServerCluster | ClientCluster
        self._peers: KnownPeers
        self._host: Host

    @property
    def _backend(self) -> Backend:
        return self._cluster.backend

    async def run(self) -> int:
        """See `run_agent`. Raises ConfigError and whatever breaks a part that must not break."""
        with stop_signals() as signals:
            async with trio.open_nursery() as nursery:
                self._scope = nursery.cancel_scope
                nursery.start_soon(self._obey, signals)
                await self._serve()
                nursery.cancel_scope.cancel()
        return 0

    async def _serve(self) -> None:
        """Starts every part, waits for the end, and stops them in the opposite order."""
        config = self._config
        self._cluster = await self._make_cluster()
        self._peers = KnownPeers(self._cluster.gossip, config.data_dir, self._own_gossip_addresses())
        self._cluster.subscribe(self._peers.handle_event)
        host = self._host = self._make_host()
        try:
            await self._serve_until_stopped(host)
        finally:
            await host.stop(drain=False)  # also when the start failed; it waits for nothing
        _LOG.info("%s stopped", config.node_name)

    async def _serve_until_stopped(self, host: Host) -> None:
        async with trio.open_nursery() as nursery:
            await host.load()
            await nursery.start(self._cluster.run)
            self._nursery = nursery
            await nursery.start(host.run)
            http = HttpServer(
                self._routes(host), self._listens(), self._http_settings(), self._runtime, metrics=self.metrics
            )
            await http.listen()
            nursery.start_soon(http.run)
            self._print_banner()
            await self._join(nursery)
            notify_systemd("READY=1")
            await self._stop_asked.wait()
            notify_systemd("STOPPING=1")
            await self._cluster.retire()
            await http.drain(HTTP_DRAIN_S)
            with trio.move_on_after(WORKER_DRAIN_S):
                # Only after the others have heard that this node leaves: until then they send to its sidecars.
                await host.stop(drain=self._has_left)
            nursery.cancel_scope.cancel()

    async def _make_cluster(self) -> ServerCluster | ClientCluster:
        if self._config.server:
            return await open_server(self._config, self._runtime, self.metrics, node_id=self._node_id)
        return ClientCluster(self._config, self._runtime, self.metrics, node_id=self._node_id)

    def _make_host(self) -> Host:
        cluster = self._cluster
        host = Host(
            self._config,
            self._runtime,
            cluster.backend,
            polls=cluster.backend,
            node=own_node(self._config, self._node_id),
            cluster_size=lambda: len(cluster.gossip.members()),
        )
        cluster.subscribe(host.handle_event)
        return host

    # -- joining

    async def _join(self, nursery: trio.Nursery) -> None:
        config, gossip, port = self._config, self._cluster.gossip, self._config.ports.serf_lan
        own = self._own_gossip_addresses()
        await join_at_start(gossip, without_own(config.start_join, own, default_port=port))
        nursery.start_soon(self._retry_join, without_own(config.retry_join, own, default_port=port))
        nursery.start_soon(partial(self._peers.rejoin, self._peers.load(), interval_s=config.retry_interval_s))
        nursery.start_soon(self._peers.run)

    def _own_gossip_addresses(self) -> tuple[tuple[str, int], ...]:
        port = self._config.ports.serf_lan
        return (self._config.advertise_address, port), (self._config.bind_address, port)

    async def _retry_join(self, addresses: Sequence[str]) -> None:
        config = self._config
        await retry_join(
            self._cluster.gossip, addresses, interval_s=config.retry_interval_s, attempts_max=config.retry_max
        )

    # -- stopping

    async def leave(self) -> None:
        """Leaves the cluster gracefully; the agent stops once the caller has its answer, within STOP_DEADLINE_S."""
        self._scope.deadline = min(self._scope.deadline, trio.current_time() + STOP_DEADLINE_S)
        if not self._is_leaving and self._nursery is not None:
            self._is_leaving = True
            # A task of the agent's own: an API client that goes away must not leave it half gone.
            self._nursery.start_soon(self._leave)
        await self._stop_asked.wait()

    async def _leave(self) -> None:
        _LOG.info("leaving the cluster")
        self._host.stop_syncing()
        await self._cluster.leave()
        self._peers.forget()
        self._has_left = True
        self._stop_asked.set()

    async def _obey(self, signals: AsyncIterator[signal.Signals]) -> None:
        """The first signal stops the agent in order, within the deadline; the second at once."""
        config = self._config
        first = await anext(signals)
        _LOG.info("caught signal: %s", first.name)
        self._scope.deadline = min(self._scope.deadline, trio.current_time() + STOP_DEADLINE_S)
        async with trio.open_nursery() as nursery:
            graceful = config.leave_on_terminate if first is signal.SIGTERM else not config.skip_leave_on_interrupt
            if graceful and self._nursery is not None:
                nursery.start_soon(self.leave)
            else:
                self._stop_asked.set()
            second = await anext(signals)
            _LOG.warning("caught signal: %s again; stopping at once", second.name)
            self._scope.cancel()

    # -- the API

    def _routes(self, host: Host) -> tuple[Route, ...]:
        config, backend, datacenter = self._config, self._backend, self._config.datacenter
        default_allow = config.default_intention_policy == "allow"
        agent = AgentApi(
            config,
            self._runtime,
            node=host.node,
            state=host.state,
            gossip=self._cluster.gossip,
            metrics=MergedMetrics(self.metrics, host.supervisor.stats),
            server_statistics=self._cluster.statistics,
            request_leave=self.leave,
        )
        return (
            *agent.routes(),
            *AgentServicesApi(host.state, host.checks, self._runtime, datacenter).routes(),
            *AgentProxyApi(WorkerViews(host.supervisor), host.sidecars.problems, self._runtime, datacenter).routes(),
            *AgentConnectApi(backend, datacenter, host.leaves, default_allow=default_allow).routes(),
            *AgentWorkersApi(host.supervisor).routes(),
            *StatusApi(backend, datacenter).routes(),
            *CatalogApi(backend, datacenter).routes(),
            *HealthApi(backend, datacenter).routes(),
            *KvApi(backend, datacenter, value_bytes_max=config.limits.kv_max_value_size).routes(),
            *IntentionsApi(backend, datacenter, self._runtime, default_allow=default_allow).routes(),
            *TrafficApi(
                backend,
                datacenter,
                gather=self._cluster.backend.gather_edges,
                observed_here=host.traffic.observed,
                default_allow=default_allow,
            ).routes(),
            *ConfigApi(backend, datacenter, self._runtime).routes(),
            *ConnectCaApi(backend, datacenter).routes(),
        )

    def _http_settings(self) -> HttpSettings:
        config = self._config
        return HttpSettings(
            limits=HttpLimits(
                connections_per_client=config.limits.http_max_conns_per_client,
                handler_s=config.max_query_time_s * (1 + 1 / WAIT_JITTER) + HANDLER_MARGIN_S,
            ),
            wait_s_default=config.default_query_time_s,
            wait_s_max=config.max_query_time_s,
            pretty=config.dev_mode,
            default_policy=config.default_intention_policy,
        )

    def _listens(self) -> tuple[TcpListen | UnixListen, ...]:
        listens: list[TcpListen | UnixListen] = []
        plain, encrypted = self._config.client_bind("http"), self._config.client_bind("https")
        if plain is not None:
            host, port = plain
            if host.startswith(_UNIX_PREFIX):
                listens.append(UnixListen("addresses.http", Path(host.removeprefix(_UNIX_PREFIX))))
            else:
                listens.append(TcpListen("ports.http", host, port))
        if encrypted is not None:
            listens.append(TcpListen("ports.https", encrypted[0], encrypted[1], self._https_context()))
        return tuple(listens)

    def _https_context(self) -> ssl.SSLContext:
        files = self._config.tls_https
        if not files.cert_file:
            raise ConfigError("ports.https: needs tls.https.cert_file and tls.https.key_file")
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.minimum_version = ssl.TLSVersion.TLSv1_2
        context.options |= ssl.OP_NO_TICKET | ssl.OP_NO_RENEGOTIATION
        context.num_tickets = 0
        try:
            context.load_cert_chain(files.cert_file, files.key_file or None)
        except (OSError, ssl.SSLError) as error:
            raise ConfigError(f"tls.https: cannot use {files.cert_file}: {error}") from error
        return context

    # -- what the user sees

    def _print_banner(self) -> None:
        config, ports = self._config, self._config.ports
        bind = config.client_bind("http") or (config.client_address, PORT_OFF)
        rows = {
            "Version": f"{VERSION} (Consul API {CONSUL_API_VERSION})",
            "Node ID": self._node_id,
            "Node name": config.node_name,
            "Datacenter": config.datacenter,
            "Server": f"true (bootstrap_expect: {config.bootstrap_expect})" if config.server else "false",
            "Client addr": f"{bind[0]} (HTTP: {ports.http}, HTTPS: {ports.https})",
            "Cluster addr": f"{join_address((config.advertise_address, ports.serf_lan))}"
            + (f" (RPC: {ports.server})" if config.server else ""),
            "Gossip encryption": str(bool(config.gossip_key)).lower(),
        }
        lines = ["==> Mesh agent running!", *(f"{name:>20}: {value}" for name, value in rows.items()), ""]
        lines += ["==> Log data will now stream in as it occurs:", ""]
        self._output.write("\n".join(lines))
        if ports.dns not in (PORT_OFF, _CONSUL_DNS_PORT):
            _LOG.warning("ports.dns is %d, but this version does not answer DNS yet", ports.dns)
