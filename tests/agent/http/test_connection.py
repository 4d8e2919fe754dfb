"""One connection over a memory stream: order, deadlines, clients that leave, malformed input. Time is simulated."""

import gzip
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from itertools import pairwise

import pytest
import trio
import trio.testing
from api_server import Answer, all_routes, read_answer
from hypothesis import given
from hypothesis import strategies as st
from state_backend import MemoryBackend

from agent.http.connection import HttpConnection, HttpLimits, HttpSettings
from agent.http.deadlines import Deadlines
from agent.http.request import ApiRequest, ApiResponse, Route, json_response, text_response
from agent.http.router import Router
from agent.runtime import Runtime


@dataclass
class Client:
    """The client's end, the connection that serves it, and what its handlers did."""

    stream: trio.StapledStream
    connection: HttpConnection
    backend: MemoryBackend
    done: trio.Event
    log: list[str] = field(default_factory=list)

    async def send(self, *lines: str, body: bytes = b"") -> None:
        await self.stream.send_all("\r\n".join([*lines, "Host: localhost", "", ""]).encode() + body)

    async def ask(self, *lines: str, body: bytes = b"") -> Answer:
        await self.send(*lines, body=body)
        return await read_answer(self.stream)


def routes_of(backend: MemoryBackend, log: list[str]) -> list[Route]:
    async def sleep(request: ApiRequest) -> ApiResponse:
        try:
            await trio.sleep(float(request.params.get("s")))
        except trio.Cancelled:
            log.append("cancelled")
            raise
        log.append("slept")
        return text_response("slept")

    async def broken(request: ApiRequest) -> ApiResponse:
        raise RuntimeError("a bug")

    async def unsendable(request: ApiRequest) -> ApiResponse:
        return text_response("x", headers=(("X-Bad", "a\r\nSet-Cookie: b"),))

    async def large(request: ApiRequest) -> ApiResponse:
        return json_response(["x" * 100] * 100)

    return [
        *all_routes(backend, Runtime(seed=1)),
        Route("GET", "/v1/test/sleep", sleep),
        Route("PUT", "/v1/test/sleep", sleep),
        Route("GET", "/v1/test/broken", broken),
        Route("GET", "/v1/test/unsendable", unsendable),
        Route("GET", "/v1/test/large", large),
    ]


@asynccontextmanager
async def serving(settings: HttpSettings | None = None, *, over_loopback: bool = True) -> AsyncIterator[Client]:
    backend, log, done = MemoryBackend(), list[str](), trio.Event()
    deadlines = Deadlines()
    ours, theirs = trio.testing.memory_stream_pair()
    connection = HttpConnection(
        theirs,
        Router(routes_of(backend, log)),
        settings or HttpSettings(),
        Runtime(seed=1),
        deadlines,
        client_address="127.0.0.1",
        over_loopback=over_loopback,
    )

    async def run() -> None:
        await connection.run()
        await theirs.aclose()
        done.set()

    async with trio.open_nursery() as nursery:
        nursery.start_soon(deadlines.run)
        nursery.start_soon(run)
        yield Client(ours, connection, backend, done, log)
        nursery.cancel_scope.cancel()


async def test_pipelined_requests_are_answered_in_order(autojump_clock):
    async with serving() as client:
        await client.stream.send_all(
            b"GET /v1/test/sleep?s=5 HTTP/1.1\r\nHost: a\r\n\r\n"
            b"PUT /v1/kv/k HTTP/1.1\r\nHost: a\r\nContent-Length: 1\r\n\r\nv"
            b"GET /v1/kv/k?raw HTTP/1.1\r\nHost: a\r\nConnection: close\r\n\r\n"
        )
        received = b""
        while data := await client.stream.receive_some():
            received += data
        assert received.index(b"slept") < received.index(b"true") < received.index(b"\r\n\r\nv")
        assert received.count(b"HTTP/1.1 200") == 3
        assert received.endswith(b"v")


