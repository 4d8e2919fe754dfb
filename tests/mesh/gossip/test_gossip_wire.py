"""The memberlist wire: known bytes, round trips, and every kind of damage. Only WireError may leave a decoder."""

import random
import struct
import zlib
from contextlib import suppress

import msgpack
import pytest
from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from hypothesis import given, settings
from hypothesis import strategies as st

from mesh.errors import ConfigError, ProtocolError
from mesh.gossip.fields import host_of, pack
from mesh.gossip.keyring import Keyring
from mesh.gossip.lzw import decompress
from mesh.gossip.messages import (
    ACCUSED_INCARNATION_MAX,
    ALIVE_INCARNATION_MAX,
    VERSIONS,
    Ack,
    Alive,
    Dead,
    IndirectPing,
    Kind,
    Message,
    Nack,
    NodeState,
    NodeStateEntry,
    Ping,
    Suspect,
    User,
    decode,
    encode,
)
from mesh.gossip.packet import DATAGRAM_BYTES_MAX, PacketCodec, compound, compound_parts
from mesh.gossip.stream import (
    NODES_MAX,
    STREAM_BYTES_MAX,
    PushPull,
    StreamDecoder,
    StreamError,
    StreamUser,
    encode_stream,
)
from mesh.gossip.wire_error import WireError

KEY = bytes(range(32))


def keyring(*keys: bytes) -> Keyring:
    rng = random.Random(7)
    return Keyring(keys or (KEY,), lambda: rng.randbytes(12))


def codec(*, keys: Keyring | None = None, label: str = "") -> PacketCodec:
    return PacketCodec(keyring=keys, label=label)


def lzw(data: bytes) -> bytes:
    """A plain LZW encoder (LSB first, 8-bit literals, clear at a full table), written from the format alone."""
    bits = count = 0
    out = bytearray()

    def emit(code: int, width: int) -> None:
        nonlocal bits, count
        bits |= code << count
        count += width
        while count >= 8:
            out.append(bits & 255)
            bits >>= 8
            count -= 8

    width, table, prefix = 9, {bytes((i,)): i for i in range(256)}, b""
    next_code = 258
    emit(256, 9)
    for value in data:
        extended = prefix + bytes((value,))
        if extended in table:
            prefix = extended
            continue
        emit(table[prefix], width)
        if next_code < 4096:
            table[extended] = next_code
            if next_code == 1 << width:
                width += 1
            next_code += 1
        else:
            emit(256, width)
            width, table, next_code = 9, {bytes((i,)): i for i in range(256)}, 258
        prefix = bytes((value,))
    if prefix:
        emit(table[prefix], width)
        if next_code < 4096 and next_code == 1 << width:
            width += 1
    emit(257, width)
    if count:
        out.append(bits & 255)
    return bytes(out)


NAMES = st.text(st.characters(categories=("L", "N"), include_characters="-._"), min_size=1, max_size=30)
ADDRESSES = st.binary(min_size=4, max_size=4) | st.binary(min_size=16, max_size=16)
UINT32 = st.integers(0, 2**32 - 1)
PORTS = st.integers(1, 65_535)
SOURCES = st.tuples(ADDRESSES, PORTS, NAMES) | st.just((b"", 0, ""))
MESSAGES: st.SearchStrategy[Message] = st.one_of(
    st.builds(lambda seq, node, src: Ping(seq, node, *src), UINT32, NAMES, SOURCES),
    st.builds(
        lambda seq, target, port, node, nack, src: IndirectPing(seq, target, port, node, nack, *src),
        UINT32,
        ADDRESSES,
        PORTS,
        NAMES,
        st.booleans(),
        SOURCES,
    ),
    st.builds(Ack, UINT32, st.binary(max_size=100)),
    st.builds(Nack, UINT32),
    st.builds(Suspect, st.integers(0, ACCUSED_INCARNATION_MAX), NAMES, NAMES),
    st.builds(Dead, st.integers(0, ACCUSED_INCARNATION_MAX), NAMES, NAMES),
    st.builds(
        Alive,
        st.integers(0, ALIVE_INCARNATION_MAX),
        NAMES,
        ADDRESSES,
        PORTS,
        st.binary(max_size=512),
        st.just(VERSIONS),
    ),
    st.builds(User, st.binary(max_size=200)),
)
ENTRIES = st.builds(
    NodeStateEntry,
    NAMES,
    ADDRESSES,
    PORTS,
    st.binary(max_size=512),
    st.integers(0, ALIVE_INCARNATION_MAX),
    st.sampled_from(NodeState),
    st.just(VERSIONS),
)
STREAMS = st.one_of(
    st.builds(PushPull, st.booleans(), st.lists(ENTRIES, max_size=6).map(tuple), st.binary(max_size=300)),
    st.builds(lambda seq, node: Ping(seq, node), UINT32, NAMES),
    st.builds(Ack, UINT32),
    st.builds(StreamError, st.text(max_size=50)),
)


