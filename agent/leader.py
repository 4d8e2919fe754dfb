"""What only the leader does: keep the catalog and Raft's voters level with gossip, run the CA, clean up.

Everything here is idempotent and starts anew with each term, in a cancel scope that ends with it.
"""

import logging
import math
from collections import deque
from collections.abc import Awaitable, Callable

import trio
from msgspec.structs import replace

from agent.addresses import join_address
from agent.ca_duties import CertificateAuthority
from agent.leadership import Leadership
from agent.membership import ServerList, ServerMember, parse_server
from agent.raft_driver import RaftDriver
from agent.server import ServerBackend
from mesh.errors import MeshError, NotLeader, OutcomeUnknown, Refused
from mesh.gossip.events import (
    GossipEvent,
    MemberFailed,
    MemberJoined,
    MemberLeft,
    MemberReaped,
    MemberUpdated,
)
from mesh.gossip.members import Member
from mesh.model.catalog import Node, Service
from mesh.model.check import SERF_HEALTH_ID, SERF_HEALTH_NAME, Check, CheckStatus
from mesh.model.command import Command, Deregister, Register, Rejected, TombstonesReap
from mesh.model.query import GetNodeServices, ListNodeChecks, ListNodes
from mesh.state import queries
from mesh.state.store import Store

_LOG = logging.getLogger("mesh.leader")

RECONCILE_INTERVAL_S = 60.0  # Consul's
RETRY_INTERVAL_S = 1.0
VOTERS_INTERVAL_S = 10.0  # Consul autopilot's reconcile interval
# A node that gossip does not know was reaped while nobody led, or has not been heard of yet by a leader that has just
# started; only the first may be forgotten, so it must stay unknown for longer than any start takes.
UNKNOWN_NODE_GRACE_S = 300.0
TOMBSTONE_AGE_S = 15 * 60.0  # Consul's tombstone_ttl
TOMBSTONE_INTERVAL_S = 30.0
SERVERS_MIN = 3  # dead servers are removed only while at least this many (or bootstrap_expect) living ones remain

ALIVE_OUTPUT = "Agent alive and reachable"  # clients and dashboards know these two texts
FAILED_OUTPUT = "Agent not live or unreachable"
SERVER_SERVICE = "consul"


def serf_health(node: str, status: CheckStatus) -> Check:
    """The check that says whether gossip sees the node."""
    return Check(
        node=node,
        check_id=SERF_HEALTH_ID,
        name=SERF_HEALTH_NAME,
        status=status,
        output=ALIVE_OUTPUT if status == "passing" else FAILED_OUTPUT,
    )