async def test_connection_is_reused_until_the_client_says_close(autojump_clock):
    async with serving() as client:
        for _ in range(3):
            assert (await client.ask("GET /v1/status/leader HTTP/1.1")).status == 200
        last = await client.ask("GET /v1/status/leader HTTP/1.1", "Connection: close")
        assert last.headers["connection"] == "close"
        assert await client.stream.receive_some() == b""


async def test_silent_client_is_closed_after_the_header_deadline(autojump_clock):
    async with serving() as client:
        assert await client.stream.receive_some() == b""
        assert trio.current_time() == pytest.approx(10.0)


async def test_header_that_drips_is_cut_at_the_deadline(autojump_clock):
    async with serving() as client:
        assert (await client.ask("GET /v1/status/leader HTTP/1.1")).status == 200
        start = trio.current_time()
        answers: list[Answer] = []

        async def read() -> None:
            answers.append(await read_answer(client.stream))

        async with trio.open_nursery() as nursery:
            nursery.start_soon(read)
            for byte in b"GET /v1/status/leader HTTP/1.1\r\n":
                await trio.sleep(1)
                try:
                    await client.stream.send_all(bytes([byte]))
                except trio.BrokenResourceError:
                    break
        assert answers[0].status == 408
        assert trio.current_time() - start <= 13  # 10 s after its first byte


async def test_body_that_stalls_is_given_up(autojump_clock):
    async with serving() as client:
        await client.send("PUT /v1/kv/k HTTP/1.1", "Content-Length: 10", body=b"half")
        assert await client.stream.receive_some() == b""
        assert trio.current_time() == pytest.approx(120.0)
        assert client.backend.commands == []


async def test_idle_connection_is_closed(autojump_clock):
    async with serving() as client:
        await client.ask("GET /v1/status/leader HTTP/1.1")
        assert await client.stream.receive_some() == b""
        assert trio.current_time() == pytest.approx(300.0)


async def test_blocking_query_wakes_on_the_change_it_waits_for(autojump_clock):
    async with serving() as client:
        await client.ask("PUT /v1/kv/a HTTP/1.1", "Content-Length: 1", body=b"1")
        await client.send("GET /v1/kv/a?index=10 HTTP/1.1")
        await trio.sleep(30)
        assert len(client.backend.registry) == 1
        async with serving_same(client) as other:
            await other.ask("PUT /v1/kv/b HTTP/1.1", "Content-Length: 1", body=b"2")
            await trio.sleep(30)
            assert len(client.backend.registry) == 1  # another key is no reason to wake
            await other.ask("PUT /v1/kv/a HTTP/1.1", "Content-Length: 1", body=b"3")
        answer = await read_answer(client.stream)
        assert (answer.status, answer.headers["x-consul-index"]) == (200, "12")
        assert trio.current_time() == pytest.approx(60.0)
        assert len(client.backend.registry) == 0


@asynccontextmanager
async def serving_same(client: Client) -> AsyncIterator[Client]:
    """A second connection to the same state."""
    ours, theirs = trio.testing.memory_stream_pair()
    connection = HttpConnection(
        theirs,
        Router(routes_of(client.backend, client.log)),
        HttpSettings(),
        Runtime(seed=1),
        Deadlines(),
        client_address="127.0.0.1",
        over_loopback=True,
    )
    async with trio.open_nursery() as nursery:
        nursery.start_soon(connection.run)
        yield Client(ours, connection, client.backend, trio.Event())
        nursery.cancel_scope.cancel()


@pytest.mark.parametrize(
    ("query", "seconds"),
    [
        ("", 300),
        ("&wait=10s", 10),
        ("&wait=1m30s", 90),
        ("&wait=9999h", 600),
        ("&wait=0", 300),
        ("&wait=120000ms", 120),
    ],
)
async def test_blocking_query_times_out_with_the_current_answer(autojump_clock, query, seconds):
    async with serving() as client:
        await client.ask("PUT /v1/kv/a HTTP/1.1", "Content-Length: 1", body=b"1")
        answer = await client.ask(f"GET /v1/kv/a?index=10{query} HTTP/1.1")
        assert (answer.status, answer.headers["x-consul-index"]) == (200, "10")
        assert trio.current_time() == pytest.approx(seconds)


