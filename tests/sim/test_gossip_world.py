"""The gossip core against faults, in simulated time. Each test names its seeds; bounds are in simulated seconds."""

from dataclasses import replace

import pytest
from sim.gossip_world import GossipWorld

from mesh.gossip.config import LAN
from mesh.gossip.events import MemberFailed, MemberJoined, MemberLeft, MemberReaped, MemberUpdated, NameConflicted


def names(world: GossipWorld) -> list[str]:
    return list(world.hosts)


def pool(count: int, *, seed: int, **options) -> GossipWorld:
    """A pool in which everybody already sees everybody alive."""
    world = GossipWorld(seed=seed, **options)
    world.start_pool(count)
    world.run_till(lambda: world.all_see(names(world), "alive", observers=names(world)), limit_s=60)
    return world


@pytest.mark.parametrize(("count", "seed"), [(30, 1), (30, 2), (64, 0)])
def test_nodes_that_join_one_seed_at_once_all_see_all(count, seed):
    world = GossipWorld(seed=seed)
    world.start_pool(count)
    took = world.run_till(lambda: world.all_see(names(world), "alive", observers=names(world)), limit_s=15)
    assert took < 15
    assert world.deaths() == []


def test_steady_pool_suspects_nobody_and_sends_little():
    world = pool(32, seed=3)
    world.run_for(5)
    world.datagrams = world.datagram_bytes = 0
    world.run_for(60)
    assert not any(notice.reason == "probe-failed" for host in world.hosts.values() for notice in host.notices)
    # One ping out and one ack back for each ping in: two a second, and nothing else when there is no news.
    assert world.datagrams / 32 / 60 <= 3.0
    assert world.datagram_bytes / 32 / 60 <= 1024


@pytest.mark.parametrize("seed", range(4, 10))
def test_crash_is_seen_by_all_within_the_bound(seed):
    world = pool(16, seed=seed)
    others = [name for name in names(world) if name != "n5"]
    world.run_for(7)
    world.crash("n5")
    first = world.run_till(lambda: bool(world.deaths()), limit_s=13.5)
    spread = world.run_till(lambda: world.all_see(["n5"], "failed", observers=others), limit_s=2)
    # Probe round, suspicion minimum for 16 is 4.8 s once two confirm.
    assert first >= 4.8
    assert first + spread < 15
    assert {subject for _, _, subject in world.deaths()} == {"n5"}


@pytest.mark.parametrize("seed", [11, 12])
def test_ten_percent_loss_kills_nobody(seed):
    world = pool(32, seed=seed, loss=0.1)
    world.run_for(60)
    assert world.deaths() == []


def test_duplicated_delayed_and_reordered_packets_change_nothing():
    world = pool(16, seed=13, duplication=0.5, delay_s=(0.0, 0.2))
    world.run_for(60)
    assert world.deaths() == []
    assert world.all_see(names(world), "alive", observers=names(world))


def test_sudden_twenty_percent_loss_with_recovery_kills_nobody_for_good():
    world = pool(16, seed=14, loss=0.2)
    world.run_for(60)
    world.loss = 0.0
    world.run_till(lambda: world.all_see(names(world), "alive", observers=names(world)), limit_s=90)


def test_pause_shorter_than_the_suspicion_is_refuted():
    world = pool(16, seed=15)
    world.pause("n3", 4.0)
    world.run_for(60)
    assert world.deaths() == []
    # It was suspected while it stood still, and raised its incarnation to answer.
    assert world.hosts["n3"].node._membership.local.incarnation > 1


def test_long_pause_fails_the_node_and_it_comes_back_by_itself():
    world = pool(16, seed=16)
    others = [name for name in names(world) if name != "n3"]
    resumes_at = world.now + 60.0
    world.pause("n3", 60.0)
    world.run_till(lambda: world.all_see(["n3"], "failed", observers=others), limit_s=30)
    world.run_until(resumes_at)
    world.run_till(lambda: world.all_see(names(world), "alive", observers=names(world)), limit_s=60)
    # The one who stood still blames itself before it blames others.
    assert {subject for _, _, subject in world.deaths()} == {"n3"}


def test_one_way_link_is_bridged_by_relays():
    world = pool(16, seed=17)
    world.cut(["n1"], ["n2"])
    world.run_for(120)
    assert world.deaths() == []


