"""Everything that may wait has a deadline: the reactor in this process, on Trio's mock clock, with real sockets."""

import gc
import random
import socket

import pytest
import trio
from sidecars import Authority, loopback_address

from agent.dataplane.connection import HANDSHAKE_TIMEOUT_S, LINGER_TIMEOUT_S, Connection
from agent.dataplane.http_accepted import HEAD_TIMEOUT_S, KEEP_ALIVE_TIMEOUT_S
from agent.dataplane.reactor import READABLE, Reactor
from agent.dataplane.tables import Tables
from agent.dataplane.tcp import IDLE_TIMEOUT_S as TCP_IDLE_TIMEOUT_S
from mesh.proxy.pool import LOCAL_IDLE_TIMEOUT_S
from mesh.proxy.sidecar_config import EndpointConfig

AUTHORITY = Authority()
GET = b"GET / HTTP/1.1\r\nHost: api\r\n\r\n"
OK = b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nok"
SLACK_S = 2.0


class World:
    """Two sidecars in this process."""

    def __init__(self, **arguments):
        self.address = loopback_address()
        self.reactor = Reactor()
        self.tables = Tables(self.reactor, random.Random(1))
        self.tables.apply(
            AUTHORITY.two_hops(outbound_port=9191, inbound_port=21000, app_port=8080, address=self.address, **arguments)
        )
        self.app_listener = socket.create_server((self.address, 8080))
        self.streams = []

    async def connect(self, port=9191):
        self.streams.append(await trio.open_tcp_stream(self.address, port))
        return self.streams[-1]

    async def app(self):
        await trio.lowlevel.wait_readable(self.app_listener)
        sock, _ = self.app_listener.accept()
        sock.setblocking(False)
        self.streams.append(trio.SocketStream(trio.socket.from_stdlib_socket(sock)))
        return self.streams[-1]


@pytest.fixture
async def world_of(nursery):
    worlds = []

    def make(**arguments):
        world = World(**arguments)
        nursery.start_soon(world.reactor.run)
        worlds.append(world)
        return world

    yield make
    for world in worlds:
        world.tables.close()
        world.reactor.turn()
        assert world.reactor.faults == 0
        world.app_listener.close()
        for stream in world.streams:
            stream.socket.close()


async def until_end(stream):
    """Everything up to the end of the stream, and when it came."""
    data = b""
    try:
        while piece := await stream.receive_some():
            data += piece
    except trio.BrokenResourceError:
        data += b"<reset>"
    return data, trio.current_time()


async def test_a_head_that_never_ends_is_answered_408(autojump_clock, world_of):
    world = world_of()
    began = trio.current_time()
    client = await world.connect()
    await client.send_all(GET[:10])
    data, ended = await until_end(client)
    assert data.startswith(b"HTTP/1.1 408 ")
    assert HEAD_TIMEOUT_S <= ended - began <= HEAD_TIMEOUT_S + LINGER_TIMEOUT_S + SLACK_S


async def test_dripping_a_head_does_not_extend_its_deadline(autojump_clock, world_of):
    world = world_of()
    began = trio.current_time()
    client = await world.connect()
    ended = None
    for value in b"GET / HTTP/1.1\r\nHost: api\r\nX-Slow: " + b"a" * 200:
        try:
            await client.send_all(bytes((value,)))
        except trio.BrokenResourceError:
            ended = trio.current_time()
            break
        await trio.sleep(1)
    assert ended is not None
    assert ended - began <= HEAD_TIMEOUT_S + LINGER_TIMEOUT_S + SLACK_S


async def test_a_handshake_that_never_ends_is_closed(autojump_clock, world_of):
    world = world_of()
    began = trio.current_time()
    client = await world.connect(21000)
    await client.send_all(b"\x16\x03\x01\x02\x00\x01")
    _data, ended = await until_end(client)
    assert HANDSHAKE_TIMEOUT_S <= ended - began <= HANDSHAKE_TIMEOUT_S + SLACK_S
    assert world.tables.open_connections == 0


async def test_an_idle_connection_is_closed_in_the_end(autojump_clock, world_of):
    world = world_of()
    began = trio.current_time()
    client = await world.connect()
    data, ended = await until_end(client)
    assert data == b""
    assert KEEP_ALIVE_TIMEOUT_S <= ended - began <= KEEP_ALIVE_TIMEOUT_S + SLACK_S


async def test_an_application_that_does_not_answer_is_504(autojump_clock, world_of):
    world = world_of(target={"request_timeout_s": 7.0})
    client = await world.connect()
    began = trio.current_time()
    await client.send_all(GET)
    app = await world.app()
    data = await client.receive_some()
    assert data.startswith(b"HTTP/1.1 504 ")
    assert data.endswith(b"upstream request timeout")
    assert 7.0 <= trio.current_time() - began <= 7.0 + SLACK_S
    await until_end(app)  # the request went with it
    await client.send_all(GET)  # the client's connection did not
    await (await world.app()).send_all(OK)
    assert (await client.receive_some()).endswith(b"ok")


