"""Listeners and the limits over all connections, on real sockets."""

import errno
import socket
import ssl
from contextlib import asynccontextmanager

import httpx
import pytest
import trio
from cryptography.hazmat.primitives.asymmetric import ec
from state_backend import MemoryBackend

from agent.http.connection import HttpLimits, HttpSettings
from agent.http.request import ApiRequest, ApiResponse, Route, text_response
from agent.http.server import HttpServer, TcpListen, UnixListen
from agent.runtime import Runtime
from agent.telemetry import Metrics
from mesh.errors import ConfigError

LOOPBACK = TcpListen("ports.http", "127.0.0.1", 0)


async def client_of(request: ApiRequest) -> ApiResponse:
    return text_response(request.client_address)


async def wait_forever(request: ApiRequest) -> ApiResponse:
    await trio.sleep_forever()
    raise AssertionError


ROUTES = [
    Route("GET", "/client", client_of),
    Route("GET", "/forever", wait_forever),
    Route("GET", "/items/:id", client_of),
]


@asynccontextmanager
async def serving(*listens, limits=None, metrics=None, **settings):
    common = HttpSettings(limits=limits or HttpLimits(), **settings)
    server = HttpServer(ROUTES, listens or (LOOPBACK,), common, Runtime(seed=1), metrics=metrics)
    await server.listen()
    async with trio.open_nursery() as nursery:
        nursery.start_soon(server.run)
        yield server
        nursery.cancel_scope.cancel()


async def ask(stream, path="/client") -> bytes:
    await stream.send_all(f"GET {path} HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n".encode())
    received = b""
    while data := await stream.receive_some():
        received += data
    return received


async def until(condition) -> None:
    with trio.fail_after(5):
        while not condition():
            await trio.sleep(0.005)


async def test_every_address_is_served_and_knows_its_client():
    async with serving(LOOPBACK, TcpListen("ports.http", "::1", 0)) as server:
        for host, port in server.addresses:
            async with await trio.open_tcp_stream(host, port) as stream:
                assert (await ask(stream)).endswith(b"\r\n\r\n" + host.encode())


async def test_unspecified_ipv6_address_serves_ipv4_too():
    async with serving(TcpListen("ports.http", "::", 0)) as server:
        port = server.addresses[0][1]
        for host in ("127.0.0.1", "::1"):
            async with await trio.open_tcp_stream(host, port) as stream:
                assert (await ask(stream)).endswith(b"\r\n\r\n" + host.encode())


async def test_port_in_use_is_one_line_with_key_and_address():
    async with serving() as server:
        port = server.addresses[0][1]
        second = HttpServer(
            ROUTES, (LOOPBACK, TcpListen("ports.http", "127.0.0.1", port)), HttpSettings(), Runtime(seed=1)
        )
        with pytest.raises(
            ConfigError, match=rf"^ports\.http: cannot listen on 127\.0\.0\.1:{port}: .*another process"
        ):
            await second.listen()
        assert second.addresses == ()  # what it had taken is given back


@pytest.mark.parametrize(("host", "port"), [("localhost", 0), ("", 0), ("127.0.0.1", 70000), ("192.0.2.1", 0)])
async def test_unusable_address_is_a_config_error(host, port):
    server = HttpServer(ROUTES, (TcpListen("addresses.http", host, port),), HttpSettings(), Runtime(seed=1))
    with pytest.raises(ConfigError, match=r"^addresses\.http: "):
        await server.listen()


async def test_client_over_its_limit_gets_429_and_others_are_served():
    async with serving(limits=HttpLimits(connections_per_client=2)) as server:
        held = [await trio.open_tcp_stream(*server.addresses[0]) for _ in range(2)]
        await until(lambda: server.connection_count == 2)
        async with await trio.open_tcp_stream(*server.addresses[0]) as third:
            assert (await third.receive_some()).startswith(b"HTTP/1.1 429 ")
        async with await trio.open_tcp_stream(*server.addresses[0], local_address="127.0.0.2") as other:
            assert (await ask(other)).endswith(b"127.0.0.2")
        await held[0].aclose()
        await until(lambda: server.connection_count == 1)
        async with await trio.open_tcp_stream(*server.addresses[0]) as again:
            assert (await ask(again)).startswith(b"HTTP/1.1 200 ")
        await held[1].aclose()


async def test_limit_of_zero_per_client_means_none():
    async with serving(limits=HttpLimits(connections_per_client=0)) as server:
        stream = await trio.open_tcp_stream(*server.addresses[0])
        assert (await ask(stream)).startswith(b"HTTP/1.1 200 ")
        await stream.aclose()


