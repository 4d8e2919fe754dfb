"""The bugs that real raft implementations had, each as a script."""

from __future__ import annotations

from dataclasses import replace

import pytest
from sim.raft_world import CONFIG, World, seal_snapshot

from mesh.errors import LimitExceeded, NotLeader, ProtocolError, Refused
from mesh.raft.messages import (
    AppendRequest,
    AppendResponse,
    Configuration,
    Entry,
    EntryKind,
    HardState,
    HeartbeatRequest,
    HeartbeatResponse,
    Message,
    Server,
    SnapshotChunk,
    SnapshotMeta,
    TimeoutNow,
    VoteRequest,
    VoteResponse,
)
from mesh.raft.ready import Role


def others(world: World, name: str) -> list[str]:
    return [other for other in sorted(world.hosts) if other != name]


# -- 1: membership


def test_new_leader_refuses_a_membership_change_before_it_committed_in_its_term() -> None:
    world = World(1, "abcd")
    leader = world.wait_leader()
    world.run(1.0)
    world.crash(leader)
    world.tampered = lambda _, __, message: None if isinstance(message, AppendResponse) else message
    world.run_until(lambda: world.leader() is not None, 15, "the next leader")
    new = world.leader()
    assert new is not None
    node = world.node(new)
    assert not node.is_ready_for_changes
    with pytest.raises(Refused, match="has not committed"):
        node.propose_configuration(node.log.configuration.without(leader), world.clock(world.hosts[new]))


def test_second_membership_change_waits_for_the_first() -> None:
    world = World(2, "abcde", bootstrap="abc")
    leader = world.wait_leader()
    now = world.node(leader).log.configuration
    assert world.change(leader, now.with_voter(Server("d", "d:8300")))
    with pytest.raises(Refused, match="not committed yet"):
        world.node(leader).propose_configuration(now.with_voter(Server("e", "e:8300")), world.now)
    world.run(2.0)
    with pytest.raises(Refused, match="one voter"):
        world.node(leader).propose_configuration(now.without("a").without("b"), world.clock(world.hosts[leader]))


def test_uncommitted_membership_change_is_undone_when_another_leader_overwrites_it() -> None:
    world = World(3, "abcd", bootstrap="abc")
    leader = world.wait_leader()
    world.isolate(leader)
    now = world.node(leader).log.configuration
    assert world.change(leader, now.with_voter(Server("d", "d:8300")))
    assert "d" in world.node(leader).log.configuration.voter_ids
    world.run_until(lambda: world.leader() not in (None, leader), 15, "the next leader")
    world.commit(b"meanwhile")
    world.heal()
    world.run(5.0)
    assert "d" not in world.node(leader).log.configuration.voter_ids


# -- 2: an entry of an old term is not committed by counting


def test_old_entry_on_a_majority_is_not_committed_before_one_of_the_new_term() -> None:
    """Figure 8 of the paper, from step (c) on: nothing may be committed although a majority holds the old entry."""
    world = World(4, "abc")
    leader = world.wait_leader()
    first, second = others(world, leader)
    world.tampered = lambda _, __, message: None if isinstance(message, AppendResponse) else message
    index = world.propose(leader, b"old term")
    world.run(0.3)
    assert index is not None
    world.crash(leader)
    # The next leader has the old entry everywhere, but may not count it; its own no-op must reach a majority first.
    new_term = world.node(first).term

    def own_entry_lost(_: str, __: str, message: Message) -> Message | None:
        if isinstance(message, AppendRequest) and message.term > new_term:
            old = tuple(entry for entry in message.entries if entry.term <= new_term)
            return replace_entries(message, old)
        return message

    world.tampered = own_entry_lost
    world.run_until(lambda: world.leader() is not None, 15, "the next leader")
    new = world.leader()
    assert new is not None
    world.run(3.0)
    assert world.node(first).log.term_at(index) == world.node(second).log.term_at(index)
    assert world.node(new).log.commit < index
    world.tampered = None
    world.wait_leader()
    world.run(1.0)
    assert world.highest_committed > index


