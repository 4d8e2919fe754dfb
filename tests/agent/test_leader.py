"""What a leader keeps level: the catalog with gossip, Raft's voters with the living servers, the CA, tombstones."""

import pytest
import trio
from clusters import three_servers, until, world

from agent import leader as leader_module
from agent.leader import ALIVE_OUTPUT, FAILED_OUTPUT, CatalogReconciler
from mesh.gossip.members import Member
from mesh.model.catalog import Node
from mesh.model.check import Check
from mesh.model.command import COMMAND_CODEC, Deregister, KvDelete, KvSet, Register
from mesh.model.query import GetCaRoots, GetNodeServices, ListNodeChecks, ListNodes, ReadOptions
from mesh.state import queries
from mesh.state.fsm import Fsm
from mesh.state.store import Store


def node_names(cluster) -> list[str]:
    return [node.node for node in queries.run(cluster.leader().cluster.store, ListNodes()).value]


def serf_health(cluster, node: str) -> tuple[str, str] | None:
    leader = cluster.leader()
    if leader is None:
        return None
    for check in queries.run(leader.cluster.store, ListNodeChecks(node)).value:
        if check.check_id == "serfHealth":
            return check.status, check.output
    return None


# -- with real servers


async def test_members_become_nodes_and_servers_a_service():
    async with three_servers() as cluster:
        await cluster.start_client("c1")
        await until(lambda: node_names(cluster) == ["c1", "s1", "s2", "s3"])
        store = cluster.leader().cluster.store
        for name in ("s1", "s2", "s3"):
            row = queries.run(store, GetNodeServices(name)).value
            assert (row.node.address, row.node.node_id) == ("127.0.0.1", f"id-{name}")
            assert [(one.service_id, one.port) for one in row.services] == [
                ("consul", cluster.agents[name].cluster.rpc_port)
            ]
        assert queries.run(store, GetNodeServices("c1")).value.services == ()
        assert {serf_health(cluster, name) for name in node_names(cluster)} == {("passing", ALIVE_OUTPUT)}


async def test_a_failed_member_turns_critical_and_recovers():
    async with three_servers() as cluster:
        client = await cluster.start_client("c1")
        await until(lambda: serf_health(cluster, "c1") == ("passing", ALIVE_OUTPUT))
        await client.kill()
        await until(lambda: serf_health(cluster, "c1") == ("critical", FAILED_OUTPUT))
        await cluster.start_client("c1")
        await until(lambda: serf_health(cluster, "c1") == ("passing", ALIVE_OUTPUT))


async def test_a_member_that_leaves_vanishes_from_the_catalog():
    async with three_servers() as cluster:
        client = await cluster.start_client("c1")
        await until(lambda: "c1" in node_names(cluster))
        await client.leave()
        await until(lambda: "c1" not in node_names(cluster))


async def test_a_server_that_leaves_hands_over_and_is_no_voter_any_more():
    async with three_servers() as cluster:
        old = cluster.leader()
        with trio.fail_after(3):  # it hears of its removal; otherwise it would wait for that in vain
            await old.leave()
        await until(lambda: cluster.leader() is not None)
        leader = await cluster.wait_for_leader()
        await until(lambda: old.cluster.node_id not in leader.cluster.raft.status.voters)
        await until(lambda: old.cluster.node_id.removeprefix("id-") not in node_names(cluster))
        await leader.backend.apply(KvSet("k", b"v"))


async def test_a_stopping_leader_hands_over_and_stays_a_voter():
    async with three_servers() as cluster:
        old = cluster.leader()
        await old.cluster.hand_over()
        assert not old.cluster.leadership.is_leader
        leader = await cluster.wait_for_leader()
        assert leader is not old
        assert old.cluster.node_id in leader.cluster.raft.status.voters


async def test_a_fourth_server_becomes_a_voter_and_then_replaces_a_dead_one():
    async with three_servers() as cluster:
        dead = cluster.followers()[0]
        await dead.kill()
        await until(
            lambda: serf_health(cluster, dead.cluster.node_id.removeprefix("id-")) == ("critical", FAILED_OUTPUT)
        )
        leader = cluster.leader()
        assert dead.cluster.node_id in leader.cluster.raft.status.voters  # two living servers do not replace three
        await cluster.start_server("s4", expect=0)
        await until(
            lambda: (
                sorted(leader.cluster.raft.status.voters)
                == sorted({"id-s1", "id-s2", "id-s3", "id-s4"} - {dead.cluster.node_id})
            )
        )


async def test_the_first_leader_makes_the_ca_and_later_ones_keep_it():
    async with three_servers() as cluster:

        async def roots():
            return (await cluster.leader().backend.read(GetCaRoots(), ReadOptions())).value

        await until(lambda: cluster.leader().cluster.store.cluster_id)
        first = await roots()
        await cluster.leader().kill()
        await cluster.wait_for_leader()
        assert await roots() == first


