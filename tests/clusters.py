"""Clusters of real agents' cluster parts in one process, on loopback, with fast timing."""

from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from pathlib import Path

import trio

from agent.cluster import ClientCluster, ServerCluster, open_server
from agent.config import AgentConfig
from agent.config.values import Performance, Ports
from agent.runtime import Runtime
from agent.telemetry import Metrics
from mesh.gossip.config import TEST
from mesh.raft.config import RaftConfig

RAFT = RaftConfig(heartbeat_interval_s=0.05, election_timeout_s=0.3, lease_s=0.2, retransmit_s=0.15)
WAIT_S = 15.0  # generous: the machine may be busy; a healthy test never gets near it


async def until(condition: Callable[[], object]) -> None:
    """Waits until the condition holds."""
    with trio.fail_after(WAIT_S):
        while not condition():
            await trio.sleep(0.01)


class Running:
    """One agent that can be stopped as if its host had lost power, or asked to leave."""

    def __init__(self, cluster: ServerCluster | ClientCluster, scope: trio.CancelScope, ended: trio.Event) -> None:
        self.cluster = cluster
        self.backend = cluster.backend
        self._scope = scope
        self.ended = ended

    async def kill(self) -> None:
        self._scope.cancel()
        await self.ended.wait()

    async def leave(self) -> None:
        await self.cluster.leave()
        await self.kill()


class World:
    """The agents of one test."""

    def __init__(self, nursery: trio.Nursery, expect: int) -> None:
        self._nursery = nursery
        self._expect = expect
        self.agents: dict[str, Running] = {}

    async def start_server(self, name: str, data_dir: Path | str = "", *, expect: int | None = None) -> Running:
        config = AgentConfig(
            node_name=name,
            server=True,
            bootstrap_expect=self._expect if expect is None else expect,
            data_dir=str(data_dir),
            bind_address="127.0.0.1",
            advertise_address="127.0.0.1",
            ports=Ports(serf_lan=0, server=0),
            performance=Performance(),
        )
        runtime = Runtime()
        cluster = await open_server(
            config, runtime, Metrics(runtime.unix_time_s), node_id=f"id-{name}", gossip=TEST, raft=RAFT
        )
        return await self._start(name, cluster, cluster.run)

    async def start_client(self, name: str) -> Running:
        config = AgentConfig(
            node_name=name,
            bind_address="127.0.0.1",
            advertise_address="127.0.0.1",
            ports=Ports(serf_lan=0),
        )
        runtime = Runtime()
        cluster = ClientCluster(config, runtime, Metrics(runtime.unix_time_s), node_id=f"id-{name}", gossip=TEST)
        return await self._start(name, cluster, cluster.run)

    async def _start(
        self, name: str, cluster: ServerCluster | ClientCluster, run: Callable[..., Awaitable[None]]
    ) -> Running:
        scope, ended = trio.CancelScope(), trio.Event()

        async def task(*, task_status: trio.TaskStatus[None]) -> None:
            with scope:
                await run(task_status=task_status)
            ended.set()

        await self._nursery.start(task)
        others = [
            "{}:{}".format(*agent.cluster.gossip.address) for other, agent in self.agents.items() if other != name
        ]
        agent = self.agents[name] = Running(cluster, scope, ended)
        if others:
            await cluster.gossip.join(others)
        return agent

    def servers(self) -> list[Running]:
        return [
            one for one in self.agents.values() if isinstance(one.cluster, ServerCluster) and not one.ended.is_set()
        ]

    def leader(self) -> Running | None:
        leaders = [one for one in self.servers() if one.cluster.leadership.is_leader]
        return max(leaders, key=lambda one: one.cluster.leadership.term, default=None)

    async def wait_for_leader(self) -> Running:
        await until(lambda: self.leader() is not None and self.leader().cluster.raft.lease_valid())
        return self.leader()

    def followers(self) -> list[Running]:
        return [one for one in self.servers() if not one.cluster.leadership.is_leader]


@asynccontextmanager
async def world(expect: int = 3) -> AsyncIterator[World]:
    async with trio.open_nursery() as nursery:
        yield World(nursery, expect)
        nursery.cancel_scope.cancel()


@asynccontextmanager
async def three_servers() -> AsyncIterator[World]:
    async with world() as made:
        for name in ("s1", "s2", "s3"):
            await made.start_server(name)
        await made.wait_for_leader()
        yield made