def replace_entries(message: AppendRequest, entries: tuple[Entry, ...]) -> AppendRequest:
    return AppendRequest(message.term, message.prev_index, message.prev_term, message.commit, entries)


# -- 3, 4, 20: what is promised is on the disk


@pytest.mark.parametrize("steps_done", [0, 1])
def test_vote_is_not_given_twice_in_a_term_across_a_crash(steps_done: int) -> None:
    world = World(5, "abc")
    world.run(0.1)
    candidate, rival = VoteRequest(2, 9, 1, False, False), VoteRequest(2, 9, 1, False, False)
    world.deliver("b", "a", candidate)
    assert world.node("a").vote == "b"
    world.crash("a", steps_done=steps_done)
    sent = ("a", 2) in world.votes
    assert not sent  # the answer waits for the disk
    world.start("a")
    if steps_done:
        assert world.hosts["a"].disk.hard_state == HardState(2, "b")
        world.node("a")._election.contact_s = float("-inf")
        world.deliver("c", "a", rival)
        assert world.node("a").vote == "b"


def test_append_is_not_acknowledged_before_it_is_durable() -> None:
    world = World(6, "abc")
    leader = world.wait_leader()
    follower = others(world, leader)[0]
    world.run(1.0)
    acknowledged: list[int] = []

    def watch(sender: str, _: str, message: Message) -> Message:
        if sender == follower and isinstance(message, AppendResponse):
            acknowledged.append(message.index)
        return message

    world.tampered = watch
    world.faults.slow_disk = 1.0
    world.isolate(others(world, leader)[1])
    index = world.propose(leader, b"x")
    assert index is not None
    world.run(0.04)  # the message has arrived; no disk is that fast now
    assert world.node(follower).log.last_index == index
    assert index not in acknowledged
    world.run(2.5)
    assert index in acknowledged


def test_heartbeats_are_answered_while_the_disk_is_busy() -> None:
    world = World(7, "abc")
    leader = world.wait_leader()
    follower = others(world, leader)[0]
    world.run(1.0)
    world.faults.slow_disk = 1.0
    world.propose(leader, b"x")
    world.run(0.005)
    assert world.hosts[follower].unfinished
    answers: list[Message] = []
    world.tampered = lambda sender, _, message: answers.append(message) or message if sender == follower else message
    node = world.node(leader)
    world.deliver(leader, follower, HeartbeatRequest(node.term, 1, 0))
    assert answers == [HeartbeatResponse(node.term, 1)]


def test_single_server_acknowledges_only_what_is_durable() -> None:
    world = World(8, "a")
    world.wait_leader()
    world.faults.slow_disk = 1.0
    index = world.propose("a", b"x")
    assert index is not None
    world.run(0.04)
    assert b"x" not in world.acknowledged
    assert world.node("a").log.commit < index
    world.crash("a", steps_done=0)
    world.start("a")
    world.faults.slow_disk = 0.0
    world.wait_leader()
    assert b"x" not in [data for _, data in world.committed.values()]


def test_leader_does_not_count_itself_before_its_own_disk_is_done() -> None:
    world = World(9, "abc")
    leader = world.wait_leader()
    world.run(1.0)
    world.isolate(others(world, leader)[0])
    world.faults.slow_disk = 1.0
    index = world.propose(leader, b"x")
    world.faults.slow_disk = 0.0
    assert index is not None
    world.run(0.03)  # the one follower has it on disk and said so
    assert world.node(leader).progress[others(world, leader)[1]].match == index
    assert world.node(leader).log.commit < index
    world.run(1.5)
    assert b"x" in world.acknowledged


# -- 7, 8: snapshots


def fill(world: World, count: int) -> None:
    for number in range(count):
        leader = world.wait_leader()
        world.propose(leader, b"entry %d" % number)
        world.run(0.02)


