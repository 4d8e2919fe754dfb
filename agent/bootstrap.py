"""Starting a new cluster: `bootstrap_expect` servers find each other by gossip and begin with the same voters."""

import logging

from agent.membership import ServerList, ServerMember, join_address
from agent.raft_driver import RaftDriver

_LOG = logging.getLogger("mesh.server")


class Bootstrapper:
    """Bootstraps Raft once, when every expected server is here. Call `check` after every change of the server list."""

    def __init__(self, raft: RaftDriver, servers: ServerList, *, node_id: str, expect: int) -> None:
        self._raft = raft
        self._servers = servers
        self._node_id = node_id
        self._expect = expect
        self._done = False
        self._complained: set[str] = set()

    def check(self) -> None:
        """Bootstraps if it is time; cheap when it is not."""
        if self._done:
            return
        if self._raft.has_state():
            self._done = True  # part of a cluster already, perhaps only just now through its leader
            return
        if not self._expect:
            return
        voters = self._agreed_voters()
        if voters is None:
            return
        self._done = True
        if self._raft.bootstrap({server.node_id: join_address(server.address) for server in voters}):
            names = ", ".join(server.name for server in voters)
            _LOG.info("found the expected %d servers, bootstrapping the cluster: %s", self._expect, names)

    def _agreed_voters(self) -> tuple[ServerMember, ...] | None:
        """Exactly the expected servers, all alive and expecting the same; None while that is not so."""
        alive = [server for server in self._servers.all() if server.alive]
        for server in alive:
            if server.expect not in (0, self._expect):
                # A majority of one side's voters and of the other's need not overlap: two leaders.
                self._complain(
                    f"{server.name} has bootstrap_expect {server.expect}, this server has {self._expect}: not "
                    "bootstrapping; give all servers of the datacenter the same bootstrap_expect and restart them"
                )
                return None
        voters = [server for server in alive if server.expect == self._expect]
        if self._node_id not in {server.node_id for server in voters} or len(voters) < self._expect:
            return None
        if len(voters) > self._expect:
            # Which of them start is then a matter of what each has heard so far, so they could choose differently.
            self._complain(
                f"{len(voters)} servers are here and {self._expect} are expected: not bootstrapping; set "
                f"bootstrap_expect to {len(voters)} on all of them, or start only {self._expect} at first"
            )
            return None
        return tuple(sorted(voters, key=lambda server: server.node_id))

    def _complain(self, text: str) -> None:
        if text not in self._complained:
            self._complained.add(text)
            _LOG.error(text)
