"""Plain connections over real sockets: sending without a wait, and with one."""

import socket
from collections.abc import AsyncIterator

import pytest
import trio
import trio.testing

from agent.http.plain_stream import PlainStream


@pytest.fixture
async def pair() -> AsyncIterator[tuple[PlainStream, trio.SocketStream]]:
    ours, theirs = (trio.SocketStream(trio.socket.from_stdlib_socket(end)) for end in socket.socketpair())
    plain = PlainStream(ours)
    async with theirs:
        yield plain, theirs
    plain.close()


async def test_what_is_sent_arrives_both_ways(pair):
    plain, peer = pair
    assert plain.send_now(b"answer") == 6
    assert await peer.receive_some() == b"answer"
    await peer.send_all(b"request")
    assert await plain.receive_some(4) == b"requ"
    assert await plain.receive_some(100) == b"est"


async def test_more_than_the_kernel_takes_waits_for_the_peer(pair, nursery):
    plain, peer = pair
    data = bytes(range(256)) * 20_000
    sent = plain.send_now(data)
    assert 0 < sent < len(data)
    assert plain.send_now(data) == 0
    nursery.start_soon(plain.send_all, data[sent:])
    received = bytearray()
    while len(received) < len(data):
        received += await peer.receive_some()
    assert received == data


async def test_peer_that_left_is_told_apart_from_our_own_close(pair):
    plain, peer = pair
    await plain.send_eof()
    assert await peer.receive_some() == b""
    await peer.aclose()
    assert await plain.receive_some(1) == b""
    with pytest.raises(trio.BrokenResourceError):
        plain.send_now(b"x")
    with pytest.raises(trio.BrokenResourceError):
        await plain.send_all(b"x")
    plain.close()
    plain.close()
    with pytest.raises(trio.ClosedResourceError):
        plain.send_now(b"x")


async def test_close_wakes_the_reader(pair, nursery):
    plain, _ = pair
    woken = trio.Event()

    async def read() -> None:
        with pytest.raises(trio.ClosedResourceError):
            await plain.receive_some(1)
        woken.set()

    nursery.start_soon(read)
    await trio.testing.wait_all_tasks_blocked()
    await plain.aclose()
    await woken.wait()
