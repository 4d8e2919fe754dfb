"""The Backend of a server: beside the state, and one forwarded call away from the leader when it does not lead."""

import math
import random
from collections.abc import Awaitable, Callable, Iterable
from typing import cast

import trio
from msgspec.structs import replace

from agent.addresses import join_address, split_address
from agent.edge_board import POLL_S, EdgeBoard
from agent.leadership import Leadership
from agent.membership import ServerList
from agent.raft_driver import RaftDriver
from agent.rpc import Address, RpcPool
from agent.rpc.calls import (
    BOOTSTRAP_ANSWERS,
    CALLS,
    EDGES_ASKED,
    EDGES_GATHERED,
    LEAF_ANSWERS,
    STATUS_ANSWERS,
    ApplyCall,
    BootstrapAnswer,
    BootstrapCall,
    EdgesAsked,
    EdgesGatherCall,
    EdgesGathered,
    EdgesPollCall,
    ReadCall,
    ServerCall,
    SignLeafCall,
    StatusAnswer,
    StatusCall,
    decode_answer,
    encode_answer,
    encode_read,
)
from agent.telemetry import Metrics
from agent.watches import Watches
from mesh.errors import NoLeader, NotLeader, OutcomeUnknown, Refused, Unreachable
from mesh.model.ca import IssuedLeaf
from mesh.model.command import (
    COMMAND_CODEC,
    RESULT_CODEC,
    CaRootsSet,
    Command,
    CommandResult,
    TombstonesReap,
)
from mesh.model.query import Answer, AnswerT, Asks, ReadMeta, ReadOptions
from mesh.state import queries
from mesh.state.store import Store

RPC_TIMEOUT_S = 60.0  # Consul's limits.rpc_client_timeout
RETRY_PAUSE_S = 0.05  # between attempts while an election runs; a change of leadership ends the pause at once
WAIT_S_MAX = 600.0  # Consul's max_query_time; the API caps it, too, but a peer's message may say anything
WAIT_JITTER = 16  # a blocking query waits up to a sixteenth longer, so that timeouts of many clients spread
DEPOSED_GRACE_S = 1.0  # how long a write forwarded to a leader still waits for it once another one leads

SignLeaf = Callable[[bytes], Awaitable[IssuedLeaf]]


