"""The corpus (see corpus_rows) through two live sidecars, to an application that keeps every request it is sent.

Two things are held for each input. The verdict is the table's. And nothing gets out of step: a canary sent right behind
the input on its own connection, and another on a connection that lives through all of them, is each answered with its
own answer or, behind a refusal, with none; the application never sees a request that no client sent.

No input deviates from its verdict. Rows not in the table, for their clock or their scope: 42 (a head that drips: see
test_deadlines), 63 (bytes on an idle connection, below), 52, 53, 56 and 58 (below); 19's TAB is no control character.
WebSocket frames and handshakes (RFC 6455) are the application's: after its 101 the sidecars relay bytes.
"""

import contextlib
import re
import socket

import pytest
from corpus_rows import ACCEPTED, CHUNKED, END, FORGED, HIDDEN, REFUSED, RESPONSES, get, post
from recording_application import RecordingApplication


class World:
    """Both sidecars, the application behind them, and a client that stays for the whole module."""

    def __init__(self, pair):
        self.pair = pair
        self.hops = pair.hops()
        self.application = RecordingApplication(self.hops.listener)
        self._leaf = pair.authority.leaf("web")
        self._witness = self.hops.client()
        self._canaries = 0

    def client(self, listener="outbound"):
        return self.hops.client() if listener == "outbound" else self.hops.tls_client(leaf=self._leaf)

    def canary(self):
        """A request like no other: (its bytes, what its answer says)."""
        self._canaries += 1
        target = b"/canary/%d" % self._canaries
        return get(target), b"GET " + target

    def check(self, expected):
        """The application has seen these (method, target, body) and no more, and the witness gets its own answer."""
        request, answer = self.canary()
        self._witness.send(request)
        assert self._witness.read_message()[1] == answer
        seen = [request.seen for request in self.application.requests]
        assert seen == [*expected, (b"GET", answer.removeprefix(b"GET "), b"")]
        assert self.application.faults == []
        assert self.pair.worker.counter("mesh_worker_handler_faults") == 0


@pytest.fixture(scope="module")
def live(module_pair):
    world = World(module_pair)
    yield world
    world.hops.close()


@pytest.fixture
def world(live):
    live.application.clear()
    return live


def identify(rows):
    return [f"{row[0]} {row[1]}" for row in rows]


def test_the_corpus_is_whole():
    covered = {row[0] for row in (*REFUSED, *ACCEPTED, *RESPONSES)}
    elsewhere = {42, 52, 53, 58, 63}
    assert set(range(1, 65)) - covered == elsewhere
    assert len(REFUSED) + len(ACCEPTED) + len(RESPONSES) >= 200
    names = identify([*REFUSED, *ACCEPTED, *RESPONSES])
    assert len(names) == len(set(names))


@pytest.mark.parametrize("listener", ["outbound", "inbound"])
@pytest.mark.parametrize("row", REFUSED, ids=identify(REFUSED))
def test_refused(world, row, listener):
    _, _, data, statuses = row
    client = world.client(listener)
    with contextlib.suppress(ConnectionError):  # a refusal may come before everything is sent
        client.send(data)
    with contextlib.suppress(ConnectionError):
        client.send(world.canary()[0])
    with contextlib.suppress(ConnectionResetError):
        while client._fill():
            pass
    client.close()
    answers = re.findall(rb"HTTP/1\.1 ([0-9]{3}) ", client.buffer)
    assert len(answers) == 1, client.buffer
    assert int(answers[0]) in statuses, client.buffer
    assert b"\r\nconnection: close\r\n" in client.buffer
    world.check([])


@pytest.mark.parametrize("listener", ["outbound", "inbound"])
@pytest.mark.parametrize("row", ACCEPTED, ids=identify(ACCEPTED))
def test_accepted(world, row, listener):
    _, _, data, expected = row
    client = world.client(listener)
    canary, answer = world.canary()
    client.send(data + canary)
    for method, target, _ in expected:
        head, body = client.read_message()
        assert (head[:13], body) == (b"HTTP/1.1 200 ", b"%b %b" % (method, target))
    assert client.read_message()[1] == answer
    client.close()
    for request in world.application.requests:
        names = {name for name, _ in (*request.headers, *request.trailers)}
        assert not names & {b"upgrade", b"http2-settings", b"connection", b"x-private", b"authorization", b"cookie"}
        assert request.header(b"host") in (b"api", b"other", b"other:80")
        assert not request.trailers
    world.check([*expected, (b"GET", answer.removeprefix(b"GET "), b"")])