def test_ping_is_the_bytes_that_a_go_peer_reads():
    # One type byte, then a fixmap of two with old raw strings.
    assert encode(Ping(1, "a")) == b"\x00\x82\xa5SeqNo\x01\xa4Node\xa1a"
    assert encode(Dead(5, "n", "n")) == b"\x05\x83\xabIncarnation\x05\xa4Node\xa1n\xa4From\xa1n"


def test_strings_are_old_raw_even_when_long():
    # str8 (0xd9) and bin (0xc4) are the new types that old decoders refuse.
    assert b"\xda\x00\xc8" in encode(Alive(1, "n", bytes(4), 1, b"\xaa" * 200, VERSIONS))


def test_alive_from_go_reads_with_mapped_address_and_versions_as_string():
    mapped = bytes(10) + b"\xff\xff" + bytes((10, 0, 0, 7))
    data = pack(
        {"Incarnation": 3, "Node": "go", "Addr": mapped, "Port": 8301, "Meta": b"m", "Vsn": b"\x01\x05\x02\x02\x05\x05"}
    )
    alive = decode(bytes((Kind.ALIVE,)) + data)
    assert alive == Alive(3, "go", mapped, 8301, b"m", (1, 5, 2, 2, 5, 5))
    assert host_of(mapped) == "10.0.0.7"


@given(MESSAGES)
def test_every_message_survives_a_round_trip(message):
    assert decode(encode(message)) == message


@given(st.lists(MESSAGES, min_size=1, max_size=8), st.booleans(), st.booleans(), st.sampled_from(["", "pool"]))
def test_packets_survive_a_round_trip_in_every_envelope(messages, encrypted, checksum, label):
    pool = codec(keys=keyring() if encrypted else None, label=label)
    body = compound([encode(message) for message in messages]) if len(messages) > 1 else encode(messages[0])
    packet = pool.seal(body, checksum=checksum)
    assert len(packet) <= len(body) + pool.overhead_bytes
    opened = pool.open(packet)
    assert opened.messages == tuple(messages)
    assert opened.problems == ()


@given(st.binary(max_size=3000) | st.lists(st.sampled_from([b"ab", b"abc", b"x"]), max_size=6000).map(b"".join))
@settings(deadline=None)
def test_lzw_reads_back_what_an_encoder_wrote(data):
    assert decompress(lzw(data), bytes_max=1 << 20) == data


def test_lzw_goes_on_after_the_table_is_full():
    data = random.Random(1).randbytes(40_000)
    assert decompress(lzw(data), bytes_max=1 << 20) == data


def test_compressed_compound_in_a_checksum_reads_as_go_sends_it():
    body = compound([encode(Nack(1)), encode(Ack(2))])
    compressed = bytes((Kind.COMPRESS,)) + pack({"Algo": 0, "Buf": lzw(body)})
    packet = struct.pack(">BI", Kind.CHECKSUM, zlib.crc32(compressed)) + compressed
    assert codec().open(packet).messages == (Nack(1), Ack(2))


# Damage.


@given(st.binary(max_size=400))
def test_random_bytes_raise_nothing_but_protocol_errors(data):
    for pool in (codec(), codec(keys=keyring()), codec(label="pool")):
        with suppress(ProtocolError):
            pool.open(data)


@given(MESSAGES, st.data())
def test_mutated_packets_raise_nothing_but_protocol_errors(message, data):
    packet = bytearray(codec().seal(compound([encode(message)] * 2), checksum=False))
    for _ in range(data.draw(st.integers(1, 4))):
        packet[data.draw(st.integers(0, len(packet) - 1))] = data.draw(st.integers(0, 255))
    with suppress(ProtocolError):
        codec().open(bytes(packet))