class ServerBackend:
    """Implements `agent.backend.Backend`, and answers other agents' calls (`handle`)."""

    def __init__(
        self,
        *,
        raft: RaftDriver,
        leadership: Leadership,
        store: Store,
        watches: Watches,
        pool: RpcPool,
        servers: ServerList,
        rng: random.Random,
        metrics: Metrics,
        hold_s: float = 7.0,
    ) -> None:
        """`hold_s`: how long a request waits for a leader (Consul's performance.rpc_hold_timeout)."""
        self._raft = raft
        self._leadership = leadership
        self._store = store
        self._watches = watches
        self._pool = pool
        self._servers = servers
        self._rng = rng
        self._metrics = metrics
        self._hold_s = hold_s
        self._sign_leaf: SignLeaf | None = None
        self._candidates: Callable[[], tuple[str, ...]] = tuple
        self._forwarded: dict[trio.CancelScope, tuple[str, float]] = {}  # -> whom it was sent to, grace
        self._edges = EdgeBoard()
        self._alive_nodes: Callable[[], Iterable[str]] = tuple
        leadership.subscribe(watches.wake_everyone)
        leadership.subscribe(self._edges.abandon)
        leadership.subscribe(self._give_up_on_deposed)

    def set_candidates(self, candidates: Callable[[], tuple[str, ...]]) -> None:
        """Who says with whom this server would start a new cluster."""
        self._candidates = candidates

    def set_alive_nodes(self, alive_nodes: Callable[[], Iterable[str]]) -> None:
        """Who says which agents are there to be asked."""
        self._alive_nodes = alive_nodes

    def set_signer(self, sign_leaf: SignLeaf | None) -> None:
        """Who signs leaves here while this server leads."""
        self._sign_leaf = sign_leaf

    # -- Backend

    async def apply(self, command: Command) -> CommandResult:
        """See Backend."""
        return await self._apply(command, forwarded=False)

    async def read(self, query: Asks[AnswerT], options: ReadOptions) -> Answer[AnswerT]:
        """See Backend."""
        return await self._read(query, options, forwarded=False)

    async def sign_leaf(self, csr_der: bytes) -> IssuedLeaf:
        """See Backend."""
        return await self._sign(csr_der, forwarded=False)

    async def leader_address(self) -> str:
        """See Backend."""
        address = self._leader_address()
        return "" if address is None else join_address(address)

    async def peer_addresses(self) -> tuple[str, ...]:
        """See Backend."""
        voters = self._raft.status.voters
        return tuple(sorted(self._current_address(node_id, text) for node_id, text in voters.items()))

    async def peers_at_leader(self) -> tuple[str, ...]:
        """The voters as the leader has them: a server that was taken out is not told so any more by Raft.

        Raises NoLeader, Unreachable, OutcomeUnknown.
        """
        if self._leadership.is_leader:
            return await self.peer_addresses()
        return STATUS_ANSWERS.decode(await self._call_leader(CALLS.encode(StatusCall()), RPC_TIMEOUT_S)).peers

    def resolve(self, node_id: str) -> Address | None:
        """Where the server with that ID listens: as gossip says, else as Raft's configuration says."""
        server = self._servers.get(node_id)
        if server is not None and not server.left:
            return server.address
        status = self._raft.status
        configured = status.voters.get(node_id) or status.learners.get(node_id)
        return None if configured is None else split_address(configured)

    def _current_address(self, node_id: str, configured: str) -> str:
        address = self.resolve(node_id)
        return configured if address is None else join_address(address)

    def _leader_address(self) -> Address | None:
        leader_id = self._leadership.leader_id
        return None if leader_id is None else self.resolve(leader_id)

    # -- calls from other agents

    async def handle(self, body: bytes) -> bytes:
        """The answer to one RPC call. Raises what the Backend methods raise, ProtocolError, and NotLeader when a call
        that was forwarded already met no leader here: one hop is the limit, so a loop cannot arise.
        """
        call: ServerCall = CALLS.decode(body)
        self._metrics.count("consul.rpc.request")
        match call:
            case ApplyCall(CaRootsSet() | TombstonesReap() as command):
                # A leader writes these by itself. Taken from anyone, a root would make its sender the whole mesh's CA.
                raise Refused(f"{type(command).__name__} is the leader's own to write")
            case ApplyCall(command, forwarded):
                return RESULT_CODEC.encode(await self._apply(command, forwarded=forwarded))
            case ReadCall(query, options, forwarded):
                self._metrics.count("consul.rpc.query")
                asked = cast(Asks[object], query)  # each kind has its own answer type; here it only passes through
                return encode_answer(asked, await self._read(asked, options, forwarded=forwarded))
            case SignLeafCall(csr_der, forwarded):
                return LEAF_ANSWERS.encode(await self._sign(csr_der, forwarded=forwarded))
            case EdgesPollCall():
                return EDGES_ASKED.encode(await self.poll_edges(call))
            case EdgesGatherCall(since_s, forwarded):
                return EDGES_GATHERED.encode(await self._gather_edges(since_s, forwarded=forwarded))
            case BootstrapCall():
                return BOOTSTRAP_ANSWERS.encode(BootstrapAnswer(self._raft.has_state(), self._candidates()))
            case StatusCall():
                return STATUS_ANSWERS.encode(StatusAnswer(await self.leader_address(), await self.peer_addresses()))

    # -- writes

    async def _apply(self, command: Command, *, forwarded: bool) -> CommandResult:
        data = COMMAND_CODEC.encode(command)
        hold = _Hold(self._leadership, self._hold_s)
        while True:
            try:
                if self._leadership.is_leader:
                    return await self._propose(data)
                if forwarded:
                    raise NotLeader(self._leadership.leader_id)
                body = CALLS.encode(ApplyCall(command, forwarded=True))
                return RESULT_CODEC.decode(await self._call_leader(body, RPC_TIMEOUT_S, grace_s=DEPOSED_GRACE_S))
            except (NotLeader, NoLeader, Unreachable) as error:
                # All three mean that nothing was appended to any log, so trying again cannot apply it twice.
                if forwarded:
                    raise
                await hold.pause(error)

    async def apply_here(self, command: Command) -> CommandResult:
        """As `apply`, but only while this server leads. Raises NotLeader at once when it does not."""
        if not self._leadership.is_leader:
            raise NotLeader(self._leadership.leader_id)
        return await self._propose(COMMAND_CODEC.encode(command))

    async def _propose(self, data: bytes) -> CommandResult:
        # No deadline of its own: the driver ends every wait within raft_driver.WAIT_S_MAX, which is shorter.
        started = trio.current_time()
        result = cast(CommandResult, await self._raft.propose(data))
        self._metrics.sample("consul.raft.apply.time", (trio.current_time() - started) * 1000)
        self._metrics.count("consul.raft.apply")
        return result

    async def _call_leader(self, body: bytes, timeout_s: float, *, grace_s: float = 0.0) -> bytes:
        """What the leader answers. Raises NoLeader, Unreachable, or OutcomeUnknown: also when another server leads now
        and this one has not answered `grace_s` later, as a frozen host keeps its connections open for long.
        """
        leader_id, address = self._leadership.leader_id, self._leader_address()
        if leader_id is None or address is None:
            raise NoLeader("No cluster leader")
        with trio.CancelScope() as scope:
            self._forwarded[scope] = (leader_id, grace_s)
            try:
                return await self._pool.call(address, body, timeout_s=timeout_s)
            finally:
                del self._forwarded[scope]
        raise OutcomeUnknown(f"another server became the leader before {join_address(address)} answered")

    def _give_up_on_deposed(self) -> None:
        leader_id = self._leadership.leader_id
        if leader_id is None:
            return  # an election: whoever was asked may yet win it
        for scope, (asked, grace_s) in self._forwarded.items():
            if asked != leader_id:
                scope.deadline = min(scope.deadline, trio.current_time() + grace_s)

    # -- reads

    async def _read(self, query: Asks[AnswerT], options: ReadOptions, *, forwarded: bool) -> Answer[AnswerT]:
        wait_s = min(max(0.0, options.wait_s), WAIT_S_MAX)
        until = trio.current_time() + wait_s + self._rng.random() * wait_s / WAIT_JITTER if options.min_index else 0.0
        hold = _Hold(self._leadership, self._hold_s)
        while True:
            try:
                if self._leadership.is_leader or self._may_answer_stale(options):
                    return await self._read_here(query, options, until)
                if forwarded:
                    raise NotLeader(self._leadership.leader_id)
                return await self._read_at_leader(query, options, until)
            except (NotLeader, NoLeader, Unreachable, OutcomeUnknown) as error:
                if forwarded:
                    raise
                await hold.pause(error)

    def _may_answer_stale(self, options: ReadOptions) -> bool:
        if options.consistency != "stale":
            return False
        return options.max_stale_s is None or self._last_contact_s() <= options.max_stale_s

    def _last_contact_s(self) -> float:
        """Seconds since this server knew itself level with a leader; 0 on the leader."""
        if self._leadership.is_leader:
            return 0.0
        contact_s = self._raft.status.last_contact_s
        return math.inf if contact_s is None else contact_s

    async def _read_here(self, query: Asks[AnswerT], options: ReadOptions, until: float) -> Answer[AnswerT]:
        while True:
            await self._verify(options)
            # No await between the read and the wait: a change in between would be missed.
            reading = queries.run(self._store, query)
            if reading.index > options.min_index or trio.current_time() >= until:
                return Answer(reading.value, self._meta(reading.index))
            await self._watches.wait(reading.watch_keys, until=until)

    async def _verify(self, options: ReadOptions) -> None:
        """Returns once the local state may answer. Raises NotLeader."""
        if options.consistency == "stale" and not self._leadership.is_leader:
            return
        if options.consistency != "consistent" and self._raft.lease_valid():
            return
        if options.consistency == "stale":
            return
        await self._raft.read_index(self._hold_s)

    def _meta(self, index: int) -> ReadMeta:
        contact_s = self._last_contact_s()
        return ReadMeta(
            index=max(1, index),
            known_leader=self._leadership.leader_id is not None,
            last_contact_s=contact_s if math.isfinite(contact_s) else 0.0,
        )

    async def _read_at_leader(self, query: Asks[AnswerT], options: ReadOptions, until: float) -> Answer[AnswerT]:
        remaining_s = max(0.0, until - trio.current_time())
        consistency = "default" if options.consistency == "stale" else options.consistency
        asked = ReadOptions(min_index=options.min_index, wait_s=remaining_s, consistency=consistency)
        timeout_s = RPC_TIMEOUT_S + remaining_s * (1 + 1 / WAIT_JITTER)
        data = await self._call_leader(encode_read(query, asked, forwarded=True), timeout_s)
        return decode_answer(query, data)

    # -- leaves

    async def _sign(self, csr_der: bytes, *, forwarded: bool) -> IssuedLeaf:
        hold = _Hold(self._leadership, self._hold_s)
        while True:
            try:
                if self._leadership.is_leader:
                    if self._sign_leaf is None:
                        raise NoLeader("the new leader's certificate authority is not ready yet")
                    return await self._sign_leaf(csr_der)
                if forwarded:
                    raise NotLeader(self._leadership.leader_id)
                body = CALLS.encode(SignLeafCall(csr_der, forwarded=True))
                return LEAF_ANSWERS.decode(await self._call_leader(body, RPC_TIMEOUT_S))
            except (NotLeader, NoLeader, Unreachable, OutcomeUnknown) as error:
                # Signing twice is harmless, so an unknown outcome may be tried again.
                if forwarded:
                    raise
                await hold.pause(error)

    # -- who calls whom

    async def poll_edges(self, call: EdgesPollCall) -> EdgesAsked:
        """Waits at the leader for a question about an agent's traffic. Raises NoLeader, NotLeader (a forwarded call),
        Unreachable, OutcomeUnknown; the agent asks again.
        """
        if self._leadership.is_leader:
            return await self._edges.poll(call)
        if call.forwarded:
            raise NotLeader(self._leadership.leader_id)
        body = CALLS.encode(replace(call, forwarded=True))
        return EDGES_ASKED.decode(await self._call_leader(body, POLL_S + RPC_TIMEOUT_S))

    async def gather_edges(self, since_s: float) -> EdgesGathered:
        """Who called whom in the last `since_s` seconds, as all agents saw it. Raises NoLeader, Unreachable,
        OutcomeUnknown, LimitExceeded.
        """
        return await self._gather_edges(since_s, forwarded=False)

    async def _gather_edges(self, since_s: float, *, forwarded: bool) -> EdgesGathered:
        hold = _Hold(self._leadership, self._hold_s)
        while True:
            try:
                if self._leadership.is_leader:
                    return await self._edges.gather(since_s, self._alive_nodes)
                if forwarded:
                    raise NotLeader(self._leadership.leader_id)
                body = CALLS.encode(EdgesGatherCall(since_s, forwarded=True))
                return EDGES_GATHERED.decode(await self._call_leader(body, RPC_TIMEOUT_S))
            except (NotLeader, NoLeader, Unreachable, OutcomeUnknown) as error:
                if forwarded:
                    raise
                await hold.pause(error)


class _Hold:
    """Bounds how long one request waits for a leader, counted from when it first had none."""

    def __init__(self, leadership: Leadership, hold_s: float) -> None:
        self._leadership = leadership
        self._hold_s = hold_s
        self._until = -math.inf
        self._last_pause_at = -math.inf

    async def pause(self, error: Exception) -> None:
        """Waits a little for things to change. Raises NoLeader when that has taken too long."""
        now = trio.current_time()
        if now - self._last_pause_at > self._hold_s:
            self._until = now + self._hold_s  # the attempt before this went well for long: a blocking query
        if now >= self._until:
            if isinstance(error, NoLeader | NotLeader):
                raise NoLeader("No cluster leader") from error
            raise error
        with trio.move_on_after(RETRY_PAUSE_S):
            await self._leadership.changed()
        self._last_pause_at = trio.current_time()