@pytest.mark.parametrize("row", RESPONSES, ids=identify(RESPONSES))
def test_responses(world, row):
    _, name, data, verdict = row
    method = b"HEAD" if name.startswith("HEAD") else b"POST"
    world.application.answers[b"/bad"] = (data, False)
    client = world.client()
    client.send(method + b" /bad HTTP/1.1\r\nHost: api\r\nContent-Length: 0\r\n\r\n")
    if verdict == "cut":
        with contextlib.suppress(ConnectionResetError):
            while client._fill():
                pass
        # A reset, with or without the beginning of the response before it: never all of one.
        assert not client.buffer.endswith(END), client.buffer
        assert client.buffer[:13] in (b"HTTP/1.1 200 ", b"HTTP/1.1 502 ", b"")
        client = world.client()
    else:
        informational = 0
        while (head := client.read_head()).startswith(b"HTTP/1.1 103 "):
            informational += 1
        assert informational <= 10
        status = int(head[9:12])
        length = re.search(rb"\r\ncontent-length: ([0-9]+)\r\n", head)
        if b"\r\ntransfer-encoding: chunked\r\n" in head:
            body = b""
            while size := int(client.read_until(b"\r\n"), 16):
                body += client.read(size + 2)[:-2]
            client.read_until(b"\r\n")
        else:
            body = client.read(int(length[1])) if length and method != b"HEAD" and status != 304 else b""
        if isinstance(verdict, int):
            assert status == verdict
        else:
            assert (status, body) == verdict
    canary, answer = world.canary()
    client.send(canary)
    assert client.read_message()[1] == answer  # nothing that the application said in addition
    client.close()
    seen = [request.seen for request in world.application.requests]
    world.check([(method, b"/bad", b"")] * (len(seen) - 1) + [(b"GET", answer.removeprefix(b"GET "), b"")])
    assert len(seen) == 2


# ---- rows with a course of events


@pytest.fixture(params=["outbound", "inbound"])
def client(world, request):
    client = world.client(request.param)
    yield client
    client.close()


def test_52_a_body_cut_short_never_becomes_a_request(world, client):
    client.send(get(b"/whole"))
    client.read_message()
    client.send(CHUNKED + b"23\r\n" + HIDDEN[:-2])
    client.sock.shutdown(socket.SHUT_RDWR)
    world.check([(b"GET", b"/whole", b"")])


def test_53_an_expectation_gets_one_100_and_its_answer(world, client):
    client.send(post(b"Expect: 100-continue", b"Content-Length: 3"))
    assert client.read_head() == b"HTTP/1.1 100 Continue\r\n\r\n"
    client.send(b"abc")
    assert client.read_message()[1] == b"POST /p"
    world.check([(b"POST", b"/p", b"abc")])


def test_53_a_client_that_does_not_wait_is_served_too(world, client):
    canary, answer = world.canary()
    client.send(post(b"Expect: 100-continue", b"Content-Length: 3", body=b"abc" + canary))
    assert client.read_head() in (b"HTTP/1.1 100 Continue\r\n\r\n", b"HTTP/1.1 200 OK\r\ncontent-length: 7\r\n\r\n")
    while not client.buffer.endswith(answer):
        assert client._fill()
    world.check([(b"POST", b"/p", b"abc"), (b"GET", answer.removeprefix(b"GET "), b"")])


def test_56_bytes_behind_a_refused_websocket_upgrade_are_never_a_request(world, client):
    client.send(get(b"/w", b"Connection: Upgrade", b"Upgrade: websocket") + HIDDEN)
    assert client.read_message()[1] == b"GET /w"
    assert client.at_end()
    world.check([(b"GET", b"/w", b"")])


def test_56_bytes_behind_an_accepted_upgrade_are_the_new_protocols(world, client):
    switching = b"HTTP/1.1 101 Switching Protocols\r\nConnection: upgrade\r\nUpgrade: websocket\r\n\r\n"
    world.application.answers[b"/ws"] = (switching + FORGED, True)
    client.send(get(b"/ws", b"Connection: Upgrade", b"Upgrade: websocket") + b"\x81\x80")
    assert client.read_head().startswith(b"HTTP/1.1 101 ")
    assert client.read(len(FORGED)) == FORGED
    assert client.at_end()
    world.check([(b"GET", b"/ws", b"")])


