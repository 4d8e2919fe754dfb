"""Whatever arrives at a listener, only its own connection suffers."""

import contextlib
import random
import socket
import time

import pytest

GET = b"GET / HTTP/1.1\r\nHost: api\r\n\r\n"
OK = b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nok"


def assert_serving(hops, app=None):
    client = hops.client()
    client.send(GET)
    app = app or hops.app()
    app.read_message()
    app.send(OK)
    assert client.read_message()[1] == b"ok"
    client.close()
    return app


def connect(hops, port):
    sock = socket.create_connection((hops.address, port), 5)
    sock.settimeout(5)
    return sock


def test_random_bytes_at_both_listeners(pair):
    hops = pair.hops()
    rng = random.Random(4)
    app = assert_serving(hops)
    for port in (hops.outbound_port, hops.inbound_port):
        for _ in range(60):
            sock = connect(hops, port)
            try:
                sock.sendall(rng.randbytes(rng.randrange(1, 3000)))
                if rng.random() < 0.5:
                    sock.shutdown(socket.SHUT_WR)
                    while sock.recv(65536):
                        pass
            except OSError:
                pass
            sock.close()
    assert_serving(hops, app)
    assert pair.worker.counter("envoy_http_downstream_cx_protocol_error") > 0
    assert pair.worker.counter("envoy_listener_ssl_connection_error") > 0


@pytest.mark.parametrize(
    ("request_bytes", "status"),
    [
        (b"GET / HTTP/1.1\r\nHost: a\r\nContent-Length: 5\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n", b"400"),
        (b"GET / HTTP/1.1\r\nHost: a\r\nHost: b\r\n\r\n", b"400"),
        (b"GET / HTTP/1.1\r\n\r\n", b"400"),
        (b"GET / HTTP/1.1\r\nHost: a\n\r\n", b"400"),
        (b"CONNECT a:1 HTTP/1.1\r\nHost: a\r\n\r\nhello", b"405"),
        (b"GET / HTTP/2.0\r\nHost: a\r\n\r\n", b"505"),
        (b"GET /" + b"a" * 9000 + b" HTTP/1.1\r\nHost: a\r\n\r\n", b"414"),
        (b"GET / HTTP/1.1\r\nHost: a\r\nA: " + b"a" * 70000 + b"\r\n\r\n", b"431"),
        (b"GET / HTTP/1.1\r\nHost: a\r\n" + b"a: b\r\n" * 101 + b"\r\n", b"431"),
    ],
)
def test_malformed_requests_are_answered_and_closed(pair, request_bytes, status):
    hops = pair.hops()
    client = hops.client()
    client.send(request_bytes)
    head, _ = client.read_message()
    assert head.startswith(b"HTTP/1.1 " + status + b" ")
    assert b"connection: close" in head
    assert client.at_end()


def test_a_client_that_resets_after_each_byte_of_its_request(pair):
    hops = pair.hops()
    hops.serve()
    request = b"POST / HTTP/1.1\r\nHost: api\r\nTransfer-Encoding: chunked\r\n\r\n3\r\nabc\r\n0\r\n\r\n"
    for end in range(1, len(request)):
        client = hops.client()
        client.send(request[:end])
        client.reset()
    client = hops.client()
    client.send(GET)
    assert client.read_message()[1] == b"ok"


def test_an_application_that_resets_after_each_byte_of_its_response(pair):
    hops = pair.hops()
    response = b"HTTP/1.1 200 OK\r\nContent-Length: 3\r\n\r\nabc"
    for end in range(len(response)):
        client = hops.client()
        client.send(b"POST / HTTP/1.1\r\nHost: api\r\nContent-Length: 0\r\n\r\n")
        app = hops.app()
        app.read_head()
        app.send(response[:end])
        app.reset()
        with contextlib.suppress(ConnectionResetError):
            while client._fill() and not client.buffer.startswith(b"HTTP/1.1 50"):
                pass
        assert not client.buffer.endswith(b"\r\n\r\nabc")
        assert client.buffer[:12] in (b"", b"HTTP/1.1 200", b"HTTP/1.1 502", b"HTTP/1.1 503")
        client.close()
    assert_serving(hops)


def test_a_flood_of_silent_connections_stops_at_the_cap_and_leaves_room_for_others(pair):
    hops = pair.hops(connections_max=50)
    app = assert_serving(hops)
    silent = [connect(hops, hops.inbound_port) for _ in range(80)]
    deadline = time.monotonic() + 5
    while pair.worker.counter("envoy_listener_downstream_cx_overflow") < 20 and time.monotonic() < deadline:
        pass
    assert pair.worker.counter("envoy_listener_downstream_cx_overflow") >= 20
    assert_serving(hops, app)  # over the connection that the caller's sidecar already has
    for sock in silent:
        sock.close()


def test_one_byte_at_a_time(pair):
    hops = pair.hops()
    client = hops.client()
    request = b"POST / HTTP/1.1\r\nHost: api\r\nTransfer-Encoding: chunked\r\n\r\n3\r\nabc\r\n0\r\n\r\n"
    for value in request:
        client.send(bytes((value,)))
    app = hops.app()
    assert app.read_until(b"\r\n0\r\n\r\n").replace(b"\r\n", b"").endswith((b"3abc0", b"1a1b1c0"))
    for value in OK:
        app.send(bytes((value,)))
    assert client.read_message()[1] == b"ok"


def test_closed_connections_leave_nothing_behind(pair):
    hops = pair.hops()
    hops.serve()
    leaf = pair.authority.leaf("web")

    def visit(times):
        for _ in range(times):
            client = hops.tls_client(leaf=leaf)
            client.send(GET)
            client.read_message()
            client.close()

    visit(50)
    before = pair.worker.rss_bytes()
    visit(300)
    assert pair.worker.rss_bytes() - before < 6 * 1024 * 1024  # one that is kept costs some 70 KiB
