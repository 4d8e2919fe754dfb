"""A client agent: which server it asks, and what it does when that one does not answer."""

import random
from contextlib import asynccontextmanager

import msgspec
import pytest
import trio
from clusters import three_servers, until

from agent.client import ClientBackend
from agent.membership import ServerList, parse_server
from agent.rpc import RpcPool, RpcServer
from agent.rpc.calls import CALLS, ApplyCall, encode_answer
from agent.telemetry import Metrics
from mesh.errors import LimitExceeded, NoLeader, OutcomeUnknown, Unreachable
from mesh.gossip.events import MemberFailed, MemberJoined, MemberLeft, MemberReaped
from mesh.gossip.members import Member
from mesh.model.command import RESULT_CODEC, Applied, KvSet
from mesh.model.query import Answer, GetKv, ReadMeta, ReadOptions


def member(name: str, port: int = 8300, status: str = "alive", node_id: str = "") -> Member:
    tags = {"role": "consul", "dc": "dc1", "id": node_id or f"id-{name}", "port": str(port), "expect": "3"}
    return Member(name, "127.0.0.1", 8301, tags, status, 1, 5, 2, 2, 5, 4)


class FlakyServer:
    """Answers calls as its `behaviour` says, on a real port."""

    def __init__(self, behaviour: str) -> None:
        self.behaviour = behaviour
        self.calls: list[object] = []
        self.port = 0
        self.scope = trio.CancelScope()

    async def handle(self, body: bytes) -> bytes:
        call = CALLS.decode(body)
        self.calls.append(call)
        match self.behaviour:
            case "die":
                self.scope.cancel()
                await trio.sleep_forever()
            case "no leader":
                raise NoLeader("No cluster leader")
            case "busy":
                raise LimitExceeded("too much")
        if isinstance(call, ApplyCall):
            return RESULT_CODEC.encode(Applied(7))
        return encode_answer(GetKv("k"), Answer(None, ReadMeta(7)))

    async def run(self, *, task_status) -> None:
        listeners = await trio.open_tcp_listeners(0, host="127.0.0.1")
        self.port = listeners[0].socket.getsockname()[1]
        server = RpcServer(self.handle, receive_raft=lambda sender, data: None)
        with self.scope:
            await server.serve(listeners, task_status=task_status)
        await listeners[0].aclose()


@asynccontextmanager
async def client_of(*behaviours: str, hold_s: float = 1.0):
    """A client that prefers the servers in this order."""
    servers = ServerList("dc1", random.Random(1))
    pool = RpcPool(random.Random(1))
    flaky = [FlakyServer(behaviour) for behaviour in behaviours]
    async with trio.open_nursery() as nursery:
        await nursery.start(pool.run)
        for number, server in enumerate(flaky):
            await nursery.start(server.run)
            servers.handle_event(MemberJoined(member(f"s{number}", server.port)))
        while flaky and servers.preferred().name != "s0":
            servers.report_failure(servers.preferred())
        client = ClientBackend(
            pool=pool, servers=servers, rng=random.Random(1), metrics=Metrics(lambda: 0.0), hold_s=hold_s
        )
        yield client, servers, flaky
        nursery.cancel_scope.cancel()


async def test_it_sticks_to_one_server():
    async with client_of("fine", "fine", "fine") as (client, _, flaky):
        for _ in range(5):
            await client.apply(KvSet("k"))
        assert [len(server.calls) for server in flaky] == [5, 0, 0]


async def test_a_read_is_tried_again_elsewhere_when_the_server_dies_in_the_middle():
    async with client_of("die", "fine") as (client, servers, flaky):
        answer = await client.read(GetKv("k"), ReadOptions())
        assert answer.meta.index == 7
        assert [len(server.calls) for server in flaky] == [1, 1]
        assert servers.preferred().name == "s1"


async def test_a_write_is_not_tried_again_when_it_may_have_been_committed():
    async with client_of("die", "fine") as (client, _, flaky):
        with pytest.raises(OutcomeUnknown):
            await client.apply(KvSet("k"))
        assert [len(server.calls) for server in flaky] == [1, 0]
        assert isinstance(await client.apply(KvSet("k")), Applied)  # the next one goes to the living server