def test_blocked_udp_is_noticed_but_tcp_keeps_the_member_alive():
    world = pool(8, seed=18)
    others = [name for name in names(world) if name != "n2"]
    world.cut(others, ["n2"], tcp=False)
    world.run_for(60)
    assert not [death for death in world.deaths() if death[2] == "n2"]
    assert any(notice.reason == "udp-blocked" for name in others for notice in world.hosts[name].notices)


@pytest.mark.parametrize("seed", [20, 21])
def test_partition_heals_without_an_operator(seed):
    world = pool(20, seed=seed)
    left, right = names(world)[:10], names(world)[10:]
    world.partition(left, right)
    world.run_for(90)
    assert world.all_see(right, "failed", observers=left)
    assert world.all_see(left, "failed", observers=right)
    world.heal()
    world.run_till(lambda: world.all_see(names(world), "alive", observers=names(world)), limit_s=90)


def test_graceful_leave_is_left_not_failed():
    world = pool(16, seed=22)
    others = [name for name in names(world) if name != "n4"]
    world.leave("n4")
    world.run_till(lambda: world.hosts["n4"].left, limit_s=14)
    assert world.all_see(["n4"], "left", observers=others)
    world.run_for(60)
    assert world.all_see(["n4"], "left", observers=others)
    assert world.deaths() == []
    seen = [event for _, event in world.hosts["n0"].events if isinstance(event, MemberLeft)]
    assert [event.member.name for event in seen] == ["n4"]


def test_lonely_node_leaves_at_once():
    world = GossipWorld(seed=23)
    world.start("n0")
    world.leave("n0")
    assert world.run_till(lambda: world.hosts["n0"].left, limit_s=5) <= LAN.leave_propagate_s + 0.1


def test_restart_with_a_lower_incarnation_comes_back():
    world = pool(12, seed=24)
    others = [name for name in names(world) if name != "n6"]
    # Suspicions refuted over its life have lifted it above where a new run starts.
    for _ in range(3):
        world.hosts["n6"].node._membership._refute(50, "n0")
    world._drain(world.hosts["n6"])
    world.run_for(5)
    world.crash("n6")
    world.run_till(lambda: world.all_see(["n6"], "failed", observers=others), limit_s=30)
    world.start("n6", incarnation=1)
    world.join("n6", "n1")
    world.run_till(lambda: world.all_see(["n6"], "alive", observers=names(world)), limit_s=10)
    world.run_for(60)
    assert world.all_see(names(world), "alive", observers=names(world))


def test_full_restart_with_lower_incarnations_converges():
    world = pool(24, seed=25)
    for name in names(world):
        world.hosts[name].node._membership._refute(9, "n0")
        world._drain(world.hosts[name])
    world.run_for(5)
    for number, name in enumerate(names(world)):
        world.at(world.now + number * 0.2, lambda name=name: world.crash(name))
        seed_name = "n0" if name != "n0" else "n1"
        world.at(
            world.now + number * 0.2 + 0.1,
            lambda name=name, seed_name=seed_name: (world.start(name), world.join(name, seed_name)),
        )
    world.run_for(5.1)
    world.run_till(lambda: world.all_see(names(world), "alive", observers=names(world)), limit_s=60)


def test_restart_at_another_address_takes_its_name_back_after_the_reclaim_time():
    world = pool(8, seed=26)
    others = [name for name in names(world) if name != "n6"]
    world.crash("n6")
    world.run_till(lambda: world.all_see(["n6"], "failed", observers=others), limit_s=30)
    world.run_for(LAN.dead_reclaim_s + 2)
    world.start("n6", incarnation=1, address="10.9.9.9")
    world.join("n6", "n1")
    world.run_till(lambda: world.all_see(["n6"], "alive", observers=names(world)), limit_s=60)
    assert {host.node._membership.records["n6"].host for host in world.hosts.values()} == {"10.9.9.9"}


def test_second_node_of_the_same_name_is_refused_and_reported():
    world = pool(4, seed=27)
    before = world.hosts["n2"]
    world.hosts["twin"] = world.hosts.pop("n2")
    intruder = world.start("n2", address="10.8.8.8")
    world.hosts["n2"], world.hosts["intruder"] = before, intruder
    assert intruder.node.local_member().address == "10.8.8.8"
    conflicts = world.hosts["n1"]
    request = intruder.node.push_pull_request(join=True)
    conflicts.node.receive_stream(conflicts.node.stream_decoder().feed(request), "10.8.8.8", world.now)
    world._drain(conflicts)
    reported = [event for _, event in conflicts.events if isinstance(event, NameConflicted)]
    assert [(event.member.name, event.address) for event in reported] == [("n2", "10.8.8.8")]
    assert conflicts.node._membership.records["n2"].host == before.address


