"""The gossip driver on real loopback sockets. Trio's clock jumps while nothing moves, so no test waits in real time."""

import errno
import logging
import random
import resource
import socket
import struct
from contextlib import asynccontextmanager, closing, suppress

import pytest
import trio
import trio.testing

from agent.gossip_driver import INBOUND_STREAMS_MAX, INBOUND_STREAMS_PER_HOST_MAX, GossipDriver
from mesh.errors import ConfigError, LimitExceeded, Unreachable
from mesh.gossip.config import LAN
from mesh.gossip.events import MemberFailed, MemberJoined, MemberLeft, MemberReaped, MemberUpdated
from mesh.gossip.fields import pack
from mesh.gossip.messages import VERSIONS, Ack, Nack, NodeState, NodeStateEntry, Ping, decode, encode
from mesh.gossip.stream import PushPull, StreamDecoder, StreamError, encode_stream

KEY = bytes(range(32))


@pytest.fixture
def clock():
    # Loopback packets arrive at once; 10 ms without any of them means that everybody waits for a timer.
    return trio.testing.MockClock(autojump_threshold=0.01)


def make(name, *, host="127.0.0.1", port=0, keys=(), tags=None, config=LAN, events=None):
    return GossipDriver(
        name=name,
        bind=(host, port),
        advertise=(host, port),
        tags=tags or {"role": name},
        config=config,
        keys=keys,
        rng=random.Random(name),
        on_event=(events if events is not None else []).append,
    )


@asynccontextmanager
async def running(*drivers):
    """The drivers, started, the later ones joined to the first."""
    async with trio.open_nursery() as nursery:
        for driver in drivers:
            await nursery.start(driver.run)
        for driver in drivers[1:]:
            assert await driver.join([at(drivers[0])]) == 1
        yield drivers
        nursery.cancel_scope.cancel()


def at(driver):
    host, port = driver.address
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


def statuses(driver):
    return {member.name: member.status for member in driver.members()}


async def wait_until(condition, *, limit_s=60):
    with trio.fail_after(limit_s):
        while not condition():
            await trio.sleep(0.05)


async def read_reply(stream):
    decoder = StreamDecoder(keyring=None, label="")
    while True:
        data = await stream.receive_some()
        if not data:
            return None
        message = decoder.feed(bytes(data))
        if message is not None:
            return message


async def test_joined_drivers_see_each_other_and_report_it(clock):
    events = []
    async with running(make("a", events=events), make("b"), make("c")) as (a, b, c):
        await wait_until(lambda: all(len(driver.members()) == 3 for driver in (a, b, c)))
        assert [member.name for member in a.members()] == ["a", "b", "c"]
        assert a.members()[1] == b.local_member()
        assert b.local_member().tags == {"role": "b"}
        assert [type(event) for event in events] == [MemberJoined] * 3
        statistics = a.statistics()
        assert statistics["members"] == "3"
        assert statistics["failed"] == statistics["left"] == "0"
        assert statistics["encrypted"] == "false"
        assert set(statistics) >= {"health_score", "member_time", "event_time", "query_time", "intent_queue"}


async def test_ipv6_pool_works(clock):
    async with running(make("a", host="::1"), make("b", host="::1")) as (a, b):
        await wait_until(lambda: statuses(a) == statuses(b) == {"a": "alive", "b": "alive"})


async def test_join_counts_the_reached_and_forgives_the_rest(clock):
    a, b = make("a"), make("b")
    async with running(a), trio.open_nursery() as nursery:
        await nursery.start(b.run)
        assert await b.join(["127.0.0.1:1", at(a), "not an address:x"]) == 1
        nursery.cancel_scope.cancel()


async def test_failed_join_names_each_address_and_why(clock):
    async with running(make("a")) as (a,):
        with pytest.raises(Unreachable) as caught:
            await a.join(["127.0.0.1:1", "127.0.0.1:99999"])
        text = str(caught.value)
        assert "127.0.0.1:1: Connection refused" in text
        assert "127.0.0.1:99999" in text
        with pytest.raises(Unreachable, match=r"'\[::1' is not host"):
            await a.join(["[::1"])
        with pytest.raises(Unreachable, match="no address was given"):
            await a.join([])


