"""The HTTP/1.1 codec: what is accepted, what is refused, and that neither depends on how the bytes arrive."""

import itertools

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from msgspec.structs import replace

from mesh.errors import ProtocolError
from mesh.http import send
from mesh.http.chunked import EXTENSION_BYTES_MAX
from mesh.http.h1 import END, ClientConnection, Rejected, ServerConnection, Trailers
from mesh.http.head import RequestHead, ResponseHead
from mesh.http.receive_response import INFORMATIONAL_MAX
from mesh.http.receiver import HEAD_BYTES_MAX

HOST = b"Host: a\r\n"


def request(*lines, start=b"GET / HTTP/1.1", host=HOST, body=b""):
    return start + b"\r\n" + host + b"".join(line + b"\r\n" for line in lines) + b"\r\n" + body


def events_of(data, connection=None):
    return (connection or ServerConnection()).receive_data(data)


def status_of(data):
    """The status of the refusal, or None when the input is accepted as far as it goes."""
    events = events_of(data)
    return events[-1].status if events and isinstance(events[-1], Rejected) else None


CHUNKED = b"Transfer-Encoding: chunked"

REFUSED = [  # (corpus row of RFC 9112 and 9110 violations, input, status)
    ("CL and TE", request(b"Content-Length: 5", CHUNKED, body=b"0\r\n\r\n"), 400),
    ("TE and CL", request(CHUNKED, b"Content-Length: 5", body=b"0\r\n\r\n"), 400),
    ("TE xchunked", request(b"Transfer-Encoding: xchunked"), 501),
    ("TE chunked, identity", request(b"Transfer-Encoding: chunked, identity"), 400),
    ("TE gzip, chunked", request(b"Transfer-Encoding: gzip, chunked", body=b"0\r\n\r\n"), 501),
    ("TE ,chunked", request(b"Transfer-Encoding: ,chunked"), 501),
    ("TE identity", request(b"Transfer-Encoding: identity"), 501),
    ("TE with VT", request(b"Transfer-Encoding: \x0bchunked"), 400),
    ("TE with FF", request(b"Transfer-Encoding: chunked\x0c"), 400),
    ("TE with 0xa0", request(b"Transfer-Encoding: chunked\xa0"), 501),
    ("two TE", request(CHUNKED, CHUNKED, body=b"0\r\n\r\n"), 400),
    ("TE in HTTP/1.0", request(CHUNKED, start=b"POST / HTTP/1.0", body=b"0\r\n\r\n"), 400),
    ("two different CL", request(b"Content-Length: 1", b"Content-Length: 2", body=b"ab"), 400),
    ("two equal CL", request(b"Content-Length: 1", b"Content-Length: 1", body=b"a"), 400),
    ("CL list", request(b"Content-Length: 1, 1", body=b"a"), 400),
    *((f"CL {value!r}", request(b"Content-Length: " + value, body=b"a"), 400) for value in
      (b"+1", b"-1", b"1_0", b"0x1", b"", b"1 1", b"\xb2")),
    ("CL 2^64", request(b"Content-Length: 18446744073709551616"), 400),
    ("CL 2^63", request(b"Content-Length: 9223372036854775808"), 413),
    ("space before colon", request(b"A : b"), 400),
    ("first line begins with space", b"GET / HTTP/1.1\r\n A: b\r\nHost: a\r\n\r\n", 400),
    ("obs-fold", request(b"A: b\r\n c"), 400),
    ("bare LF after the request line", b"GET / HTTP/1.1\nHost: a\r\n\r\n", 400),
    ("bare LF after a header", b"GET / HTTP/1.1\r\nHost: a\n\r\n", 400),
    ("bare LF at the end", b"GET / HTTP/1.1\r\nHost: a\r\n\n", 400),
    ("bare CR in a value", request(b"A: b\rc"), 400),
    ("bare CR in a name", request(b"A\rb: c"), 400),
    ("bare CR in the request line", b"GET /\r HTTP/1.1\r\nHost: a\r\n\r\n", 400),
    *((f"control {value:#x} in a value", request(b"A: b%cc" % value), 400) for value in (0, 1, 8, 0x1B, 0x7F)),
    ("no colon", request(b"novalue"), 400),
    ("empty name", request(b": value"), 400),
    ("non-token name", request(b"a(b: c"), 400),
    ("content_length", request(b"content_length: 5"), 400),
    ("transfer_encoding", request(b"transfer_encoding: chunked"), 400),
    ("no Host", request(host=b""), 400),
    ("two Hosts", request(b"Host: a"), 400),
    *((f"Host {value!r}", request(host=b"Host: " + value + b"\r\n"), 400) for value in
      (b"a/b", b"u@a", b"a b", b"a:x", b"a:99999", b"a#b", b"", b"[::1", b"a?b", b"a\\b")),
    ("target without slash", request(start=b"GET a HTTP/1.1"), 400),
    ("authority form", request(start=b"GET a:80 HTTP/1.1"), 400),
    ("* with GET", request(start=b"GET * HTTP/1.1"), 400),
    ("CONNECT", request(start=b"CONNECT a:1 HTTP/1.1", body=b"GET / HTTP/1.1\r\n\r\n"), 405),
    ("CONNECT with a body", request(b"Content-Length: 1", start=b"CONNECT a:1 HTTP/1.1", body=b"x"), 405),
    ("TRACE", request(start=b"TRACE / HTTP/1.1"), 405),
    ("fragment", request(start=b"GET /a#b HTTP/1.1"), 400),
    ("userinfo in the target", request(start=b"GET http://u@a/ HTTP/1.1"), 400),
    ("foreign scheme", request(start=b"GET ftp://a/ HTTP/1.1"), 400),
    ("0x80 in the target", request(start=b"GET /\x80 HTTP/1.1"), 400),
    ("control in the target", request(start=b"GET /\x01 HTTP/1.1"), 400),
    ("two spaces before the target", request(start=b"GET  / HTTP/1.1"), 400),
    ("two spaces before the version", request(start=b"GET /  HTTP/1.1"), 400),
    ("space behind the version", request(start=b"GET / HTTP/1.1 "), 400),
    ("space before the method", request(start=b" GET / HTTP/1.1"), 400),
    ("three empty lines", b"\r\n" * 3 + request(), 400),
    ("bare LF before the request line", b"\n" + request(), 400),
    ("CR before the request line", b"\r" + request(), 400),
    ("HTTP/0.9", b"GET /\r\n\r\n", 400),
    ("TAB in the request line", request(start=b"GET /\tHTTP/1.1"), 400),
    ("HTTP/1.9", request(start=b"GET / HTTP/1.9"), 505),
    ("HTTP/2.0", request(start=b"GET / HTTP/2.0"), 505),
    ("HTTP/1.32", request(start=b"GET / HTTP/1.32"), 505),
    ("lower-case version", request(start=b"GET / http/1.1"), 400),
    ("HTTP/2 preface", b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n", 400),
    ("lower-case method", request(start=b"get / HTTP/1.1"), 400),
    ("unknown method", request(start=b"G(T / HTTP/1.1"), 400),
    ("long method", request(start=b"G" * 1024 + b" / HTTP/1.1"), 400),
    ("long target", request(start=b"GET /" + b"a" * 8192 + b" HTTP/1.1"), 414),
    ("one header of 70 KB", request(b"A: " + b"a" * 70_000), 431),
    ("headers over 60 KiB", request(*[b"A%d: " % n + b"a" * 1000 for n in range(62)]), 431),
    ("101 headers", request(*[b"A: b"] * 100), 431),
    *((f"chunk size {size!r}", request(CHUNKED, start=b"POST / HTTP/1.1", body=size + b"\r\na\r\n"), 400) for size in
      (b"0x1", b"+1", b"-1", b"1_0", b"", b" 1", b"1 ", b"g", b"fffffffffffffffff")),
    ("LF in a chunk extension", request(CHUNKED, body=b"1;a\nb\r\na\r\n"), 400),
    ("CR in a chunk extension", request(CHUNKED, body=b"1;a\rb\r\na\r\n"), 400),
    ("LF after a chunk size", request(CHUNKED, body=b"1\na\r\n"), 400),
    ("chunk not ended by CRLF", request(CHUNKED, body=b"1\r\nab\r\n"), 400),
    ("Expect: other", request(b"Expect: 200-ok"), 417),
    ("WebSocket upgrade with a body",
     request(b"Connection: upgrade", b"Upgrade: websocket", b"Content-Length: 1", body=b"x"), 400),
    ("path above the root", request(start=b"GET /a/../../b HTTP/1.1"), 400),
    ("escaped NUL in the path", request(start=b"GET /a%00 HTTP/1.1"), 400),
    ("garbage", b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03", 400),
]  # fmt: skip


@pytest.mark.parametrize(("data", "status"), [row[1:] for row in REFUSED], ids=[row[0] for row in REFUSED])
def test_refused(data, status):
    connection = ServerConnection()
    events = connection.receive_data(data)
    assert isinstance(events[-1], Rejected)
    assert events[-1].status == status
    assert connection.closed
    assert connection.receive_data(b"GET / HTTP/1.1\r\nHost: a\r\n\r\n") == []  # never the next request
    answer = connection.reject(events[-1])
    assert answer.startswith(b"HTTP/1.1 %d " % status)
    assert b"\r\nconnection: close\r\n" in answer


@pytest.mark.parametrize(("data", "status"), [row[1:] for row in REFUSED], ids=[row[0] for row in REFUSED])
def test_refused_whatever_the_pieces(data, status):
    connection = ServerConnection()
    events = [event for value in data for event in connection.receive_data(bytes((value,)))]
    assert isinstance(events[-1], Rejected)
    assert not any(event is END for event in events)


ACCEPTED = [
    ("chunked in another case", request(b"Transfer-Encoding: Chunked", body=b"1\r\na\r\n0\r\n\r\n"), b"a"),
    ("GET with a body", request(b"Content-Length: 2", body=b"ab"), b"ab"),
    ("leading CRLF", b"\r\n\r\n" + request(), b""),
    ("HTTP/1.0 with Host", request(start=b"GET / HTTP/1.0"), b""),
    ("HTTP/1.0 without Host", request(start=b"GET / HTTP/1.0", host=b""), b""),
    ("opaque bytes in a value", request(b"A: \x80\xff"), b""),
    ("chunk extension", request(CHUNKED, body=b"1;a=b;c\r\na\r\n0\r\n\r\n"), b"a"),
    ("OPTIONS *", request(start=b"OPTIONS * HTTP/1.1"), b""),
    ("IPv6 host", request(host=b"Host: [::1]:80\r\n"), b""),
    ("100 headers", request(*[b"A: b"] * 99), b""),
    ("Content-Length: 0", request(b"Content-Length: 0", start=b"POST / HTTP/1.1"), b""),
]


@pytest.mark.parametrize(("data", "body"), [row[1:] for row in ACCEPTED], ids=[row[0] for row in ACCEPTED])
def test_accepted(data, body):
    events = events_of(data)
    assert isinstance(events[0], RequestHead)
    assert events[-1] is END
    assert b"".join(event for event in events if type(event) is bytes) == body


def test_head_says_what_was_asked():
    (head, end) = events_of(
        request(b"X-A:  b c\t", b"Connection: keep-alive, X-Hop", b"X-Hop: 1", b"TE: trailers", b"Keep-Alive: 5",
                b"Proxy-Connection: x", b"Upgrade: h2c", b"HTTP2-Settings: x", start=b"PUT /a/./b?c=d HTTP/1.1"),
    )  # fmt: skip
    assert end is END
    assert head == RequestHead(b"PUT", b"/a/b", b"c=d", b"a", ((b"x-a", b"b c"),), te_trailers=True)
    assert head.target == b"/a/b?c=d"


def test_security_headers_cannot_be_shed_by_naming_them_hop_by_hop():
    (head, _) = events_of(request(b"Connection: authorization, x-forwarded-for, x-mine", b"Authorization: a",
                                  b"X-Forwarded-For: 1.2.3.4", b"X-Mine: 1"))  # fmt: skip
    assert head.headers == ((b"authorization", b"a"), (b"x-forwarded-for", b"1.2.3.4"))


def test_absolute_form_wins_over_host():
    (head, _) = events_of(request(start=b"GET http://real:8080/x?y HTTP/1.1", host=b"Host: other\r\n"))
    assert (head.authority, head.path, head.query) == (b"real:8080", b"/x", b"y")


TRAILERS = (
    b"Host: b\r\nAuthorization: x\r\ncookie: y\r\nContent-Length: 9\r\nTransfer-Encoding: chunked\r\n"
    b"x_forwarded_for: 1\r\nX-Forwarded-Client-Cert: z\r\nConnection: close\r\nGrpc-Status: \t0 \r\nX: y\r\n"
)


@pytest.mark.parametrize(
    ("value", "outcome"), [(b"2", b"1"), (b"007", b"6"), (b"0", 405), (b"x", 400), (b"-1", 400), (b"9" * 30, 400)]
)
def test_max_forwards_counts_down_for_options_alone(value, outcome):
    header = b"Max-Forwards: " + value
    assert events_of(request(header))[0].headers == ((b"max-forwards", value),)
    data = request(header, start=b"OPTIONS / HTTP/1.1")
    if isinstance(outcome, int):
        assert status_of(data) == outcome
    else:
        assert events_of(data)[0].headers == ((b"max-forwards", outcome),)


def test_empty_lines_behind_a_message_begin_nothing():
    connection = ServerConnection()
    connection.receive_data(request() + b"\r\n")
    assert not connection.mid_message
    connection.receive_data(b"\r\n")
    assert connection.receive_data(request())[-1] is END
    assert connection.receive_eof() == []


def test_trailers_are_an_event_without_what_must_not_come_late():
    events = events_of(request(CHUNKED, body=b"1\r\na\r\n0\r\n" + TRAILERS + b"\r\n") + request())
    kept = Trailers(((b"grpc-status", b"0"), (b"x", b"y")))
    assert events[1:] == [b"a", kept, END, *events_of(request())]


def test_trailers_with_nothing_to_keep_are_no_event():
    assert events_of(request(CHUNKED, body=b"0\r\nHost: b\r\n\r\n"))[1:] == [END]


@pytest.mark.parametrize(
    "trailer", [b"a b: c", b"a : b", b": b", b"a", b" a: b", b"a: b\r\n c", b"a: b\nc: d", b"a: \0", b"a: \x7f", b"\n"]
)
def test_a_trailer_that_is_no_field_is_refused(trailer):
    assert status_of(request(CHUNKED, body=b"1\r\na\r\n0\r\n" + trailer + b"\r\n\r\n")) == 400


@pytest.mark.parametrize("trailers", [b"a: b\r\n" * 101, b"a: " + b"b" * 70_000 + b"\r\n"])
def test_trailers_have_the_limits_of_headers(trailers):
    assert status_of(request(CHUNKED, body=b"1\r\na\r\n0\r\n" + trailers + b"\r\n")) == 431
    within = b"a: b\r\n" * 100
    assert len(events_of(request(CHUNKED, body=b"0\r\n" + within + b"\r\n"))[1].headers) == 100


@pytest.mark.parametrize("framing", [(b"Content-Length: 3", b"abc"), (CHUNKED, b"3\r\nabc\r\n0\r\n\r\n")])
def test_h2c_upgrade_is_stripped_and_its_body_stays_a_body(framing):
    header, body = framing
    data = request(b"Connection: Upgrade, HTTP2-Settings", b"Upgrade: h2c", b"HTTP2-Settings: x", header, body=body)
    events = events_of(data * 3)
    assert [type(event) for event in events] == [RequestHead, bytes, type(END)] * 3
    assert events[0].headers == ()
    assert events[0].upgrade == b""


def test_many_stripped_upgrades_in_one_read():
    events = events_of(request(b"Connection: upgrade", b"Upgrade: h2c") * 1000)
    assert len(events) == 2000


def test_bytes_after_a_websocket_upgrade_are_held():
    connection = ServerConnection()
    (head, end) = connection.receive_data(request(b"Connection: Upgrade", b"Upgrade: WebSocket", body=b"\x81\x80"))
    assert (head.upgrade, end) == (b"websocket", END)
    assert connection.receive_data(b"more") == []
    assert connection.upgraded
    assert connection.unparsed == b"\x81\x80more"


def test_nothing_is_read_after_connection_close():
    connection = ServerConnection()
    assert len(connection.receive_data(request(b"Connection: close") + request())) == 2
    assert connection.receive_data(request()) == []
    assert connection.unparsed == b""


def test_pipelined_requests_before_a_bad_one_are_delivered():
    events = events_of(request() * 49 + b"BAD\r\n\r\n" + request())
    assert len(events) == 49 * 2 + 1
    assert isinstance(events[-1], Rejected)


def test_chunk_extensions_are_bounded_and_one_byte_chunks_are_not():
    connection = ServerConnection()
    connection.receive_data(request(CHUNKED))
    data = b"".join(b"1;%b\r\na\r\n" % (b"e" * 1000) for _ in range(EXTENSION_BYTES_MAX // 1000 + 2))
    assert isinstance(connection.receive_data(data)[-1], Rejected)
    connection = ServerConnection()
    connection.receive_data(request(CHUNKED))
    for _ in range(100):
        assert connection.receive_data(b"1\r\na\r\n" * 1000) == [b"a" * 1000]  # one read, one piece
    assert connection.receive_data(b"0\r\n\r\n") == [END]


@pytest.mark.parametrize("count", [16, 17])
def test_all_extensions_of_a_body_share_one_limit(count):
    body = (b"1;" + b"e" * 1023 + b"\r\na\r\n") * count + b"0\r\n\r\n"
    assert status_of(request(CHUNKED, body=body)) == (400 if count > 16 else None)


def test_a_head_that_never_ends_is_refused():
    connection = ServerConnection()
    connection.receive_data(b"GET / HTTP/1.1\r\nHost: a\r\nA: ")
    fed = 0
    while not connection.closed:
        events = connection.receive_data(b"a" * 1000)
        fed += 1000
    assert events[-1].status == 431
    assert fed <= HEAD_BYTES_MAX + 1000


def test_end_of_stream():
    assert ServerConnection().receive_eof() == []
    connection = ServerConnection()
    connection.receive_data(request())
    assert connection.receive_eof() == []
    for begun in (b"G", request(b"Content-Length: 5", body=b"abc"), request(CHUNKED, body=b"1\r\na")):
        connection = ServerConnection()
        connection.receive_data(begun)
        assert connection.mid_message
        assert isinstance(connection.receive_eof()[-1], Rejected)


# ---- pieces, mutations


def merged(events):
    """Events with neighbouring body pieces joined: what does not depend on how the bytes arrived."""
    result = []
    for event in events:
        if type(event) is bytes and result and type(result[-1]) is bytes:
            result[-1] += event
        else:
            result.append(event if not isinstance(event, Rejected) else "rejected")
    return result


WHOLE = (
    request(b"Content-Length: 5", b"X: y", start=b"POST /a?b HTTP/1.1", body=b"hello")
    + request(CHUNKED, body=b"3;x=y\r\nabc\r\n10\r\n0123456789abcdef\r\n0\r\nT: t\r\n\r\n")
    + request(b"Connection: upgrade", b"Upgrade: h2c", b"Content-Length: 2", body=b"hi")
    + request(b"Expect: 100-continue", b"Content-Length: 1", body=b"x")
    + request(start=b"GET http://b/c HTTP/1.1")
)


def feed(data, cuts, connection):
    edges = [0, *sorted({cut % (len(data) + 1) for cut in cuts}), len(data)]
    return merged(
        event
        for start, end in itertools.pairwise(edges)
        if start < end
        for event in connection.receive_data(data[start:end])
    )


@given(st.lists(st.integers(0, 10_000), max_size=40))
def test_requests_do_not_depend_on_how_they_are_cut(cuts):
    assert feed(WHOLE, cuts, ServerConnection()) == merged(events_of(WHOLE))


@settings(max_examples=300)
@given(
    st.lists(st.tuples(st.integers(0, len(WHOLE) - 1), st.integers(0, 255)), min_size=1, max_size=3),
    st.lists(st.integers(0, 10_000), max_size=10),
)
def test_mutated_requests_never_raise_and_agree_over_cuts(changes, cuts):
    data = bytearray(WHOLE)
    for position, value in changes:
        data[position] = value
    data = bytes(data)
    whole, cut = ServerConnection(), ServerConnection()
    one, two = merged(events_of(data, whole)), feed(data, cuts, cut)
    # A refusal may take back a message that was begun in the same read, never add to what was seen.
    assert [event for event in one if isinstance(event, RequestHead)] == [
        event for event in two if isinstance(event, RequestHead)
    ]
    assert whole.closed == cut.closed
    for event in one:
        if isinstance(event, RequestHead):
            assert_safe(event)


def assert_safe(head):
    """A head that was accepted reads back as itself."""
    sender = ClientConnection()
    data = sender.send_request(head)
    back = events_of(data)[0]
    assert isinstance(back, RequestHead), data
    assert (back.method, back.path, back.query, back.headers) == (head.method, head.path, head.query, head.headers)
    assert (back.content_length, back.chunked) == (head.content_length, head.chunked)


@given(st.binary(max_size=300))
def test_noise_never_raises(data):
    ServerConnection().receive_data(data)
    client = ClientConnection()
    client.send_request(RequestHead(b"GET", b"/", None, b"a", ()))
    client.receive_data(data)
    client.receive_eof()


# ---- responses


def client_for(method=b"GET", **fields):
    connection = ClientConnection()
    connection.send_request(RequestHead(method, b"/", None, b"a", (), **fields))
    connection.end()
    return connection


BAD_RESPONSES = [
    ("CL and TE", b"HTTP/1.1 200 OK\r\nContent-Length: 1\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n"),
    ("two CL", b"HTTP/1.1 200 OK\r\nContent-Length: 1\r\nContent-Length: 1\r\n\r\na"),
    ("TE gzip", b"HTTP/1.1 200 OK\r\nTransfer-Encoding: gzip\r\n\r\nabc"),
    ("status 099", b"HTTP/1.1 099 X\r\n\r\n"),
    ("status 2000", b"HTTP/1.1 2000 X\r\n\r\n"),
    ("status 600", b"HTTP/1.1 600 X\r\n\r\n"),
    ("unasked 101", b"HTTP/1.1 101 X\r\nConnection: upgrade\r\nUpgrade: websocket\r\n\r\n"),
    ("HTTP/2.0", b"HTTP/2.0 200 OK\r\nContent-Length: 0\r\n\r\n"),
    ("bare LF", b"HTTP/1.1 200 OK\nContent-Length: 0\n\n"),
    ("too many 1xx", b"HTTP/1.1 103 X\r\n\r\n" * (INFORMATIONAL_MAX + 1)),
    ("not HTTP", b"SSH-2.0-OpenSSH\r\n"),
    ("large head", b"HTTP/1.1 200 OK\r\nA: " + b"a" * 70_000 + b"\r\n\r\n"),
]


@pytest.mark.parametrize("data", [row[1] for row in BAD_RESPONSES], ids=[row[0] for row in BAD_RESPONSES])
@pytest.mark.parametrize("method", [b"GET", b"HEAD"])
def test_bad_responses_are_502_and_end_the_connection(data, method):
    connection = client_for(method)
    events = connection.receive_data(data) + connection.receive_eof()
    assert isinstance(events[-1], Rejected)
    assert events[-1].status == 502
    assert not connection.idle


def test_response_bodies():
    connection = client_for()
    events = connection.receive_data(b"HTTP/1.1 200 OK\r\nX: y\r\nContent-Length: 2\r\n\r\nok")
    assert events == [ResponseHead(200, ((b"x", b"y"),), 2), b"ok", END]
    assert connection.idle
    connection = client_for()
    events = connection.receive_data(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n2\r\nok\r\n0\r\n\r\n")
    assert events == [ResponseHead(200), b"ok", END]
    connection = client_for()
    assert connection.receive_data(b"HTTP/1.1 200 OK\r\n\r\nok") == [ResponseHead(200), b"ok"]
    assert connection.receive_eof() == [END]
    assert not connection.idle


@pytest.mark.parametrize(
    ("method", "response"),
    [
        (b"HEAD", b"HTTP/1.1 200 OK\r\nContent-Length: 5\r\n\r\n"),
        (b"HEAD", b"HTTP/1.1 100 X\r\n\r\nHTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n"),
        (b"GET", b"HTTP/1.1 204 No Content\r\n\r\n"),
        (b"GET", b"HTTP/1.1 304 Not Modified\r\nContent-Length: 5\r\n\r\n"),
    ],
)
def test_responses_without_a_body_end_with_their_head(method, response):
    connection = client_for(method)
    for value in response[:-1]:
        assert END not in connection.receive_data(bytes((value,)))
    assert connection.receive_data(response[-1:])[-1] is END
    assert connection.idle
    connection = client_for(method)
    assert END in connection.receive_data(response + b"leftover")
    assert not connection.idle


def test_bytes_after_a_response_make_the_connection_unusable():
    connection = client_for()
    events = connection.receive_data(b"HTTP/1.1 200 OK\r\nContent-Length: 1\r\n\r\naHTTP/1.1 200 OK\r\n\r\n")
    assert events == [ResponseHead(200, (), 1), b"a", END]
    assert not connection.idle
    connection = client_for()
    connection.receive_data(b"HTTP/1.1 204 OK\r\n\r\n")
    assert isinstance(connection.receive_data(b"x")[0], Rejected)


def test_keep_alive_of_responses():
    for data, idle in [
        (b"HTTP/1.1 200 OK\r\nConnection: close\r\nContent-Length: 0\r\n\r\n", False),
        (b"HTTP/1.0 200 OK\r\nContent-Length: 0\r\n\r\n", False),
        (b"HTTP/1.0 200 OK\r\nConnection: keep-alive\r\nContent-Length: 0\r\n\r\n", True),
        (b"HTTP/1.1 200 OK\r\nContent-Length: 0\r\n\r\n", True),
    ]:
        connection = client_for()
        assert connection.receive_data(data)[-1] is END
        assert connection.idle == idle


def test_accepted_upgrade_hands_over_the_rest():
    connection = client_for(upgrade=b"websocket")
    events = connection.receive_data(
        b"HTTP/1.1 101 X\r\nConnection: Upgrade\r\nUpgrade: websocket\r\nSec-WebSocket-Accept: x\r\n\r\n\x81\x00"
    )
    assert events[0].status == 101
    assert connection.upgraded
    assert connection.unparsed == b"\x81\x00"


def test_one_100_reaches_whoever_asked_for_it_and_none_anybody_else():
    interim = b"HTTP/1.1 100 Continue\r\n\r\n" * 3 + b"HTTP/1.1 103 Early Hints\r\n\r\n"
    final = b"HTTP/1.1 200 OK\r\nContent-Length: 0\r\n\r\n"
    for expects, statuses in [(True, [100, 103, 200]), (False, [103, 200])]:
        events = client_for(expects_continue=expects).receive_data(interim + final)
        assert [event.status for event in events if event is not END] == statuses


def test_blanks_before_colons_are_stripped_from_responses():
    data = b"HTTP/1.1 200 OK\r\nX-A \t: b : c\r\nContent-Length : 2\r\n\r\nok"
    expected = [ResponseHead(200, ((b"x-a", b"b : c"),), 2), b"ok", END]
    assert client_for().receive_data(data) == expected
    assert feed(data, range(len(data)), client_for()) == expected


def test_response_trailers_are_an_event():
    data = (
        b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n2\r\nok\r\n0\r\nGrpc-Status: 0\r\nSet-Cookie: a\r\n\r\n"
    )
    assert client_for().receive_data(data) == [ResponseHead(200), b"ok", Trailers(((b"grpc-status", b"0"),)), END]


RESPONSES = (
    b"HTTP/1.1 103 Early Hints\r\nLink: x\r\n\r\nHTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\nA: b\r\n\r\n"
    b"3\r\nabc\r\n10;x\r\n0123456789abcdef\r\n0\r\nT: t\r\n\r\n"
)


@given(st.lists(st.integers(0, 10_000), max_size=30))
def test_responses_do_not_depend_on_how_they_are_cut(cuts):
    assert feed(RESPONSES, cuts, client_for()) == merged(client_for().receive_data(RESPONSES))


@settings(max_examples=200)
@given(
    st.lists(st.tuples(st.integers(0, len(RESPONSES) - 1), st.integers(0, 255)), min_size=1, max_size=3),
    st.lists(st.integers(0, 10_000), max_size=10),
    st.sampled_from([b"GET", b"HEAD"]),
)
def test_mutated_responses_never_raise_and_can_be_passed_on(changes, cuts, method):
    data = bytearray(RESPONSES)
    for position, value in changes:
        data[position] = value
    connection = client_for(method)
    events = feed(bytes(data), cuts, connection)
    asked = RequestHead(method, b"/", None, b"a", ())
    for event in events:
        if isinstance(event, ResponseHead) and not event.informational:
            sent = ServerConnection().send_response(event, asked)
            back = client_for(method).receive_data(sent)[0]
            assert isinstance(back, ResponseHead)
            assert back.headers == event.headers


# ---- sending


ASKED = RequestHead(b"GET", b"/", None, b"a", ())


@pytest.mark.parametrize(
    "header",
    [
        *((b"x", value) for value in (b"a\r\nb: c", b"a\nb", b"a\rb", b"a\0b", b"a\r\n", b"\x01", b"\x7f", b"\x0b")),
        *((name, b"a") for name in (b"", b"a b", b"a:", b"a\r\nb", b"\xe4", b":path", b"a ", b"x(")),
        *(
            (name, b"1")
            for name in (b"Content-Length", b"transfer-encoding", b"Connection", b"Host", b"upgrade", b"TE")
        ),
    ],
)
def test_a_header_that_would_not_be_accepted_is_not_sent(header):
    server, client = ServerConnection(), ClientConnection()
    for _ in range(2):  # what was refused is not remembered as good
        with pytest.raises(ProtocolError):
            server.send_response(ResponseHead(200, ((b"ok", b"1"), header), 0), ASKED)
        with pytest.raises(ProtocolError):
            server.send_informational(ResponseHead(103, (header,)))
        with pytest.raises(ProtocolError):
            client.send_request(RequestHead(b"GET", b"/", None, b"a", (header,)))
    assert not server.must_close
    answer = server.send_response(ResponseHead(500, (), 0), ASKED)  # nothing was changed by what failed
    assert answer == b"HTTP/1.1 500 Internal Server Error\r\ncontent-length: 0\r\n\r\n"
    assert client.idle
    assert client.send_request(ASKED) == b"GET / HTTP/1.1\r\nhost: a\r\n\r\n"


@pytest.mark.parametrize(
    "fields",
    [
        *(
            {"path": path}
            for path in (b"", b"a", b"/a b", b"/a\r\n", b"/a#b", b"/a?b", b"/\x80", b"/\x7f", b"/\t", b"*/")
        ),
        *({"query": query} for query in (b"a b", b"a#", b"\r\n", b"\xff")),
        *({"authority": authority} for authority in (b"a b", b"a/b", b"u@a", b"a\r\nx: y", b"a?b", b"a#b", b"\xe4")),
        *({"method": method} for method in (b"", b"get", b"GET /", b"G\r\nX: y", b"G:")),
    ],
)
def test_a_request_that_would_not_be_accepted_is_not_sent(fields):
    with pytest.raises(ProtocolError):
        ClientConnection().send_request(replace(ASKED, **fields))


@pytest.mark.parametrize("status", [-1, 0, 99, 600, 799, 2000])
def test_a_status_that_is_none_is_not_sent(status):
    with pytest.raises(ProtocolError):
        ServerConnection().send_response(ResponseHead(status, (), 0), ASKED)
    with pytest.raises(ProtocolError):
        ServerConnection().send_response(ResponseHead(200, (), 0, b"a\r\nb: c"), ASKED)


def test_names_that_are_remembered_as_good_are_bounded():
    for number in range(3 * send._NAMES_KEPT_MAX):
        ClientConnection().send_request(replace(ASKED, headers=((b"x-%d" % number, b""),)))
    assert len(send._good_names) <= send._NAMES_KEPT_MAX


def test_trailers_are_sent_where_they_can_be():
    trailers = ((b"grpc-status", b"0"),)
    client = ClientConnection()
    client.send_request(replace(ASKED, method=b"POST", chunked=True))
    assert client.end(trailers) == b"0\r\ngrpc-status: 0\r\n\r\n"
    client = ClientConnection()
    client.send_request(replace(ASKED, method=b"POST", content_length=0))
    assert client.end(trailers) == b""
    for asked, response, expected in [
        (replace(ASKED, te_trailers=True), ResponseHead(200), b"0\r\ngrpc-status: 0\r\n\r\n"),
        (ASKED, ResponseHead(200), b"0\r\n\r\n"),
        (replace(ASKED, te_trailers=True), ResponseHead(200, (), 0), b""),
        (replace(ASKED, te_trailers=True, http_minor=0), ResponseHead(200), b""),
        (replace(ASKED, te_trailers=True, method=b"HEAD"), ResponseHead(200), b""),
    ]:
        server = ServerConnection()
        server.send_response(response, asked)
        assert server.end(trailers) == expected


@pytest.mark.parametrize(
    "trailer",
    [(b"Content-Length", b"1"), (b"host", b"a"), (b"a b", b"c"), (b"a", b"b\r\nc: d"), (b"x_forwarded_for", b"")],
)
def test_a_trailer_that_would_not_be_kept_is_not_sent(trailer):
    client = ClientConnection()
    client.send_request(replace(ASKED, method=b"POST", chunked=True))
    with pytest.raises(ProtocolError):
        client.end((trailer,))
    assert client.end() == b"0\r\n\r\n"


def test_responses_are_framed_by_what_the_request_allows():
    body = ResponseHead(200, (), 2)
    unknown = ResponseHead(200)
    modern = RequestHead(b"GET", b"/", None, b"a", ())
    old = RequestHead(b"GET", b"/", None, b"a", (), keep_alive=False, http_minor=0)
    head = RequestHead(b"HEAD", b"/", None, b"a", ())

    def sent(response, asked, *pieces):
        connection = ServerConnection()
        data = connection.send_response(response, asked)
        data += b"".join(connection.send_body(piece) for piece in pieces) + connection.end()
        return data, connection.must_close

    assert sent(body, modern, b"ok") == (b"HTTP/1.1 200 OK\r\ncontent-length: 2\r\n\r\nok", False)
    assert sent(unknown, modern, b"o", b"", b"k") == (
        b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n1\r\no\r\n1\r\nk\r\n0\r\n\r\n",
        False,
    )
    assert sent(unknown, old, b"ok") == (b"HTTP/1.1 200 OK\r\nconnection: close\r\n\r\nok", True)
    assert sent(body, head, b"ok") == (b"HTTP/1.1 200 OK\r\ncontent-length: 2\r\n\r\n", False)
    assert sent(ResponseHead(204, (), 0), modern) == (b"HTTP/1.1 204 No Content\r\n\r\n", False)
    assert sent(ResponseHead(599, (), 0, b"Odd"), modern)[0].startswith(b"HTTP/1.1 599 Odd\r\n")


def test_a_body_that_differs_from_its_length_is_our_bug():
    asked = RequestHead(b"GET", b"/", None, b"a", ())
    connection = ServerConnection()
    connection.send_response(ResponseHead(200, (), 2), asked)
    with pytest.raises(AssertionError):
        connection.send_body(b"abc")
    connection.send_response(ResponseHead(200, (), 2), asked)
    connection.send_body(b"a")
    with pytest.raises(AssertionError):
        connection.end()