def test_57_headers_that_speak_for_the_mesh_do_not_pass_and_cannot_be_shed(world, client):
    nominated = b"Connection: x-forwarded-for, authorization, cookie, host, x-private, x-forwarded-client-cert, close"
    fields = (b"X-Forwarded-For: 1", b"Authorization: 2", b"Cookie: 3", b"X-Private: 4", b"Keep-Alive: 5")
    client.send(get(b"/", *fields, b"X-Forwarded-Client-Cert: 6", b"x-forwarded-client-cert: 7", nominated))
    assert client.read_message()[0].startswith(b"HTTP/1.1 200 ")
    request = world.application.requests[0]
    values = [request.header(name) for name in (b"x-forwarded-for", b"authorization", b"cookie")]
    assert values == [b"1", b"2", b"3"]
    assert request.header(b"x-forwarded-client-cert") not in (b"6", b"7")
    assert not {name for name, _ in request.headers} & {b"x-private", b"keep-alive", b"connection"}
    world.check([(b"GET", b"/", b"")])


def test_58_a_bad_request_in_a_pipeline_is_the_last_one_answered(world, client):
    requests = [get(b"/%d" % number) for number in range(100)]
    requests[49] = get(b"/49", b"A : b")
    client.send(b"".join(requests))
    for number in range(49):
        assert client.read_message()[1] == b"GET /%d" % number
    assert client.read_message()[0].startswith(b"HTTP/1.1 400 ")
    assert client.at_end()
    world.check([(b"GET", b"/%d" % number, b"") for number in range(49)])


@pytest.mark.parametrize("first", [get(b"/1"), post(b"Content-Length: 1", body=b"a"), CHUNKED + b"1\r\na\r\n" + END])
def test_33_and_34_behind_another_request_are_judged_alike(world, client, first):
    client.send(first + b"GET  /x HTTP/1.1\r\nHost: api\r\n\r\n")
    assert client.read_message()[0].startswith(b"HTTP/1.1 200 ")
    assert client.read_message()[0].startswith(b"HTTP/1.1 400 ")
    assert client.at_end()
    client = world.client()
    client.send(first + b"\r\n" * 3 + get(b"/x"))
    assert client.read_message()[0].startswith(b"HTTP/1.1 200 ")
    assert client.read_message()[0].startswith(b"HTTP/1.1 400 ")
    client.close()
    seen = [request.seen for request in world.application.requests]
    assert b"/x" not in [target for _, target, _ in seen]
    world.check(seen)


def test_63_bytes_on_an_idle_connection_answer_nobody(world, client):
    world.application.answers[b"/more"] = (b"HTTP/1.1 200 OK\r\nContent-Length: 4\r\n\r\nmine" + FORGED, False)
    client.send(get(b"/more"))
    assert client.read_message()[1] == b"mine"
    client.send(get(b"/second"))
    assert client.read_message()[1] == b"GET /second"
    world.check([(b"GET", b"/more", b""), (b"GET", b"/second", b"")])


def test_trailers_pass_both_ways_to_whoever_takes_them(world, client):
    answer = b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n2\r\nok\r\n0\r\nGrpc-Status: 0\r\nAge: 1\r\n\r\n"
    world.application.answers[b"/c"] = (answer, False)
    try:
        for te, expected in [(b"", b""), (b"TE: trailers\r\n", b"grpc-status: 0\r\n")]:
            asked = CHUNKED[:-2] + te + b"\r\n"
            client.send(asked + b"1\r\na\r\n0\r\nDigest: \t x \r\nHost: b\r\n\r\n")
            client.read_head()
            assert client.read_until(b"0\r\n").endswith(b"\r\nok\r\n0\r\n")
            assert client.read(len(expected) + 2) == expected + b"\r\n"
            assert world.application.requests[-1].trailers == [(b"digest", b"x")]
        world.check([(b"POST", b"/c", b"a")] * 2)
    finally:
        del world.application.answers[b"/c"]


def test_an_http_1_0_client_is_answered_until_close(world, client):
    answer = b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n2\r\nok\r\n0\r\n\r\n"
    world.application.answers[b"/old"] = (answer, False)
    client.send(get(b"/old", version=b"HTTP/1.0", host=b"Host: api") + HIDDEN)
    while client._fill():
        pass
    head, _, body = client.buffer.partition(b"\r\n\r\n")
    assert head.startswith(b"HTTP/1.1 200 ")
    assert b"connection: close" in head
    assert b"transfer-encoding" not in head
    assert body == b"ok"
    world.check([(b"GET", b"/old", b"")])


def test_an_http_1_0_request_without_host(world):
    client = world.client()
    client.send(get(b"/hostless", version=b"HTTP/1.0", host=b""))
    head, body = client.read_message()
    assert (head[:13], body) == (b"HTTP/1.1 200 ", b"GET /hostless")
    assert client.at_end()
    client.close()
    world.check([(b"GET", b"/hostless", b"")])
