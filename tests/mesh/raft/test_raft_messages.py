"""Raft bytes: everything survives the round trip, nothing malformed gets through, and no message can break a server."""

from __future__ import annotations

import contextlib
import random

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mesh.errors import ProtocolError
from mesh.raft.config import RaftConfig
from mesh.raft.messages import (
    ENTRIES_MAX,
    MESSAGE_BYTES_MAX,
    AppendRequest,
    AppendResponse,
    Configuration,
    Entry,
    EntryKind,
    HeartbeatRequest,
    HeartbeatResponse,
    Message,
    Server,
    SnapshotChunk,
    SnapshotMeta,
    SnapshotResponse,
    TimeoutNow,
    VoteRequest,
    VoteResponse,
    decode_configuration,
    decode_message,
    decode_snapshot_meta,
    encode_configuration,
    encode_message,
    encode_snapshot_meta,
)
from mesh.raft.node import Node

counters = st.integers(0, 2**53 - 1)
small = st.integers(0, 12)
CONFIGURATION = Configuration(tuple(Server(name, f"{name}:1") for name in "abc"))


@st.composite
def appends(draw: st.DrawFn, numbers: st.SearchStrategy[int] = small) -> AppendRequest:
    previous = draw(numbers)
    term = 0 if previous == 0 else draw(st.integers(1, 3))
    entries: list[Entry] = []
    last = term
    for offset in range(draw(st.integers(0, 4))):
        last = max(1, last + draw(st.integers(0, 1)))
        kind = draw(st.sampled_from([EntryKind.COMMAND, EntryKind.NOOP, EntryKind.CONFIGURATION]))
        data = encode_configuration(CONFIGURATION) if kind is EntryKind.CONFIGURATION else draw(st.binary(max_size=5))
        entries.append(Entry(previous + 1 + offset, last, kind, data))
    return AppendRequest(max(1, last) + draw(st.integers(0, 2)), previous, term, draw(numbers), tuple(entries))


def messages(numbers: st.SearchStrategy[int]) -> st.SearchStrategy[Message]:
    return st.one_of(
        st.builds(VoteRequest, numbers, numbers, numbers, st.booleans(), st.booleans()),
        st.builds(VoteResponse, numbers, st.booleans(), st.booleans()),
        appends(),
        st.builds(AppendResponse, numbers, st.booleans(), numbers, numbers, numbers),
        st.builds(HeartbeatRequest, numbers, numbers, numbers),
        st.builds(HeartbeatResponse, numbers, numbers),
        st.builds(SnapshotChunk, numbers, numbers, numbers, numbers, st.binary(max_size=9), st.booleans()),
        st.builds(SnapshotResponse, numbers, numbers, numbers),
        st.builds(TimeoutNow, numbers),
    )


@given(messages(counters))
def test_message_survives_the_round_trip(message: Message) -> None:
    assert decode_message(encode_message(message)) == message


@given(st.binary(max_size=200))
def test_random_bytes_are_a_message_or_a_protocol_error(data: bytes) -> None:
    with contextlib.suppress(ProtocolError):
        assert decode_message(data) is not None


@given(messages(small), st.data())
def test_truncated_or_changed_message_is_a_message_or_a_protocol_error(message: Message, data: st.DataObject) -> None:
    encoded = bytearray(encode_message(message))
    if data.draw(st.booleans()):
        del encoded[data.draw(st.integers(0, len(encoded) - 1)) :]
        with pytest.raises(ProtocolError):
            decode_message(bytes(encoded))
        return
    for _ in range(data.draw(st.integers(1, 4))):
        encoded[data.draw(st.integers(0, len(encoded) - 1))] = data.draw(st.integers(0, 255))
    with contextlib.suppress(ProtocolError):
        assert decode_message(bytes(encoded)) is not None


