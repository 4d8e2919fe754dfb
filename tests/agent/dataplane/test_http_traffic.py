"""HTTP through two sidecars of a real worker; the test plays the client and the application."""

import os
import signal
import threading
import time

import pytest

GET = b"GET /path?q=1 HTTP/1.1\r\nHost: api\r\n\r\n"
OK = b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nok"


def test_a_request_and_its_response_pass_unchanged_but_for_mesh_headers(pair):
    hops = pair.hops()
    client = hops.client()
    client.send(b"GET /a/../path?q=1 HTTP/1.1\r\nHost: api\r\nX-Custom: a b\r\nConnection: x-hop\r\nX-Hop: 1\r\n\r\n")
    app = hops.app()
    head, body = app.read_message()
    lines = head.split(b"\r\n")
    assert lines[0] == b"GET /path?q=1 HTTP/1.1"
    assert b"host: api" in lines
    assert b"x-custom: a b" in lines
    assert b"x-hop" not in head
    assert sum(line.startswith(b"x-request-id: ") for line in lines) == 1
    assert sum(line.startswith(b"traceparent: 00-") for line in lines) == 1
    app.send(b"HTTP/1.1 201 Created\r\nX-Answer: yes\r\nContent-Length: 5\r\nKeep-Alive: timeout=5\r\n\r\nhello")
    head, body = client.read_message()
    assert head.startswith(b"HTTP/1.1 201 Created\r\n")
    assert b"x-answer: yes\r\n" in head
    assert b"keep-alive" not in head
    assert body == b"hello"


def test_request_id_trace_and_foreign_identity_headers(pair):
    hops = pair.hops()
    client = hops.client()
    trace = b"traceparent: 00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"
    client.send(
        b"GET / HTTP/1.1\r\nHost: api\r\nX-Request-Id: mine\r\n" + trace + b"\r\n"
        b"X-Forwarded-Client-Cert: By=spiffe://fake;URI=spiffe://fake\r\nX-Forwarded-For: 10.0.0.1\r\n\r\n"
    )
    head, _ = hops.app().read_message()
    assert b"x-request-id: mine\r\n" in head
    assert trace in head
    assert b"x-forwarded-client-cert" not in head
    assert b"x-forwarded-for: 10.0.0.1\r\n" in head


def test_connections_are_kept_alive_and_reused_on_every_leg(pair):
    hops = pair.hops()
    client = hops.client()
    app = None
    for number in range(5):
        client.send(GET)
        app = app or hops.app()
        app.read_message()
        app.send(b"HTTP/1.1 200 OK\r\nContent-Length: 1\r\n\r\n%d" % number)
        assert client.read_message()[1] == b"%d" % number
    assert pair.worker.counter("envoy_cluster_upstream_cx_total") == 2  # one to the sidecar, one to the application


