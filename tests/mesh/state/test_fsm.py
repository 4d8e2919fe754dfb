"""Applying entries is total; snapshots are all or nothing."""

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mesh.errors import ProtocolError
from mesh.model.catalog import Node, Proxy, Service, Upstream
from mesh.model.check import Check
from mesh.model.command import (
    COMMAND_CODEC,
    Applied,
    CaRootsSet,
    Command,
    ConfigEntryDelete,
    ConfigEntrySet,
    Deregister,
    IntentionDelete,
    IntentionUpsert,
    KvDelete,
    KvSet,
    Register,
    Rejected,
)
from mesh.model.config_entry import ConfigEntry
from mesh.model.intention import Intention
from mesh.model.query import GetKv, ListKv, ListNodes
from mesh.state.fsm import Fsm
from mesh.state.queries import run
from mesh.state.store import Store
from mesh.state.watch import EVERYTHING


def filled() -> Fsm:
    fsm = Fsm(Store())
    proxy = Service("web-sidecar-proxy", "p", kind="connect-proxy", proxy=Proxy("web", upstreams=(Upstream("api"),)))
    history: tuple[Command, ...] = (
        Register(Node("n1", "10.0.0.1", node_id="u1"), Service("web", "w"), (Check("n1", "c", "c", service_id="w"),)),
        Register(Node("n1", "10.0.0.1", node_id="u1"), proxy),
        KvSet("a/b", b"x" * 1000),
        KvSet("gone"),
        KvDelete("gone"),
        ConfigEntrySet(ConfigEntry("service-defaults", "web", {"Protocol": "http"})),
        IntentionUpsert(Intention("web", "api")),
    )
    for index, command in enumerate(history, start=1):
        assert fsm.apply(index, COMMAND_CODEC.encode(command)) == Applied(index)
    return fsm


def nested(depth: int) -> object:
    value: object = "leaf"
    for _ in range(depth):
        value = {"deeper": value}
    return value


POISON = {
    "empty": b"",
    "not msgpack": b"\xc1",
    "not a map": msgspec.msgpack.encode(7),
    "unknown command": msgspec.msgpack.encode({"type": "Explode"}),
    "missing fields": msgspec.msgpack.encode({"type": "Register"}),
    "wrong types": msgspec.msgpack.encode({"type": "KvSet", "key": 7}),
    "trailing bytes": COMMAND_CODEC.encode(KvSet("a")) + b"x",
    "half an entry": COMMAND_CODEC.encode(KvSet("a" * 100))[:-7],
    "body of bytes": COMMAND_CODEC.encode(ConfigEntrySet(ConfigEntry("mesh", "mesh", {"TLS": b"\xff"}))),
    "body with a number as key": COMMAND_CODEC.encode(ConfigEntrySet(ConfigEntry("mesh", "mesh", {"TLS": {1: 2}}))),
    "body with NaN": COMMAND_CODEC.encode(ConfigEntrySet(ConfigEntry("mesh", "mesh", {"TLS": float("nan")}))),
    "body too deep": COMMAND_CODEC.encode(ConfigEntrySet(ConfigEntry("mesh", "mesh", {"TLS": nested(70)}))),
    "body far too deep": b"\x82\xa4type\xaeConfigEntrySet\xa5entry" + b"\x81\xa4body" * 5000,
    "proxy config of bytes": COMMAND_CODEC.encode(
        Register(Node("n9", "a"), Service("p", "p", kind="connect-proxy", proxy=Proxy("w", config={"x": b""})))
    ),
    "permission of bytes": COMMAND_CODEC.encode(
        IntentionUpsert(Intention("a", "b", None, permissions=({"Action": "allow", "HTTP": {"Methods": b""}},)))
    ),
    "rule without an action": COMMAND_CODEC.encode(IntentionUpsert(Intention("a", "b", None))),
    "negative flags": COMMAND_CODEC.encode(KvSet("k", flags=-1)),
    "recursive compare and delete": COMMAND_CODEC.encode(KvDelete("a", recurse=True, cas_index=3)),
}