async def test_a_response_that_is_not_complete_in_time_is_cut_off_with_a_reset(autojump_clock, world_of):
    world = world_of(target={"request_timeout_s": 7.0})
    client = await world.connect()
    began = trio.current_time()
    await client.send_all(GET)
    app = await world.app()
    await app.send_all(OK[:-2])
    assert (await client.receive_some()).startswith(b"HTTP/1.1 200 ")
    rest, _ended = await until_end(client)
    assert rest == b"<reset>"
    assert 7.0 <= trio.current_time() - began <= 7.0 + SLACK_S


async def test_without_a_request_timeout_only_silence_ends_a_response(autojump_clock, world_of):
    world = world_of(target={"request_timeout_s": 0.0})
    client = await world.connect()
    await client.send_all(GET)
    app = await world.app()
    await app.send_all(OK[:-2])
    for value in b"ok":
        await trio.sleep(20)
        await app.send_all(bytes((value,)))
    data = b""
    while not data.endswith(b"\r\n\r\nok"):
        data += await client.receive_some()


async def test_an_endpoint_that_does_not_complete_a_handshake_is_a_connect_failure(autojump_clock, world_of):
    silent = socket.create_server((loopback_address(), 21000))
    world = world_of(
        target={
            "endpoints": (EndpointConfig("silent", *silent.getsockname()),),
            "connect_timeout_s": 3.0,
        }
    )
    client = await world.connect()
    began = trio.current_time()
    await client.send_all(GET)
    data = await client.receive_some()
    assert data.startswith(b"HTTP/1.1 503 ")
    assert 3.0 <= trio.current_time() - began <= 3.0 + SLACK_S
    silent.close()


async def test_pooled_connections_do_not_outlive_their_use(autojump_clock, world_of):
    world = world_of()
    client = await world.connect()
    await client.send_all(GET)
    app = await world.app()
    await app.receive_some()
    await app.send_all(OK)
    await client.receive_some()
    began = trio.current_time()
    data, ended = await until_end(app)
    assert data == b""
    assert LOCAL_IDLE_TIMEOUT_S <= ended - began <= LOCAL_IDLE_TIMEOUT_S + SLACK_S


async def test_a_silent_tcp_relay_ends_in_the_end_and_a_busy_one_does_not(autojump_clock, world_of):
    world = world_of(protocol="tcp")
    client = await world.connect()
    app = await world.app()
    for _ in range(5):
        await trio.sleep(TCP_IDLE_TIMEOUT_S * 0.9)
        await client.send_all(b"x")
        assert await app.receive_some() == b"x"
    began = trio.current_time()
    _, ended = await until_end(app)
    assert TCP_IDLE_TIMEOUT_S <= ended - began <= TCP_IDLE_TIMEOUT_S + SLACK_S


def living_tls_connections():
    return sum(isinstance(thing, Connection) and thing.tls is not None for thing in gc.get_objects())


async def test_a_closed_tcp_relay_leaves_nothing_for_the_collector(autojump_clock, world_of):
    world = world_of(protocol="tcp")
    gc.collect()
    gc.disable()  # its next full run may be thousands of connections away
    try:
        before = living_tls_connections()
        for ends_first in ("client", "app"):
            client = await world.connect()
            await client.send_all(b"x")
            app = await world.app()
            assert await app.receive_some() == b"x"
            assert living_tls_connections() > before
            first, second = (client, app) if ends_first == "client" else (app, client)
            await first.send_eof()
            await until_end(second)
            await second.aclose()
            await until_end(first)
            await trio.sleep(0.01)
        assert living_tls_connections() == before
    finally:
        gc.enable()


async def test_timers_run_in_order_and_a_failing_one_stops_nothing(autojump_clock, nursery):
    reactor = Reactor()
    nursery.start_soon(reactor.run)
    ran = []

    def fail():
        raise RuntimeError("a broken callback")

    start = trio.current_time()
    reactor.call_at(start + 3, lambda: ran.append(3))
    reactor.call_at(start + 1, fail)
    cancelled = reactor.call_at(start + 2, lambda: ran.append(2))
    reactor.call_at(start + 2, lambda: reactor.call_soon(lambda: ran.append("soon")))
    cancelled.cancel()
    await trio.sleep(5)
    assert ran == ["soon", 3]
    assert reactor.faults == 1
    nursery.cancel_scope.cancel()


async def test_a_handler_that_raises_closes_its_own_connection_only(autojump_clock, nursery):
    reactor = Reactor()
    nursery.start_soon(reactor.run)
    faulted = []

    class Broken:
        def __init__(self, sock):
            self.sock = sock
            reactor.register(sock.fileno(), self, READABLE)

        def ready(self, mask):
            raise ValueError("broken handler")

        def fault(self, error):
            faulted.append(str(error))
            reactor.close(self.sock.fileno(), self.sock)

    class Sound(Broken):
        def ready(self, mask):
            self.sock.send(self.sock.recv(100))

    pairs = [socket.socketpair() for _ in range(2)]
    Broken(pairs[0][0]), Sound(pairs[1][0])
    for _, far in pairs:
        far.send(b"hello")
        far.setblocking(False)
    await trio.sleep(1)
    assert faulted == ["broken handler"]
    assert pairs[1][1].recv(100) == b"hello"
    with pytest.raises(ConnectionResetError):
        pairs[0][1].recv(100)
    nursery.cancel_scope.cancel()
    for near, far in pairs:
        near.close()
        far.close()
