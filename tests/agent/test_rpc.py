"""Calls between agents: multiplexing, cancellation, typed errors, and what bad or vanished peers can do (nothing)."""

import contextlib
import random
import socket
import ssl
import struct
import time
from contextlib import asynccontextmanager

import pytest
import trio
from certificates import CA, KEY, LEAF, key_pem, pem
from hypothesis import given
from hypothesis import strategies as st

from agent import tls
from agent.addresses import Address
from agent.raft_transport import QUEUED_MESSAGES_MAX, RaftTransport
from agent.rpc import RpcPool, RpcServer
from agent.rpc import pool as rpc_pool
from agent.rpc import server as rpc_server
from agent.rpc.frames import (
    CALL_BYTES_MAX,
    CLIENT_MESSAGES,
    MAGIC,
    Call,
    FrameDecoder,
    Hello,
    Ping,
    Purpose,
    frame,
    message_frame,
    preface,
)
from mesh.errors import LimitExceeded, NoLeader, NotLeader, OutcomeUnknown, ProtocolError, Refused, Unreachable


class Service:
    """A handler that does what the call's body says."""

    def __init__(self):
        self.waiting = 0
        self.release = trio.Event()
        self.raft: list[tuple[str, bytes]] = []

    async def handle(self, body: bytes) -> bytes:
        match body.split(b" ", 1):
            case [b"echo", rest]:
                return rest
            case [b"big", size]:
                return b"x" * int(size)
            case [b"wait"]:
                self.waiting += 1
                try:
                    await self.release.wait()
                finally:
                    self.waiting -= 1
                return b"released"
            case [b"not-leader"]:
                raise NotLeader("s2")
            case [b"no-leader"]:
                raise NoLeader("No cluster leader")
            case [b"refused"]:
                raise Refused("policy says no")
            case [b"bug"]:
                raise ZeroDivisionError
        raise AssertionError(body)

    def receive_raft(self, sender_id: str, data: bytes) -> None:
        self.raft.append((sender_id, data))


async def listen() -> tuple[list[trio.SocketListener], Address]:
    listeners = await trio.open_tcp_listeners(0, host="127.0.0.1")
    return listeners, ("127.0.0.1", listeners[0].socket.getsockname()[1])


@asynccontextmanager
async def running(**limits: int):
    service = Service()
    server = RpcServer(service.handle, receive_raft=service.receive_raft, **limits)
    listeners, address = await listen()
    pool = RpcPool(random.Random(1))
    async with trio.open_nursery() as nursery:
        await nursery.start(server.serve, listeners)
        await nursery.start(pool.run)
        yield service, server, pool, address
        nursery.cancel_scope.cancel()


async def until(condition) -> None:
    with trio.fail_after(5):
        while not condition():
            await trio.sleep(0.005)


async def drain(stream: trio.SocketStream) -> bytes:
    """All bytes until the far side closes."""
    data = b""
    with trio.fail_after(10):
        try:
            while chunk := await stream.receive_some():
                data += chunk
        except trio.BrokenResourceError:
            pass
    return data


@given(st.lists(st.binary(max_size=300), max_size=10), st.integers(1, 40))
def test_decoder_gives_the_same_frames_however_the_bytes_are_cut(payloads: list[bytes], step: int):
    data = b"".join(map(frame, payloads))
    decoder = FrameDecoder(300)
    seen = []
    for start in range(0, len(data), step):
        decoder.feed(data[start : start + step])
        while (payload := decoder.next_frame()) is not None:
            seen.append(payload)
    assert seen == payloads
    assert decoder.buffered_bytes == 0


@given(st.binary(max_size=200))
def test_decoder_and_codec_survive_any_bytes(data: bytes):
    decoder = FrameDecoder(64)
    decoder.feed(data)
    try:
        while (payload := decoder.next_frame()) is not None:
            CLIENT_MESSAGES.decode(payload)
    except ProtocolError:
        pass


def test_decoder_refuses_a_length_before_its_bytes_arrive():
    decoder = FrameDecoder(100)
    decoder.feed(struct.pack(">I", 2**32 - 1))
    with pytest.raises(ProtocolError, match="4294967295"):
        decoder.next_frame()


