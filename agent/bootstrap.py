"""Starting a new cluster: `bootstrap_expect` servers find each other by gossip, and one of them begins.

Two servers that begin with different voters make two clusters, so: the candidates are the expected number of living
servers with the lowest IDs, the lowest of them begins, and only after every other server has said that it is part of no
cluster and every candidate that it would choose the same candidates. The others start empty and learn.
"""

import logging

import trio

from agent.addresses import join_address
from agent.membership import ServerList, ServerMember
from agent.raft_driver import RaftDriver
from agent.rpc import RpcPool
from agent.rpc.calls import BOOTSTRAP_ANSWERS, CALLS, BootstrapAnswer, BootstrapCall
from mesh.errors import MeshError

_LOG = logging.getLogger("mesh.server")

RETRY_S = 0.5
ANSWER_S = 5.0


class Bootstrapper:
    """Bootstraps Raft once, when every expected server is here and agrees."""

    def __init__(self, raft: RaftDriver, servers: ServerList, pool: RpcPool, *, node_id: str, expect: int) -> None:
        self._raft = raft
        self._servers = servers
        self._pool = pool
        self._node_id = node_id
        self._expect = expect
        self._complained: set[str] = set()

    async def run(self, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Until this server has state: because it began, or because a leader has taken it in."""
        task_status.started()
        while self._expect and not self._raft.has_state():
            changed = self._servers.changed
            candidates = self.candidates()
            if candidates and candidates[0] == self._node_id and await self._everyone_agrees(candidates):
                self._begin(candidates)
                return
            with trio.move_on_after(RETRY_S):
                await changed()

    def candidates(self) -> tuple[str, ...]:
        """The IDs of those that would be the first voters, sorted; empty while there are too few, or they disagree."""
        alive = [server for server in self._servers.all() if server.alive]
        for server in alive:
            if server.expect not in (0, self._expect):
                # A majority of one side's voters and of the other's need not overlap: two leaders.
                self._complain(
                    f"{server.name} has bootstrap_expect {server.expect}, this server has {self._expect}: not "
                    "bootstrapping; give all servers of the datacenter the same bootstrap_expect and restart them"
                )
                return ()
        expecting = sorted(server.node_id for server in alive if server.expect == self._expect)
        return tuple(expecting[: self._expect]) if len(expecting) >= self._expect else ()

    async def _everyone_agrees(self, candidates: tuple[str, ...]) -> bool:
        others = [server for server in self._servers.all() if server.alive and server.node_id != self._node_id]
        agreed: list[bool] = []

        async def ask(server: ServerMember) -> None:
            agreed.append(await self._agrees(server, candidates))

        async with trio.open_nursery() as nursery:
            for server in others:
                nursery.start_soon(ask, server)
        # What was heard meanwhile may have changed the candidates.
        return all(agreed) and candidates == self.candidates() and not self._raft.has_state()

    async def _agrees(self, server: ServerMember, candidates: tuple[str, ...]) -> bool:
        try:
            data = await self._pool.call(server.address, CALLS.encode(BootstrapCall()), timeout_s=ANSWER_S)
            answer: BootstrapAnswer = BOOTSTRAP_ANSWERS.decode(data)
        except MeshError as error:
            _LOG.debug("asking %s before bootstrapping: %s", server.name, error)
            return False
        if answer.has_state:
            self._complain(f"{server.name} is part of a cluster already: waiting for its leader to add this server")
            return False
        return server.node_id not in candidates or answer.candidates == candidates

    def _begin(self, candidates: tuple[str, ...]) -> None:
        voters = [server for server in map(self._servers.get, candidates) if server is not None]
        if self._raft.bootstrap({server.node_id: join_address(server.address) for server in voters}):
            names = ", ".join(server.name for server in voters)
            _LOG.info("found the expected servers, bootstrapping the cluster with %s", names)

    def _complain(self, text: str) -> None:
        if text not in self._complained:
            self._complained.add(text)
            _LOG.warning(text)
