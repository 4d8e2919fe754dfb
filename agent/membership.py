"""What gossip tags say about agents, and the list of servers that every agent keeps from them."""

import random
from collections.abc import Callable, Mapping

import msgspec
import trio

from agent.addresses import Address
from mesh.gossip.events import GossipEvent, MemberFailed, MemberJoined, MemberLeft, MemberReaped, MemberUpdated
from mesh.gossip.members import Member
from mesh.names import is_node_name

SERVER_ROLE = "consul"  # Consul's own values: `consul members` and Serf tools read them
CLIENT_ROLE = "node"


class ServerMember(msgspec.Struct, frozen=True):
    """A server as its gossip tags describe it. `address` is its RPC listener."""

    name: str
    node_id: str
    datacenter: str
    address: Address
    expect: int  # bootstrap-expect; 0 when it was not given
    alive: bool
    left: bool


def server_tags(
    *, datacenter: str, node_id: str, rpc_port: int, expect: int, build: str, extra: Mapping[str, str] | None = None
) -> dict[str, str]:
    """The tags of a server, named as Consul names them."""
    tags = {"role": SERVER_ROLE, "port": str(rpc_port), "raft_vsn": "3"}
    if expect:
        tags["expect"] = str(expect)
        if expect == 1:
            tags["bootstrap"] = "1"
    return tags | _common_tags(datacenter, node_id, build) | dict(extra or {})


def client_tags(*, datacenter: str, node_id: str, build: str, extra: Mapping[str, str] | None = None) -> dict[str, str]:
    """The tags of a client agent."""
    return {"role": CLIENT_ROLE} | _common_tags(datacenter, node_id, build) | dict(extra or {})


def _common_tags(datacenter: str, node_id: str, build: str) -> dict[str, str]:
    return {
        "dc": datacenter,
        "id": node_id,
        "segment": "",
        "vsn": "2",
        "vsn_min": "2",
        "vsn_max": "3",
        "build": f"{build}:mesh",
    }


def parse_server(member: Member, datacenter: str) -> ServerMember | None:
    """The member as a server of the datacenter; None when it is none, or when its tags make no sense."""
    tags = member.tags
    if tags.get("role") != SERVER_ROLE or tags.get("dc") != datacenter or not is_node_name(tags.get("id", "")):
        return None
    port, expect = tags.get("port", ""), tags.get("expect", "0")
    # Five digits: a longer number, whatever it begins with, would be an error only where somebody dials it.
    if not (port.isascii() and port.isdigit() and len(port) <= 5 and 0 < int(port) < 65536):
        return None
    return ServerMember(
        name=member.name,
        node_id=tags["id"],
        datacenter=datacenter,
        address=(member.address, int(port)),
        expect=int(expect[:6]) if expect.isascii() and expect.isdigit() else 0,
        alive=member.status == "alive",
        left=member.status in ("left", "leaving"),
    )


class ServerList:
    """The datacenter's servers as gossip knows them, and which one a client agent talks to.

    The order is a random permutation, so that clients spread; a failing server goes to the back.
    """

    def __init__(self, datacenter: str, rng: random.Random) -> None:
        self._datacenter = datacenter
        self._rng = rng
        self._by_id: dict[str, ServerMember] = {}
        self._order: list[str] = []  # IDs of living servers, the preferred one first
        self._changed = trio.Event()
        self._subscribers: list[Callable[[], None]] = []

    def subscribe(self, callback: Callable[[], None]) -> None:
        """Has the callback called after every change."""
        self._subscribers.append(callback)

    def handle_event(self, event: GossipEvent) -> None:
        """Folds one gossip event in."""
        match event:
            case MemberJoined(member) | MemberUpdated(member) | MemberFailed(member) | MemberLeft(member):
                server = parse_server(member, self._datacenter)
                self._forget_other_ids(member.name, None if server is None else server.node_id)
                if server is not None:
                    self._put(server)
            case MemberReaped(member):
                self._forget_other_ids(member.name, None)
            case _:
                return
        self._changed.set()
        self._changed = trio.Event()
        for callback in self._subscribers:
            callback()

    def _put(self, server: ServerMember) -> None:
        known = self._by_id.get(server.node_id)
        if known is not None and known.name != server.name and known.alive and not server.alive:
            return  # the host was renamed: the death of its old name says nothing about the new one
        self._by_id[server.node_id] = server
        if not server.alive:
            self._order = [node_id for node_id in self._order if node_id != server.node_id]
        elif server.node_id not in self._order:
            self._order.insert(self._rng.randint(0, len(self._order)), server.node_id)

    def _forget_other_ids(self, name: str, keep: str | None) -> None:
        # A host that was rebuilt keeps its name and comes with another ID.
        for node_id in [one.node_id for one in self._by_id.values() if one.name == name and one.node_id != keep]:
            del self._by_id[node_id]
            self._order = [other for other in self._order if other != node_id]

    def get(self, node_id: str) -> ServerMember | None:
        """The server with that ID, alive or not."""
        return self._by_id.get(node_id)

    def all(self) -> tuple[ServerMember, ...]:
        """Every server known, alive or not, by ID."""
        return tuple(self._by_id[node_id] for node_id in sorted(self._by_id))

    def preferred(self) -> ServerMember | None:
        """The server to ask now, or None when none is alive."""
        return self._by_id[self._order[0]] if self._order else None

    def report_failure(self, server: ServerMember) -> None:
        """It did not answer: the next one is preferred from now on."""
        if self._order and self._order[0] == server.node_id:
            self._order.append(self._order.pop(0))

    def rebalance(self) -> None:
        """Draws a new order, so that load follows servers that come and go."""
        self._rng.shuffle(self._order)

    async def changed(self) -> None:
        """Waits for the next change."""
        await self._changed.wait()