async def test_calls_share_a_connection_and_answers_come_in_any_order():
    async with running() as (service, server, pool, address):
        answers = {}

        async def call(body: bytes) -> None:
            answers[body] = await pool.call(address, body, timeout_s=5)

        async with trio.open_nursery() as nursery:
            nursery.start_soon(call, b"wait")
            await until(lambda: service.waiting == 1)
            for number in range(50):
                await call(b"echo %d" % number)
            service.release.set()
        assert answers == {b"wait": b"released", **{b"echo %d" % n: b"%d" % n for n in range(50)}}
        assert server.counters["connections_accepted"] == 1


async def test_a_large_answer_arrives_whole():
    async with running() as (_, _, pool, address):
        assert len(await pool.call(address, b"big 20000000", timeout_s=10)) == 20_000_000


async def test_errors_cross_the_wire_as_their_class():
    async with running() as (_, server, pool, address):
        with pytest.raises(NotLeader) as caught:
            await pool.call(address, b"not-leader", timeout_s=5)
        assert caught.value.leader_id == "s2"
        with pytest.raises(NoLeader, match="No cluster leader"):
            await pool.call(address, b"no-leader", timeout_s=5)
        with pytest.raises(Refused, match="policy says no"):
            await pool.call(address, b"refused", timeout_s=5)
        with pytest.raises(Exception, match="internal error"):
            await pool.call(address, b"bug", timeout_s=5)
        assert await pool.call(address, b"echo still here", timeout_s=5) == b"still here"
        assert server.connection_count == 1


async def test_a_cancelled_call_is_cancelled_at_the_server():
    async with running() as (service, _, pool, address):
        with trio.move_on_after(5) as scope:
            async with trio.open_nursery() as nursery:
                nursery.start_soon(lambda: pool.call(address, b"wait", timeout_s=60))
                await until(lambda: service.waiting == 1)
                scope.cancel()
        await until(lambda: service.waiting == 0)


async def test_a_call_that_times_out_is_unknown_and_freed_at_the_server():
    async with running() as (service, _, pool, address):
        with pytest.raises(OutcomeUnknown):
            await pool.call(address, b"wait", timeout_s=0.05)
        await until(lambda: service.waiting == 0)


async def test_a_client_that_vanishes_frees_its_calls():
    async with running() as (service, server, _, address):
        stream = await trio.open_tcp_stream(*address)
        await stream.send_all(preface(Purpose.CALLS))
        await stream.send_all(b"".join(message_frame(Call(number, b"wait")) for number in range(100)))
        await until(lambda: service.waiting == 100)
        await stream.aclose()
        await until(lambda: service.waiting == 0 and server.connection_count == 0)


async def test_a_refused_connection_is_unreachable_and_tried_again_later():
    listeners, address = await listen()
    await listeners[0].aclose()
    pool = RpcPool(random.Random(1))
    async with trio.open_nursery() as nursery:
        await nursery.start(pool.run)
        for _ in range(3):
            with pytest.raises(Unreachable):
                await pool.call(address, b"echo x", timeout_s=5)
        service = Service()
        listeners = await trio.open_tcp_listeners(address[1], host="127.0.0.1")
        server = RpcServer(service.handle, receive_raft=service.receive_raft)
        await nursery.start(server.serve, listeners)
        with trio.fail_after(5):
            while True:
                try:
                    assert await pool.call(address, b"echo x", timeout_s=5) == b"x"
                    break
                except Unreachable:
                    await trio.sleep(0.02)
        nursery.cancel_scope.cancel()


async def test_a_connection_broken_before_the_answer_is_an_unknown_outcome():
    listeners, address = await listen()

    async def hang_up(stream: trio.SocketStream) -> None:
        await stream.send_all(preface(Purpose.CALLS))
        await stream.receive_some()
        async with stream:
            await stream.receive_some()

    pool = RpcPool(random.Random(1))
    async with trio.open_nursery() as nursery:
        await nursery.start(pool.run)
        nursery.start_soon(trio.serve_listeners, hang_up, listeners)
        with pytest.raises(OutcomeUnknown):
            await pool.call(address, b"echo x", timeout_s=5)
        nursery.cancel_scope.cancel()


async def test_a_dropped_connection_ends_its_calls_and_the_next_call_connects_anew():
    async with running() as (service, server, pool, address):
        outcomes = []

        async def call() -> None:
            try:
                await pool.call(address, b"wait", timeout_s=60)
            except OutcomeUnknown as error:
                outcomes.append(error)

        async with trio.open_nursery() as nursery:
            nursery.start_soon(call)
            await until(lambda: service.waiting == 1)
            pool.drop(address)
        assert len(outcomes) == 1
        assert await pool.call(address, b"echo x", timeout_s=5) == b"x"
        assert server.counters["connections_accepted"] == 2