async def test_flood_is_closed_beyond_the_total_and_service_resumes():
    async with serving(limits=HttpLimits(connections_max=10)) as server:
        flood = [await trio.open_tcp_stream(*server.addresses[0]) for _ in range(30)]
        await until(lambda: server.connection_count == 10)
        for stream in flood[10:]:
            with pytest.raises((trio.BrokenResourceError, AssertionError)):
                assert await stream.receive_some() == b"never anything"
        for stream in flood:
            await stream.aclose()
        await until(lambda: server.connection_count == 0)
        async with await trio.open_tcp_stream(*server.addresses[0]) as stream:
            assert (await ask(stream)).startswith(b"HTTP/1.1 200 ")


async def test_requests_are_timed_and_refusals_counted(caplog):
    caplog.set_level("DEBUG", logger="mesh.http")
    metrics = Metrics(lambda: 1000.0)
    async with serving(limits=HttpLimits(connections_per_client=1), metrics=metrics) as server:
        async with await trio.open_tcp_stream(*server.addresses[0]) as stream:
            await until(lambda: server.connection_count == 1)
            async with await trio.open_tcp_stream(*server.addresses[0]) as second:
                assert (await second.receive_some()).startswith(b"HTTP/1.1 429 ")
            assert "consul_http_connections 1" in metrics.prometheus_text()
            await ask(stream, "/items/secret-name?x=1")
        await until(lambda: server.connection_count == 0)
        async with await trio.open_tcp_stream(*server.addresses[0]) as stream:
            await stream.send_all(b"nonsense\r\n\r\n")
            assert (await stream.receive_some()).startswith(b"HTTP/1.1 400 ")
    text = metrics.prometheus_text()
    assert 'consul_api_http_count{method="GET",path="items._"} 1' in text
    assert "secret-name" not in text
    assert "consul_http_refused 1" in text
    assert "consul_http_malformed 1" in text
    assert "method=GET url=/items/secret-name?x=1 from=127.0.0.1 ms=" in caplog.text


async def test_exhausted_descriptors_pause_accepting_and_nothing_ends(monkeypatch, caplog):
    accept, failures = trio.SocketListener.accept, [errno.EMFILE, errno.ENFILE]

    async def failing(self):
        if failures:
            raise OSError(failures.pop(), "Too many open files")
        return await accept(self)

    monkeypatch.setattr(trio.SocketListener, "accept", failing)
    async with serving() as server, await trio.open_tcp_stream(*server.addresses[0]) as stream:
        assert (await ask(stream)).startswith(b"HTTP/1.1 200 ")
    assert failures == []
    assert caplog.text.count("ulimit") == 1


async def test_reset_at_any_moment_harms_nobody_else():
    async with serving() as server:
        for sent in (b"", b"GET /cl", b"GET /forever?index=1 HTTP/1.1\r\nHost: a\r\n\r\n", b"\x00\xff" * 50):
            stream = await trio.open_tcp_stream(*server.addresses[0])
            if sent:
                await stream.send_all(sent)
            if not sent.startswith(b"\x00"):
                await until(lambda: server.connection_count == 1)
            stream.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\x01\x00\x00\x00\x00\x00\x00\x00")
            await stream.aclose()
            await until(lambda: server.connection_count == 0)
        async with await trio.open_tcp_stream(*server.addresses[0]) as stream:
            assert (await ask(stream)).startswith(b"HTTP/1.1 200 ")


async def test_refused_upload_can_still_read_its_answer():
    async with serving() as server, await trio.open_tcp_stream(*server.addresses[0]) as stream:
        received = bytearray()

        async def read() -> None:
            while data := await stream.receive_some():
                received.extend(data)

        async with trio.open_nursery() as nursery:
            nursery.start_soon(read)
            await stream.send_all(b"GET /client HTTP/1.1\r\nHost: a\r\nContent-Length: 4000000\r\n\r\n")
            await stream.send_all(b"x" * 4_000_000)
        assert received.startswith(b"HTTP/1.1 413 ")


