"""This agent's part in the cluster, built as one: gossip, RPC, and on servers Raft, the state and leader duties.

`agent.app` puts the API, checks and sidecars on top.
"""

import errno
import logging
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

import trio

from agent.addresses import join_address
from agent.bootstrap import Bootstrapper
from agent.ca_duties import CertificateAuthority
from agent.client import ClientBackend
from agent.config import AgentConfig
from agent.gossip_driver import GossipDriver
from agent.leader import CatalogReconciler, LeaderDuties, VoterReconciler, commit_or_log
from agent.leadership import Leadership
from agent.membership import ServerList, client_tags, parse_server, server_tags
from agent.raft_driver import RaftDriver
from agent.raft_store import MemoryRaftStore, RaftStore, SqliteRaftStore
from agent.raft_transport import RaftTransport
from agent.rpc import RpcPool, RpcServer
from agent.runtime import Runtime
from agent.server import ServerBackend
from agent.telemetry import Metrics
from agent.version import CONSUL_API_VERSION
from agent.watches import WatchedState, Watches
from mesh.errors import ConfigError, MeshError
from mesh.gossip.config import DEV, LAN, GossipConfig
from mesh.gossip.events import GossipEvent, MemberFailed
from mesh.gossip.members import Member
from mesh.model.command import Command
from mesh.raft.config import RaftConfig
from mesh.state.fsm import Fsm
from mesh.state.store import Store
from mesh.state.watch import ROOTS, WatchRegistry

_LOG = logging.getLogger("mesh.agent")

TRANSFER_DEADLINE_S = 2.5  # an election timeout and the way there and back
RPC_DRAIN_S = 0.5  # writes take milliseconds; blocking queries are asked again elsewhere
REMOVAL_DEADLINE_S = 3.0  # for the leader to take a leaving server out of the voters
REMOVAL_POLL_S = 0.05
GOSSIP_LEAVE_DEADLINE_S = 4.0  # the three together stay below the 10 s within which an agent stops
CLUSTER_TAG = "cid"  # which cluster a server belongs to, so that two clusters never merge by accident


def gossip_config(config: AgentConfig) -> GossipConfig:
    """The gossip core's constants for this configuration."""
    timing = config.gossip_lan
    return replace(
        DEV if config.dev_mode else LAN,
        probe_interval_s=timing.probe_interval_s,
        probe_timeout_s=timing.probe_timeout_s,
        gossip_interval_s=timing.gossip_interval_s,
        gossip_nodes=timing.gossip_nodes,
        suspicion_multiplier=timing.suspicion_mult,
        retransmit_multiplier=timing.retransmit_mult,
        reconnect_timeout_s=config.reconnect_timeout_s,
    )


def raft_config(config: AgentConfig) -> RaftConfig:
    """The Raft core's constants for this configuration."""
    timing = config.raft
    return RaftConfig(
        heartbeat_interval_s=timing.heartbeat_interval_s,
        election_timeout_s=timing.election_timeout_s,
        lease_s=timing.lease_s,
        retransmit_s=timing.election_timeout_s / 2,
        snapshot_entries=timing.snapshot_threshold,
        snapshot_interval_s=timing.snapshot_interval_s,
        trailing_entries=timing.trailing_logs,
    )


class Cluster:
    """What servers and clients have in common: gossip, the list of servers, the RPC pool and the Backend."""

    def __init__(
        self, config: AgentConfig, runtime: Runtime, metrics: Metrics, *, node_id: str, gossip: GossipConfig
    ) -> None:
        self.node_id = node_id
        self.servers = ServerList(config.datacenter, runtime.random_source("servers"))
        self._config = config
        self._runtime = runtime
        self._metrics = metrics
        self._gossip_config = gossip
        self._pool = RpcPool(runtime.random_source("rpc"))
        self._subscribers: list[Callable[[GossipEvent], None]] = [self.servers.handle_event]
        metrics.gauge("consul.serf.member.count", lambda: float(len(self.gossip.members())))
        metrics.gauge("mesh.gossip.refused", lambda: float(sum(self.gossip.counters.values())))

    # made by the subclasses' constructors
    gossip: GossipDriver

    def subscribe(self, callback: Callable[[GossipEvent], None]) -> None:
        """Has the callback called with every gossip event; it must not raise and must not wait."""
        self._subscribers.append(callback)

    def _make_gossip(self, tags: dict[str, str]) -> GossipDriver:
        config = self._config
        port = config.ports.serf_lan
        return GossipDriver(
            name=config.node_name,
            bind=(config.bind_address, port),
            advertise=(config.advertise_address, port),
            tags=tags,
            config=self._gossip_config,
            keys=(config.gossip_key,) if config.gossip_key else (),
            rng=self._runtime.random_source("gossip"),
            on_event=self._on_gossip,
        )

    def _on_gossip(self, event: GossipEvent) -> None:
        self._metrics.count(f"consul.serf.events.{type(event).__name__}")
        if isinstance(event, MemberFailed):
            server = parse_server(event.member, self._config.datacenter)
            if server is not None:
                self._pool.drop(server.address)  # a frozen host keeps its connections open
        for callback in self._subscribers:
            callback(event)

    def local_member(self) -> Member:
        """This agent as gossip shows it."""
        return self.gossip.local_member()


