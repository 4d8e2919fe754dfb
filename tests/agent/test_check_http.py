"""What a hostile server can do to the agent that checks it: nothing."""

import gzip
import tracemalloc

import trio

from agent.check_http import HttpChecker
from agent.definitions import check_definition


async def visit(answers: list[bytes]) -> tuple[list[str], list[bytes], int]:
    """Runs a check once per answer: the statuses, the requests' heads, and the most memory that was held."""
    listeners = await trio.open_tcp_listeners(0, host="127.0.0.1")
    heads: list[bytes] = []
    statuses: list[str] = []

    async def serve(stream: trio.SocketStream) -> None:
        async with stream:
            heads.append(bytes(await stream.receive_some(65536)))
            await stream.send_all(answers[len(heads) - 1])

    url = f"http://127.0.0.1:{listeners[0].socket.getsockname()[1]}/"
    checker = HttpChecker()
    with trio.fail_after(20):
        async with trio.open_nursery() as nursery:
            await nursery.start(trio.serve_listeners, serve, listeners)
            tracemalloc.start()
            for _ in answers:
                definition = check_definition({"Name": "c", "HTTP": url, "Interval": "10s"})
                statuses.append((await checker.run(definition)).status)
            peak = tracemalloc.get_traced_memory()[1]
            tracemalloc.stop()
            await checker.close()
            nursery.cancel_scope.cancel()
    return statuses, heads, peak


def answer(body: bytes, *headers: bytes) -> bytes:
    lines = [b"HTTP/1.1 200 OK", b"Content-Length: %d" % len(body), b"Connection: close", *headers]
    return b"\r\n".join(lines) + b"\r\n\r\n" + body


async def test_a_compression_bomb_is_never_inflated() -> None:
    bomb = gzip.compress(gzip.compress(bytes(64 * 1024 * 1024)))
    statuses, heads, peak = await visit([answer(bomb, b"Content-Encoding: gzip, gzip")])
    assert statuses == ["passing"]
    assert b"accept-encoding: identity\r\n" in heads[0].lower()
    assert peak < 16 * 1024 * 1024


async def test_cookies_are_neither_kept_nor_sent_on() -> None:
    setting = answer(b"", b"Set-Cookie: session=mine; Path=/")
    statuses, heads, _ = await visit([setting, setting])
    assert statuses == ["passing", "passing"]
    assert b"cookie" not in heads[1].lower()