async def test_wait_times_are_configurable(autojump_clock):
    async with serving(HttpSettings(wait_s_default=7.0, wait_s_max=20.0)) as client:
        for query, seconds in (("", 7), ("&wait=1h", 20)):
            start = trio.current_time()
            assert (await client.ask(f"GET /v1/catalog/nodes?index=1{query} HTTP/1.1")).status == 200
            assert trio.current_time() - start == pytest.approx(seconds)


async def test_slow_write_survives_index_parameters(autojump_clock):
    async with serving() as client:
        await client.send("PUT /v1/test/sleep?s=3&index=5 HTTP/1.1")
        await client.stream.send_eof()
        assert (await read_answer(client.stream)).status == 200


async def test_missing_key_blocks_with_404(autojump_clock):
    async with serving() as client:
        answer = await client.ask("GET /v1/kv/a?index=1&wait=5s HTTP/1.1")
        assert (answer.status, answer.body) == (404, b"")
        assert trio.current_time() == pytest.approx(5.0)


async def test_client_that_leaves_a_blocking_query_frees_its_watch_at_once(autojump_clock):
    async with serving() as client:
        await client.send("GET /v1/catalog/nodes?index=5 HTTP/1.1")
        await trio.sleep(1)
        assert len(client.backend.registry) == 1
        await client.stream.aclose()
        await client.done.wait()
        assert len(client.backend.registry) == 0
        assert trio.current_time() == pytest.approx(1.0)


async def test_client_that_stops_sending_after_a_write_still_gets_its_answer(autojump_clock):
    async with serving() as client:
        await client.send("PUT /v1/test/sleep?s=3 HTTP/1.1")
        await client.stream.send_eof()
        answer = await read_answer(client.stream)
        assert (answer.status, client.log) == (200, ["slept"])
        await client.done.wait()


async def test_request_sent_behind_a_blocking_query_is_answered_after_it(autojump_clock):
    async with serving() as client:
        await client.send("GET /v1/catalog/nodes?index=5&wait=20s HTTP/1.1")
        await trio.sleep(1)
        await client.send("GET /v1/status/leader HTTP/1.1", "Connection: close")
        received = b""
        while data := await client.stream.receive_some():
            received += data
        assert received.index(b"[]") < received.index(b'"127.0.0.1:8300"')
        assert trio.current_time() == pytest.approx(20.0)


async def test_drain_ends_waiting_and_idle_connections_but_not_an_answer_in_progress(autojump_clock):
    async with serving() as waiting, serving() as idle, serving() as busy, serving() as fresh:
        await waiting.send("GET /v1/catalog/nodes?index=5 HTTP/1.1")
        await idle.ask("GET /v1/status/leader HTTP/1.1")
        await busy.send("PUT /v1/test/sleep?s=3 HTTP/1.1")
        await trio.sleep(1)
        for client in (waiting, idle, busy, fresh):
            client.connection.drain()
        for client in (waiting, idle, fresh):
            await client.done.wait()
        assert trio.current_time() == pytest.approx(1.0)
        answer = await read_answer(busy.stream)
        assert (answer.status, answer.headers["connection"]) == (200, "close")


async def test_handler_that_never_answers_is_given_up(autojump_clock):
    async with serving() as client:
        answer = await client.ask("GET /v1/test/sleep?s=100000 HTTP/1.1")
        assert (answer.status, client.log) == (500, ["cancelled"])
        assert trio.current_time() == pytest.approx(720.0)


async def test_bug_in_a_handler_is_a_500_and_the_connection_goes_on(autojump_clock, caplog):
    async with serving() as client:
        for path in ("broken", "unsendable"):
            assert (await client.ask(f"GET /v1/test/{path} HTTP/1.1")).status == 500
            assert path in caplog.text
        assert (await client.ask("GET /v1/status/leader HTTP/1.1")).status == 200


async def test_oversized_body_is_refused_before_it_is_read(autojump_clock):
    async with serving() as client:
        answer = await client.ask("PUT /v1/kv/k HTTP/1.1", "Content-Length: 1000000000", "Expect: 100-continue")
        assert (answer.status, answer.headers["connection"]) == (413, "close")