async def test_a_write_that_was_never_sent_is_tried_elsewhere():
    async with client_of("fine", "fine") as (client, _, flaky):
        flaky[0].scope.cancel()
        await trio.testing.wait_all_tasks_blocked()
        assert isinstance(await client.apply(KvSet("k")), Applied)
        assert len(flaky[1].calls) == 1


async def test_without_a_leader_it_asks_until_the_hold_time_is_over():
    async with client_of("no leader", hold_s=0.3) as (client, _, flaky):
        with pytest.raises(NoLeader, match="No cluster leader"):
            await client.apply(KvSet("k"))
        assert len(flaky[0].calls) > 1
        flaky[0].behaviour = "fine"
        assert isinstance(await client.apply(KvSet("k")), Applied)


async def test_a_server_that_sheds_load_is_not_asked_again():
    async with client_of("busy", "fine") as (client, _, flaky):
        with pytest.raises(LimitExceeded):
            await client.apply(KvSet("k"))
        assert [len(server.calls) for server in flaky] == [1, 0]


async def test_without_servers_the_error_says_so(autojump_clock):
    async with client_of() as (client, _, _):
        with pytest.raises(Unreachable, match="No known Consul servers"):
            await client.read(GetKv("k"), ReadOptions())


async def test_a_real_client_survives_each_server_in_turn():
    async with three_servers() as cluster:
        client = await cluster.start_client("c1")
        await until(lambda: len(client.cluster.servers.all()) == 3)
        favourite = client.cluster.servers.preferred()
        await client.backend.apply(KvSet("k", b"v"))
        await cluster.agents[favourite.name].kill()
        answer = await client.backend.read(GetKv("k"), ReadOptions())
        assert answer.value.value == b"v"


# -- the list of servers


def test_servers_come_and_go_with_gossip():
    servers = ServerList("dc1", random.Random(1))
    servers.handle_event(MemberJoined(member("s1")))
    servers.handle_event(MemberJoined(member("s2")))
    assert [server.node_id for server in servers.all()] == ["id-s1", "id-s2"]
    servers.handle_event(MemberFailed(member("s1", status="failed")))
    assert servers.preferred().name == "s2"
    servers.handle_event(MemberLeft(member("s2", status="left")))
    assert servers.preferred() is None
    servers.handle_event(MemberReaped(member("s2", status="left")))
    assert [server.name for server in servers.all()] == ["s1"]


def test_a_rebuilt_server_with_the_same_name_replaces_the_old_one():
    servers = ServerList("dc1", random.Random(1))
    servers.handle_event(MemberJoined(member("s1", node_id="old")))
    servers.handle_event(MemberJoined(member("s1", node_id="new")))
    assert [server.node_id for server in servers.all()] == ["new"]
    assert servers.preferred().node_id == "new"


def test_the_death_of_a_former_name_does_not_touch_the_renamed_server():
    servers = ServerList("dc1", random.Random(1))
    servers.handle_event(MemberJoined(member("old", node_id="one")))
    servers.handle_event(MemberJoined(member("new", node_id="one")))
    servers.handle_event(MemberFailed(member("old", node_id="one", status="failed")))
    assert servers.get("one").name == "new"
    assert servers.preferred().name == "new"


def test_clients_spread_over_the_servers():
    firsts = set()
    for seed in range(20):
        servers = ServerList("dc1", random.Random(seed))
        for name in ("s1", "s2", "s3"):
            servers.handle_event(MemberJoined(member(name)))
        firsts.add(servers.preferred().name)
    assert firsts == {"s1", "s2", "s3"}


def test_a_server_of_another_datacenter_is_none_of_ours():
    assert parse_server(member("s1"), "dc2") is None


@pytest.mark.parametrize(
    "tags",
    [{"port": "00001" + "9" * 400}, {"port": "0"}, {"port": "65536"}, {"port": "-1"}, {"port": "٨٣٠٠"},
     {"id": "\x1b[2J"}, {"id": "a/b"}, {"id": ""}, {"id": "i" * 400}],
)  # fmt: skip
def test_a_member_whose_tags_make_no_server_is_none_and_nobody_dials_it(tags):
    rogue = member("rogue")
    rogue = msgspec.structs.replace(rogue, tags={**rogue.tags, **tags})
    servers = ServerList("dc1", random.Random(1))
    servers.handle_event(MemberJoined(rogue))
    assert servers.preferred() is None