@pytest.mark.parametrize("name", POISON)
def test_poison_entry_is_rejected_and_changes_nothing(name):
    fsm = filled()
    before = fsm.state_hash()
    fsm.take_changes()
    result = fsm.apply(100, POISON[name])
    assert isinstance(result, Rejected)
    assert result.index == 100
    assert result.reason
    assert fsm.state_hash() == before
    assert fsm.take_changes() == ()
    assert fsm.applied_index == 100


json_like = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(2**63), 2**64 - 1)
    | st.floats()
    | st.text(max_size=3)
    | st.binary(max_size=3),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=9), inner, max_size=3),
    max_leaves=12,
)
source_like = st.fixed_dictionaries(
    {},
    optional={
        "Name": st.sampled_from(["", "a", "*", "a*", 7, None]),
        "Action": st.sampled_from(["", "allow", "deny", 7, None]),
        "Permissions": json_like,
        "Description": json_like,
        "Type": json_like,
    },
)
bodies = st.one_of(
    st.dictionaries(st.sampled_from(["Sources", "Protocol", "Config"]), json_like, max_size=3),
    st.builds(lambda sources: {"Sources": sources}, st.lists(source_like | json_like, max_size=3)),
)
texts = st.text(max_size=5)
wild_commands = st.one_of(
    st.builds(
        ConfigEntrySet,
        entry=st.builds(
            ConfigEntry,
            kind=st.sampled_from(["service-intentions", "service-defaults", "mesh", ""]),
            name=texts,
            body=bodies,
        ),
    ),
    st.builds(ConfigEntryDelete, kind=texts, name=texts),
    st.builds(KvSet, key=texts, flags=st.integers(-(2**63), 2**64 - 1)),
    st.builds(Deregister, node=texts, service_id=texts, check_id=texts),
    st.builds(IntentionDelete, source=texts, destination=texts),
    st.builds(
        Register,
        node=st.builds(Node, node=texts, address=texts, node_id=texts),
        service=st.none()
        | st.builds(Service, service=texts, service_id=texts, kind=st.sampled_from(["", "connect-proxy"])),
        checks=st.lists(st.builds(Check, node=texts, check_id=texts, name=texts, service_id=texts), max_size=2).map(
            tuple
        ),
    ),
    st.builds(CaRootsSet, cluster_id=texts, roots=st.just(()), cas_index=st.integers(0, 3)),
)


@settings(max_examples=200, deadline=None)
@given(st.lists(wild_commands, max_size=8))
def test_whatever_decodes_is_applied_or_rejected_and_snapshots(history):
    fsm = Fsm(Store())
    for index, command in enumerate(history, start=1):
        result = fsm.apply(index, COMMAND_CODEC.encode(command))
        assert isinstance(result, Applied | Rejected)
        if isinstance(result, Rejected):
            assert "defect" not in result.reason
    other = Fsm(Store())
    other.restore(len(history), fsm.snapshot()())
    assert other.state_hash() == fsm.state_hash()


@settings(max_examples=200, deadline=None)
@given(st.sampled_from(sorted(POISON)), st.data())
def test_mutated_entries_never_raise(name, data):
    valid = COMMAND_CODEC.encode(
        Register(Node("n1", "10.0.0.1"), Service("web", "w"), (Check("n1", "c", "c", service_id="w"),))
    )
    entry = bytearray(data.draw(st.sampled_from([valid, POISON[name]])))
    for _ in range(data.draw(st.integers(0, 4))):
        if entry:
            entry[data.draw(st.integers(0, len(entry) - 1))] = data.draw(st.integers(0, 255))
    result = Fsm(Store()).apply(1, bytes(entry))
    assert isinstance(result, Applied) or "defect" not in result.reason