class CatalogReconciler:
    """Turns what gossip says of a member into the writes that the catalog lacks: none when it says so already."""

    def __init__(
        self,
        *,
        store: Store,
        commit: Callable[[Command], Awaitable[object]],
        members: Callable[[], tuple[Member, ...]],
        datacenter: str,
        own_name: str,
    ) -> None:
        self._store = store
        self._commit = commit
        self._members = members
        self._datacenter = datacenter
        self._own_name = own_name
        self._unknown_since: dict[str, float] = {}

    async def reconcile_all(self) -> None:
        """Every member, and every node that gossip has forgotten. Raises what `commit` raises."""
        members = self._members()
        for member in members:
            await self.reconcile(member)
        known = {member.name.lower() for member in members}
        await self._forget_unknown(known)

    async def reconcile(self, member: Member) -> None:
        """One member. Raises what `commit` raises; a refusal by the state is logged."""
        if member.tags.get("dc", self._datacenter) != self._datacenter:
            return
        match member.status:
            case "alive":
                await self._register(member)
            case "failed":
                await self._mark_failed(member)
            case "left":
                await self.deregister(member.name, "it left")
            case "leaving":
                return  # on its way: it still answers, and says so itself when it is done

    async def _register(self, member: Member) -> None:
        existing = queries.run(self._store, GetNodeServices(member.name)).value
        node_id = member.tags.get("id", "")
        if existing is not None and node_id and existing.node.node_id not in ("", node_id):
            # Names are unique among living members, so the host that the catalog knows by this name is gone.
            _LOG.warning("node %s came back with another ID: forgetting %s", member.name, existing.node.node_id)
            await self.deregister(member.name, "its name belongs to another host now")
            existing = None
        node = self._desired_node(member, None if existing is None else existing.node)
        service = self._server_service(member)
        check = serf_health(node.node, "passing")
        current_services = () if existing is None else existing.services
        has_service = service is None or any(_same_service(service, other) for other in current_services)
        if existing is not None and existing.node == node and has_service and self._has_check(check):
            return
        if self._is_taken(node):
            return
        # The agent itself owns the rest of its node's row (meta, tagged addresses), and may register it while this
        # write is on its way: a row that we had not seen is created where there is none, and left alone where there is.
        skip = existing is None or existing.node == node
        await self._commit(Register(node, None if has_service else service, (check,), skip_node_update=skip))
        if existing is None:
            _LOG.info("member %s joined, registering it in the catalog", member.name)

    def _is_taken(self, node: Node) -> bool:
        """Whether another living member has the same ID: registering either would rename the other away, for ever."""
        if not node.node_id:
            return False
        twins = [
            member.name
            for member in self._members()
            if member.status == "alive" and member.tags.get("id") == node.node_id and member.name != node.node
        ]
        if twins:
            _LOG.error(
                "nodes %s and %s have the same ID %s (a cloned disk?): remove node-id from the data directory of one "
                "and restart it; %s is not registered until then",
                node.node,
                twins[0],
                node.node_id,
                node.node,
            )
        return bool(twins)

    def _desired_node(self, member: Member, existing: Node | None) -> Node:
        node_id = member.tags.get("id", "")
        if existing is None:
            return Node(node=member.name, address=member.address, node_id=node_id, datacenter=self._datacenter)
        return replace(existing, address=member.address, node_id=node_id or existing.node_id)

    def _server_service(self, member: Member) -> Service | None:
        server = parse_server(member, self._datacenter)
        if server is None:
            return None
        return Service(
            service=SERVER_SERVICE,
            service_id=SERVER_SERVICE,
            port=server.address[1],
            meta={
                "non_voter": "false",
                "raft_version": member.tags.get("raft_vsn", "3"),
                "serf_protocol_current": str(member.protocol_current),
                "serf_protocol_max": str(member.protocol_max),
                "serf_protocol_min": str(member.protocol_min),
                "version": member.tags.get("build", "").partition(":")[0],
            },
        )

    def _has_check(self, wanted: Check) -> bool:
        checks = queries.run(self._store, ListNodeChecks(wanted.node)).value
        return any(
            check.check_id == wanted.check_id and (check.status, check.output) == (wanted.status, wanted.output)
            for check in checks
        )

    async def _mark_failed(self, member: Member) -> None:
        existing = queries.run(self._store, GetNodeServices(member.name)).value
        if existing is None:
            return  # never registered: there is nothing that anyone could be warned about
        node_id = member.tags.get("id", "")
        if node_id and existing.node.node_id not in ("", node_id):
            return  # the failure of a former holder of the name
        check = serf_health(existing.node.node, "critical")
        if self._has_check(check):
            return
        _LOG.info("member %s failed, marking it critical", member.name)
        await self._commit(Register(existing.node, None, (check,), skip_node_update=True))

    async def deregister(self, name: str, reason: str) -> None:
        """Removes a node and all that is on it; never our own, which the next leader does when we are gone."""
        if name.lower() == self._own_name.lower():
            return
        if queries.run(self._store, GetNodeServices(name)).value is None:
            return
        _LOG.info("deregistering node %s: %s", name, reason)
        await self._commit(Deregister(name))

    async def _forget_unknown(self, known: set[str]) -> None:
        now = trio.current_time()
        unknown: dict[str, float] = {}
        for node in queries.run(self._store, ListNodes()).value:
            if node.node.lower() in known:
                continue
            checks = queries.run(self._store, ListNodeChecks(node.node)).value
            if not any(check.check_id == SERF_HEALTH_ID for check in checks):
                continue  # registered from outside (catalog/register): none of gossip's business
            since = unknown[node.node] = self._unknown_since.get(node.node, now)
            if now - since >= UNKNOWN_NODE_GRACE_S:
                await self.deregister(node.node, "gossip has not known it for minutes")
        self._unknown_since = unknown