async def test_join_gives_up_on_a_peer_that_accepts_and_says_nothing(clock):
    with socket.create_server(("127.0.0.1", 0)) as silent:
        async with running(make("a")) as (a,):
            with pytest.raises(Unreachable, match="no answer within 10 s"):
                await a.join([f"127.0.0.1:{silent.getsockname()[1]}"])


@pytest.mark.parametrize("kind", [socket.SOCK_STREAM, socket.SOCK_DGRAM])
async def test_port_in_use_is_a_config_error_that_names_the_address(clock, kind):
    with socket.socket(socket.AF_INET, kind) as taken:
        taken.bind(("127.0.0.1", 0))
        if kind == socket.SOCK_STREAM:
            taken.listen()
        port = taken.getsockname()[1]
        with pytest.raises(ConfigError, match=f"127.0.0.1:{port}.*Address already in use"):
            await make("a", port=port).run()


def test_bad_configuration_is_refused_before_any_socket():
    with pytest.raises(ConfigError, match="not an IP address"):
        make("a", host="localhost")
    with pytest.raises(ConfigError, match="16, 24 or 32 bytes"):
        make("a", keys=(b"short",))
    with pytest.raises(LimitExceeded):
        make("a", tags={"big": "x" * 600})


async def test_leave_is_seen_as_left_and_ends_in_bounded_time(clock):
    events = []
    async with running(make("a", events=events), make("b")) as (a, b):
        await wait_until(lambda: statuses(a).get("b") == "alive")
        started = trio.current_time()
        await b.leave()
        assert trio.current_time() - started < 2 * LAN.broadcast_timeout_s + LAN.leave_propagate_s
        assert statuses(a)["b"] == "left"
        assert any(isinstance(event, MemberLeft) for event in events)
        assert not any(isinstance(event, MemberFailed) for event in events)


async def test_vanished_member_fails_and_can_be_forced_out_and_pruned(clock):
    events = []
    a, b, c = make("a", events=events), make("b"), make("c")
    async with running(a, c):
        async with running(b):
            await b.join([at(a)])
            await wait_until(lambda: statuses(c).get("b") == "alive")
        await wait_until(lambda: statuses(a)["b"] == statuses(c)["b"] == "failed")
        assert [event.member.name for event in events if isinstance(event, MemberFailed)] == ["b"]
        assert await a.force_leave("b")
        await wait_until(lambda: statuses(c)["b"] == "left")
        assert not await a.force_leave("nobody")
        assert await c.force_leave("b", prune=True)
        await wait_until(lambda: "b" not in statuses(a))
        assert isinstance(events[-1], MemberReaped)


async def test_tags_change_for_all(clock):
    events = []
    async with running(make("a", events=events), make("b")) as (a, b):
        await wait_until(lambda: statuses(a).get("b") == "alive")
        b.set_tags({"dc": "dc2"})
        await wait_until(lambda: a.members()[1].tags == {"dc": "dc2"})
        assert [event.member.tags for event in events if isinstance(event, MemberUpdated)] == [{"dc": "dc2"}]
        with pytest.raises(LimitExceeded):
            b.set_tags({"dc": "x" * 600})
        assert b.local_member().tags == {"dc": "dc2"}


async def test_restart_on_the_same_port_is_taken_at_once(clock):
    a = make("a")
    async with running(a):
        first = make("b")
        async with running(first):
            await first.join([at(a)])
        second = make("b", port=first.address[1], tags={"role": "again"})
        async with running(second):
            await second.join([at(a)])
            await wait_until(lambda: a.members()[1].tags == {"role": "again"}, limit_s=2)
            assert statuses(second) == {"a": "alive", "b": "alive"}


