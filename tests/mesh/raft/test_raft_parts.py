"""The parts of the core on their own: majorities, timing, the log."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mesh.errors import ConfigError, ProtocolError
from mesh.raft.config import RaftConfig
from mesh.raft.log import RaftLog
from mesh.raft.messages import Entry, EntryKind
from mesh.raft.quorum import majority, quorum_value, vote_outcome


@given(st.lists(st.integers(0, 9), min_size=1, max_size=7))
def test_quorum_value_is_the_largest_that_a_majority_reached(values: list[int]) -> None:
    naive = max(v for v in values if sum(1 for other in values if other >= v) > len(values) / 2)
    assert quorum_value(values) == naive


@given(st.integers(1, 9))
def test_two_majorities_always_share_a_voter(voters: int) -> None:
    assert 2 * majority(voters) > voters
    assert majority(voters) <= voters


@given(st.dictionaries(st.sampled_from("abcdefg"), st.booleans()), st.integers(1, 5))
def test_vote_outcome_counts_only_voters(votes: dict[str, bool], count: int) -> None:
    voters = "abcde"[:count]
    granted = sum(votes.get(voter, False) for voter in voters)
    open_votes = sum(voter not in votes for voter in voters)
    expected = "won" if granted * 2 > count else "lost" if (granted + open_votes) * 2 <= count else "pending"
    assert vote_outcome(voters, votes) == expected


@pytest.mark.parametrize("multiplier", [1, 5, 10])
def test_consul_timing_scales(multiplier: int) -> None:
    config = RaftConfig.consul_default(multiplier)
    assert config.election_timeout_s == pytest.approx(1.0 * multiplier)
    assert config.heartbeat_interval_s == pytest.approx(0.15 * multiplier)
    assert config.lease_s == pytest.approx(0.5 * multiplier)


@pytest.mark.parametrize("multiplier", [0, 11, -1])
def test_multiplier_out_of_range_is_refused(multiplier: int) -> None:
    with pytest.raises(ConfigError, match="raft_multiplier"):
        RaftConfig.consul_default(multiplier)


@pytest.mark.parametrize(("heartbeat", "lease", "election"), [(0.1, 1.0, 1.0), (0.3, 0.5, 1.0), (0.0, 0.5, 1.0)])
def test_timing_that_cannot_be_safe_is_refused(heartbeat: float, lease: float, election: float) -> None:
    with pytest.raises(ConfigError, match="raft timing"):
        RaftConfig(heartbeat_interval_s=heartbeat, lease_s=lease, election_timeout_s=election, retransmit_s=0.5)


def entries(first: int, terms: list[int]) -> tuple[Entry, ...]:
    return tuple(Entry(first + i, term, EntryKind.COMMAND, b"%d" % term) for i, term in enumerate(terms))


terms = st.lists(st.integers(1, 4), max_size=8).map(sorted)


@given(terms, terms, st.integers(0, 8))
def test_merge_keeps_what_agrees_and_replaces_from_the_first_conflict(
    ours: list[int], theirs: list[int], at: int
) -> None:
    log = RaftLog(None, entries(1, ours))
    at = min(at, len(ours))
    new = [max(term, ours[at - 1]) for term in theirs] if at else theirs
    if not new:
        return
    conflict = next((i for i, term in enumerate(new) if at + i >= len(ours) or ours[at + i] != term), None)
    expected = ours if conflict is None else ours[: at + conflict] + new[conflict:]
    assert log.merge(entries(at + 1, new)) == at + len(new)
    assert [entry.term for entry in log.entries(1, log.last_index)] == expected if expected else log.last_index == 0


def test_merge_never_replaces_a_committed_entry() -> None:
    log = RaftLog(None, entries(1, [1, 1, 1]))
    log.commit_to(2)
    with pytest.raises(ProtocolError, match="entries to 2 are committed"):
        log.merge(entries(2, [2]))
    assert log.last_index == 3


def test_committed_entries_are_given_out_in_turns_and_only_when_durable() -> None:
    log = RaftLog(None, entries(1, [1] * 7))
    log.append(Entry(8, 1, EntryKind.COMMAND, b""))
    log.commit_to(8)
    turns = [[entry.index for entry in log.take_committed(3)] for _ in range(4)]
    assert turns == [[1, 2, 3], [4, 5, 6], [7], []]
    log.begin_write()
    log.end_write()
    assert [entry.index for entry in log.take_committed(3)] == [8]


@given(terms, st.integers(0, 10), st.integers(0, 5))
def test_latest_match_is_the_last_place_where_logs_may_agree(ours: list[int], index: int, term: int) -> None:
    log = RaftLog(None, entries(1, ours))
    naive = max((i for i, t in enumerate(ours, 1) if i <= index and t <= term), default=0)
    assert log.latest_match(index, term)[0] == naive


@given(st.lists(st.integers(0, 30), min_size=1, max_size=20), st.integers(1, 100), st.integers(0, 20))
def test_trailing_entries_respect_both_limits(sizes: list[int], data_bytes: int, count: int) -> None:
    log = RaftLog(None, [Entry(i, 1, EntryKind.COMMAND, b"x" * size) for i, size in enumerate(sizes, 1)])
    first = log.trailing_from(len(sizes), entries=count, data_bytes=data_bytes)
    kept = sizes[first - 1 :]
    assert len(kept) <= count
    assert sum(kept) <= data_bytes
    if first > 1 and len(kept) < count:
        assert sum(kept) + sizes[first - 2] > data_bytes