def _same_service(wanted: Service, existing: Service) -> bool:
    return replace(existing, create_index=0, modify_index=0) == wanted


class VoterReconciler:
    """Keeps Raft's servers level with gossip: living servers vote, left ones do not, dead ones once replaced."""

    def __init__(
        self, *, raft: RaftDriver, servers: ServerList, own_id: str, expect: int, cluster_of: Callable[[str], str]
    ) -> None:
        """`cluster_of(node ID)`: the cluster that the server says it belongs to; empty when it says nothing."""
        self._raft = raft
        self._servers = servers
        self._own_id = own_id
        self._servers_min = max(SERVERS_MIN, expect)
        self._cluster_of = cluster_of
        self._complained: set[str] = set()

    async def reconcile(self) -> None:
        """One pass, one change at a time. Raises NotLeader, OutcomeUnknown, Refused, Unreachable from Raft."""
        for server in self._servers.all():
            if server.left and server.node_id != self._own_id:
                await self._remove(server, "left")
        for server in self._servers.all():
            if server.alive and server.node_id != self._own_id and not self._is_foreign(server):
                await self._add(server)
        await self._remove_replaced()

    async def _add(self, server: ServerMember) -> None:
        address = join_address(server.address)
        if self._raft.status.voters.get(server.node_id) == address:
            return
        _LOG.info("server %s at %s joins the voters", server.name, address)
        await self._raft.add_voter(server.node_id, address)

    async def _remove(self, server: ServerMember, reason: str) -> None:
        status = self._raft.status
        if server.node_id in status.voters or server.node_id in status.learners:
            _LOG.info("server %s %s: removing it from the voters", server.name, reason)
            await self._raft.remove_server(server.node_id)

    async def _remove_replaced(self) -> None:
        for server in self._servers.all():
            voters = self._raft.status.voters
            living = [node_id for node_id in voters if self._is_alive(node_id)]
            if server.alive or server.left or server.node_id not in voters:
                continue
            # Only once others hold its place: with three servers and one dead, a second removal would leave a pair
            # that the next failure stops, while the dead one may well come back.
            if len(living) >= self._servers_min and len(living) > len(voters) // 2:
                await self._remove(server, "failed and has been replaced")

    def _is_alive(self, node_id: str) -> bool:
        server = self._servers.get(node_id)
        return node_id == self._own_id or (server is not None and server.alive)

    def _is_foreign(self, server: ServerMember) -> bool:
        own, other = self._cluster_of(self._own_id), self._cluster_of(server.node_id)
        if not own or not other or own == other:
            return False
        if server.node_id not in self._complained:
            self._complained.add(server.node_id)
            _LOG.error(
                "server %s belongs to another cluster (%s, ours is %s) and is not added: to move it here, stop it, "
                "remove the raft folder from its data directory and start it again",
                server.name,
                other,
                own,
            )
        return True