def test_follower_that_was_away_too_long_catches_up_by_snapshot_and_continues() -> None:
    world = World(10, "abc")
    leader = world.wait_leader()
    away = others(world, leader)[0]
    world.isolate(away)
    fill(world, 120)
    assert world.node(leader).log.base > world.node(away).log.last_index
    world.heal()
    world.run(8.0)
    log = world.node(away).log
    assert log.snapshot is not None
    assert log.applied == world.node(world.wait_leader()).log.applied
    assert world.hosts[away].state == world.hosts[leader].state


@pytest.mark.parametrize("steps_done", [0, 1, 2, 3, 9])
def test_crash_at_any_point_of_a_snapshot_install_leaves_a_server_that_starts(steps_done: int) -> None:
    world = World(11, "abc")
    leader = world.wait_leader()
    away = others(world, leader)[0]
    world.isolate(away)
    fill(world, 120)
    world.heal()

    def installing() -> bool:
        node = world.hosts[away].node
        return node is not None and node._outbox.writing is not None and node._outbox.writing.completes_snapshot

    world.run_until(installing, 10.0, "the last chunk")
    world.crash(away, steps_done=steps_done)
    world.start(away)
    world.recover()


def test_damaged_snapshot_is_fetched_again() -> None:
    world = World(12, "abc")
    leader = world.wait_leader()
    away = others(world, leader)[0]
    world.isolate(away)
    fill(world, 120)
    damaged: list[SnapshotChunk] = []

    def damage(_: str, __: str, message: Message) -> Message:
        if isinstance(message, SnapshotChunk) and not damaged:
            damaged.append(message)
            return SnapshotChunk(
                message.term,
                message.index,
                message.snapshot_term,
                message.offset,
                b"?" * len(message.data),
                message.is_last,
            )
        return message

    world.tampered = damage
    world.heal()
    world.run(8.0)
    assert damaged
    assert world.hosts[away].state == world.hosts[leader].state


def test_snapshot_older_than_the_log_removes_nothing_that_was_acknowledged() -> None:
    world = World(13, "abc")
    leader = world.wait_leader()
    world.run(1.0)
    follower = others(world, leader)[0]
    node, log = world.node(follower), world.node(follower).log
    world.tampered = lambda _, __, message: None if isinstance(message, HeartbeatRequest) else message
    for _ in range(5):
        world.propose(leader, b"x")
    world.run(0.02)
    last, behind = log.last_index, log.last_index - 2
    log.commit = log.applied = min(log.commit, behind - 1)
    term = log.term_at(behind)
    assert term is not None
    late = seal_snapshot(SnapshotMeta(behind, term, log.configuration), 0)
    world.deliver(leader, follower, SnapshotChunk(node.term, behind, term, 0, late, True))
    world.run(0.02)
    assert log.last_index == last


def test_log_behind_a_snapshot_under_way_is_kept_so_that_it_is_not_installed_in_a_loop() -> None:
    world = World(14, "abc")
    leader = world.wait_leader()
    away = others(world, leader)[0]
    world.isolate(away)
    fill(world, 120)
    world.run(1.0)
    installed: set[int] = set()

    def slow_chunks(_: str, peer: str, message: Message) -> Message | None:
        if isinstance(message, SnapshotChunk):
            installed.add(message.index)
        # Only one chunk in several gets through, while the leader goes on writing and compacting.
        return None if isinstance(message, SnapshotChunk) and world.rng.random() < 0.8 else message

    world.tampered = slow_chunks
    world.heal()
    fill(world, 200)
    world.run_until(lambda: world.node(away).log.applied >= 120, 60.0, "the install")
    world.run(1.0)
    assert world.node(away).log.applied == world.node(leader).log.applied
    assert len(installed) <= 2, "at most one more, when a compaction fell between the install and the rest of the log"


# -- 9, 10, 11: elections