@pytest.mark.parametrize("encrypted", [False, True])
def test_packet_cut_at_each_byte_is_refused_or_cut_clean(encrypted):
    pool = codec(keys=keyring() if encrypted else None)
    packet = pool.seal(encode(Alive(1, "n", bytes(4), 1, b"meta", VERSIONS)), checksum=True)
    for length in range(len(packet)):
        with pytest.raises(WireError):
            pool.open(packet[:length])


def test_bad_part_of_a_compound_is_dropped_alone():
    opened = codec().open(compound([encode(Nack(1)), b"\x02\xc1", encode(Nack(2))]))
    assert opened.messages == (Nack(1), Nack(2))
    assert [problem.reason for problem in opened.problems] == ["msgpack"]


def test_changed_bit_fails_the_checksum():
    packet = bytearray(codec().seal(encode(Nack(77)), checksum=True))
    packet[-1] ^= 1
    with pytest.raises(WireError) as caught:
        codec().open(bytes(packet))
    assert caught.value.reason == "checksum"


@pytest.mark.parametrize("depth", [1025, 60_000])
def test_deep_nesting_is_refused(depth):
    with pytest.raises(WireError):
        decode(bytes((Kind.ACK,)) + b"\x91" * depth)


@pytest.mark.parametrize(
    "header", [b"\xdd\xff\xff\xff\xff", b"\xdf\xff\xff\xff\xff", b"\xdb\xff\xff\xff\xff", b"\xc6\xff\xff\xff\xff"]
)
def test_huge_claimed_lengths_are_refused_without_memory(header):
    for kind in (Kind.PING, Kind.ALIVE, Kind.COMPRESS):
        with pytest.raises(WireError):
            codec().open(bytes((kind,)) + header)
    decoder = StreamDecoder(keyring=None, label="")
    with pytest.raises(WireError):
        decoder.feed(bytes((Kind.PUSH_PULL,)) + header + bytes(100_000))


def test_oversized_packet_is_refused():
    with pytest.raises(WireError) as caught:
        codec().open(bytes((Kind.USER,)) + bytes(DATAGRAM_BYTES_MAX))
    assert caught.value.reason == "oversized"


def test_decompression_bomb_is_capped():
    bomb = lzw(bytes(200_000))
    assert len(bomb) < 2_000
    with pytest.raises(WireError) as caught:
        codec().open(bytes((Kind.COMPRESS,)) + pack({"Algo": 0, "Buf": bomb}))
    assert caught.value.reason == "compression"


def test_nested_compression_and_nested_compounds_are_refused():
    inner = bytes((Kind.COMPRESS,)) + pack({"Algo": 0, "Buf": lzw(encode(Nack(1)))})
    with pytest.raises(WireError):
        codec().open(bytes((Kind.COMPRESS,)) + pack({"Algo": 0, "Buf": lzw(inner)}))
    opened = codec().open(compound([compound([encode(Nack(1))]), inner]))
    assert opened.messages == ()
    assert [problem.reason for problem in opened.problems] == ["type", "type"]


def test_compound_of_255_parts_works_and_a_shorter_one_is_refused():
    packet = compound([encode(Nack(number)) for number in range(255)])
    assert len(compound_parts(packet)) == 255
    with pytest.raises(WireError):
        compound_parts(packet[:-1])


def test_duplicate_keys_are_refused():
    with pytest.raises(WireError, match="duplicate"):
        decode(bytes((Kind.NACK,)) + b"\x82\xa5SeqNo\x01\xa5SeqNo\x02")


@pytest.mark.parametrize("name", ["a/b", "a\x00b", "", "x" * 129, "a b", "line\nbreak", b"\xff\xfe"])
def test_names_that_no_member_may_have_are_refused(name):
    fields = {"Incarnation": 1, "Node": name, "Addr": bytes(4), "Port": 1, "Meta": b"", "Vsn": bytes(VERSIONS)}
    with pytest.raises(WireError):
        decode(bytes((Kind.ALIVE,)) + pack(fields))


@pytest.mark.parametrize(
    "change",
    [
        {"Meta": bytes(10_000)},
        {"Meta": bytes(513)},
        {"Addr": b"12345"},
        {"Addr": None},
        {"Port": 65_536},
        {"Port": 0},
        {"Port": "80"},
        {"Incarnation": -1},
        {"Incarnation": 2**32 - 1},
        {"Incarnation": True},
        {"Vsn": [1, 2, "x"]},
        {"Vsn": b"\x00\x05\x02\x02\x05\x05"},
        {"Vsn": b"\x06\x05\x02\x02\x05\x05"},
    ],
)
def test_alive_with_an_impossible_field_is_refused(change):
    fields = {"Incarnation": 1, "Node": "n", "Addr": bytes(4), "Port": 1, "Meta": b"", "Vsn": bytes(VERSIONS)}
    with pytest.raises(WireError):
        decode(bytes((Kind.ALIVE,)) + pack(fields | change))