async def test_servers_that_expect_different_numbers_do_not_bootstrap(caplog):
    async with world() as cluster:
        await cluster.start_server("s1", expect=2)
        await cluster.start_server("s2", expect=3)
        await cluster.start_server("s3", expect=3)
        await until(lambda: "give all servers of the datacenter the same bootstrap_expect" in caplog.text)
        assert cluster.leader() is None
        assert not any(agent.cluster.raft.has_state() for agent in cluster.servers())


async def test_five_servers_that_expect_three_make_one_cluster_of_five():
    async with world(expect=3) as cluster:
        async with trio.open_nursery() as nursery:
            for number in range(1, 6):
                nursery.start_soon(cluster.start_server, f"s{number}")
        for agent in cluster.servers():
            await agent.cluster.gossip.join(["{}:{}".format(*one.cluster.gossip.address) for one in cluster.servers()])
        leader = await cluster.wait_for_leader()
        everyone = {f"id-s{number}" for number in range(1, 6)}
        await until(lambda: set(leader.cluster.raft.status.voters) == everyone)
        await until(
            lambda: {agent.cluster.leadership.leader_id for agent in cluster.servers()} == {leader.cluster.node_id}
        )


async def test_a_new_server_waits_for_a_cluster_that_exists_instead_of_starting_one():
    async with three_servers() as cluster:
        await cluster.agents["s1"].leave()
        fresh = await cluster.start_server("a0")  # the lowest ID, and with it three that expect three
        leader = await cluster.wait_for_leader()
        await until(lambda: fresh.cluster.node_id in leader.cluster.raft.status.voters)
        assert fresh.cluster.leadership.leader_id in ("id-s2", "id-s3")


async def test_two_clusters_that_meet_do_not_merge(caplog):
    async with world(expect=1) as cluster:
        first = await cluster.start_server("s1")
        await until(lambda: first.cluster.store.cluster_id)
        cluster.agents.clear()
        second = await cluster.start_server("s2")
        await until(lambda: second.cluster.store.cluster_id)
        await second.cluster.gossip.join(["{}:{}".format(*first.cluster.gossip.address)])
        await until(lambda: "belongs to another cluster" in caplog.text)
        await trio.sleep(0.2)
        assert list(first.cluster.raft.status.voters) == ["id-s1"]
        assert list(second.cluster.raft.status.voters) == ["id-s2"]


async def test_tombstones_are_reaped_once_old_enough(monkeypatch):
    monkeypatch.setattr(leader_module, "TOMBSTONE_INTERVAL_S", 0.05)
    monkeypatch.setattr(leader_module, "TOMBSTONE_AGE_S", 0.3)
    async with world(expect=1) as cluster:
        server = await cluster.start_server("s1")
        await cluster.wait_for_leader()
        await server.backend.apply(KvSet("k", b"v"))
        await server.backend.apply(KvDelete("k"))
        assert server.cluster.store.kv.tombstones
        await until(lambda: not server.cluster.store.kv.tombstones)


# -- the reconciler alone


class Catalog:
    """A reconciler over a state of its own, and every write that it made."""

    def __init__(self, *members: Member) -> None:
        self.members = members
        self.store = Store()
        self.writes: list[object] = []
        self.overtaking: Register | None = None  # reaches the log just before the next write
        self._fsm = Fsm(self.store)
        self.reconciler = CatalogReconciler(
            store=self.store, commit=self.commit, members=lambda: self.members, datacenter="dc1", own_name="s1"
        )

    async def commit(self, command) -> None:
        overtaking, self.overtaking = self.overtaking, None
        if overtaking is not None:
            await self.commit(overtaking)
        self.writes.append(command)
        self._fsm.apply(len(self.writes), COMMAND_CODEC.encode(command))

    def names(self) -> list[str]:
        return [node.node for node in queries.run(self.store, ListNodes()).value]


def member(name: str, status: str = "alive", *, address: str = "10.0.0.1", node_id: str = "", **tags: str) -> Member:
    every = {"role": "node", "dc": "dc1", "id": node_id or f"id-{name}", **tags}
    return Member(name, address, 8301, every, status, 1, 5, 2, 2, 5, 4)


SERVER = member("s1", role="consul", port="8300", raft_vsn="3", build="1.22.0:mesh")


async def test_a_second_pass_writes_nothing():
    catalog = Catalog(SERVER, member("c1"), member("c2", "failed"), member("c3", "left"))
    await catalog.reconciler.reconcile_all()
    assert catalog.names() == ["c1", "s1"]
    written = len(catalog.writes)
    await catalog.reconciler.reconcile_all()
    assert len(catalog.writes) == written