class LeaderDuties:
    """Runs the leader's work whenever this server leads."""

    def __init__(
        self,
        *,
        leadership: Leadership,
        backend: ServerBackend,
        raft: RaftDriver,
        store: Store,
        catalog: CatalogReconciler,
        voters: VoterReconciler,
        authority: CertificateAuthority,
    ) -> None:
        self._leadership = leadership
        self._backend = backend
        self._raft = raft
        self._store = store
        self._catalog = catalog
        self._voters = voters
        self._authority = authority
        self._pending: dict[str, Member | None] = {}  # member name -> what changed; None: it was forgotten
        self._event_arrived = trio.Event()
        self._servers_changed = trio.Event()

    def handle_event(self, event: GossipEvent) -> None:
        """Notes a gossip event while this server leads; a new leader begins with a pass over everything."""
        if not self._leadership.is_leader:
            return
        match event:
            case MemberJoined(member) | MemberUpdated(member) | MemberFailed(member) | MemberLeft(member):
                self._pending[member.name] = member
            case MemberReaped(member):
                self._pending[member.name] = None
            case _:
                return
        self._event_arrived.set()
        self._servers_changed.set()

    async def run(self, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Until cancelled."""
        task_status.started()
        while True:
            while not self._leadership.is_leader:
                await self._leadership.changed()
            self._pending.clear()
            await self._lead(self._leadership.term)

    async def _lead(self, term: int) -> None:
        _LOG.info("cluster leadership acquired")
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self._end_with_term, term, nursery.cancel_scope)
            await self._retrying("committing the first entry of the term", self._barrier)
            nursery.start_soon(self._run_voters)
            nursery.start_soon(self._run_catalog)
            nursery.start_soon(self._reap_tombstones)
            await self._retrying("initialising the certificate authority", self._authority.ensure_root)
            self._backend.set_signer(self._authority.sign)
        self._backend.set_signer(None)
        _LOG.info("cluster leadership lost")

    async def _end_with_term(self, term: int, scope: trio.CancelScope) -> None:
        while self._leadership.is_leader and self._leadership.term == term:
            await self._leadership.changed()
        scope.cancel()

    async def _barrier(self) -> None:
        await self._raft.barrier()

    async def _retrying(self, what: str, action: Callable[[], Awaitable[None]]) -> None:
        """Until it succeeds; the end of the term cancels it."""
        while True:
            try:
                await action()
                return
            except (NotLeader, OutcomeUnknown) as error:
                _LOG.debug("%s: %s", what, error)
            except MeshError as error:
                _LOG.error("%s failed, trying again: %s", what, error)
            await trio.sleep(RETRY_INTERVAL_S)

    async def _run_catalog(self) -> None:
        full_pass_at = -math.inf
        while True:
            try:
                if trio.current_time() >= full_pass_at:
                    await self._catalog.reconcile_all()
                    full_pass_at = trio.current_time() + RECONCILE_INTERVAL_S
                while self._pending:
                    name, member = next(iter(self._pending.items()))
                    if member is None:
                        await self._catalog.deregister(name, "gossip forgot it")
                    else:
                        await self._catalog.reconcile(member)
                    if self._pending.get(name) is member:
                        del self._pending[name]
            except (NotLeader, OutcomeUnknown) as error:
                _LOG.debug("reconciling the catalog: %s", error)
                await trio.sleep(RETRY_INTERVAL_S)
                continue
            except MeshError as error:
                _LOG.error("reconciling the catalog failed, trying again: %s", error)
                await trio.sleep(RETRY_INTERVAL_S)
                continue
            with trio.move_on_at(full_pass_at):
                await self._event_arrived.wait()
            self._event_arrived = trio.Event()

    async def _run_voters(self) -> None:
        while True:
            self._servers_changed = trio.Event()
            pause_s = VOTERS_INTERVAL_S
            try:
                await self._voters.reconcile()
            except (NotLeader, OutcomeUnknown, Refused) as error:
                # Refused: one change at a time, and none before the first commit of the term.
                _LOG.debug("changing the voters: %s", error)
                pause_s = RETRY_INTERVAL_S
            except MeshError as error:
                _LOG.error("changing the voters failed, trying again: %s", error)
            with trio.move_on_after(pause_s):
                await self._servers_changed.wait()

    async def _reap_tombstones(self) -> None:
        """KV tombstones keep prefix indexes from going back; once every reader has had time to see them, they go."""
        seen: deque[tuple[float, int]] = deque()
        reaped = 0
        while True:
            await trio.sleep(TOMBSTONE_INTERVAL_S)
            now = trio.current_time()
            seen.append((now, self._raft.status.applied_index))
            while len(seen) > 1 and now - seen[1][0] >= TOMBSTONE_AGE_S:
                seen.popleft()
            since, index = seen[0]
            buried = self._store.kv.tombstones.values()
            if now - since < TOMBSTONE_AGE_S or index <= reaped or all(at > index for at in buried):
                continue
            try:
                await self._backend.apply_here(TombstonesReap(index))
                reaped = index
            except MeshError as error:
                _LOG.debug("reaping tombstones: %s", error)


async def commit_or_log(backend: ServerBackend, command: Command) -> None:
    """Commits a write of the leader's own; a refusal by the state is logged, for nobody else would read it.

    Raises NotLeader, OutcomeUnknown, LimitExceeded.
    """
    result = await backend.apply_here(command)
    if isinstance(result, Rejected):
        _LOG.error("%s was refused: %s", type(command).__name__, result.reason)