@pytest.mark.parametrize(
    ("array", "reason"),
    [
        ([1, 2**63, 0, 0, True, False], "term of 2^63"),
        ([5, -1, 0, 0], "negative term"),
        ([10, 1], "unknown message"),
        ([9], "too few fields"),
        ([9, 1, 1], "too many fields"),
        ([9, "1"], "text for a number"),
        ([9, 1.0], "fraction for a number"),
        ([3, 2, 0, 0, 0, [[2, 1, 0, b""]]], "gap after the previous entry"),
        ([3, 2, 0, 0, 0, [[1, 1, 0, b""], [3, 1, 0, b""]]], "gap between entries"),
        ([3, 2, 0, 0, 0, [[1, 3, 0, b""]]], "entry of a later term than the message"),
        ([3, 5, 4, 3, 0, [[5, 2, 0, b""]]], "entry of an earlier term than its predecessor"),
        ([3, 5, 4, 6, 0, []], "previous term after the message's"),
        ([3, 5, 4, 0, 0, []], "previous entry without a term"),
        ([3, 5, 0, 4, 0, []], "a term before the first entry"),
        ([3, 2, 0, 0, 0, [[1, 1, 3, b""]]], "unknown kind of entry"),
        ([3, 2, 0, 0, 0, [[1, 1, 2, b"?"]]], "configuration that does not decode"),
        ([3, 2, 0, 0, 0, [[1, 1, 0, "text"]]], "text for bytes"),
        ([3, 2, 0, 0, 0, [[i, 1, 0, b""] for i in range(1, ENTRIES_MAX + 2)]], "too many entries"),
        ({"type": 9}, "map for an array"),
        ([[[[[[9]]]]]], "nesting"),
    ],
)
def test_contradictory_message_is_refused(array: object, reason: str) -> None:
    with pytest.raises(ProtocolError):
        decode_message(msgspec.msgpack.encode(array))


def test_message_over_the_size_limit_is_refused_before_it_is_decoded() -> None:
    with pytest.raises(ProtocolError, match="the limit is"):
        decode_message(b"\x00" * (MESSAGE_BYTES_MAX + 1))


def test_text_that_is_not_utf8_is_refused() -> None:
    data = encode_configuration(CONFIGURATION).replace(b"a:1", b"\xff:1")
    for decode in (decode_configuration, decode_snapshot_meta):
        with pytest.raises(ProtocolError):
            decode(data)


def test_trailing_bytes_are_refused() -> None:
    with pytest.raises(ProtocolError):
        decode_message(encode_message(TimeoutNow(1)) + b"\x00")


@pytest.mark.parametrize(
    "bad",
    [
        Configuration(),
        Configuration((Server("b", "1"), Server("a", "1"))),
        Configuration((Server("a", "1"), Server("a", "2"))),
        Configuration((Server("a", "1"),), (Server("a", "1"),)),
        Configuration((Server("", "1"),)),
        Configuration(tuple(Server(f"{n:03}", "") for n in range(65))),
    ],
)
def test_impossible_configuration_is_refused(bad: Configuration) -> None:
    with pytest.raises(ProtocolError):
        decode_configuration(encode_configuration(bad))
    with pytest.raises(ProtocolError):
        decode_snapshot_meta(encode_snapshot_meta(SnapshotMeta(1, 1, bad)))


def test_equal_configurations_have_equal_bytes() -> None:
    forwards, backwards = Configuration(), Configuration()
    for name in "abc":
        forwards = forwards.with_learner(Server(name, "x")).with_voter(Server(name, "x"))
    for name in "cba":
        backwards = backwards.with_voter(Server(name, "x"))
    assert encode_configuration(forwards) == encode_configuration(backwards)


@settings(max_examples=300)
@given(st.lists(st.tuples(st.sampled_from("bcx"), messages(small), st.floats(0, 1.5)), max_size=25), st.integers(0, 3))
def test_no_sequence_of_valid_messages_breaks_a_server(steps: list[tuple[str, Message, float]], seed: int) -> None:
    """A hostile member may stop progress; it may not crash us, make us undo a commit, or go back in term."""
    now = 0.0
    node = Node(node_id="a", config=RaftConfig.consul_default(), rng=random.Random(seed), now=now)
    node.bootstrap(CONFIGURATION)
    term, commit = 0, 0
    for sender, message, wait in steps:
        now += wait
        if now >= node.next_deadline(now):
            node.handle_timer(now)
        with contextlib.suppress(ProtocolError):
            node.receive_message(sender, message, now)
        ready = node.take_ready(now)
        if ready.write is not None:
            node.advance(ready.write, now, installed=None)
        assert node.term >= term
        assert node.log.commit >= commit
        term, commit = node.term, node.log.commit