def test_server_back_from_a_partition_does_not_move_the_term() -> None:
    world = World(20, "abc")
    leader = world.wait_leader()
    away = others(world, leader)[0]
    world.isolate(away)
    world.run(60.0)
    world.heal()
    term = world.node(leader).term
    world.run(10.0)
    assert world.leader() == leader
    assert {world.node(name).term for name in world.hosts} == {term}


def test_removed_server_does_not_disturb_the_others() -> None:
    world = World(21, "abcd")
    leader = world.wait_leader()
    removed = others(world, leader)[0]
    world.isolate(removed)  # so it never learns of its removal
    assert world.change(leader, world.node(leader).log.configuration.without(removed))
    world.run(5.0)
    world.heal()
    term = world.node(leader).term
    world.run(30.0)
    assert world.leader() == leader
    assert world.node(leader).term == term


def test_one_server_that_cannot_hear_the_leader_does_not_depose_it() -> None:
    world = World(22, "abc")
    leader = world.wait_leader()
    deaf = others(world, leader)[0]
    world.blocked.add((leader, deaf))
    term = world.node(leader).term
    world.run(30.0)
    assert world.leader() == leader
    assert world.node(leader).term == term


def test_bridge_to_a_leader_without_quorum_does_not_keep_a_majority_from_electing() -> None:
    """a leads and hears only c; a's heartbeats reach c for ever unless it falls silent. b, c, d, e are a majority."""
    world = World(23, "abcde")
    leader = world.wait_leader()
    rest = others(world, leader)
    bridge = rest[0]
    for other in rest[1:]:
        world.blocked |= {(leader, other), (other, leader)}
    world.run_until(lambda: world.leader() not in (None, leader), 10.0, "a leader of the connected majority")
    assert bridge in rest
    world.commit(b"again", seconds=10.0)


def test_leader_that_hears_nobody_steps_down_although_all_hear_it() -> None:
    world = World(24, "abc")
    leader = world.wait_leader()
    for other in others(world, leader):
        world.blocked.add((other, leader))
    world.run_until(lambda: world.leader() not in (None, leader), 10.0, "another leader")
    assert world.node(leader).role is not Role.LEADER
    world.commit(b"again", seconds=10.0)


def test_member_with_a_higher_term_and_a_shorter_log_does_not_freeze_the_group() -> None:
    world = World(25, "abc")
    leader = world.wait_leader()
    behind = others(world, leader)[0]
    world.crash(behind)
    world.commit(b"x")
    world.hosts[behind].disk.hard_state = HardState(world.node(leader).term + 7, None)
    world.start(behind)
    world.commit(b"y", seconds=15.0)
    world.run(3.0)
    assert len({world.node(name).term for name in world.hosts}) == 1


def test_server_that_is_asking_around_itself_still_gives_its_vote() -> None:
    world = World(28, "abc")
    leader = world.wait_leader()
    world.run(1.0)
    voter, rival = others(world, leader)
    world.isolate(voter)
    world.crash(leader)
    node = world.node(voter)
    world.run_until(lambda: node.role is Role.PRE_CANDIDATE, 5.0, "the pre-candidate")
    node.term, node.vote = node.term + 1, None  # as after the answer of a server of a later term
    world.deliver(rival, voter, VoteRequest(node.term, node.log.last_index, node.log.last_term, False, False))
    assert (node.vote, node.role) == (rival, Role.FOLLOWER)


def test_huge_term_of_a_server_that_is_no_member_is_ignored() -> None:
    world = World(26, "abc")
    leader = world.wait_leader()
    world.run(1.0)
    terms = {name: world.node(name).term for name in world.hosts}
    huge = 2**52
    for name in world.hosts:
        for message in (
            VoteRequest(huge, huge, huge, False, True),
            VoteRequest(huge, huge, huge, True, False),
            VoteResponse(huge, False, False),
            AppendResponse(huge, True, 5),
            HeartbeatResponse(huge, 1),
            HeartbeatRequest(huge, 1, 0),
            AppendRequest(huge, 0, 0, 0, ()),
        ):
            world.deliver("mallory", name, message)
    world.run(3.0)
    assert {name: world.node(name).term for name in world.hosts} == terms
    assert world.leader() == leader


