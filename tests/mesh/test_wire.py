"""The one codec: exact round trips, and nothing but ProtocolError for anything else."""

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mesh.errors import LimitExceeded, ProtocolError
from mesh.model.catalog import Node, Service
from mesh.model.check import Check
from mesh.model.command import COMMAND_CODEC, RESULT_CODEC, Applied, KvSet, Register, Rejected
from mesh.wire import WIRE_BYTES_MAX, Codec, encode

REGISTER = Register(Node("n1", "10.0.0.1", meta={"a": "b"}), Service("web", "w"), (Check("n1", "c", "c"),))


@pytest.mark.parametrize("command", [REGISTER, KvSet("a", b"\x00\xff", 2**64 - 1, 7)])
def test_commands_come_back_as_they_were(command):
    assert COMMAND_CODEC.decode(COMMAND_CODEC.encode(command)) == command
    assert COMMAND_CODEC.decode(memoryview(COMMAND_CODEC.encode(command))) == command


def test_results_come_back_as_they_were():
    for result in (Applied(7, ok=False), Rejected(8, "no")):
        assert RESULT_CODEC.decode(RESULT_CODEC.encode(result)) == result


def test_every_truncation_is_a_protocol_error():
    data = COMMAND_CODEC.encode(REGISTER)
    for end in range(len(data)):
        with pytest.raises(ProtocolError):
            COMMAND_CODEC.decode(data[:end])


@given(st.binary(max_size=60))
def test_any_bytes_decode_or_are_a_protocol_error(data):
    try:
        COMMAND_CODEC.decode(data)
    except ProtocolError as error:
        assert "undecodable" in str(error)  # noqa: PT017 - most inputs raise, a few may decode


@given(st.data())
def test_mutated_commands_decode_or_are_a_protocol_error(data):
    mutated = bytearray(COMMAND_CODEC.encode(REGISTER))
    for _ in range(data.draw(st.integers(1, 4))):
        mutated[data.draw(st.integers(0, len(mutated) - 1))] = data.draw(st.integers(0, 255))
    try:
        again = COMMAND_CODEC.decode(bytes(mutated))
    except ProtocolError:
        return
    assert COMMAND_CODEC.decode(COMMAND_CODEC.encode(again)) == again


@pytest.mark.parametrize(
    "data",
    [
        b"\x91" * 100_000 + b"\xc0",  # nested lists
        b"\x81\xa1a" * 100_000 + b"\xc0",  # nested maps
        b"\xdd\xff\xff\xff\xff",  # a list that claims four billion elements
        b"\xdb\xff\xff\xff\xff",  # a string that claims four gigabytes
        b"\x81\xa1\xff\xc0",  # a key that is not UTF-8
    ],
)
def test_hostile_shapes_are_protocol_errors(data):
    for codec in (Codec(object), COMMAND_CODEC):
        with pytest.raises(ProtocolError):
            codec.decode(data)


def test_sizes_are_limited_both_ways():
    with pytest.raises(ProtocolError, match="larger than the limit of 3"):
        Codec(bytes).decode(encode(b"1234"), bytes_max=3)
    with pytest.raises(LimitExceeded):
        encode(bytes(WIRE_BYTES_MAX + 1))


def test_unknown_fields_of_newer_agents_are_passed_over():
    data = msgspec.msgpack.encode({"type": "KvSet", "key": "a", "invented_later": 1})
    assert COMMAND_CODEC.decode(data) == KvSet("a")
