"""The replicated state as the rest of the agent sees it, whether this agent is a server or a client of servers.

`agent.server` implements it beside the state; `agent.client` forwards to a server over RPC. Everyone else receives one.
"""

from typing import Protocol

from mesh.model.ca import IssuedLeaf
from mesh.model.command import Command, CommandResult
from mesh.model.query import Answer, AnswerT, Asks, ReadOptions


class Backend(Protocol):
    """Reads and writes of the cluster's state. Every call has a deadline of its own."""

    async def apply(self, command: Command) -> CommandResult:
        """Commits a command through the leader and waits until it is applied there.

        Raises NoLeader after the RPC hold time (7 s) without one, OutcomeUnknown when it may or may not have been
        committed, LimitExceeded when the leader sheds load, Unreachable when no server answers.
        """
        ...

    async def read(self, query: Asks[AnswerT], options: ReadOptions) -> Answer[AnswerT]:
        """Runs a query at the consistency asked for, blocking when `options.min_index` > 0.

        Raises NoLeader (default and consistent reads), Unreachable.
        """
        ...

    async def sign_leaf(self, csr_der: bytes) -> IssuedLeaf:
        """Has the leader sign a certificate request. Raises Refused, LimitExceeded, NoLeader, Unreachable."""
        ...

    async def leader_address(self) -> str:
        """`host:port` of the leader's RPC listener, or the empty string when there is none."""
        ...

    async def peer_addresses(self) -> tuple[str, ...]:
        """`host:port` of every Raft voter, sorted."""
        ...