def test_chunked_bodies_stream_both_ways_before_they_end(pair):
    hops = pair.hops()
    client = hops.client()
    client.send(b"POST /up HTTP/1.1\r\nHost: api\r\nTransfer-Encoding: chunked\r\n\r\n5\r\nhello\r\n")
    app = hops.app()
    assert b"transfer-encoding: chunked" in app.read_head()
    assert app.read(10) == b"5\r\nhello\r\n"
    client.send(b"6;ext=1\r\n world\r\n")
    assert app.read(11) == b"6\r\n world\r\n"
    client.send(b"0\r\nTrailer: dropped\r\n\r\n")
    assert app.read(5) == b"0\r\n\r\n"
    app.send(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n3\r\none\r\n")
    assert b"transfer-encoding: chunked" in client.read_head()
    assert client.read(8) == b"3\r\none\r\n"
    app.send(b"3\r\ntwo\r\n0\r\n\r\n")
    assert client.read(13) == b"3\r\ntwo\r\n0\r\n\r\n"


def test_a_body_that_lasts_until_close_reaches_the_client_as_chunks(pair):
    hops = pair.hops()
    client = hops.client()
    client.send(GET)
    app = hops.app()
    app.read_message()
    app.send(b"HTTP/1.1 200 OK\r\n\r\nuntil the end")
    app.close()
    assert client.read_message()[1] == b"until the end"
    client.send(GET)  # and the client's connection lives on
    app = hops.app()
    app.read_message()
    app.send(OK)
    assert client.read_message()[1] == b"ok"


def test_100_continue_is_answered_by_the_application(pair):
    hops = pair.hops()
    client = hops.client()
    client.send(b"PUT / HTTP/1.1\r\nHost: api\r\nContent-Length: 4\r\nExpect: 100-continue\r\n\r\n")
    app = hops.app()
    assert b"expect: 100-continue" in app.read_head()
    app.send(b"HTTP/1.1 100 Continue\r\n\r\n")
    assert client.read_head() == b"HTTP/1.1 100 Continue\r\n\r\n"
    client.send(b"body")
    assert app.read(4) == b"body"
    app.send(OK)
    assert client.read_message()[1] == b"ok"


def test_a_refused_expectation_needs_no_body(pair):
    hops = pair.hops()
    client = hops.client()
    client.send(b"PUT / HTTP/1.1\r\nHost: api\r\nContent-Length: 4\r\nExpect: 100-continue\r\n\r\n")
    app = hops.app()
    app.read_head()
    app.send(b"HTTP/1.1 413 Payload Too Large\r\nContent-Length: 0\r\n\r\n")
    head, _ = client.read_message()
    assert head.startswith(b"HTTP/1.1 413 ")
    assert b"connection: close" in head
    assert client.at_end()


@pytest.mark.parametrize("response", [b"HTTP/1.1 204 No Content\r\n\r\n", b"HTTP/1.1 304 Not Modified\r\n\r\n"])
def test_responses_without_a_body_leave_the_connection_in_step(pair, response):
    hops = pair.hops()
    client = hops.client()
    client.send(GET + GET)
    app = hops.app()
    app.read_message()
    app.send(response)
    assert client.read_head().split(b"\r\n")[0] == response.split(b"\r\n")[0]
    app.read_message()
    app.send(OK)
    assert client.read_message()[1] == b"ok"


def test_head_has_a_length_and_no_body(pair):
    hops = pair.hops()
    client = hops.client()
    client.send(b"HEAD / HTTP/1.1\r\nHost: api\r\n\r\n")
    app = hops.app()
    app.read_message()
    app.send(b"HTTP/1.1 200 OK\r\nContent-Length: 1000\r\n\r\n")
    assert b"content-length: 1000" in client.read_head()
    client.send(GET)
    app.read_message()
    app.send(OK)
    assert client.read_message()[1] == b"ok"


def test_pipelined_requests_are_answered_in_order(pair):
    hops = pair.hops()
    client = hops.client()
    client.send(b"".join(b"GET /%d HTTP/1.1\r\nHost: api\r\n\r\n" % number for number in range(50)) + b"BAD\r\n\r\n")
    app = hops.app()
    for number in range(50):
        assert app.read_head().startswith(b"GET /%d " % number)
        app.send(b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n%d" % (len(str(number)), number))
    for number in range(50):
        assert client.read_message()[1] == b"%d" % number
    assert client.read_message()[0].startswith(b"HTTP/1.1 400 ")
    assert client.at_end()


def test_an_early_response_is_delivered_and_the_rest_of_the_request_is_not_read(pair):
    hops = pair.hops()
    client = hops.client()
    client.send(b"POST / HTTP/1.1\r\nHost: api\r\nContent-Length: 1000000\r\n\r\nsome")
    app = hops.app()
    app.read_head()
    app.send(b"HTTP/1.1 403 Forbidden\r\nContent-Length: 2\r\n\r\nno")
    head, body = client.read_message()
    assert (head.split(b"\r\n")[0], body) == (b"HTTP/1.1 403 Forbidden", b"no")
    assert client.at_end()
    assert app.was_reset()


def test_websocket_upgrade_becomes_a_byte_relay(pair):
    hops = pair.hops()
    client = hops.client()
    client.send(
        b"GET /chat HTTP/1.1\r\nHost: api\r\nConnection: keep-alive, Upgrade\r\nUpgrade: WebSocket\r\n"
        b"Sec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\nSec-WebSocket-Version: 13\r\n\r\nearly"
    )
    app = hops.app()
    head = app.read_head()
    assert b"upgrade: websocket\r\n" in head
    assert b"connection: upgrade\r\n" in head
    app.send(
        b"HTTP/1.1 101 Switching Protocols\r\nConnection: Upgrade\r\nUpgrade: websocket\r\n"
        b"Sec-WebSocket-Accept: s3pPLMBiTxaQ9kYGzzhZRbK+xOo=\r\n\r\nfirst"
    )
    head = client.read_head()
    assert head.startswith(b"HTTP/1.1 101 ")
    assert b"sec-websocket-accept: s3pPLMBiTxaQ9kYGzzhZRbK+xOo=\r\n" in head
    assert client.read(5) == b"first"
    assert app.read(5) == b"early"
    for data in (b"\x81\x00", b"x" * 300_000):
        client.send(data)
        assert app.read(len(data)) == data
        app.send(data)
        assert client.read(len(data)) == data
    client.close()
    assert app.at_end()


def test_after_a_refused_upgrade_the_connection_closes(pair):
    hops = pair.hops()
    client = hops.client()
    client.send(b"GET / HTTP/1.1\r\nHost: api\r\nConnection: Upgrade\r\nUpgrade: websocket\r\n\r\n")
    app = hops.app()
    app.read_message()
    app.send(OK)
    head, body = client.read_message()
    assert (b"connection: close" in head, body) == (True, b"ok")
    assert client.at_end()


def test_a_relay_ends_with_every_byte_delivered(pair):
    hops = pair.hops()
    client = hops.client()
    client.send(b"GET / HTTP/1.1\r\nHost: api\r\nConnection: Upgrade\r\nUpgrade: websocket\r\n\r\n")
    app = hops.app()
    app.read_head()
    app.send(b"HTTP/1.1 101 X\r\nConnection: Upgrade\r\nUpgrade: websocket\r\n\r\n")
    client.read_head()
    app.end()
    assert client.at_end()
    data = bytes(range(256)) * 8192
    sender = threading.Thread(target=lambda: (client.send(data), client.close()))
    sender.start()
    assert app.read(len(data)) == data
    assert app.at_end()
    sender.join()


def test_requests_behind_one_whose_response_closes_are_not_served(pair):
    hops = pair.hops()
    client = hops.client()
    post = b"POST /first HTTP/1.1\r\nHost: api\r\nContent-Length: 100000\r\n\r\n"
    client.send(post)
    app = hops.app()
    app.read_head()
    app.send(b"HTTP/1.1 403 Forbidden\r\nContent-Length: 0\r\n\r\n")
    assert client.read_head().startswith(b"HTTP/1.1 403 ")
    client.send(bytes(100000) + b"GET /second HTTP/1.1\r\nHost: api\r\n\r\n")
    assert client.at_end()
    hops.listener.settimeout(0.2)
    with pytest.raises(TimeoutError):
        hops.app()


def test_what_is_sent_behind_an_upgrade_request_is_bounded_and_complete(pair):
    hops = pair.hops()
    client = hops.client()
    client.send(b"GET / HTTP/1.1\r\nHost: api\r\nConnection: Upgrade\r\nUpgrade: websocket\r\n\r\n")
    app = hops.app()
    app.read_head()
    sent = 0
    client.sock.settimeout(0.2)
    with pytest.raises(TimeoutError):  # noqa: PT012
        while sent < 64 * 1024 * 1024:
            sent += client.sock.send(bytes(65536))
    app.send(b"HTTP/1.1 101 X\r\nConnection: Upgrade\r\nUpgrade: websocket\r\n\r\n")
    assert app.read(sent) == bytes(sent)


def test_http_1_0_client_gets_a_body_until_close(pair):
    hops = pair.hops()
    client = hops.client()
    client.send(b"GET / HTTP/1.0\r\nHost: api\r\n\r\n")
    app = hops.app()
    assert b" HTTP/1.1\r\n" in app.read_head()
    app.send(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n2\r\nok\r\n0\r\n\r\n")
    head = client.read_head()
    assert b"transfer-encoding" not in head
    assert b"connection: close" in head
    assert client.read(2) == b"ok"
    assert client.at_end()


def test_a_response_cut_short_reaches_the_client_as_a_reset(pair):
    hops = pair.hops()
    client = hops.client()
    client.send(GET)
    app = hops.app()
    app.read_message()
    app.send(b"HTTP/1.1 200 OK\r\nContent-Length: 1000\r\n\r\nonly this")
    client.read_head()
    app.close()
    assert client.was_reset()


def test_a_client_that_leaves_takes_its_request_with_it(pair):
    hops = pair.hops()
    client = hops.client()
    client.send(GET)
    app = hops.app()
    app.read_message()
    client.reset()
    assert app.was_reset()


def test_no_endpoint_and_a_dead_application_answer_as_envoy_does(pair):
    hops = pair.hops(target={"endpoints": ()})
    client = hops.client()
    client.send(GET)
    head, body = client.read_message()
    assert head.startswith(b"HTTP/1.1 503 ")
    assert body == b"no healthy upstream"
    hops.apply(target={"expected_spiffe_ids": (pair.authority.spiffe_id("api"),)})
    hops.listener.close()
    client.send(GET)
    head, body = client.read_message()
    assert head.startswith(b"HTTP/1.1 503 ")
    assert body == b"upstream connect error or disconnect/reset before headers. reset reason: remote connection failure"
    assert "local_app cannot be reached" in pair.worker.log.read_text()


def test_connection_closed_before_the_response_is_503_for_post_and_retried_once_for_get(pair):
    hops = pair.hops()
    client = hops.client()
    client.send(GET)
    app = hops.app()
    app.read_message()
    app.send(OK)
    client.read_message()
    client.send(GET)  # on the reused connection
    app.read_message()
    app.close()
    again = hops.app()
    again.read_message()
    again.send(OK)
    assert client.read_message()[1] == b"ok"
    client.send(b"POST / HTTP/1.1\r\nHost: api\r\nContent-Length: 1\r\n\r\nx")
    again.read_message()
    again.close()
    head, body = client.read_message()
    assert head.startswith(b"HTTP/1.1 503 ")
    assert body.endswith(b"reset reason: connection termination")


def test_a_retry_does_not_take_another_connection_that_was_closed_with_the_first(pair):
    hops = pair.hops()
    clients = [hops.client(), hops.client()]
    apps = []
    for client in clients:  # both at once, so that each has a connection to the application
        client.send(GET)
        apps.append(hops.app())
    for client, app in zip(clients, apps, strict=True):
        app.read_message()
        app.send(OK)
        client.read_message()
    clients[1].send(GET)
    apps[1].read_message()  # the connection used last is reused first
    os.kill(pair.worker.pid, signal.SIGSTOP)
    for app in reversed(apps):
        app.close()
    os.kill(pair.worker.pid, signal.SIGCONT)
    again = hops.app()
    again.read_message()
    again.send(OK)
    assert clients[1].read_message()[1] == b"ok"


def test_denied_requests_get_403_and_a_flip_applies_to_the_next_request(pair):
    hops = pair.hops(default_allow=False)
    client = hops.client()
    client.send(GET)
    head, body = client.read_message()
    assert head.startswith(b"HTTP/1.1 403 ")
    assert body == b"RBAC: access denied"
    hops.apply(default_allow=True)
    client.send(GET)
    app = hops.app()
    app.read_message()
    app.send(OK)
    assert client.read_message()[1] == b"ok"
    hops.apply(default_allow=False)
    client.send(GET)
    assert client.read_message()[1] == b"RBAC: access denied"


def test_a_malformed_response_is_502_and_its_connection_is_dropped(pair):
    hops = pair.hops()
    client = hops.client()
    client.send(GET)
    app = hops.app()
    app.read_message()
    app.send(b"HTTP/1.1 200 OK\r\nContent-Length: 1\r\nContent-Length: 2\r\n\r\nx")
    head, _ = client.read_message()
    assert head.startswith(b"HTTP/1.1 502 ")
    assert app.at_end()


def test_unasked_bytes_on_an_idle_upstream_connection_are_never_taken_for_a_response(pair):
    hops = pair.hops()
    client = hops.client()
    client.send(GET)
    app = hops.app()
    app.read_message()
    app.send(OK + b"HTTP/1.1 200 OK\r\nContent-Length: 6\r\n\r\nforged")
    assert client.read_message()[1] == b"ok"
    assert app.at_end()
    client.send(GET)
    fresh = hops.app()
    fresh.read_message()
    fresh.send(OK)
    assert client.read_message()[1] == b"ok"


def test_configuration_changes_leave_requests_in_flight_alone(pair):
    hops = pair.hops()
    client = hops.client()
    client.send(GET)
    app = hops.app()
    app.read_message()
    for _ in range(5):  # new leaves each time, too
        hops.apply()
    app.send(OK)
    assert client.read_message()[1] == b"ok"
    client.send(GET)
    app.read_message()
    app.send(OK)
    assert client.read_message()[1] == b"ok"


def test_a_slow_reader_stalls_only_its_own_stream_in_bounded_memory(pair):
    hops = pair.hops()
    slow, quick = hops.client(), hops.client()
    slow.send(GET)
    app = hops.app()
    app.read_message()
    before = pair.worker.rss_bytes()
    app.send(b"HTTP/1.1 200 OK\r\nContent-Length: 1000000000\r\n\r\n")
    app.sock.settimeout(0.3)
    pattern = bytes(range(256)) * 256
    sent = 0
    with pytest.raises(TimeoutError):  # noqa: PT012
        while sent < 256 * 1024 * 1024:
            sent += app.sock.send(pattern[sent % 65536 :])
    assert sent < 64 * 1024 * 1024  # kernel buffers and our marks: then the application was stopped
    assert pair.worker.rss_bytes() - before < 16 * 1024 * 1024
    other = None
    for _ in range(20):
        began = time.monotonic()
        quick.send(GET)
        other = other or hops.app()
        other.read_message()
        other.send(OK)
        assert quick.read_message()[1] == b"ok"
        assert time.monotonic() - began < 5
    slow.read_head()
    assert slow.read(sent - 1000) == (pattern * (sent // 65536 + 1))[: sent - 1000]  # it goes on when the reader does


def test_a_gibibyte_passes_in_bounded_memory(pair):
    hops = pair.hops()
    client = hops.client()
    client.send(GET)
    app = hops.app()
    app.read_message()
    size, block = 1 << 30, bytes(1 << 20)
    app.send(b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n" % size)
    before = highest = pair.worker.rss_bytes()
    sender = threading.Thread(target=lambda: [app.send(block) for _ in range(size // len(block))])
    sender.start()
    client.read_head()
    received, buffer, reads = len(client.buffer), bytearray(1 << 20), 0
    while received < size:
        received += client.sock.recv_into(buffer)
        reads += 1
        if not reads % 256:
            highest = max(highest, pair.worker.rss_bytes())
    sender.join()
    assert received == size
    assert highest - before < 16 * 1024 * 1024