async def test_encrypted_pool_refuses_plain_text_and_other_keys(clock):
    async with running(make("a", keys=(KEY,)), make("b", keys=(KEY,))) as (a, _):
        await wait_until(lambda: statuses(a) == {"a": "alive", "b": "alive"})
        assert a.statistics()["encrypted"] == "true"
        for outsider in (make("plain"), make("other", keys=(bytes(32),))):
            async with running(outsider):
                with pytest.raises(Unreachable):
                    await outsider.join([at(a)])
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as udp:
            udp.sendto(encode(Ping(1, "a")), a.address)
        await wait_until(lambda: a.counters["decrypt"] == 3)
        assert statuses(a) == {"a": "alive", "b": "alive"}


async def test_bad_packets_are_counted_dropped_and_logged_once(clock, caplog):
    caplog.set_level(logging.WARNING, "mesh.gossip")
    async with running(make("a")) as (a,):
        noise = random.Random(5)
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as udp:
            for _ in range(200):
                udp.sendto(b"\x02" + noise.randbytes(noise.randrange(60)), a.address)
            udp.sendto(b"", a.address)
            udp.sendto(bytes(60_000), a.address)
            udp.setblocking(False)
            udp.sendto(encode(Ping(77, "a")), a.address)
            await trio.lowlevel.wait_readable(udp)
            assert decode(udp.recv(2000)) == Ack(77)
        assert sum(a.counters.values()) >= 150
        lines = [record for record in caplog.records if "dropped a gossip message" in record.getMessage()]
        assert 1 <= len(lines) <= len(a.counters)
        assert statuses(a) == {"a": "alive"}


async def test_stray_acks_and_nacks_change_nothing(clock):
    async with running(make("a"), make("b")) as (a, b):
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as udp:
            for sequence in range(50):
                udp.sendto(encode(Ack(sequence)), a.address)
                udp.sendto(encode(Nack(sequence)), a.address)
        await trio.sleep(30)
        assert statuses(a) == statuses(b) == {"a": "alive", "b": "alive"}


async def test_bad_stream_is_told_why_and_closed(clock):
    async with running(make("a")) as (a,):
        async with await trio.open_tcp_stream(*a.address) as stream:
            await stream.send_all(b"GET / HTTP/1.1\r\n\r\n")
            reply = await read_reply(stream)
            assert isinstance(reply, StreamError)
            assert await stream.receive_some() == b""
        assert a.counters["type"] == 1


async def test_stream_ping_is_acked_only_for_us(clock):
    async with running(make("a")) as (a,):
        for node, expected in (("a", Ack(5)), ("b", None)):
            async with await trio.open_tcp_stream(*a.address) as stream:
                await stream.send_all(encode_stream(Ping(5, node), keyring=None, label=""))
                assert await read_reply(stream) == expected


async def test_stalled_stream_is_closed_at_its_deadline(clock):
    async with running(make("a")) as (a,), await trio.open_tcp_stream(*a.address) as stream:
        await stream.send_all(b"\x06")
        started = trio.current_time()
        assert await stream.receive_some() == b""
        assert trio.current_time() - started <= LAN.stream_timeout_s + 1
        await wait_until(lambda: a.counters["stream-timeout"] == 1)


async def test_stream_reset_at_any_byte_leaves_the_driver_well(clock):
    entry = NodeStateEntry("x", bytes((127, 0, 0, 1)), 1, b"", 1, NodeState.LEFT, VERSIONS)
    message = encode_stream(PushPull(True, (entry,), b""), keyring=None, label="")
    async with running(make("a")) as (a,):
        for length in range(0, len(message) + 1, 7):
            with closing(socket.create_connection(a.address)) as raw:
                raw.sendall(message[:length])
                raw.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        async with await trio.open_tcp_stream(*a.address) as stream:
            await stream.send_all(message)
            assert isinstance(await read_reply(stream), PushPull)
        assert a._inbound <= 1