async def test_a_draining_server_finishes_what_it_began_and_sends_the_rest_elsewhere():
    async with running() as (service, server, pool, address):
        outcomes = []

        async def call() -> None:
            outcomes.append(await pool.call(address, b"wait", timeout_s=60))

        async with trio.open_nursery() as nursery:
            nursery.start_soon(call)
            await until(lambda: service.waiting == 1)
            nursery.start_soon(server.drain, 5)
            await trio.testing.wait_all_tasks_blocked()
            with pytest.raises(Unreachable, match="stopping"):
                await pool.call(address, b"echo x", timeout_s=5)
            service.release.set()
        assert outcomes == [b"released"]


async def test_what_outlasts_the_drain_is_an_unknown_outcome():
    async with running() as (service, server, pool, address):
        async with trio.open_nursery() as nursery:

            async def call() -> None:
                with pytest.raises(OutcomeUnknown, match="stopped"):
                    await pool.call(address, b"wait", timeout_s=60)

            nursery.start_soon(call)
            await until(lambda: service.waiting == 1)
            await server.drain(0.05)
        assert service.waiting == 0


async def test_a_half_open_server_is_given_up(autojump_clock):
    listeners, address = await listen()

    async def swallow(stream: trio.SocketStream) -> None:
        await stream.send_all(preface(Purpose.CALLS))
        async for _ in stream:
            pass

    pool = RpcPool(random.Random(1))
    async with trio.open_nursery() as nursery:
        await nursery.start(pool.run)
        nursery.start_soon(trio.serve_listeners, swallow, listeners)
        started = trio.current_time()
        with pytest.raises(OutcomeUnknown):
            await pool.call(address, b"echo x", timeout_s=600)
        assert trio.current_time() - started < rpc_pool.SILENCE_MAX_S + 2 * rpc_pool.PING_INTERVAL_S
        nursery.cancel_scope.cancel()


@pytest.mark.parametrize(
    "junk",
    [
        b"GET / HTTP/1.1\r\nHost: x\r\n\r\n",
        b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03",  # the start of a TLS hello
        MAGIC + b"\x09C",  # another version
        MAGIC + b"\x01?",  # another purpose
        preface(Purpose.CALLS) + b"\xff\xff\xff\xff",
        preface(Purpose.CALLS) + struct.pack(">I", CALL_BYTES_MAX + 1),
        preface(Purpose.CALLS) + frame(b"\xc1" * 30),
        preface(Purpose.CALLS) + message_frame(Call(7, b"wait")) * 2,  # one ID twice
        preface(Purpose.RAFT) + b"\xff\xff\xff\xff",
        preface(Purpose.RAFT) + frame(b"not a hello"),
        preface(Purpose.RAFT) + message_frame(Hello("x" * 5000)),
    ],
)
async def test_bad_bytes_close_that_connection_only(junk: bytes):
    async with running() as (service, server, pool, address):
        assert await pool.call(address, b"echo before", timeout_s=5) == b"before"
        stream = await trio.open_tcp_stream(*address)
        await stream.send_all(junk)
        await drain(stream)
        await stream.aclose()
        await until(lambda: server.connection_count == 1)
        assert server.counters["connections_malformed"] == 1
        assert await pool.call(address, b"echo after", timeout_s=5) == b"after"
        assert service.waiting == 0


@pytest.mark.parametrize(
    ("sent", "within_s"),
    [
        (b"", rpc_server.HANDSHAKE_DEADLINE_S),
        (MAGIC, rpc_server.HANDSHAKE_DEADLINE_S),
        (preface(Purpose.CALLS), rpc_server.SERVER_IDLE_MAX_S),
        (preface(Purpose.CALLS) + message_frame(Call(1, b"echo x"))[:-1], 12),
        (preface(Purpose.RAFT), rpc_server.HANDSHAKE_DEADLINE_S),
        (preface(Purpose.RAFT) + message_frame(Hello("s1")) + b"\x00\x00\x00\x05abc", 12),
    ],
)
async def test_a_stalled_peer_is_closed(autojump_clock, sent: bytes, within_s: float):
    async with running() as (_, server, _, address):
        stream = await trio.open_tcp_stream(*address)
        await stream.send_all(sent)
        started = trio.current_time()
        await until_closed(stream)
        await stream.aclose()
        assert trio.current_time() - started <= within_s + 0.1
        await until(lambda: server.connection_count == 0)