def test_two_leaders_of_one_term_are_a_protocol_error() -> None:
    world = World(27, "abc")
    leader = world.wait_leader()
    world.run(1.0)
    first, second = others(world, leader)
    term = world.node(leader).term
    with pytest.raises(ProtocolError, match="claims to lead"):
        world.deliver(second, first, HeartbeatRequest(term, 1, 0))


# -- 12: reads


def test_deposed_leader_answers_no_read_and_its_lease_ends_before_another_leads() -> None:
    world = World(30, "abc")
    old = world.wait_leader()
    world.run(1.0)
    assert world.node(old).lease_valid(world.clock(world.hosts[old]))
    world.isolate(old)
    world.run_until(lambda: not world.node(old).lease_valid(world.clock(world.hosts[old])), 0.6, "the lease's end")
    assert world.leader() == old, "nobody else may lead while the lease holds"
    world.run_until(lambda: world.leader() != old, 10.0, "another leader")
    before = world.reads_done
    world.read(old)
    world.run(5.0)
    assert world.reads_done == before


def test_paused_leader_does_not_serve_from_its_lease_when_it_wakes() -> None:
    world = World(31, "abc")
    old = world.wait_leader()
    world.run(1.0)
    world.pause(old, 8.0)
    world.run(7.0)
    new = world.leader()
    world.commit(b"written elsewhere")
    world.run_until(lambda: world.hosts[old].paused_until <= world.now, 3.0, "the wake-up")
    assert new not in (None, old)
    assert not world.node(old).lease_valid(world.clock(world.hosts[old]))


def test_vote_is_withheld_from_others_while_a_leader_may_hold_a_lease() -> None:
    world = World(32, "abc")
    leader = world.wait_leader()
    world.run(1.0)
    voter, rival = others(world, leader)
    node = world.node(voter)
    for ahead in (1, 0):
        # Also when our term has moved past that leader's for another reason.
        if not ahead:
            node.term, node.vote, node.leader_id = node.term + 1, None, None
        world.deliver(rival, voter, VoteRequest(node.term + ahead, 99, node.term, False, False))
        assert node.vote != rival


def test_restarted_server_votes_for_nobody_while_the_leader_it_answered_may_hold_a_lease() -> None:
    world = World(33, "abc")
    leader = world.wait_leader()
    world.run(1.0)
    voter, rival = others(world, leader)
    world.crash(voter)
    world.isolate(leader)
    world.start(voter)
    term = world.node(voter).term
    world.deliver(rival, voter, VoteRequest(term + 1, 99, term, False, False))
    assert world.node(voter).term == term


def test_read_waits_for_the_first_commit_of_the_term() -> None:
    world = World(34, "abc")
    old = world.wait_leader()
    world.commit(b"x")
    world.crash(old)
    world.tampered = lambda _, __, message: None if isinstance(message, AppendResponse) else message
    world.run_until(lambda: world.leader() is not None, 15.0, "the next leader")
    new = world.leader()
    assert new is not None
    world.read(new)
    world.run(0.5)
    assert world.reads_done == 0
    world.tampered = None
    world.run(3.0)
    world.wait_leader()


def test_reads_are_answered_only_by_a_round_that_began_after_them() -> None:
    world = World(35, "abc")
    leader = world.wait_leader()
    world.run(1.0)
    world.isolate(leader)
    host = world.hosts[leader]
    world.read(leader)
    node = world.node(leader)
    # Answers to rounds from before the read are worth nothing to it.
    for other in others(world, leader):
        world.deliver(other, leader, HeartbeatResponse(node.term, 1))
    world.run(0.2)
    assert world.reads_done == 0
    world.run(3.0)
    assert not host.reads, "the read failed when the leadership ended"