def test_an_entry_is_never_applied_twice():
    fsm = filled()
    with pytest.raises(AssertionError, match="applied already"):
        fsm.apply(fsm.applied_index, COMMAND_CODEC.encode(KvSet("a")))


def test_changes_are_collected_until_taken():
    fsm = Fsm(Store())
    fsm.apply(1, COMMAND_CODEC.encode(KvSet("a")))
    fsm.apply(2, COMMAND_CODEC.encode(KvSet("b")))
    assert fsm.take_changes() == (("kv", "a"), ("kv", "b"))
    assert fsm.take_changes() == ()


def test_snapshot_is_of_the_moment_it_was_taken_though_the_state_changes_while_it_streams():
    fsm = filled()
    expected = fsm.state_hash()
    stream = iter(fsm.snapshot()())
    chunks = [next(stream)]
    fsm.apply(101, COMMAND_CODEC.encode(Deregister("n1")))
    chunks.append(next(stream))
    fsm.apply(102, COMMAND_CODEC.encode(KvDelete("", recurse=True)))
    fsm.apply(103, COMMAND_CODEC.encode(IntentionDelete("web", "api")))
    chunks.extend(stream)
    other = Fsm(Store())
    other.restore(7, chunks)
    assert other.state_hash() == expected
    assert other.applied_index == 7


def test_restore_replaces_the_state_behind_the_same_store_and_wakes_everyone():
    fsm = Fsm(Store())
    store = fsm.store
    fsm.apply(1, COMMAND_CODEC.encode(KvSet("mine")))
    fsm.restore(7, filled().snapshot()())
    assert fsm.take_changes() == (EVERYTHING,)
    assert run(store, GetKv("mine")).value is None
    assert run(store, GetKv("a/b")).value.value == b"x" * 1000
    assert run(store, ListNodes()).index == 1
    assert run(store, ListKv("gone")).index == 5
    assert fsm.apply(8, COMMAND_CODEC.encode(KvSet("new"))) == Applied(8)


def test_broken_snapshot_leaves_the_state_as_it_was():
    stream = b"".join(filled().snapshot()())
    fsm = Fsm(Store())
    fsm.apply(1, COMMAND_CODEC.encode(KvSet("mine")))
    before = fsm.state_hash()
    fsm.take_changes()
    broken = [stream[:at] for at in range(0, len(stream), 7)]
    broken += [stream[:at] + bytes([stream[at] ^ 0x41]) + stream[at + 1 :] for at in range(0, len(stream), 5)]
    broken += [stream + b"x", stream + stream]
    for damaged in broken:
        with pytest.raises(ProtocolError):
            fsm.restore(50, [damaged])
    assert fsm.state_hash() == before
    assert fsm.applied_index == 1
    assert fsm.take_changes() == ()


def test_snapshot_of_another_format_version_is_named():
    stream = bytearray(b"".join(filled().snapshot()()))
    stream[12] = 9
    with pytest.raises(ProtocolError, match="format version 9"):
        Fsm(Store()).restore(1, [bytes(stream)])


def test_large_values_are_snapshotted_in_pieces():
    fsm = Fsm(Store())
    for index in range(1, 9):
        fsm.apply(index, COMMAND_CODEC.encode(KvSet(f"k{index}", bytes(200_000))))
    assert max(map(len, fsm.snapshot()())) < 700_000


def test_defect_in_applying_is_answered_and_shortage_of_memory_stops_the_server(monkeypatch):
    fsm = filled()
    faults: list[BaseException] = [KeyError("secret"), MemoryError()]

    def broken(*_: object) -> bool:
        raise faults.pop(0)

    monkeypatch.setattr(fsm.store, "apply", broken)
    assert fsm.apply(50, COMMAND_CODEC.encode(KvSet("a"))) == Rejected(
        50, "entry 50 cannot be applied: KeyError (a defect; report it)"
    )
    with pytest.raises(MemoryError):
        fsm.apply(51, COMMAND_CODEC.encode(KvSet("a")))
