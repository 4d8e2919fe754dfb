"""Reads and writes of a cluster of real servers, wherever they are made."""

import pytest
import trio
from clusters import three_servers, until, world

from agent.rpc.calls import CALLS, ApplyCall
from mesh.errors import NoLeader, Refused
from mesh.model.command import Applied, CaRootsSet, KvSet, TombstonesReap
from mesh.model.query import GetKv, ListKv, ReadOptions


async def get(agent, key: str, **options):
    answer = await agent.backend.read(GetKv(key), ReadOptions(**options))
    return None if answer.value is None else answer.value.value


async def test_a_write_at_any_agent_is_read_at_any_other():
    async with three_servers() as cluster:
        client = await cluster.start_client("c1")
        await until(lambda: client.cluster.servers.preferred() is not None)
        writers = [*cluster.servers(), client]
        for number, writer in enumerate(writers):
            result = await writer.backend.apply(KvSet(f"k{number}", b"%d" % number))
            assert isinstance(result, Applied)
            for reader in writers:
                for consistency in ("default", "consistent"):
                    assert await get(reader, f"k{number}", consistency=consistency) == b"%d" % number


async def test_who_leads_and_votes_is_the_same_everywhere():
    async with three_servers() as cluster:
        client = await cluster.start_client("c1")
        await until(lambda: client.cluster.servers.preferred() is not None)
        agents = [*cluster.servers(), client]
        assert len({await agent.backend.leader_address() for agent in agents} - {""}) == 1
        peers = {await agent.backend.peer_addresses() for agent in agents}
        assert peers == {tuple(sorted(f"127.0.0.1:{one.cluster.rpc_port}" for one in cluster.servers()))}


async def test_a_blocking_query_wakes_on_a_write_made_elsewhere():
    async with three_servers() as cluster:
        client = await cluster.start_client("c1")
        await until(lambda: client.cluster.servers.preferred() is not None)
        first, second = cluster.followers()
        await first.backend.apply(KvSet("watched", b"old"))
        for reader in (first, second, cluster.leader(), client):
            answer = await reader.backend.read(ListKv("watched"), ReadOptions())
            seen = []

            async def block(reader=reader, index=answer.meta.index, seen=seen) -> None:
                seen.append(await reader.backend.read(ListKv("watched"), ReadOptions(min_index=index, wait_s=60)))

            leader = cluster.leader()
            before = len(leader.cluster.watches)
            async with trio.open_nursery() as nursery:
                nursery.start_soon(block)
                await until(lambda before=before, leader=leader: len(leader.cluster.watches) > before)
                assert not seen
                await second.backend.apply(KvSet("other", b"x"))
                value = b"new for " + reader.cluster.node_id.encode()
                await second.backend.apply(KvSet("watched", value))
            assert seen[0].value[0].value == value
            assert seen[0].meta.index > answer.meta.index


async def test_a_blocking_query_that_times_out_answers_what_there_is():
    async with three_servers() as cluster:
        agent = cluster.followers()[0]
        await agent.backend.apply(KvSet("k", b"v"))
        index = (await agent.backend.read(GetKv("k"), ReadOptions())).meta.index
        answer = await agent.backend.read(GetKv("k"), ReadOptions(min_index=index, wait_s=0.1))
        assert (answer.value.value, answer.meta.index) == (b"v", index)


async def test_a_reader_that_goes_away_frees_the_watch_at_the_leader():
    async with three_servers() as cluster:
        client = await cluster.start_client("c1")
        await until(lambda: client.cluster.servers.preferred() is not None)
        leader = cluster.leader()
        before = len(leader.cluster.watches)
        async with trio.open_nursery() as nursery:
            for _ in range(20):
                nursery.start_soon(client.backend.read, GetKv("k"), ReadOptions(min_index=10**9, wait_s=600))
            await until(lambda: len(leader.cluster.watches) == before + 20)
            nursery.cancel_scope.cancel()
        await until(lambda: len(leader.cluster.watches) == before)