async def test_what_the_agent_said_of_its_own_node_is_kept():
    catalog = Catalog(member("c1"))
    await catalog.commit(Register(Node("c1", "10.0.0.1", "id-c1", "dc1", {"wan": "1.2.3.4"}, {"rack": "7"})))
    await catalog.reconciler.reconcile_all()
    row = queries.run(catalog.store, GetNodeServices("c1")).value.node
    assert (row.tagged_addresses, row.meta) == ({"wan": "1.2.3.4"}, {"rack": "7"})
    catalog.members = (member("c1", address="10.0.0.9"),)
    await catalog.reconciler.reconcile_all()
    row = queries.run(catalog.store, GetNodeServices("c1")).value.node
    assert (row.address, row.tagged_addresses, row.meta) == ("10.0.0.9", {"wan": "1.2.3.4"}, {"rack": "7"})


async def test_an_agent_that_registers_itself_while_the_leader_does_keeps_its_row():
    catalog = Catalog(member("c1"))
    own = Node("c1", "10.0.0.1", "id-c1", "dc1", {"wan": "1.2.3.4"}, {"rack": "7"})
    catalog.overtaking = Register(own)
    await catalog.reconciler.reconcile_all()
    row = queries.run(catalog.store, GetNodeServices("c1")).value.node
    assert (row.tagged_addresses, row.meta) == ({"wan": "1.2.3.4"}, {"rack": "7"})
    checks = queries.run(catalog.store, ListNodeChecks("c1")).value
    assert [(check.check_id, check.status) for check in checks] == [("serfHealth", "passing")]


async def test_a_rebuilt_host_with_its_old_name_takes_the_place_of_the_old_one():
    catalog = Catalog(member("c1", node_id="old"))
    await catalog.reconciler.reconcile_all()
    catalog.members = (member("c1", node_id="new"),)
    await catalog.reconciler.reconcile_all()
    assert queries.run(catalog.store, GetNodeServices("c1")).value.node.node_id == "new"


async def test_a_renamed_host_loses_its_old_name():
    catalog = Catalog(member("c1", node_id="one"))
    await catalog.reconciler.reconcile_all()
    catalog.members = (member("c1", "failed", node_id="one"), member("c9", node_id="one"))
    await catalog.reconciler.reconcile_all()
    assert catalog.names() == ["c9"]


async def test_two_living_hosts_with_one_id_do_not_take_turns(caplog):
    catalog = Catalog(member("c1", node_id="one"))
    await catalog.reconciler.reconcile_all()
    catalog.members = (member("c1", node_id="one"), member("c2", node_id="one"))
    written = len(catalog.writes)
    await catalog.reconciler.reconcile_all()
    assert len(catalog.writes) == written
    assert "have the same ID one" in caplog.text


async def test_nodes_registered_from_outside_are_left_alone(autojump_clock):
    catalog = Catalog(SERVER)
    await catalog.commit(Register(Node("external", "10.9.9.9"), None, (Check("external", "ping", "ping"),)))
    for _ in range(10):
        await catalog.reconciler.reconcile_all()
        await trio.sleep(60)
    assert catalog.names() == ["external", "s1"]


async def test_a_node_that_gossip_forgot_goes_only_after_a_while(autojump_clock):
    catalog = Catalog(SERVER, member("c1"))
    await catalog.reconciler.reconcile_all()
    catalog.members = (SERVER,)
    await catalog.reconciler.reconcile_all()
    assert catalog.names() == ["c1", "s1"]
    await trio.sleep(leader_module.UNKNOWN_NODE_GRACE_S + 1)
    await catalog.reconciler.reconcile_all()
    assert catalog.names() == ["s1"]


async def test_the_leader_never_deregisters_itself():
    catalog = Catalog(SERVER)
    await catalog.reconciler.reconcile_all()
    catalog.members = (member("s1", "left"),)
    await catalog.reconciler.reconcile_all()
    assert catalog.names() == ["s1"]
    assert not any(isinstance(write, Deregister) for write in catalog.writes)


@pytest.mark.parametrize("tags", [{"port": "x"}, {"port": "0"}, {"port": "99999"}, {"port": ""}, {"expect": "-"}])
async def test_a_server_with_senseless_tags_is_no_server_but_still_a_node(tags):
    catalog = Catalog(member("s9", **{"role": "consul", "port": "8300", **tags}))
    await catalog.reconciler.reconcile_all()
    assert catalog.names() == ["s9"]


async def test_members_of_another_datacenter_are_ignored():
    catalog = Catalog(member("far", dc="dc2"))
    await catalog.reconciler.reconcile_all()
    assert catalog.names() == []