def test_longer_log_of_an_older_term_gets_no_vote() -> None:
    world = World(36, "abc")
    leader = world.wait_leader()
    world.run(1.0)
    world.crash(leader)
    world.run(1.0)  # nobody is shielded any more
    voter, rival = others(world, leader)
    log = world.node(voter).log
    term = world.node(voter).term
    for pre in (True, False):
        world.deliver(rival, voter, VoteRequest(term + 9, log.last_index + 100, log.last_term - 1, pre, False))
        assert world.node(voter).vote != rival or world.node(voter).term < term + 9


def test_leader_without_a_quorum_falls_silent_when_its_lease_ends() -> None:
    world = World(37, "abc")
    leader = world.wait_leader()
    world.run(1.0)
    for other in others(world, leader):
        world.blocked.add((other, leader))
    sent: list[float] = []
    cut_at = world.now

    def watch(sender: str, _: str, message: Message) -> Message:
        if sender == leader and isinstance(message, HeartbeatRequest | AppendRequest):
            sent.append(world.now)
        return message

    world.tampered = watch
    world.run(0.85)
    world.propose(leader, b"x")
    assert world.leader() == leader
    assert sent
    assert max(sent) <= cut_at + CONFIG.lease_s + 0.01


# -- 13: transfer


def test_transfer_hands_over_without_an_election_timeout() -> None:
    world = World(40, "abc")
    leader = world.wait_leader()
    world.run(1.0)
    target = others(world, leader)[1]
    assert world.transfer(leader, target)
    assert not world.node(leader).lease_valid(world.clock(world.hosts[leader])), "its successor may lead any moment"
    assert world.propose(leader, b"late") is None
    started = world.now
    world.run_until(lambda: world.leader() == target, 1.0, "the successor")
    assert world.now - started < 0.1


def test_a_stranger_that_pretends_to_be_a_transfers_target_deposes_nobody() -> None:
    world = World(1, "abc")
    leader = world.wait_leader()
    world.run(2.0)
    term = world.node(leader).term
    for name in sorted(world.hosts):
        request = VoteRequest(term + 1, 2**40, term + 1, pre=False, transfer=True)
        world.node(name).receive_message("stranger", request, world.clock(world.hosts[name]))
        assert world.node(name).term == term
    assert world.leader() == leader


def test_transfer_to_a_dead_target_is_given_up_and_writes_resume() -> None:
    world = World(41, "abc")
    leader = world.wait_leader()
    target = others(world, leader)[0]
    world.crash(target)
    world.propose(leader, b"x")
    assert world.transfer(leader, target)
    world.run(1.5)
    assert world.leader() == leader
    world.commit(b"y", seconds=3.0)


def test_transfer_whose_target_dies_midway_ends_in_an_election() -> None:
    world = World(42, "abc")
    leader = world.wait_leader()
    world.run(1.0)
    target = others(world, leader)[0]
    assert world.transfer(leader, target)
    world.run_until(lambda: world.node(target).role is Role.CANDIDATE, 1.0, "the campaign")
    world.crash(target)
    world.commit(b"y", seconds=15.0)


def test_timeout_now_from_a_server_that_does_not_lead_is_ignored() -> None:
    world = World(43, "abc")
    leader = world.wait_leader()
    world.run(1.0)
    first, second = others(world, leader)
    world.deliver(second, first, TimeoutNow(world.node(first).term))
    assert world.node(first).role is Role.FOLLOWER


# -- 14: old appends


def test_delayed_and_repeated_append_does_not_cut_off_what_came_after_it() -> None:
    world = World(50, "abc")
    leader = world.wait_leader()
    world.run(1.0)
    follower = others(world, leader)[0]
    kept: list[AppendRequest] = []

    def keep(_: str, peer: str, message: Message) -> Message:
        if peer == follower and isinstance(message, AppendRequest) and message.entries:
            kept.append(message)
        return message

    world.tampered = keep
    for number in range(6):
        world.propose(leader, b"%d" % number)
        world.run(0.05)
    last = world.node(follower).log.last_index
    for message in reversed(kept):
        world.deliver(leader, follower, message)
    assert world.node(follower).log.last_index == last


