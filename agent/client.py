"""The Backend of a client agent: every call goes to one of the servers that gossip knows."""

import logging
import random

import trio

from agent.addresses import join_address
from agent.backoff import backoff_s
from agent.edge_board import POLL_S
from agent.membership import ServerList, ServerMember
from agent.rpc import RpcPool
from agent.rpc.calls import (
    CALLS,
    EDGES_ASKED,
    EDGES_GATHERED,
    LEAF_ANSWERS,
    STATUS_ANSWERS,
    ApplyCall,
    EdgesAsked,
    EdgesGatherCall,
    EdgesGathered,
    EdgesPollCall,
    SignLeafCall,
    StatusAnswer,
    StatusCall,
    decode_answer,
    encode_read,
)
from agent.telemetry import Metrics
from mesh.errors import MeshError, NoLeader, NotLeader, OutcomeUnknown, Unreachable
from mesh.model.ca import IssuedLeaf
from mesh.model.command import RESULT_CODEC, Command, CommandResult
from mesh.model.query import Answer, AnswerT, Asks, ReadOptions

_LOG = logging.getLogger("mesh.client")

RPC_TIMEOUT_S = 60.0  # Consul's limits.rpc_client_timeout
RETRY_S_MIN = 0.05
RETRY_S_MAX = 1.0
REBALANCE_INTERVAL_S = 120.0  # Consul: 2 to 3 minutes
WAIT_JITTER = 16  # the server may add a sixteenth to a blocking query's wait


class ClientBackend:
    """Implements `agent.backend.Backend` over RPC. `run` rebalances now and then."""

    def __init__(
        self, *, pool: RpcPool, servers: ServerList, rng: random.Random, metrics: Metrics, hold_s: float = 7.0
    ) -> None:
        """`hold_s`: how long a request waits for a server (Consul's performance.rpc_hold_timeout)."""
        self._pool = pool
        self._servers = servers
        self._rng = rng
        self._metrics = metrics
        self._hold_s = hold_s

    async def run(self, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Draws another server every few minutes, until cancelled. Calls that are open stay where they are."""
        task_status.started()
        while True:
            await trio.sleep(REBALANCE_INTERVAL_S * (1 + self._rng.random() / 2))
            self._servers.rebalance()

    async def apply(self, command: Command) -> CommandResult:
        """See Backend. Tried again only when no server can have appended it."""
        body = CALLS.encode(ApplyCall(command))
        return RESULT_CODEC.decode(await self._call(body, timeout_s=RPC_TIMEOUT_S, repeatable=False))

    async def read(self, query: Asks[AnswerT], options: ReadOptions) -> Answer[AnswerT]:
        """See Backend."""
        started = trio.current_time()
        wait_s = options.wait_s if options.min_index else 0.0
        while True:
            remaining_s = max(0.0, started + wait_s - trio.current_time())
            asked = ReadOptions(options.min_index, remaining_s, options.consistency, options.max_stale_s)
            timeout_s = RPC_TIMEOUT_S + remaining_s * (1 + 1 / WAIT_JITTER)
            try:
                data = await self._call(
                    encode_read(query, asked, forwarded=False), timeout_s=timeout_s, repeatable=False
                )
            except OutcomeUnknown:
                # Broken in the middle of what may have been a long wait: ask the next server for the rest of it.
                if trio.current_time() > started + wait_s + self._hold_s:
                    raise
                await trio.sleep(RETRY_S_MIN)
                continue
            return decode_answer(query, data)

    async def sign_leaf(self, csr_der: bytes) -> IssuedLeaf:
        """See Backend. Signing twice is harmless."""
        return LEAF_ANSWERS.decode(await self._call(CALLS.encode(SignLeafCall(csr_der)), timeout_s=RPC_TIMEOUT_S))

    async def poll_edges(self, call: EdgesPollCall) -> EdgesAsked:
        """As the server's; raises what calls raise, and the agent asks again."""
        body = CALLS.encode(call)
        return EDGES_ASKED.decode(await self._call(body, timeout_s=POLL_S + 2 * RPC_TIMEOUT_S, repeatable=False))

    async def gather_edges(self, since_s: float) -> EdgesGathered:
        """Who called whom in the last `since_s` seconds, as all agents saw it. Raises NoLeader, Unreachable,
        OutcomeUnknown, LimitExceeded.
        """
        return EDGES_GATHERED.decode(await self._call(CALLS.encode(EdgesGatherCall(since_s)), timeout_s=RPC_TIMEOUT_S))

    async def leader_address(self) -> str:
        """See Backend."""
        return (await self._status()).leader

    async def peer_addresses(self) -> tuple[str, ...]:
        """See Backend."""
        return (await self._status()).peers

    async def _status(self) -> StatusAnswer:
        return STATUS_ANSWERS.decode(await self._call(CALLS.encode(StatusCall()), timeout_s=RPC_TIMEOUT_S))

    async def _call(self, body: bytes, *, timeout_s: float, repeatable: bool = True) -> bytes:
        """Asks servers in turn until one answers or the hold time is over."""
        until = trio.current_time() + self._hold_s
        failures = 0
        while True:
            server = self._servers.preferred()
            self._metrics.count("consul.client.rpc")
            error: MeshError
            try:
                if server is None:
                    raise Unreachable("No known Consul servers")
                return await self._pool.call(server.address, body, timeout_s=timeout_s)
            except OutcomeUnknown as unknown:
                self._report(server, unknown)
                if not repeatable:
                    raise
                error = unknown
            except Unreachable as failed:
                self._report(server, failed)
                error = failed
            except (NoLeader, NotLeader) as leaderless:
                error = leaderless
            if trio.current_time() >= until:
                self._metrics.count("consul.client.rpc.failed")
                raise error
            failures += 1
            await trio.sleep(backoff_s(failures, rng=self._rng, first_s=RETRY_S_MIN, last_s=RETRY_S_MAX))

    def _report(self, server: ServerMember | None, error: MeshError) -> None:
        if server is not None:
            _LOG.debug("server %s at %s: %s", server.name, join_address(server.address), error)
            self._servers.report_failure(server)