async def until_closed(stream: trio.SocketStream) -> None:
    try:
        while await stream.receive_some():
            pass
    except trio.BrokenResourceError:
        pass


async def test_a_client_that_reads_nothing_is_closed_and_its_answers_freed(autojump_clock):
    async with running() as (_, server, _, address):
        stream = await trio.open_tcp_stream(*address)
        await stream.send_all(preface(Purpose.CALLS))
        await stream.send_all(b"".join(message_frame(Call(number, b"big 8000000")) for number in range(4)))
        await trio.sleep(60)
        assert server.connection_count == 0
        await stream.aclose()


async def test_unfinished_frames_of_all_connections_together_are_capped(monkeypatch):
    monkeypatch.setattr(rpc_server, "UNFINISHED_BYTES_MAX", 1_000_000)
    async with running() as (_service, server, pool, address):
        streams = []
        for number in range(4):
            stream = await trio.open_tcp_stream(*address)
            streams.append(stream)
            purpose = (Purpose.CALLS, Purpose.RAFT)[number % 2]
            start = b"" if purpose is Purpose.CALLS else message_frame(Hello("s9"))
            with contextlib.suppress(trio.BrokenResourceError):
                await stream.send_all(preface(purpose) + start + frame(bytes(8_000_000))[:500_000])
        await until(lambda: server.counters["connections_malformed"] == 2)
        assert await pool.call(address, b"echo small", timeout_s=5) == b"small"
        for stream in streams:
            await stream.aclose()
        await until(lambda: server.connection_count == 1)
        assert await pool.call(address, b"echo " + bytes(900_000), timeout_s=5) == bytes(900_000)  # all given back


async def test_connections_from_one_address_are_capped():
    async with running(connections_per_ip_max=3) as (_, server, pool, address):
        streams = [await trio.open_tcp_stream(*address) for _ in range(3)]
        await until(lambda: server.connection_count == 3)
        with pytest.raises(Unreachable):
            await pool.call(address, b"echo x", timeout_s=5)
        for stream in streams:
            await stream.aclose()
        await until(lambda: server.connection_count == 0)
        await trio.sleep(0.1)  # the pool's back-off
        assert await pool.call(address, b"echo x", timeout_s=5) == b"x"


async def test_open_calls_on_one_connection_are_capped(monkeypatch):
    async with running() as (service, _, pool, address):
        monkeypatch.setattr(rpc_server, "IN_FLIGHT_MAX", 10)
        stream = await trio.open_tcp_stream(*address)
        await stream.send_all(preface(Purpose.CALLS))
        await stream.send_all(b"".join(message_frame(Call(number, b"wait")) for number in range(20)))
        await until(lambda: service.waiting == 10)
        received = b""
        while received.count(LimitExceeded.__name__.encode()) < 10:
            received += await stream.receive_some()
        assert service.waiting == 10
        await stream.aclose()
        assert await pool.call(address, b"echo x", timeout_s=5) == b"x"


async def test_a_server_that_is_away_is_not_dialled_again_at_once():
    pool = RpcPool(random.Random(1))
    with socket.socket() as held:
        held.bind(("127.0.0.1", 0))  # nobody else's, and nobody listens
        address = held.getsockname()
        async with trio.open_nursery() as nursery:
            await nursery.start(pool.run)
            with pytest.raises(Unreachable, match="Connection refused"):
                await pool.call(address, b"echo x", timeout_s=5)
            with pytest.raises(Unreachable, match="the last attempt just failed"):
                await pool.call(address, b"echo x", timeout_s=5)
            nursery.cancel_scope.cancel()


async def test_a_flood_of_pings_does_not_starve_other_connections():
    async with running() as (_, _, pool, address):
        stream = await trio.open_tcp_stream(*address)
        await stream.send_all(preface(Purpose.CALLS))
        flood = message_frame(Ping()) * 10_000

        async def pour() -> None:
            while True:
                await stream.send_all(flood)

        async def swallow() -> None:
            while True:
                await stream.receive_some()

        async with trio.open_nursery() as nursery:
            nursery.start_soon(pour)
            nursery.start_soon(swallow)
            with trio.fail_after(5):
                for number in range(20):
                    assert await pool.call(address, b"echo %d" % number, timeout_s=5) == b"%d" % number
            nursery.cancel_scope.cancel()
        await stream.aclose()