async def test_chunked_body_is_cut_at_the_limit(autojump_clock):
    async with serving() as client:
        answers: list[Answer] = []

        async def read() -> None:
            answers.append(await read_answer(client.stream))

        async with trio.open_nursery() as nursery:
            nursery.start_soon(read)
            await client.send("PUT /v1/kv/k HTTP/1.1", "Transfer-Encoding: chunked")
            for _ in range(9):
                await client.stream.send_all(b"10000\r\n" + b"x" * 65536 + b"\r\n")
        assert answers[0].status == 413
        assert client.backend.commands == []


async def test_client_that_waits_for_continue_gets_it(autojump_clock):
    async with serving() as client:
        await client.send("PUT /v1/kv/k HTTP/1.1", "Content-Length: 1", "Expect: 100-continue")
        assert await client.stream.receive_some() == b"HTTP/1.1 100 Continue\r\n\r\n"
        await client.stream.send_all(b"v")
        assert (await read_answer(client.stream)).body == b"true"


@pytest.mark.parametrize("framing", ["Content-Length: 1", "Transfer-Encoding: chunked"])
async def test_refused_client_is_not_asked_for_its_body(autojump_clock, framing):
    async with serving() as client:
        answer = await client.ask("PUT /nope HTTP/1.1", framing, "Expect: 100-continue")
        assert (answer.status, answer.headers["connection"]) == (404, "close")


async def test_small_body_of_a_refused_request_keeps_the_connection(autojump_clock):
    async with serving() as client:
        assert (await client.ask("PUT /nope HTTP/1.1", "Content-Length: 4", body=b"body")).status == 404
        assert (await client.ask("GET /v1/status/leader HTTP/1.1")).status == 200


@pytest.mark.parametrize(
    ("lines", "status", "text"),
    [
        (["GET / HTTP/1.1"], 404, "Invalid URL path: not a recognized HTTP API endpoint"),
        (["GET /v1/kv HTTP/1.1"], 404, "Invalid URL path: not a recognized HTTP API endpoint"),
        (["GET /v1/catalog/nodes/x HTTP/1.1"], 404, "Invalid URL path: not a recognized HTTP API endpoint"),
        (["GET /v1/kv/../status/leader HTTP/1.1"], 404, ""),  # a key, never another endpoint
        (["GET /v1/catalog/%2e%2e/status/leader HTTP/1.1"], 404, "Invalid URL path"),
        (["POST /v1/kv/k HTTP/1.1", "Content-Length: 0"], 405, "method POST not allowed"),
        (["PATCH /v1/kv/k HTTP/1.1", "Content-Length: 0"], 405, "method PATCH not allowed"),
        (["GET /v1/kv/k HTTP/1.1", "X-Consul-Namespace: team"], 400, 'Invalid header: "X-Consul-Namespace"'),
        (["CONNECT a:1 HTTP/1.1"], 405, ""),
        (["GET /v1/kv/k HTTP/2.0"], 505, ""),
        (["GET /v1/kv/k HTTP/1.1", "Content-Length: x"], 400, ""),
        (["GET /v1/kv/k HTTP/1.1", "Host: other"], 400, ""),
        (["nonsense"], 400, ""),
    ],
)
async def test_what_is_no_request_of_ours(autojump_clock, lines, status, text):
    async with serving() as client:
        answer = await client.ask(*lines)
        assert (answer.status, answer.body.decode()[: len(text)]) == (status, text)
        if status == 405 and text:
            assert answer.headers["allow"] == "OPTIONS,DELETE,GET,PUT"


async def test_options_head_and_redirect(autojump_clock):
    async with serving() as client:
        options = await client.ask("OPTIONS /v1/kv/k HTTP/1.1")
        assert (options.status, options.body, options.headers["allow"]) == (200, b"", "OPTIONS,DELETE,GET,PUT")
        moved = await client.ask("GET /v1//catalog///nodes?stale HTTP/1.1")
        assert (moved.status, moved.headers["location"]) == (301, "/v1/catalog/nodes?stale")
        away = await client.ask("GET //evil.example/x HTTP/1.1")
        assert (away.status, away.headers["location"]) == (301, "/evil.example/x")
        await client.send("HEAD /v1/status/leader HTTP/1.1", "Connection: close")
        received = b""
        while data := await client.stream.receive_some():
            received += data
        assert b"Content-Length: 16\r\n" in received or b"content-length: 16\r\n" in received
        assert received.endswith(b"\r\n\r\n")