async def test_a_client_that_dies_frees_its_watches_at_the_leader():
    async with three_servers() as cluster:
        client = await cluster.start_client("c1")
        await until(lambda: client.cluster.servers.preferred() is not None)
        leader = cluster.leader()
        before = len(leader.cluster.watches)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(client.backend.read, GetKv("k"), ReadOptions(min_index=10**9, wait_s=600))
            await until(lambda: len(leader.cluster.watches) == before + 1)
            await client.kill()
            await until(lambda: len(leader.cluster.watches) == before)
            nursery.cancel_scope.cancel()


async def test_writes_and_blocked_reads_survive_the_death_of_the_leader():
    async with three_servers() as cluster:
        client = await cluster.start_client("c1")
        await until(lambda: client.cluster.servers.preferred() is not None)
        await client.backend.apply(KvSet("k", b"before"))
        index = (await client.backend.read(GetKv("k"), ReadOptions())).meta.index
        old = cluster.leader()
        seen = []

        async def block(agent) -> None:
            seen.append(await agent.backend.read(GetKv("k"), ReadOptions(min_index=index, wait_s=60)))

        before = len(old.cluster.watches)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(block, client)
            nursery.start_soon(block, cluster.followers()[0])
            await until(lambda: len(old.cluster.watches) >= before + 2)
            await old.kill()
            for agent in (*cluster.servers(), client):
                assert await get(agent, "k") == b"before"
            assert isinstance(await client.backend.apply(KvSet("k", b"after")), Applied)
        assert [answer.value.value for answer in seen] == [b"after", b"after"]


async def test_without_a_quorum_stale_reads_answer_and_others_say_no_leader(monkeypatch):
    async with three_servers() as cluster:
        leader = cluster.leader()
        await leader.backend.apply(KvSet("k", b"v"))
        survivor, other = cluster.followers()
        await until(lambda: survivor.cluster.store.kv.rows.get("k"))
        await other.kill()
        await leader.kill()
        await until(lambda: survivor.cluster.leadership.leader_id is None)
        monkeypatch.setattr(survivor.backend, "_hold_s", 0.3)
        answer = await survivor.backend.read(GetKv("k"), ReadOptions(consistency="stale"))
        assert answer.value.value == b"v"
        assert not answer.meta.known_leader
        assert answer.meta.last_contact_s > 0
        for consistency in ("default", "consistent"):
            with pytest.raises(NoLeader, match="No cluster leader"):
                await survivor.backend.read(GetKv("k"), ReadOptions(consistency=consistency))
        with pytest.raises(NoLeader):
            await survivor.backend.read(GetKv("k"), ReadOptions(consistency="stale", max_stale_s=0.01))
        with pytest.raises(NoLeader):
            await survivor.backend.apply(KvSet("k", b"w"))


async def test_everything_is_there_after_a_restart_of_all_servers(tmp_path):
    names = ("s1", "s2", "s3")
    for name in names:
        (tmp_path / name).mkdir()
    async with world() as cluster:
        for name in names:
            await cluster.start_server(name, tmp_path / name)
        await cluster.wait_for_leader()
        for number in range(20):
            await cluster.servers()[number % 3].backend.apply(KvSet(f"k{number}", b"%d" % number))
        cluster_id = cluster.leader().cluster.store.cluster_id
    async with world() as cluster:
        for name in names:
            await cluster.start_server(name, tmp_path / name)
        await cluster.wait_for_leader()
        for agent in cluster.servers():
            for number in range(20):
                assert await get(agent, f"k{number}") == b"%d" % number
        assert cluster.leader().cluster.store.cluster_id == cluster_id != ""


async def test_nobody_else_writes_what_is_the_leaders_own():
    async with world(expect=1) as cluster:
        await cluster.start_server("s1")
        leader = await cluster.wait_for_leader()
        await until(lambda: leader.cluster.store.cluster_id)
        for command in (CaRootsSet(leader.cluster.store.cluster_id, (), 1), TombstonesReap(10**9)):
            for forwarded in (False, True):
                with pytest.raises(Refused, match="the leader's own"):
                    await leader.backend.handle(CALLS.encode(ApplyCall(command, forwarded=forwarded)))