def tls_contexts() -> tuple[ssl.SSLContext, ssl.SSLContext]:
    """A server's and a client's, under one root."""
    now = int(time.time())
    ages = {"not_before_s": now - 60, "not_after_s": now + 3600}
    root = CA.change(**ages).build()
    leaf = pem(LEAF.change(**ages).build(root, KEY))
    return (
        tls.server_context(leaf, key_pem(KEY), (pem(root),)),
        tls.client_context(leaf, key_pem(KEY), (pem(root),)),
    )


async def test_calls_and_raft_messages_run_over_tls_and_nothing_runs_without():
    server_context, client_context = tls_contexts()
    service = Service()
    server = RpcServer(service.handle, receive_raft=service.receive_raft, context=server_context)
    listeners, address = await listen()
    pool = RpcPool(random.Random(1), context=client_context)
    plain_pool = RpcPool(random.Random(1))
    transport = RaftTransport("s1", lambda peer_id: address, random.Random(1), context=client_context)
    async with trio.open_nursery() as nursery:
        await nursery.start(server.serve, listeners)
        for part in (pool, plain_pool, transport):
            await nursery.start(part.run)
        assert await pool.call(address, b"echo secret", timeout_s=5) == b"secret"
        assert len(await pool.call(address, b"big 3000000", timeout_s=5)) == 3_000_000
        with pytest.raises(Unreachable):
            await plain_pool.call(address, b"echo x", timeout_s=5)
        for number in range(20):
            transport.send("s2", b"%d" % number)
        await until(lambda: len(service.raft) == 20)
        nursery.cancel_scope.cancel()


async def test_a_connection_reset_at_any_byte_leaves_the_server_as_it_was():
    async with running() as (service, server, pool, address):
        data = preface(Purpose.CALLS) + message_frame(Call(1, b"wait")) + message_frame(Call(2, b"big 300000"))
        for cut in range(0, len(data) + 1, 3):
            stream = await trio.open_tcp_stream(*address)
            await stream.send_all(data[:cut])
            stream.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))  # close sends a reset
            await stream.aclose()
        await until(lambda: server.connection_count == 0 and service.waiting == 0)
        assert server.counters["connections_crashed"] == 0
        assert await pool.call(address, b"echo x", timeout_s=5) == b"x"


async def test_raft_messages_arrive_in_order_and_again_after_the_peer_restarts():
    listeners, address = await listen()
    transport = RaftTransport("s1", lambda peer_id: address if peer_id == "s2" else None, random.Random(1))

    async def serve_until(service: Service, count: int, listeners) -> None:
        server = RpcServer(service.handle, receive_raft=service.receive_raft)
        async with trio.open_nursery() as nursery:
            await nursery.start(server.serve, listeners)
            with trio.fail_after(5):
                number = 0
                while len(service.raft) < count:
                    transport.send("s2", b"%d" % number)
                    number += 1
                    await trio.sleep(0.005)
            nursery.cancel_scope.cancel()

    async with trio.open_nursery() as nursery:
        await nursery.start(transport.run)
        first = Service()
        await serve_until(first, 20, listeners)
        senders, messages = zip(*first.raft, strict=True)
        assert set(senders) == {"s1"}
        assert list(map(int, messages)) == sorted(map(int, messages))
        second = Service()
        listeners = await trio.open_tcp_listeners(address[1], host="127.0.0.1")
        await serve_until(second, 20, listeners)
        transport.send("nobody", b"x")  # no address: dropped
        nursery.cancel_scope.cancel()


async def test_raft_messages_to_an_unreachable_peer_are_dropped_not_waited_for():
    transport = RaftTransport("s1", lambda peer_id: ("127.0.0.1", 1), random.Random(1))
    async with trio.open_nursery() as nursery:
        await nursery.start(transport.run)
        for _ in range(QUEUED_MESSAGES_MAX + 50):
            transport.send("s2", b"x")
        assert transport.counters["raft_messages_dropped"] == 50
        nursery.cancel_scope.cancel()