async def test_drain_answers_what_is_in_progress_then_run_ends():
    server = HttpServer(ROUTES, (LOOPBACK,), HttpSettings(), Runtime(seed=1))
    await server.listen()
    address = server.addresses[0]
    async with trio.open_nursery() as nursery:
        nursery.start_soon(server.run)
        idle, waiting = [await trio.open_tcp_stream(*address) for _ in range(2)]
        await waiting.send_all(b"GET /forever?index=1 HTTP/1.1\r\nHost: a\r\n\r\n")
        await until(lambda: server.connection_count == 2)
        with trio.fail_after(5):
            await server.drain(2.0)
            for stream in (idle, waiting):
                assert await stream.receive_some() == b""
                await stream.aclose()
    with pytest.raises(OSError, match="failed"):
        await trio.open_tcp_stream(*address)


async def test_unix_socket_is_served_and_replaced_when_stale(tmp_path):
    path = tmp_path / "http.sock"
    with socket.socket(socket.AF_UNIX) as dead:
        dead.bind(str(path))
    listen = UnixListen("addresses.http", path, mode=0o660)
    async with serving(listen):
        assert path.stat().st_mode & 0o777 == 0o660
        async with await trio.open_unix_socket(path) as stream:
            assert (await ask(stream)).endswith(b"\r\n\r\n")  # no client address
        second = HttpServer(ROUTES, (listen,), HttpSettings(), Runtime(seed=1))
        with pytest.raises(ConfigError, match="another process has it"):
            await second.listen()
    assert not path.exists()
    path.write_text("precious")
    third = HttpServer(ROUTES, (listen,), HttpSettings(), Runtime(seed=1))
    with pytest.raises(ConfigError, match="not a socket"):
        await third.listen()
    assert path.read_text() == "precious"


@pytest.fixture(scope="module")
def tls_contexts(tmp_path_factory):
    """A server's and a client's context, of one self-signed certificate for localhost."""
    import datetime

    from cryptography import x509
    from cryptography.hazmat.primitives import hashes, serialization

    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, "localhost")])
    start = datetime.datetime(2020, 1, 1, tzinfo=datetime.UTC)
    certificate = (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(name)
        .public_key(key.public_key())
        .serial_number(1)
        .not_valid_before(start)
        .not_valid_after(start + datetime.timedelta(days=36500))
        .add_extension(x509.SubjectAlternativeName([x509.DNSName("localhost")]), critical=False)
        .sign(key, hashes.SHA256())
    )
    path = tmp_path_factory.mktemp("tls") / "server.pem"
    path.write_bytes(
        certificate.public_bytes(serialization.Encoding.PEM)
        + key.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
    )
    server = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    server.load_cert_chain(path)
    return server, ssl.create_default_context(cafile=str(path))


async def test_https_serves_blocking_queries_and_notices_who_leaves(tls_contexts):
    server_side, client_side = tls_contexts
    async with serving(TcpListen("ports.https", "127.0.0.1", 0, server_side)) as server:
        port = server.addresses[0][1]
        async with httpx.AsyncClient(verify=client_side, trust_env=False) as client:
            for _ in range(2):
                assert (await client.get(f"https://localhost:{port}/client")).text == "127.0.0.1"
            with trio.move_on_after(0.05):
                await client.get(f"https://localhost:{port}/forever?index=1")
        await until(lambda: server.connection_count == 0)


async def test_https_port_survives_clients_that_do_not_speak_tls(tls_contexts):
    server_side, client_side = tls_contexts
    limits = HttpLimits(handshake_s=0.05)
    async with serving(TcpListen("ports.https", "127.0.0.1", 0, server_side), limits=limits) as server:
        for sent in (b"GET / HTTP/1.1\r\nHost: a\r\n\r\n", b"", b"\x16\x03\x01\x00"):
            async with await trio.open_tcp_stream(*server.addresses[0]) as stream:
                if sent:
                    await stream.send_all(sent)
                with trio.fail_after(5):
                    try:
                        while await stream.receive_some():
                            pass
                    except trio.BrokenResourceError:
                        pass
        port = server.addresses[0][1]
        async with httpx.AsyncClient(verify=client_side, trust_env=False) as client:
            assert (await client.get(f"https://localhost:{port}/client")).status_code == 200


async def test_abandoned_blocking_queries_leave_nothing_behind(api):
    """The peer closes mid-wait, a hundred times over: every watch and connection is freed."""
    backend: MemoryBackend = api.backend
    streams = [await api.connect() for _ in range(100)]
    for stream in streams:
        await stream.send_all(b"GET /v1/kv/a?index=7 HTTP/1.1\r\nHost: a\r\n\r\n")
    await until(lambda: len(backend.registry) == 100)
    for stream in streams:
        await stream.aclose()
    await until(lambda: len(backend.registry) == 0 and api.server.connection_count == 0)