def test_append_that_would_replace_a_committed_entry_is_a_protocol_error() -> None:
    world = World(51, "abc")
    leader = world.wait_leader()
    world.commit(b"x")
    world.run(1.0)
    follower = others(world, leader)[0]
    node = world.node(follower)
    commit = node.log.commit
    previous = node.log.term_at(commit - 1)
    assert previous is not None
    forged = Entry(commit, node.term + 1, EntryKind.COMMAND, b"forged")
    with pytest.raises(ProtocolError, match="committed"):
        world.deliver(leader, follower, AppendRequest(node.term + 1, commit - 1, previous, commit, (forged,)))


def test_follower_commits_only_as_far_as_the_message_reaches() -> None:
    """What lies behind the entries of an append may be another leader's and is about to be replaced."""
    world = World(52, "abc")
    leader = world.wait_leader()
    world.run(1.0)
    follower = others(world, leader)[0]
    world.isolate(leader)
    node = world.node(follower)
    last = node.log.last_index
    stray = Entry(last + 1, node.term, EntryKind.COMMAND, b"stray")
    world.deliver(leader, follower, AppendRequest(node.term, last, node.log.last_term, 0, (stray,)))
    world.deliver(leader, follower, AppendRequest(node.term, last, node.log.term_at(last) or 0, last + 1, ()))
    assert node.log.commit <= last


# -- 15: the disk answers late


def test_write_of_a_replaced_entry_does_not_make_its_replacement_durable() -> None:
    world = World(60, "abc")
    leader = world.wait_leader()
    world.run(1.0)
    follower, rival = others(world, leader)
    node = world.node(follower)
    world.isolate(follower)
    world.run_until(lambda: node._outbox.writing is None, 1.0, "a quiet disk")
    world.faults.slow_disk = 1.0
    last, term = node.log.last_index, node.log.last_term
    old = Entry(last + 1, node.term, EntryKind.COMMAND, b"old")
    world.deliver(leader, follower, AppendRequest(node.term, last, term, 0, (old,)))
    writing = node._outbox.writing
    assert writing is not None
    assert writing.entries == (old,)
    new = Entry(last + 1, node.term + 1, EntryKind.COMMAND, b"new")
    node._election.contact_s = float("-inf")
    world.deliver(rival, follower, AppendRequest(node.term + 1, last, term, 0, (new,)))
    for step in world.hosts[follower].unfinished:
        step()
    node.advance(writing, world.clock(world.hosts[follower]))
    assert node.log.stable == last


# -- 16: removing servers


def test_leader_that_removes_itself_steps_down_once_that_is_committed() -> None:
    world = World(61, "abc")
    leader = world.wait_leader()
    world.run(1.0)
    assert world.change(leader, world.node(leader).log.configuration.without(leader))
    world.run_until(lambda: world.leader() not in (None, leader), 2.0, "its successor")
    world.run(1.0)
    new = world.leader()
    assert new is not None
    assert leader not in world.node(new).log.configuration.voter_ids
    assert world.node(leader).role is Role.FOLLOWER
    world.commit(b"after")


def test_one_of_two_servers_can_be_removed() -> None:
    world = World(62, "ab")
    leader = world.wait_leader()
    world.run(1.0)
    other = others(world, leader)[0]
    world.crash(other)
    world.start(other)
    world.run(0.5)
    assert world.change(leader, world.node(leader).log.configuration.without(other))
    world.run(1.0)
    world.crash(other)
    world.commit(b"alone", seconds=5.0)