def test_force_leave_turns_failed_into_left_everywhere():
    world = pool(8, seed=28)
    others = [name for name in names(world) if name != "n7"]
    world.crash("n7")
    world.run_till(lambda: world.all_see(["n7"], "failed", observers=others), limit_s=30)
    assert world.hosts["n1"].node.force_leave("n7", prune=False, now=world.now)
    world._drain(world.hosts["n1"])
    world.run_till(lambda: world.all_see(["n7"], "left", observers=others), limit_s=3)
    assert world.hosts["n1"].node.force_leave("nobody", prune=False, now=world.now) is None


def test_force_leave_with_prune_forgets_the_member_everywhere():
    world = pool(8, seed=29)
    others = [name for name in names(world) if name != "n7"]
    world.crash("n7")
    world.run_till(lambda: world.all_see(["n7"], "failed", observers=others), limit_s=30)
    world.hosts["n1"].node.force_leave("n7", prune=True, now=world.now)
    world._drain(world.hosts["n1"])
    world.run_till(lambda: all("n7" not in world.statuses(name) for name in others), limit_s=3)
    world.run_for(120)
    assert all("n7" not in world.statuses(name) for name in others)
    assert any(isinstance(event, MemberReaped) for _, event in world.hosts["n3"].events)


def test_living_member_refutes_a_forced_leave():
    world = pool(8, seed=30)
    world.hosts["n1"].node.force_leave("n5", prune=False, now=world.now)
    world._drain(world.hosts["n1"])
    world.run_for(5)
    world.run_till(lambda: world.all_see(names(world), "alive", observers=names(world)), limit_s=5)


def test_failed_members_are_reaped_after_their_time():
    world = pool(5, seed=31, config=replace(LAN, reconnect_timeout_s=60.0))
    world.crash("n4")
    world.run_for(120)
    assert "n4" not in world.statuses("n0")
    assert "n4" not in world.hosts["n0"].node._membership.records


def test_new_tags_reach_all_as_an_update():
    world = pool(12, seed=32)
    world.hosts["n3"].node.set_tags({"role": "new"}, world.now)
    world._drain(world.hosts["n3"])
    world.run_for(3)
    for host in world.hosts.values():
        (update,) = [event for _, event in host.events if isinstance(event, MemberUpdated)]
        assert update.member.name == "n3"
        assert update.member.tags == {"role": "new"}


def test_each_member_is_reported_joined_once():
    world = pool(12, seed=33)
    world.run_for(60)
    for host in world.hosts.values():
        joined = [event.member.name for _, event in host.events if isinstance(event, MemberJoined)]
        assert sorted(joined) == sorted(names(world))
        assert not any(isinstance(event, MemberFailed) for _, event in host.events)


def test_encrypted_pool_works_and_keeps_to_the_packet_size():
    world = pool(12, seed=34, keys=(bytes(range(32)),))
    world.crash("n3")
    others = [name for name in names(world) if name != "n3"]
    world.run_till(lambda: world.all_see(["n3"], "failed", observers=others), limit_s=20)


def test_rejoin_after_leave_is_alive_again():
    world = pool(8, seed=35)
    world.leave("n4")
    world.run_till(lambda: world.hosts["n4"].left, limit_s=14)
    world.start("n4", incarnation=1)
    world.join("n4", "n0")
    world.run_till(lambda: world.all_see(["n4"], "alive", observers=names(world)), limit_s=10)
    world.run_for(60)
    assert world.all_see(names(world), "alive", observers=names(world))


def test_a_run_is_a_function_of_its_seed():
    def history(seed: int) -> list[object]:
        world = GossipWorld(seed=seed, loss=0.1)
        world.start_pool(10)
        world.run_for(5)
        world.crash("n3")
        world.run_for(20)
        return [(host.name, host.events) for host in world.hosts.values()] + [world.datagrams, world.datagram_bytes]

    assert history(36) == history(36)
    assert history(36) != history(37)