async def test_connections_above_the_limit_are_closed_and_the_rest_served(clock):
    async with running(make("a")) as (a,):
        held = [
            await trio.open_tcp_stream(
                *a.address, local_address=f"127.0.0.{2 + number // INBOUND_STREAMS_PER_HOST_MAX}"
            )
            for number in range(INBOUND_STREAMS_MAX)
        ]
        await wait_until(lambda: a._inbound == INBOUND_STREAMS_MAX, limit_s=5)
        async with await trio.open_tcp_stream(*a.address) as extra:
            assert await extra.receive_some() == b""
        assert a.counters["stream-limit"] == 1
        for stream in held:
            await stream.aclose()
        await wait_until(lambda: a._inbound == 0)
        async with await trio.open_tcp_stream(*a.address) as stream:
            await stream.send_all(encode_stream(Ping(1, "a"), keyring=None, label=""))
            assert await read_reply(stream) == Ack(1)


async def test_one_host_that_stalls_its_streams_keeps_nobody_else_out(clock):
    async with running(make("a")) as (a,):
        held = [
            await trio.open_tcp_stream(*a.address, local_address="127.0.0.2")
            for _ in range(INBOUND_STREAMS_PER_HOST_MAX + 1)
        ]
        assert await held[-1].receive_some() == b""
        async with await trio.open_tcp_stream(*a.address) as stream:
            await stream.send_all(encode_stream(Ping(1, "a"), keyring=None, label=""))
            assert await read_reply(stream) == Ack(1)
        for stream in held:
            await stream.aclose()
        await wait_until(lambda: a._inbound == 0)
        assert not a._inbound_from


async def test_unfinished_streams_together_hold_bounded_memory(clock, monkeypatch):
    monkeypatch.setattr("agent.gossip_streams.STREAM_BUFFER_BYTES_MAX", 300_000)
    unfinished = b"\x06" + pack({"Nodes": 0, "UserStateLen": 10_000_000, "Join": True}) + bytes(200_000)
    async with running(make("a")) as (a,):
        async with await trio.open_tcp_stream(*a.address) as first, await trio.open_tcp_stream(*a.address) as second:
            await first.send_all(unfinished)
            await wait_until(lambda: a._streams.buffered_bytes == len(unfinished))
            with suppress(trio.BrokenResourceError):
                await second.send_all(unfinished)
            await wait_until(lambda: a.counters["stream-memory"] == 1)
            assert a._inbound <= 2
        await wait_until(lambda: a._streams.buffered_bytes == 0)
        async with await trio.open_tcp_stream(*a.address) as stream:
            await stream.send_all(encode_stream(Ping(1, "a"), keyring=None, label=""))
            assert await read_reply(stream) == Ack(1)


async def test_listener_survives_running_out_of_descriptors(clock):
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    async with running(make("a")) as (a,):
        with socket.socket() as client:
            highest = client.fileno()
            resource.setrlimit(resource.RLIMIT_NOFILE, (highest + 1, hard))
            fillers = []
            try:
                with suppress(OSError):
                    while True:
                        fillers.append(socket.socket())
                client.setblocking(False)
                assert client.connect_ex(a.address) in (0, errno.EINPROGRESS)
                await wait_until(lambda: a.counters["accept-failed"] >= 2)
            finally:
                resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
                for filler in fillers:
                    filler.close()
            await wait_until(lambda: a._inbound == 1)
        await wait_until(lambda: a._inbound == 0)


async def test_large_state_is_taken_over(clock):
    entries = tuple(
        NodeStateEntry(f"node-{i}", bytes((127, 99, i >> 8, i & 255)), 7946, b"m" * 100, 1, NodeState.ALIVE, VERSIONS)
        for i in range(3000)
    )
    encoded = encode_stream(PushPull(True, entries, b"\x02" + pack({"LTime": 9})), keyring=None, label="")
    assert len(encoded) > 256 * 1024
    async with running(make("a")) as (a,):
        async with await trio.open_tcp_stream(*a.address) as stream:
            await stream.send_all(encoded)
            reply = await read_reply(stream)
        assert [entry.name for entry in reply.nodes] == ["a"]
        await wait_until(lambda: len(a.members()) == 3001, limit_s=5)