def test_unknown_types_and_empty_messages_are_refused():
    for data in (b"", b"\x0e", b"\x63\x80", bytes((Kind.PUSH_PULL,)) + b"\x80", bytes((Kind.ERROR,)) + b"\x80"):
        with pytest.raises(WireError):
            codec().open(data)


def test_an_ack_is_never_longer_than_the_ping_it_answers():
    for node in ("", "n", "a-longer-node-name"):
        assert len(encode(Ack(2**32 - 1))) <= len(encode(Ping(2**32 - 1, node)))


# Keys and labels.


def test_any_key_of_the_ring_opens_and_the_first_seals():
    old, new = bytes(16), bytes(range(32))
    sealed_old = codec(keys=keyring(old)).seal(encode(Nack(1)), checksum=False)
    both = codec(keys=keyring(new, old))
    assert both.open(sealed_old).messages == (Nack(1),)
    sealed_new = both.seal(encode(Nack(2)), checksum=False)
    assert codec(keys=keyring(new)).open(sealed_new).messages == (Nack(2),)
    with pytest.raises(WireError):
        codec(keys=keyring(old)).open(sealed_new)


def test_plain_packets_are_refused_by_an_encrypted_pool_and_sealed_ones_by_a_plain_pool():
    with pytest.raises(WireError) as caught:
        codec(keys=keyring()).open(codec().seal(encode(User(bytes(60))), checksum=False))
    assert caught.value.reason == "decrypt"
    with pytest.raises(WireError):
        codec().open(codec(keys=keyring()).seal(encode(Nack(1)), checksum=False))


def test_unknown_encryption_version_is_refused():
    sealed = bytearray(keyring().seal(b"x", b""))
    sealed[0] = 2
    with pytest.raises(WireError):
        keyring().open(bytes(sealed), b"")


def test_padded_envelope_of_version_zero_opens():
    nonce, plain = bytes(12), b"hello"
    padded = plain + bytes((11,)) * 11
    sealed = b"\x00" + nonce + AESGCM(KEY).encrypt(nonce, padded, b"")
    assert keyring().open(sealed, b"") == plain
    broken = b"\x00" + nonce + AESGCM(KEY).encrypt(nonce, plain + b"\x40" * 11, b"")
    with pytest.raises(WireError):
        keyring().open(broken, b"")


def test_label_is_bound_as_associated_data():
    packet = codec(keys=keyring(), label="one").seal(encode(Nack(1)), checksum=False)
    relabelled = bytes((Kind.LABEL, 3)) + b"two" + packet[5:]
    for pool, data in [
        (codec(keys=keyring(), label="two"), packet),
        (codec(keys=keyring(), label="two"), relabelled),
        (codec(keys=keyring()), packet),
        (codec(keys=keyring(), label="one"), bytes((Kind.LABEL, 3)) + b"one" + packet),
        (codec(keys=keyring(), label="one"), bytes((Kind.LABEL, 0)) + packet[5:]),
        (codec(keys=keyring(), label="one"), bytes((Kind.LABEL, 255)) + b"one"),
        (codec(keys=keyring(), label="one"), bytes((Kind.LABEL,))),
    ]:
        with pytest.raises(WireError):
            pool.open(data)


def test_bad_keyrings_are_refused():
    for keys in ([], [bytes(15)], [bytes(16)] * 6):
        with pytest.raises(ConfigError):
            Keyring(keys, lambda: bytes(12))


# Streams.


@given(STREAMS, st.booleans(), st.sampled_from(["", "pool"]), st.data())
@settings(deadline=None)
def test_streams_read_the_same_however_they_are_cut(message, encrypted, label, data):
    keys = keyring() if encrypted else None
    encoded = encode_stream(message, keyring=keys, label=label)
    decoder = StreamDecoder(keyring=keys, label=label)
    position = 0
    result = None
    while position < len(encoded):
        assert result is None
        size = data.draw(st.integers(1, 200))
        result = decoder.feed(encoded[position : position + size])
        position += size
    assert result == message


