"""Hostile HTTP/1.1 through two live sidecars, to an application that keeps every byte it is sent.

Whatever comes in, the application sees either nothing or exactly one canonical request for each that it answered: no
second reader behind us can find another request in those bytes. Rows follow RFC 9112 and RFC 9110.
"""

import contextlib
import re
import socket
import threading

import pytest
from peers import Peer

HIDDEN = b"GET /hidden HTTP/1.1\r\nHost: api\r\n\r\n"
CHUNKED = b"POST /c HTTP/1.1\r\nHost: api\r\nTransfer-Encoding: chunked\r\n\r\n"

_REQUEST_LINE = re.compile(rb"([A-Z-]+) ((?:/[!-~\x80-\xff]*|\*)) HTTP/1\.1")
_FIELD = re.compile(rb"([a-z0-9!#$%&'*+.^`|~-]+): ([\x20-\x7e\t\x80-\xff]*)")


class Recorder:
    """An application that accepts only what needs no interpretation, and remembers it."""

    def __init__(self, listener):
        self.requests = []  # (method, target, headers, body)
        self.faults = []
        self.begun = 0
        self._listener = listener
        threading.Thread(target=self._accept, daemon=True).start()

    def _accept(self):
        with contextlib.suppress(OSError):
            while True:
                self._listener.settimeout(None)
                sock, _address = self._listener.accept()
                threading.Thread(target=self._serve, args=(sock,), daemon=True).start()

    def _serve(self, sock):
        peer = Peer(sock)
        sock.settimeout(None)
        with contextlib.suppress(OSError, AssertionError):
            while True:
                head = peer.read_head()
                self.begun += 1
                try:
                    method, target, headers = _canonical(head)
                    body = _body(peer, headers)
                except ValueError as error:
                    self.faults.append((str(error), head))
                    break
                self.requests.append((method, target, headers, body))
                seen = b"%b %b" % (method, target)
                peer.send(b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n%b" % (len(seen), seen))
        peer.close()


def _canonical(head):
    start, *lines = head.removesuffix(b"\r\n\r\n").split(b"\r\n")
    request_line = _REQUEST_LINE.fullmatch(start)
    if request_line is None:
        raise ValueError("request line")
    headers = []
    for line in lines:
        field = _FIELD.fullmatch(line)
        if field is None:
            raise ValueError(f"field {line!r}")
        headers.append(field.groups())
    names = [name for name, _ in headers]
    if names.count(b"host") != 1 or names.count(b"content-length") + names.count(b"transfer-encoding") > 1:
        raise ValueError("host or framing")
    return *request_line.groups(), headers


def _body(peer, headers):
    named = dict(headers)
    if b"transfer-encoding" in named:
        if named[b"transfer-encoding"] != b"chunked":
            raise ValueError("transfer-encoding")
        body = b""
        while True:
            line = peer.read_until(b"\r\n")
            if re.fullmatch(rb"[0-9a-f]{1,8}\r\n", line) is None:
                raise ValueError(f"chunk {line!r}")
            body += peer.read(int(line, 16))
            if peer.read(2) != b"\r\n":
                raise ValueError("chunk end")
            if line == b"0\r\n":
                return body
    length = named.get(b"content-length", b"0")
    if re.fullmatch(rb"0|[1-9][0-9]{0,18}", length) is None:
        raise ValueError("content-length")
    return peer.read(int(length))


@pytest.fixture(scope="module")
def hops_of_module(module_pair):
    hops = module_pair.hops()
    return hops, Recorder(hops.listener)


@pytest.fixture(params=["outbound", "inbound"])
def world(request, hops_of_module, module_pair):
    """(a client of one of the two listeners, the application behind them)."""
    hops, recorder = hops_of_module
    recorder.requests.clear()
    recorder.faults.clear()
    recorder.begun = 0
    client = hops.client() if request.param == "outbound" else hops.tls_client(leaf=_leaf(module_pair))
    yield client, recorder
    client.close()
    assert recorder.faults == []
    assert module_pair.worker.counter("mesh_worker_handler_faults") == 0


_LEAVES = {}


def _leaf(pair):
    return _LEAVES.setdefault(id(pair), pair.authority.leaf("web"))


def _post(*fields, body=b""):
    return b"\r\n".join((b"POST /p HTTP/1.1", b"Host: api", *fields, b"", body))


def _get(target=b"/", *fields, host=b"Host: api", version=b"HTTP/1.1"):
    return b"\r\n".join((b"GET %b %b" % (target, version), *((host,) if host else ()), *fields, b"", b""))


REFUSED = {
    "1 CL.TE": _post(b"Content-Length: 5", b"Transfer-Encoding: chunked", body=b"0\r\n\r\n" + HIDDEN),
    "1 TE.CL": _post(b"Transfer-Encoding: chunked", b"Content-Length: 5", body=b"0\r\n\r\n" + HIDDEN),
    "2 xchunked": _post(b"Transfer-Encoding: xchunked", b"Content-Length: 5", body=b"0\r\n\r\n" + HIDDEN),
    "2 chunked, identity": _post(b"Transfer-Encoding: chunked, identity", body=b"0\r\n\r\n" + HIDDEN),
    "2 gzip, chunked": _post(b"Transfer-Encoding: gzip, chunked", body=b"0\r\n\r\n" + HIDDEN),
    "2 ,chunked": _post(b"Transfer-Encoding: ,chunked", body=b"0\r\n\r\n" + HIDDEN),
    "2 identity": _post(b"Transfer-Encoding: identity", body=HIDDEN),
    "3 VT": _post(b"Transfer-Encoding: \x0bchunked", body=b"0\r\n\r\n" + HIDDEN),
    "3 FF": _post(b"Transfer-Encoding: chunked\x0c", body=b"0\r\n\r\n" + HIDDEN),
    "3 NBSP": _post(b"Transfer-Encoding: \xa0chunked", body=b"0\r\n\r\n" + HIDDEN),
    "3 NEL": _post(b"Transfer-Encoding: chunked\x85", body=b"0\r\n\r\n" + HIDDEN),
    "4 two TE": _post(b"Transfer-Encoding: chunked", b"Transfer-Encoding: chunked", body=b"0\r\n\r\n" + HIDDEN),
    "6 TE on 1.0": CHUNKED.replace(b"HTTP/1.1", b"HTTP/1.0") + b"0\r\n\r\n" + HIDDEN,
    "7 two CL": _post(b"Content-Length: 0", b"Content-Length: 35", body=HIDDEN),
    "8 two equal CL": _post(b"Content-Length: 1", b"Content-Length: 1", body=b"a" + HIDDEN),
    "8 CL list": _post(b"Content-Length: 1, 1", body=b"a" + HIDDEN),
    **{
        f"9 CL {value!r}": _post(b"Content-Length: " + value, body=b"a" + HIDDEN)
        for value in (b"+1", b"-1", b"1_0", b"0x1", b"", b"1 1", b"1;", b"\xc2\xb9")
    },
    **{
        f"10 CL {value!r}": _post(b"Content-Length: " + value, body=b"a" + HIDDEN)
        for value in (b"9" * 20, b"9223372036854775808", b"18446744073709551616", b"18446744073709551617")
    },
    "13 space before colon": _get(b"/", b"A : b"),
    "13 in CL": _post(b"Content-Length : 35", body=HIDDEN),
    "14 first line begins with space": _get(b"/", host=b" Host: api"),
    "15 obs-fold": _get(b"/", b"A: b", b" c"),
    "15 folded TE": _post(b"Transfer-Encoding:", b" chunked", body=b"0\r\n\r\n" + HIDDEN),
    "16 bare LF": b"GET / HTTP/1.1\nHost: api\n\n",
    "16 bare LF in a field": b"GET / HTTP/1.1\r\nHost: api\r\nA: b\nC: d\r\n\r\n",
    "17 CR in the start line": b"GET /\rx HTTP/1.1\r\nHost: api\r\n\r\n",
    "17 CR in a name": _get(b"/", b"A\rB: c"),
    "17 CR in a value": _get(b"/", b"A: b\rC: d"),
    "18 NUL": _get(b"/", b"A: b\0"),
    **{f"19 control {byte:#x}": _get(b"/", b"A: b%bc" % bytes((byte,))) for byte in (1, 8, 0x0B, 0x1B, 0x1F, 0x7F)},
    "21 no token": _get(b"/", b"A(: b"),
    "21 empty name": _get(b"/", b": b"),
    "21 no colon": _get(b"/", b"nothing"),
    "22 content_length": _post(b"content_length: 35", body=HIDDEN),
    "22 transfer_encoding": _post(b"Transfer_Encoding: chunked", body=b"0\r\n\r\n" + HIDDEN),
    "22 identity with underscores": _get(b"/", b"X_Forwarded_Client_Cert: URI=spiffe://a/b"),
    "22 identity, mixed": _get(b"/", b"x-forwarded_client-cert: URI=spiffe://a/b"),
    "23 no Host": _get(b"/", host=b""),
    "23 two Hosts": _get(b"/", b"Host: other"),
    **{
        f"24 Host {value!r}": _get(b"/", host=b"Host: " + value)
        for value in (b"a/b", b"u@a", b"a b", b"a:99999", b"a:b", b"a:", b"[::1", b"a\\b", b"a?b", b"a#b", b"a,\tb")
    },
    "25 empty Host": _get(b"/", host=b"Host:"),
    "26 authority with a user": _get(b"http://u@api/"),
    "26 no authority": _get(b"http:///x"),
    "26 other scheme": _get(b"ftp://api/x"),
    "27 no slash": _get(b"a"),
    "27 authority form": _get(b"api:80"),
    "28 asterisk": _get(b"*"),
    "29 CONNECT": b"CONNECT api:80 HTTP/1.1\r\nHost: api:80\r\n\r\n" + HIDDEN,
    "30 CONNECT with a body": b"CONNECT api:80 HTTP/1.1\r\nHost: a\r\nContent-Length: 35\r\n\r\n" + HIDDEN,
    "31 fragment": _get(b"/a#b"),
    "32 space in the target": _get(b"/a b"),
    "32 control in the target": _get(b"/a\x01"),
    "33 TAB": b"GET\t/ HTTP/1.1\r\nHost: api\r\n\r\n",
    "35 HTTP/0.9": b"GET /\r\n\r\n",
    **{
        f"36 {version!r}": _get(b"/", version=version)
        for version in (b"HTTP/1.9", b"HTTP/1.32", b"HTTP/2.0", b"http/1.1", b"HTTP/0.9", b"HTTP/3", b"ICE/1.0")
    },
    "37 PRI": b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n",
    "38 method with a separator": b"GE(T / HTTP/1.1\r\nHost: api\r\n\r\n",
    "38 get": b"get / HTTP/1.1\r\nHost: api\r\n\r\n",
    "38 long method": b"A" * 1024 + b" / HTTP/1.1\r\nHost: api\r\n\r\n",
    "39 request line": _get(b"/" + b"a" * 8200),
    "40 header of 70 KB": _get(b"/", b"A: " + b"a" * 70_000),
    "40 headers of 61 KB": _get(b"/", *[b"A: " + b"a" * 1000] * 62),
    "41 headers": _get(b"/", *[b"A: b"] * 101),
    **{
        f"43 chunk size {size!r}": CHUNKED + size + b"\r\na\r\n0\r\n\r\n" + HIDDEN
        for size in (b"0x1", b"+1", b"-1", b"1_0", b"", b" 1", b"g")
    },
    "44 chunk size of 17 digits": CHUNKED + b"10000000000000001\r\na\r\n0\r\n\r\n" + HIDDEN,
    "45 chunk extensions": CHUNKED + b"1;" + b"a" * 150_000 + b"\r\na\r\n0\r\n\r\n" + HIDDEN,
    "46 LF in an extension": CHUNKED + b"1;a\nb\r\na\r\n0\r\n\r\n" + HIDDEN,
    "46 CR in an extension": CHUNKED + b"1;a\rb\r\na\r\n0\r\n\r\n" + HIDDEN,
    "47 blank after the size": CHUNKED + b"1 \r\na\r\n0\r\n\r\n" + HIDDEN,
    "48 LF after the size": CHUNKED + b"1\na\r\n0\r\n\r\n" + HIDDEN,
    "48 no CRLF after the data": CHUNKED + b"1\r\nab\r\n0\r\n\r\n" + HIDDEN,
    "48 LF after the data": CHUNKED + b"1\r\na\n0\r\n\r\n" + HIDDEN,
    "48 LF after the last chunk": CHUNKED + b"1\r\na\r\n0\n\n" + HIDDEN,
    "51 trailers": CHUNKED + b"0\r\n" + b"a: b\r\n" * 30_000 + b"\r\n" + HIDDEN,
    "54 Expect": _post(b"Expect: the-unexpected", b"Content-Length: 35", body=HIDDEN),
    "59 TRACE": b"TRACE / HTTP/1.1\r\nHost: api\r\n\r\n" + HIDDEN,
    "path above the root": _get(b"/a/../../b"),
    "path with an escaped NUL": _get(b"/a%00b"),
    "path with half an escape": _get(b"/a%2"),
}  # fmt: skip


@pytest.mark.parametrize("row", REFUSED)
def test_refused_and_closed_with_nothing_reaching_the_application(world, row):
    client, recorder = world
    with contextlib.suppress(ConnectionError):  # a refusal may come before everything is sent
        client.send(REFUSED[row])
    answers = []
    with contextlib.suppress(ConnectionResetError):
        while client._fill():
            pass
    answers = re.findall(rb"HTTP/1\.1 ([0-9]{3}) ", client.buffer)
    assert len(answers) == 1
    assert answers[0] in (b"400", b"405", b"413", b"414", b"417", b"431", b"501", b"505"), client.buffer
    assert recorder.requests == []


ACCEPTED = {
    "33 double space": (b"GET  /a  HTTP/1.1\r\nHost: api\r\n\r\n", [(b"GET", b"/a", b"")]),  # RFC 9112 3: may
    "5 Chunked": (_post(b"Transfer-Encoding: Chunked", body=b"1\r\na\r\n0\r\n\r\n"), [(b"POST", b"/p", b"a")]),
    "12 GET with a body": (
        b"GET /g HTTP/1.1\r\nHost: api\r\nContent-Length: 35\r\n\r\n" + HIDDEN, [(b"GET", b"/g", HIDDEN)]
    ),
    "12 DELETE with a body": (
        b"DELETE /d HTTP/1.1\r\nHost: api\r\nContent-Length: 35\r\n\r\n" + HIDDEN, [(b"DELETE", b"/d", HIDDEN)]
    ),
    "20 high bytes": (_get(b"/", b"A: \xff\x80"), [(b"GET", b"/", b"")]),
    "34 CRLF before": (b"\r\n" + _get(b"/a"), [(b"GET", b"/a", b"")]),
    "44 zeros": (CHUNKED + b"0" * 15 + b"1\r\na\r\n0\r\n\r\n", [(b"POST", b"/c", b"a")]),
    "45 extension": (CHUNKED + b"1;a=b;c=\"d\"\r\na\r\n0\r\n\r\n", [(b"POST", b"/c", b"a")]),
    "49 one-byte chunks": (CHUNKED + b"1\r\na\r\n" * 50_000 + b"0\r\n\r\n", [(b"POST", b"/c", b"a" * 50_000)]),
    "50 trailers": (
        CHUNKED + b"1\r\na\r\n0\r\nHost: other\r\nAuthorization: x\r\nCookie: y\r\n\r\n", [(b"POST", b"/c", b"a")]
    ),
    "55 h2c": (
        _get(b"/u", b"Connection: Upgrade, HTTP2-Settings", b"Upgrade: h2c", b"HTTP2-Settings: AAMAAABkAAQ"),
        [(b"GET", b"/u", b"")],
    ),
    "55 h2c with a body": (
        _post(b"Connection: Upgrade", b"Upgrade: h2c", b"Content-Length: 35", body=HIDDEN), [(b"POST", b"/p", HIDDEN)]
    ),
    "26 absolute form": (_get(b"http://other:80/a?b=/../c"), [(b"GET", b"/a?b=/../c", b"")]),
    "path": (_get(b"/a/./b/../%63%2F%2e%2E/d"), [(b"GET", b"/a/c%2F../d", b"")]),
    "pipeline": (_get(b"/1") + _get(b"/2") + _get(b"/3"), [(b"GET", b"/%d" % n, b"") for n in (1, 2, 3)]),
}  # fmt: skip


@pytest.mark.parametrize("row", ACCEPTED)
def test_accepted_as_exactly_these_requests_and_the_connection_stays_in_step(world, row):
    client, recorder = world
    data, expected = ACCEPTED[row]
    client.send(data + _get(b"/after"))
    for method, target, _ in (*expected, (b"GET", b"/after", b"")):
        head, body = client.read_message()
        assert head.startswith(b"HTTP/1.1 200 ")
        assert body == b"%b %b" % (method, target)
    assert [(method, target, body) for method, target, _, body in recorder.requests[:-1]] == expected
    for _, _, headers, _ in recorder.requests:
        assert not {name for name, _ in headers} & {b"upgrade", b"http2-settings", b"connection", b"trailer"}
        assert (b"host", b"other") not in headers
        assert not {name for name, _ in headers} & {b"authorization", b"cookie"}


def test_absolute_form_decides_the_host(world):
    client, recorder = world
    client.send(_get(b"http://other:81/a"))
    client.read_message()
    assert (b"host", b"other:81") in recorder.requests[0][2]


def test_headers_that_speak_for_the_mesh_do_not_pass_and_cannot_be_shed(world):
    client, recorder = world
    nominated = b"Connection: x-forwarded-for, authorization, cookie, host, x-private, x-forwarded-client-cert, close"
    fields = (b"X-Forwarded-For: 1", b"Authorization: 2", b"Cookie: 3", b"X-Private: 4", b"Keep-Alive: 5")
    client.send(_get(b"/", *fields, b"X-Forwarded-Client-Cert: 6", b"x-forwarded-client-cert: 7", nominated))
    assert client.read_message()[0].startswith(b"HTTP/1.1 200 ")
    named = dict(recorder.requests[0][2])
    assert (named[b"x-forwarded-for"], named[b"authorization"], named[b"cookie"]) == (b"1", b"2", b"3")
    assert not set(named) & {b"x-private", b"keep-alive", b"connection", b"x-forwarded-client-cert"}


def test_a_body_cut_short_never_becomes_a_request(world):
    client, recorder = world
    client.send(_get(b"/whole"))
    client.read_message()
    client.send(CHUNKED + b"23\r\n" + HIDDEN[:-2])
    client.sock.shutdown(socket.SHUT_RDWR)
    assert [target for _, target, _, _ in recorder.requests] == [b"/whole"]


def test_a_bad_request_in_a_pipeline_is_the_last_one_answered(world):
    client, recorder = world
    requests = [_get(b"/%d" % number) for number in range(100)]
    requests[49] = _get(b"/49", b"A : b")
    client.send(b"".join(requests))
    for number in range(49):
        assert client.read_message()[1] == b"GET /%d" % number
    assert client.read_message()[0].startswith(b"HTTP/1.1 400 ")
    assert client.at_end()
    assert [target for _, target, _, _ in recorder.requests] == [b"/%d" % number for number in range(49)]


def test_bytes_behind_a_refused_websocket_upgrade_are_never_a_request(world):
    client, recorder = world
    client.send(_get(b"/w", b"Connection: Upgrade", b"Upgrade: websocket") + HIDDEN)
    head, _ = client.read_message()
    assert head.startswith(b"HTTP/1.1 200 ")
    assert client.at_end()
    assert [target for _, target, _, _ in recorder.requests] == [b"/w"]


BAD_RESPONSES = {
    "60 LF splits a field": b"HTTP/1.1 200 OK\r\nA: b\nC: d\r\nContent-Length: 0\r\n\r\n",
    "60 CR in a field": b"HTTP/1.1 200 OK\r\nA: b\rC: d\r\nContent-Length: 0\r\n\r\n",
    "60 NUL": b"HTTP/1.1 200 OK\r\nA: b\0\r\nContent-Length: 0\r\n\r\n",
    "62 CL and TE": b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n",
    "62 two CL": b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\nContent-Length: 3\r\n\r\nabc",
    "64 101 unasked": b"HTTP/1.1 101 Switching\r\nConnection: upgrade\r\nUpgrade: websocket\r\n\r\nabc",
    "64 status 099": b"HTTP/1.1 099 Low\r\nContent-Length: 0\r\n\r\n",
    "64 status 2000": b"HTTP/1.1 2000 High\r\nContent-Length: 0\r\n\r\n",
    "64 status 600": b"HTTP/1.1 600 High\r\nContent-Length: 0\r\n\r\n",
    "64 too many 1xx": b"HTTP/1.1 103 Early\r\n\r\n" * 1000 + b"HTTP/1.1 200 OK\r\nContent-Length: 0\r\n\r\n",
}


@pytest.mark.parametrize("row", BAD_RESPONSES)
def test_a_response_with_two_meanings_is_502_and_its_connection_is_not_used_again(pair, row):
    hops = pair.hops()
    client = hops.client()
    client.send(b"POST / HTTP/1.1\r\nHost: api\r\nContent-Length: 0\r\n\r\n")
    app = hops.app()
    app.read_head()
    with contextlib.suppress(ConnectionError):
        app.send(BAD_RESPONSES[row])
    statuses = []
    while not statuses or statuses[-1] == b"103":
        statuses.append(client.read_message()[0][9:12])
    assert statuses[-1] == b"502"
    assert len(statuses) <= 11
    assert app.at_end()


@pytest.mark.parametrize(
    "response",
    [
        b"HTTP/1.1 204 No Content\r\n\r\nHTTP/1.1 200 OK\r\nContent-Length: 6\r\n\r\nforged",
        b"HTTP/1.1 304 Not Modified\r\n\r\nHTTP/1.1 200 OK\r\nContent-Length: 6\r\n\r\nforged",
        b"HTTP/1.1 200 OK\r\nContent-Length: 0\r\n\r\nHTTP/1.1 200 OK\r\nContent-Length: 6\r\n\r\nforged",
    ],
    ids=["61 204", "61 304", "63 idle"],
)
def test_bytes_behind_a_response_answer_nobody(pair, response):
    hops = pair.hops()
    client = hops.client()
    client.send(_get(b"/first"))
    app = hops.app()
    app.read_head()
    app.send(response)
    client.read_message()
    client.send(_get(b"/second"))
    app = hops.app()  # another connection
    assert app.read_head().startswith(b"GET /second ")
    app.send(b"HTTP/1.1 200 OK\r\nContent-Length: 4\r\n\r\nreal")
    assert client.read_message()[1] == b"real"


def test_head_response_with_a_body_leaves_the_next_answer_alone(pair):
    hops = pair.hops()
    client = hops.client()
    client.send(b"HEAD / HTTP/1.1\r\nHost: api\r\n\r\n")
    app = hops.app()
    app.read_head()
    app.send(b"HTTP/1.1 200 OK\r\nContent-Length: 52\r\n\r\nHTTP/1.1 200 OK\r\nContent-Length: 6\r\n\r\nforged")
    assert client.read_head().startswith(b"HTTP/1.1 200 ")
    client.send(_get(b"/second"))
    app = hops.app()
    assert app.read_head().startswith(b"GET /second ")
    app.send(b"HTTP/1.1 200 OK\r\nContent-Length: 4\r\n\r\nreal")
    assert client.read_message()[1] == b"real"