async def test_head_never_writes(autojump_clock):
    async with serving() as client:
        await client.send("HEAD /v1/catalog/register HTTP/1.1")
        answer = await read_answer(client.stream, head_only=True)
        assert answer.status == 405
        await client.send("GET /v1/kv/k HTTP/1.1", "X-HTTP-Method-Override: DELETE")
        assert (await read_answer(client.stream)).status == 404
        assert client.backend.commands == []


async def test_json_is_indented_when_asked(autojump_clock):
    async with serving() as client:
        answer = await client.ask("GET /v1/catalog/datacenters?pretty HTTP/1.1")
        assert answer.body == b'[\n    "dc1"\n]\n'
    async with serving(HttpSettings(pretty=True)) as client:
        assert (await client.ask("GET /v1/catalog/datacenters HTTP/1.1")).body == b'[\n    "dc1"\n]\n'


async def test_large_answers_are_compressed_for_clients_that_ask(autojump_clock):
    async with serving() as client:
        plain = await client.ask("GET /v1/test/large HTTP/1.1")
        assert "content-encoding" not in plain.headers
        for accept, compressed in (("gzip, deflate", True), ("gzip;q=0", False), ("br", False), ("*", True)):
            answer = await client.ask("GET /v1/test/large HTTP/1.1", f"Accept-Encoding: {accept}")
            assert ("content-encoding" in answer.headers) == compressed, accept
            assert (gzip.decompress(answer.body) if compressed else answer.body) == plain.body
            assert answer.headers["vary"] == "Accept-Encoding"
        small = await client.ask("GET /v1/status/leader HTTP/1.1", "Accept-Encoding: gzip")
        assert "content-encoding" not in small.headers


async def test_page_of_a_rebound_name_is_refused_on_loopback(autojump_clock):
    async with serving() as client:
        for host, status in (
            ("127.0.0.1:8500", 200),
            ("[::1]:8500", 200),
            ("localhost:8500", 200),
            ("web-1", 200),
            ("consul.service.consul", 200),
            ("agent.internal", 200),
            ("10.0.0.9", 200),
            ("evil.example", 403),
            ("127.0.0.1.evil.example:8500", 403),
            ("localhost.evil.example", 403),
        ):
            await client.stream.send_all(f"GET /v1/status/leader HTTP/1.1\r\nHost: {host}\r\n\r\n".encode())
            assert (await read_answer(client.stream)).status == status, host
    for settings, over_loopback in (
        (HttpSettings(allowed_hosts=frozenset(("mesh.example.com",))), True),
        (HttpSettings(), False),
    ):
        async with serving(settings, over_loopback=over_loopback) as client:
            await client.stream.send_all(b"GET /v1/status/leader HTTP/1.1\r\nHost: mesh.example.com\r\n\r\n")
            assert (await read_answer(client.stream)).status == 200


async def test_page_of_another_origin_may_not_write(autojump_clock):
    async with serving() as client:
        for origin, status in (
            ("http://localhost", 200),
            ("http://evil.example", 403),
            ("null", 403),
            ("http://localhost:3000", 403),
        ):
            answer = await client.ask("PUT /v1/kv/k HTTP/1.1", f"Origin: {origin}", "Content-Length: 1", body=b"v")
            assert answer.status == status, origin
        assert (await client.ask("GET /v1/kv/k HTTP/1.1", "Origin: http://evil.example")).status == 200
    opened = HttpSettings(response_headers=(("Access-Control-Allow-Origin", "*"),))
    async with serving(opened) as client:
        answer = await client.ask("PUT /v1/kv/k HTTP/1.1", "Origin: http://a.example", "Content-Length: 1", body=b"v")
        assert (answer.status, answer.headers["access-control-allow-origin"]) == (200, "*")