class ClientCluster(Cluster):
    """A client agent's part: no state of its own."""

    def __init__(
        self,
        config: AgentConfig,
        runtime: Runtime,
        metrics: Metrics,
        *,
        node_id: str,
        gossip: GossipConfig | None = None,
    ) -> None:
        super().__init__(config, runtime, metrics, node_id=node_id, gossip=gossip or gossip_config(config))
        tags = client_tags(datacenter=config.datacenter, node_id=node_id, build=CONSUL_API_VERSION)
        self.gossip = self._make_gossip(tags)
        self.backend = ClientBackend(
            pool=self._pool,
            servers=self.servers,
            rng=runtime.random_source("client"),
            metrics=metrics,
            hold_s=config.performance.rpc_hold_timeout_s,
        )

    async def run(self, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Until cancelled. Raises ConfigError when a port cannot be had."""
        async with trio.open_nursery() as nursery:
            await nursery.start(self._pool.run)
            await nursery.start(self.gossip.run)
            await nursery.start(self.backend.run)
            task_status.started()

    def statistics(self) -> dict[str, dict[str, str]]:
        """Section `consul` of /v1/agent/self."""
        alive = sum(server.alive for server in self.servers.all())
        return {"consul": {"known_servers": str(alive), "server": "false"}}

    async def retire(self) -> None:
        """Before stopping: nothing, as nobody depends on a client."""

    async def leave(self) -> None:
        """Tells the others that this agent goes; returns within seconds, whether they heard it or not."""
        with trio.move_on_after(GOSSIP_LEAVE_DEADLINE_S):
            await self.gossip.leave()


class ServerCluster(Cluster):
    """A server's part. Make it with `open_server`."""

    def __init__(
        self,
        config: AgentConfig,
        runtime: Runtime,
        metrics: Metrics,
        *,
        node_id: str,
        listeners: Sequence[trio.SocketListener],
        raft_store: RaftStore,
        gossip: GossipConfig | None = None,
        raft: RaftConfig | None = None,
    ) -> None:
        super().__init__(config, runtime, metrics, node_id=node_id, gossip=gossip or gossip_config(config))
        self._listeners = listeners
        self._raft_store = raft_store
        self.leadership = Leadership()
        self.store = Store()
        registry = WatchRegistry()
        self.watches = Watches(registry)
        self._transport = RaftTransport(node_id, self._resolve, runtime.random_source("raft-transport"))
        self.raft = RaftDriver(
            node_id=node_id,
            config=raft or raft_config(config),
            store=raft_store,
            state_machine=WatchedState(Fsm(self.store), registry),
            send=self._transport.send,
            rng=runtime.random_source("raft"),
            on_leadership=self.leadership.update,
        )
        self.backend = ServerBackend(
            raft=self.raft,
            leadership=self.leadership,
            store=self.store,
            watches=self.watches,
            pool=self._pool,
            servers=self.servers,
            rng=runtime.random_source("server"),
            metrics=metrics,
            hold_s=config.performance.rpc_hold_timeout_s,
        )
        self.rpc = RpcServer(
            self.backend.handle,
            receive_raft=self.raft.receive_message,
            connections_per_ip_max=config.limits.rpc_max_conns_per_client,
        )
        self.rpc_port = int(listeners[0].socket.getsockname()[1])
        self._tags = server_tags(
            datacenter=config.datacenter,
            node_id=node_id,
            rpc_port=self.rpc_port,
            expect=config.bootstrap_expect,
            build=CONSUL_API_VERSION,
        )
        self.gossip = self._make_gossip(self._tags)
        self._bootstrapper = Bootstrapper(
            self.raft, self.servers, self._pool, node_id=node_id, expect=config.bootstrap_expect
        )
        self.backend.set_candidates(self._bootstrapper.candidates)
        self.backend.set_alive_nodes(
            lambda: [member.name for member in self.gossip.members() if member.status == "alive"]
        )
        self._duties = self._make_duties()
        self.subscribe(self._duties.handle_event)
        self._add_gauges()

    def _make_duties(self) -> LeaderDuties:
        async def commit(command: Command) -> None:
            await commit_or_log(self.backend, command)

        return LeaderDuties(
            leadership=self.leadership,
            backend=self.backend,
            raft=self.raft,
            store=self.store,
            catalog=CatalogReconciler(
                store=self.store,
                commit=commit,
                members=self.gossip.members,
                datacenter=self._config.datacenter,
                own_name=self._config.node_name,
            ),
            voters=VoterReconciler(
                raft=self.raft,
                servers=self.servers,
                own_id=self.node_id,
                expect=self._config.bootstrap_expect,
                cluster_of=self._cluster_of,
            ),
            authority=CertificateAuthority(
                state=self.store,
                apply=self.backend.apply_here,
                runtime=self._runtime,
                datacenter=self._config.datacenter,
            ),
        )

    def _add_gauges(self) -> None:
        self._metrics.gauge("consul.raft.leader", lambda: float(self.leadership.is_leader))
        self._metrics.gauge("consul.rpc.connections", lambda: float(self.rpc.connection_count))
        self._metrics.gauge("consul.rpc.queries_blocking", lambda: float(len(self.watches)))
        self._metrics.gauge("consul.raft.commitIndex", lambda: float(self.raft.status.commit_index))
        self._metrics.gauge("consul.raft.appliedIndex", lambda: float(self.raft.status.applied_index))
        for name in ("connections_accepted", "connections_refused", "connections_malformed", "calls", "calls_failed"):
            self._metrics.gauge(f"mesh.rpc.{name}", partial(_total, self.rpc.counters, name))
        for name in ("raft_messages_sent", "raft_messages_dropped"):
            self._metrics.gauge(f"mesh.rpc.{name}", partial(_total, self._transport.counters, name))

    def _resolve(self, node_id: str) -> tuple[str, int] | None:
        return self.backend.resolve(node_id)

    def _cluster_of(self, node_id: str) -> str:
        if node_id == self.node_id:
            return self.store.cluster_id
        server = self.servers.get(node_id)
        if server is None:
            return ""
        members = (member for member in self.gossip.members() if member.name == server.name)
        return next((member.tags.get(CLUSTER_TAG, "") for member in members), "")

    async def run(self, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Until cancelled. Raises ConfigError when a port cannot be had, StorageFailed when the disk fails."""
        try:
            async with trio.open_nursery() as nursery:
                await nursery.start(self._pool.run)
                await nursery.start(self._transport.run)
                await nursery.start(self.watches.run)
                await nursery.start(self.raft.run)
                await nursery.start(self.rpc.serve, self._listeners)
                await nursery.start(self.gossip.run)
                await nursery.start(self._bootstrapper.run)
                await nursery.start(self._duties.run)
                nursery.start_soon(self._announce_cluster)
                task_status.started()
        finally:
            for listener in self._listeners:
                listener.socket.close()
            self._raft_store.close()

    async def _announce_cluster(self) -> None:
        while not self.store.cluster_id:
            await self.watches.wait((ROOTS,), until=trio.current_time() + 60.0)
        self.gossip.set_tags({**self._tags, CLUSTER_TAG: self.store.cluster_id})

    def statistics(self) -> dict[str, dict[str, str]]:
        """Sections `consul` and `raft` of /v1/agent/self, under Consul's names."""
        raft = self.raft.status
        leader = None if raft.leader_id is None else self.backend.resolve(raft.leader_id)
        contact = "never" if raft.last_contact_s is None else f"{raft.last_contact_s * 1000:.6g}ms"
        return {
            "consul": {
                "bootstrap": str(self._config.bootstrap_expect == 1).lower(),
                "known_datacenters": "1",
                "leader": str(self.leadership.is_leader).lower(),
                "leader_addr": "" if leader is None else join_address(leader),
                "server": "true",
            },
            "raft": {
                "applied_index": str(raft.applied_index),
                "commit_index": str(raft.commit_index),
                "fsm_pending": str(raft.commit_index - raft.applied_index),
                "last_contact": "0" if self.leadership.is_leader else contact,
                "last_log_index": str(raft.last_log_index),
                "last_log_term": str(raft.last_log_term),
                "last_snapshot_index": str(raft.last_snapshot_index),
                "last_snapshot_term": str(raft.last_snapshot_term),
                "num_peers": str(sum(node_id != self.node_id for node_id in raft.voters)),
                "protocol_version": "3",
                "state": raft.role.capitalize(),
                "term": str(raft.term),
            },
        }

    async def leave(self) -> None:
        """Hands over leadership, tells the others, and waits to be taken out of the voters; bounded throughout."""
        alone = len(self.raft.status.voters) <= 1
        await self.hand_over()
        with trio.move_on_after(GOSSIP_LEAVE_DEADLINE_S):
            await self.gossip.leave()
        if alone:
            return
        with trio.move_on_after(REMOVAL_DEADLINE_S):
            await self._wait_removed()
            return
        _LOG.warning("leaving, but still a voter: the next leader removes this server")

    async def retire(self) -> None:
        """Before stopping: hands over the leadership, then lets other agents' calls end; bounded throughout."""
        await self.hand_over()
        await self.rpc.drain(RPC_DRAIN_S)

    async def hand_over(self) -> None:
        """Gives the leadership to another server, if this one has it: nobody then waits for an election."""
        if not self.leadership.is_leader or len(self.raft.status.voters) <= 1:
            return
        with trio.move_on_after(TRANSFER_DEADLINE_S):
            try:
                await self.raft.transfer_leadership()
            except MeshError as error:
                _LOG.warning("stopping without handing over the leadership: %s", error)

    async def _wait_removed(self) -> None:
        own = join_address((self._config.advertise_address, self.rpc_port))
        while True:
            try:
                if own not in await self.backend.peers_at_leader():
                    return
            except MeshError as error:
                _LOG.debug("asking the leader for its voters: %s", error)
            await trio.sleep(REMOVAL_POLL_S)


def _total(counters: Mapping[str, int], name: str) -> float:
    return float(counters.get(name, 0))


async def open_server(
    config: AgentConfig,
    runtime: Runtime,
    metrics: Metrics,
    *,
    node_id: str,
    gossip: GossipConfig | None = None,
    raft: RaftConfig | None = None,
) -> ServerCluster:
    """A server with its RPC port bound and its store open. Raises ConfigError naming key and address or path."""
    listeners = await _listen(config.bind_address, config.ports.server)
    try:
        return ServerCluster(
            config,
            runtime,
            metrics,
            node_id=node_id,
            listeners=listeners,
            raft_store=_open_store(config),
            gossip=gossip,
            raft=raft,
        )
    except BaseException:
        for listener in listeners:
            listener.socket.close()
        raise


def _open_store(config: AgentConfig) -> RaftStore:
    if not config.data_dir:
        return MemoryRaftStore()
    folder = Path(config.data_dir) / "raft"
    try:
        folder.mkdir(mode=0o700, exist_ok=True)
    except OSError as error:
        raise ConfigError(f"data_dir: cannot create {folder}: {error.strerror}") from error
    return SqliteRaftStore(folder)


async def _listen(host: str, port: int) -> list[trio.SocketListener]:
    try:
        return await trio.open_tcp_listeners(port, host=host)
    except OSError as error:
        # Trio folds the errors of several sockets into one without a number; the cause has it.
        number = error.errno or getattr(error.__cause__, "errno", None)
        reason = os.strerror(number) if number else str(error)
        if number == errno.EADDRINUSE:
            reason = "the port is in use; stop who has it, or set -server-port"
        elif number == errno.EADDRNOTAVAIL:
            reason = "this host has no such address; set -bind to one of its own"
        raise ConfigError(f"ports.server: cannot listen on {join_address((host, port))}: {reason}") from error