@given(STREAMS, st.booleans(), st.data())
@settings(deadline=None)
def test_mutated_streams_raise_nothing_but_protocol_errors(message, encrypted, data):
    keys = keyring() if encrypted else None
    encoded = bytearray(encode_stream(message, keyring=keys, label=""))
    for _ in range(data.draw(st.integers(1, 4))):
        encoded[data.draw(st.integers(0, len(encoded) - 1))] = data.draw(st.integers(0, 255))
    with suppress(ProtocolError):
        StreamDecoder(keyring=keys, label="").feed(bytes(encoded))


def test_stream_cut_at_each_byte_waits_for_the_rest():
    entry = NodeStateEntry("n", bytes(4), 1, b"m", 1, NodeState.ALIVE, VERSIONS)
    for keys in (None, keyring()):
        encoded = encode_stream(PushPull(True, (entry, entry), b"state"), keyring=keys, label="")
        for length in range(len(encoded)):
            assert StreamDecoder(keyring=keys, label="").feed(encoded[:length]) is None


def test_compressed_push_pull_reads_as_go_sends_it():
    entry = NodeStateEntry("n", bytes(4), 1, b"m", 1, NodeState.LEFT, VERSIONS)
    push_pull = PushPull(False, (entry,) * 40, b"state")
    compressed = bytes((Kind.COMPRESS,)) + pack(
        {"Algo": 0, "Buf": lzw(encode_stream(push_pull, keyring=None, label=""))}
    )
    assert StreamDecoder(keyring=None, label="").feed(compressed) == push_pull


def test_user_message_stream_reads():
    data = bytes((Kind.USER,)) + pack({"UserMsgLen": 5}) + b"hello"
    assert StreamDecoder(keyring=None, label="").feed(data) == StreamUser(b"hello")


@pytest.mark.parametrize(
    "header",
    [
        {"Nodes": NODES_MAX + 1, "UserStateLen": 0, "Join": True},
        {"Nodes": -1, "UserStateLen": 0, "Join": True},
        {"Nodes": 0, "UserStateLen": STREAM_BYTES_MAX + 1, "Join": True},
        {"Nodes": 1.5, "UserStateLen": 0, "Join": True},
    ],
)
def test_push_pull_that_claims_too_much_is_refused(header):
    with pytest.raises(WireError):
        StreamDecoder(keyring=None, label="").feed(bytes((Kind.PUSH_PULL,)) + pack(header))


def test_endless_stream_is_refused_at_its_limit():
    decoder = StreamDecoder(keyring=None, label="")
    decoder.feed(bytes((Kind.PUSH_PULL,)) + pack({"Nodes": 0, "UserStateLen": STREAM_BYTES_MAX, "Join": True}))
    for _ in range(STREAM_BYTES_MAX // (1024 * 1024) - 1):
        assert decoder.feed(bytes(1024 * 1024)) is None
    with pytest.raises(WireError):
        decoder.feed(bytes(2 * 1024 * 1024))
    frame = struct.pack(">BI", Kind.ENCRYPT, STREAM_BYTES_MAX + 1)
    with pytest.raises(WireError):
        StreamDecoder(keyring=keyring(), label="").feed(frame)


def test_member_with_an_odd_name_is_left_out_of_a_push_pull():
    good = {"Name": "ok", "Addr": bytes(4), "Port": 1, "Meta": b"", "Incarnation": 1, "State": 0, "Vsn": b""}
    body = pack({"Nodes": 2, "UserStateLen": 0, "Join": False}) + pack(good | {"Name": "a/b"}) + pack(good)
    message = StreamDecoder(keyring=None, label="").feed(bytes((Kind.PUSH_PULL,)) + body)
    assert [entry.name for entry in message.nodes] == ["ok"]
    assert [problem.reason for problem in message.problems] == ["name"]


def test_plain_stream_is_refused_by_an_encrypted_pool():
    with pytest.raises(WireError):
        StreamDecoder(keyring=keyring(), label="").feed(encode_stream(Ack(1), keyring=None, label=""))
    with pytest.raises(WireError):
        StreamDecoder(keyring=None, label="").feed(encode_stream(Ack(1), keyring=keyring(), label=""))


def test_msgpack_here_is_the_old_format_both_ways():
    assert msgpack.unpackb(pack({"k": b"v", "s": "t"}), raw=True) == {b"k": b"v", b"s": b"t"}