async def test_every_answer_declares_its_type_and_forbids_sniffing(autojump_clock):
    async with serving() as client:
        for line in ("GET /v1/status/leader", "GET /nope", "OPTIONS /v1/kv/k", "GET /v1/kv/k?index=x", "GET /v1//x"):
            answer = await client.ask(f"{line} HTTP/1.1")
            assert answer.headers["x-content-type-options"] == "nosniff"
            assert answer.headers["content-type"] in ("application/json", "text/plain; charset=utf-8")


def run_bytes(pieces: list[bytes]) -> bytes:
    """What the server sends for these bytes, then end of stream."""

    async def main() -> bytes:
        received = b""
        async with serving() as client:

            async def send() -> None:
                try:
                    for piece in pieces:
                        await client.stream.send_all(piece)
                    await client.stream.send_eof()
                except (trio.BrokenResourceError, trio.ClosedResourceError):
                    return  # the server had enough

            async with trio.open_nursery() as nursery:
                nursery.start_soon(send)
                while data := await client.stream.receive_some():
                    received += data
            await client.done.wait()
        return received

    return trio.run(main, clock=trio.testing.MockClock(autojump_threshold=0))


GOOD = (
    b"PUT /v1/kv/k?flags=3 HTTP/1.1\r\nHost: a\r\nContent-Length: 5\r\n\r\nhello"
    b"PUT /v1/kv/c HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\n\r\n3\r\nabc\r\n0\r\n\r\n"
    b"GET /v1/kv/?recurse HTTP/1.1\r\nHost: a\r\n\r\n"
    b'PUT /v1/catalog/register HTTP/1.1\r\nHost: a\r\nContent-Length: 29\r\n\r\n{"Node": "n", "Address": "a"}'
)


def without_date(received: bytes) -> bytes:
    return b"\n".join(line for line in received.split(b"\n") if not line.startswith(b"Date:"))


@given(st.lists(st.integers(0, len(GOOD)), max_size=8))
def test_chunking_of_the_input_does_not_matter(cuts):
    edges = [0, *sorted(cuts), len(GOOD)]
    pieces = [GOOD[start:end] for start, end in pairwise(edges) if start < end]
    assert without_date(run_bytes(pieces)) == without_date(run_bytes([GOOD]))
    assert run_bytes(pieces).count(b"HTTP/1.1 200 OK") == 4


@given(st.integers(0, len(GOOD) - 1), st.binary(max_size=6), st.integers(0, 6))
def test_mutated_input_never_breaks_the_server(position, inserted, removed):
    received = run_bytes([GOOD[:position] + inserted + GOOD[position + removed :]])
    for part in received.split(b"HTTP/1.1 ")[1:]:
        assert part[:3] in (b"200", b"301", b"400", b"403", b"404", b"405", b"408", b"413", b"414", b"417", b"431",
                            b"500", b"501", b"505")  # fmt: skip


@given(st.binary(max_size=200))
def test_random_bytes_get_a_400_or_a_close(data):
    received = run_bytes([data])
    assert received == b"" or received.startswith(b"HTTP/1.1 ")


async def test_request_that_comes_as_the_connection_is_drained_is_answered(autojump_clock):
    async with serving() as client:
        await trio.testing.wait_all_tasks_blocked()
        await client.send("PUT /v1/kv/k HTTP/1.1", "Content-Length: 1", body=b"v")
        client.connection.drain()  # it has woken, but not run yet
        answer = await read_answer(client.stream)
        assert (answer.status, answer.headers["connection"]) == (200, "close")
        assert await client.stream.receive_some() == b""
        await client.done.wait()


async def test_handler_without_an_end_is_answered_and_the_connection_closed(autojump_clock):
    async with serving(HttpSettings(limits=HttpLimits(handler_s=5))) as client:
        answer = await client.ask("PUT /v1/test/sleep?s=1000 HTTP/1.1")
        assert (answer.status, answer.body) == (500, b"The request took too long")
        assert trio.current_time() == pytest.approx(5, abs=0.2)
        await client.done.wait()
        assert client.log == ["cancelled"]