def test_removed_servers_snapshot_configuration_is_the_one_at_its_index() -> None:
    world = World(63, "abcd", bootstrap="abc")
    leader = world.wait_leader()
    world.run(0.5)
    world.isolate(*others(world, leader))
    node = world.node(leader)
    before = node.log.configuration
    assert world.change(leader, before.with_learner(Server("d", "d:8300")))
    assert node.snapshot_meta().configuration == before


@pytest.mark.parametrize("node_id", ["", "x" * 256])
def test_membership_change_that_peers_could_not_decode_is_refused(node_id: str) -> None:
    world = World(64, "abc")
    leader = world.wait_leader()
    world.run(0.5)
    node = world.node(leader)
    last = node.log.last_index
    with pytest.raises(Refused, match="too long or empty"):
        node.propose_configuration(node.log.configuration.with_learner(Server(node_id, "d:1")), world.now)
    assert node.log.last_index == last


# -- 17: flow control and limits


def test_lost_acknowledgements_do_not_stop_the_stream() -> None:
    world = World(70, "abc")
    leader = world.wait_leader()
    world.run(1.0)
    world.tampered = lambda _, __, message: None if isinstance(message, AppendResponse) else message
    for number in range(60):
        world.propose(leader, b"%d" % number)
    world.run(0.3)
    world.tampered = None
    world.run(2.0)
    assert world.acknowledged[b"59"] > 0


def test_proposals_beyond_the_uncommitted_limit_are_refused_and_accepted_again_later() -> None:
    world = World(71, "abc", config=replace(CONFIG, uncommitted_bytes_max=100))
    leader = world.wait_leader()
    world.run(1.0)
    node, clock = world.node(leader), world.clock(world.hosts[leader])
    world.isolate(*others(world, leader))
    world.isolate(leader)
    node.propose(b"x" * 90, clock)
    with pytest.raises(LimitExceeded, match="wait for a quorum"):
        node.propose(b"x" * 20, clock)
    world.heal()
    world.run(2.0)
    world.commit(b"x" * 20)


def test_entry_over_the_limit_is_refused() -> None:
    world = World(72, "a", config=replace(CONFIG, entry_bytes_max=10))
    world.wait_leader()
    with pytest.raises(LimitExceeded, match="log entry of 11 bytes"):
        world.node("a").propose(b"x" * 11, 0.0)


def test_follower_refuses_proposals_and_names_the_leader() -> None:
    world = World(73, "abc")
    leader = world.wait_leader()
    world.run(1.0)
    with pytest.raises(NotLeader) as caught:
        world.node(others(world, leader)[0]).propose(b"x", 0.0)
    assert caught.value.leader_id == leader


# -- 21: pauses


def test_leader_paused_for_less_than_an_election_timeout_keeps_its_term() -> None:
    world = World(80, "abc")
    leader = world.wait_leader()
    world.run(1.0)
    term = world.node(leader).term
    world.pause(leader, 0.8)
    world.run(5.0)
    assert (world.leader(), world.node(leader).term) == (leader, term)


def test_bootstrap_changes_nothing_on_a_server_with_state() -> None:
    world = World(90, "abc")
    world.wait_leader()
    assert not world.node("a").bootstrap(Configuration((Server("a", "a:1"),)))
    assert len(world.node("a").log.configuration.voters) == 3


def test_empty_servers_learn_the_cluster_from_the_one_that_bootstrapped() -> None:
    world = World(91, "abc")
    fresh = World(92, "abc", bootstrap="a")
    del world
    leader = fresh.wait_leader()
    assert leader == "a"
    for name in "bc":
        now = fresh.node("a").log.configuration
        assert fresh.change("a", now.with_learner(Server(name, f"{name}:8300")))
        fresh.run(1.0)
        assert fresh.change("a", fresh.node("a").log.configuration.with_voter(Server(name, f"{name}:8300")))
        fresh.run(1.0)
    assert fresh.node("c").log.configuration.voter_ids == ("a", "b", "c")
    fresh.crash("a")
    fresh.commit(b"without the first", seconds=15.0)
