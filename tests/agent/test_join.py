"""Finding the cluster: addresses given, and the peers of the last run."""

from functools import partial
from itertools import islice

import pytest
import trio
from clusters import until, world
from processes import free_ports

from agent import join
from agent.gossip_driver import GossipDriver
from agent.join import KnownPeers, pauses, retry_join, without_own
from mesh.errors import ConfigError


def address_of(gossip: GossipDriver) -> str:
    return "{}:{}".format(*gossip.address)


def test_an_agents_own_address_is_no_one_to_join():
    own = (("10.0.0.1", 8301), ("0.0.0.0", 8301))
    given = ("10.0.0.1", "10.0.0.1:8301", "10.0.0.2", "10.0.0.1:9999", "not an address:x")
    assert without_own(given, own, default_port=8301) == ("10.0.0.2", "10.0.0.1:9999", "not an address:x")


async def test_joining_is_tried_until_somebody_answers(caplog):
    async with world(expect=1) as cluster:
        lonely = (await cluster.start_client("c1")).cluster.gossip
        cluster.agents.clear()
        (port,) = free_ports(1)
        address = f"127.0.0.1:{port}"
        addresses = [address]
        async with trio.open_nursery() as nursery:
            nursery.start_soon(partial(retry_join, lonely, addresses, interval_s=0.02, attempts_max=0))
            await until(lambda: "join failed" in caplog.text)
            assert address in caplog.text
            addresses.append(address_of((await cluster.start_client("c2")).cluster.gossip))
        assert len(lonely.members()) == 2


async def test_too_many_failed_attempts_end_it():
    async with world(expect=1) as cluster:
        lonely = (await cluster.start_client("c1")).cluster.gossip
        with pytest.raises(ConfigError, match=r"retry_join: .* 2 attempts"):
            await retry_join(lonely, ("127.0.0.1:1",), interval_s=0.01, attempts_max=2)


async def test_peers_of_the_last_run_are_found_again_and_forgotten_on_leaving(tmp_path, monkeypatch):
    monkeypatch.setattr(join, "PEERS_WRITE_S", 0.05)
    async with world(expect=1) as cluster:
        other = (await cluster.start_client("c1")).cluster
        first = (await cluster.start_client("c2")).cluster
        peers = KnownPeers(first.gossip, str(tmp_path), (first.gossip.address,))
        first.subscribe(peers.handle_event)
        async with trio.open_nursery() as nursery:
            await nursery.start(peers.run)
            peers.handle_event(None)
            await until(lambda: peers.load() == (address_of(other.gossip),))
            nursery.cancel_scope.cancel()
        await cluster.agents["c2"].kill()
        cluster.agents.clear()
        second = (await cluster.start_client("c2")).cluster  # told of nobody
        peers = KnownPeers(second.gossip, str(tmp_path), (second.gossip.address,))
        await peers.rejoin(peers.load(), interval_s=0.05)
        assert {member.name for member in second.gossip.members()} == {"c1", "c2"}
        peers.forget()
        assert peers.load() == ()


def test_a_damaged_peers_file_is_as_good_as_none(tmp_path):
    (tmp_path / "serf").mkdir()
    for text in ("{", "{}", "[1, null]", "\xff", ""):
        (tmp_path / "serf" / "peers.json").write_text(text, "latin-1")
        assert KnownPeers(None, str(tmp_path), ()).load() == ()


def test_agents_that_start_together_need_not_wait_a_whole_interval_for_each_other() -> None:
    assert list(islice(pauses(30.0), 7)) == [1.0, 2.0, 4.0, 8.0, 16.0, 30.0, 30.0]
    assert list(islice(pauses(0.5), 2)) == [0.5, 0.5]
