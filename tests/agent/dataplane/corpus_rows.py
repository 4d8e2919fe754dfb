"""Hostile and odd HTTP/1.1, by the row of the corpus it belongs to (RFC 9112 and RFC 9110; section numbers are theirs).

Each input has its verdict: the statuses it may be refused with (the connection then closes), or the requests that the
application must have been sent, as (method, target, body). Where Envoy is lenient (bare LF, obs-fold, two Hosts: rows
16, 15, 23) the verdict is a refusal.
"""

HIDDEN = b"GET /hidden HTTP/1.1\r\nHost: api\r\n\r\n"
CHUNKED = b"POST /c HTTP/1.1\r\nHost: api\r\nTransfer-Encoding: chunked\r\n\r\n"
END = b"0\r\n\r\n"


def post(*fields, body=b""):
    """A POST of these header lines and body bytes."""
    return b"\r\n".join((b"POST /p HTTP/1.1", b"Host: api", *fields, b"", body))


def get(target=b"/", *fields, host=b"Host: api", version=b"HTTP/1.1"):
    """A GET of these header lines."""
    return b"\r\n".join((b"GET %b %b" % (target, version), *((host,) if host else ()), *fields, b"", b""))


def _te(value):
    return post(b"Transfer-Encoding: " + value, body=END + HIDDEN)


def _cl(value, body=b"a" + HIDDEN):
    return post(b"Content-Length: " + value, body=body)


def _size(line):
    return CHUNKED + line + b"\r\na\r\n" + END + HIDDEN


def _start(line):
    return line + b"\r\nHost: api\r\n\r\n"


def _many(row, statuses, inputs):
    return [(row, name, data, statuses) for name, data in inputs.items()]


BAD = (400,)

REFUSED = [
    *_many(1, BAD, {
        "CL.TE": post(b"Content-Length: 5", b"Transfer-Encoding: chunked", body=END + HIDDEN),
        "TE.CL": post(b"Transfer-Encoding: chunked", b"Content-Length: 5", body=END + HIDDEN),
        "CL 0 and TE": post(b"Content-Length: 0", b"Transfer-Encoding: chunked", body=END + HIDDEN),
        "TE, CL in other cases": post(b"tRANSFER-eNCODING: chunked", b"CONTENT-LENGTH: 5", body=END + HIDDEN),
    }),
    *_many(2, (400, 501), {
        "xchunked and CL": post(b"Transfer-Encoding: xchunked", b"Content-Length: 5", body=END + HIDDEN),
        **{repr(value): _te(value) for value in (
            b"xchunked", b"chunked, identity", b"gzip, chunked", b",chunked", b"chunked,", b"identity", b"gzip",
            b"chunked, chunked", b"chunked;q=1", b'"chunked"', b"'chunked'", b"chun ked", b"")},
    }),
    *_many(3, (400, 501), {repr(value): _te(value) for value in (
        b"\x0bchunked", b"chunked\x0b", b"chunked\x0c", b"\x0cchunked", b"\xa0chunked", b"chunked\xa0", b"chunked\x85",
        b"chunked\x00", b"\xef\xbb\xbfchunked")}),
    *_many(4, BAD, {
        "two chunked": post(b"Transfer-Encoding: chunked", b"Transfer-Encoding: chunked", body=END + HIDDEN),
        "chunked, then identity": post(b"Transfer-Encoding: chunked", b"Transfer-Encoding: identity", body=END),
    }),
    *_many(6, BAD, {"TE on 1.0": CHUNKED.replace(b"1.1", b"1.0") + END + HIDDEN}),
    *_many(7, BAD, {
        "0 and 35": post(b"Content-Length: 0", b"Content-Length: 35", body=HIDDEN),
        "35 and 0": post(b"Content-Length: 35", b"Content-Length: 0", body=HIDDEN),
    }),
    *_many(8, BAD, {
        "two equal": post(b"Content-Length: 1", b"Content-Length: 1", body=b"a" + HIDDEN),
        "list": _cl(b"1, 1"),
        "list with an empty member": _cl(b"1,"),
    }),
    *_many(9, BAD, {repr(value): _cl(value) for value in (
        b"+1", b"-1", b"1_0", b"0x1", b"", b"1 1", b"1;", b"\xc2\xb9", b"1.0", b"1e0", b"\x0b1", b"1\xa0")}),
    *_many(10, (400, 413), {repr(value): _cl(value) for value in (
        b"9" * 20, b"9223372036854775808", b"18446744073709551616", b"18446744073709551617", b"9" * 400)}),
    *_many(11, (413,), {"beyond the cap": _cl(b"4611686018427387905")}),
    *_many(13, BAD, {
        "space": get(b"/", b"A : b"),
        "TAB": get(b"/", b"A\t: b"),
        "in CL": post(b"Content-Length : 35", body=HIDDEN),
        "in TE": post(b"Transfer-Encoding : chunked", body=END + HIDDEN),
        "in Host": get(host=b"Host : api"),
    }),
    *_many(14, BAD, {
        "space": get(host=b" Host: api"),
        "TAB": get(host=b"\tHost: api"),
    }),
    *_many(15, BAD, {
        "a value": get(b"/", b"A: b", b" c"),
        "a value, with TAB": get(b"/", b"A: b", b"\tc"),
        "an empty line of blanks": get(b"/", b"A: b", b"  "),
        "TE": post(b"Transfer-Encoding:", b" chunked", body=END + HIDDEN),
        "CL": post(b"Content-Length:", b" 35", body=HIDDEN),
        "Host": get(host=b"Host:\r\n api"),
    }),
    *_many(16, BAD, {
        "everywhere": b"GET / HTTP/1.1\nHost: api\n\n",
        "after the request line": b"GET / HTTP/1.1\nHost: api\r\n\r\n",
        "after a field": b"GET / HTTP/1.1\r\nHost: api\r\nA: b\nC: d\r\n\r\n",
        "at the end": b"GET / HTTP/1.1\r\nHost: api\r\n\n",
        "at the end, before": b"GET / HTTP/1.1\r\nHost: api\n\r\n",
        "hiding a field": b"GET / HTTP/1.1\r\nHost: api\r\nA: b\nContent-Length: 35\r\n\r\n" + HIDDEN,
    }),
    *_many(17, BAD, {
        "start line": b"GET /\rx HTTP/1.1\r\nHost: api\r\n\r\n",
        "name": get(b"/", b"A\rB: c"),
        "value": get(b"/", b"A: b\rC: d"),
        "CR CR LF": get(b"/", b"A: b\r"),
        "line ends": b"GET / HTTP/1.1\rHost: api\r\r",
    }),
    *_many(18, BAD, {"end": get(b"/", b"A: b\0"), "middle": get(b"/", b"A: b\0c"), "name": get(b"/", b"A\0: b")}),
    *_many(19, BAD, {hex(byte): get(b"/", b"A: b%bc" % bytes((byte,))) for byte in
                     (1, 2, 7, 8, 0x0B, 0x0C, 0x0E, 0x1B, 0x1F, 0x7F)}),
    *_many(21, BAD, {
        "no token": get(b"/", b"A(: b"), "high byte": get(b"/", b"\xe4: b"), "space": get(b"/", b"A B: c"),
        "empty": get(b"/", b": b"), "no colon": get(b"/", b"nothing"), "quoted": get(b"/", b'"a": b'),
    }),
    *_many(22, BAD, {
        "content_length": post(b"content_length: 35", body=HIDDEN),
        "transfer_encoding": post(b"Transfer_Encoding: chunked", body=END + HIDDEN),
        "identity": get(b"/", b"X_Forwarded_Client_Cert: URI=spiffe://a/b"),
        "identity, mixed": get(b"/", b"x-forwarded_client-cert: URI=spiffe://a/b"),
    }),
    *_many(23, BAD, {
        "none": get(host=b""), "two": get(b"/", b"Host: other"), "two equal": get(b"/", b"Host: api"),
        "two in other cases": get(b"/", b"hOST: other"),
    }),
    *_many(24, BAD, {repr(value): get(host=b"Host: " + value) for value in (
        b"a/b", b"u@a", b"a b", b"a:99999", b"a:b", b"a:", b"[::1", b"a\\b", b"a?b", b"a#b", b"a,\tb", b"a:1:2", b"[a]",
        b"\xe4", b"http://a", b"a" * 600)}),
    *_many(25, BAD, {"empty": get(host=b"Host:"), "blank": get(host=b"Host: \t ")}),
    *_many(26, BAD, {
        "user": get(b"http://u@api/"), "none": get(b"http:///x"), "other scheme": get(b"ftp://api/x"),
        "bad port": get(b"http://api:x/"), "query alone": get(b"http://api?x"), "one slash": get(b"http:/api"),
    }),
    *_many(27, BAD, {"no slash": get(b"a"), "authority form": get(b"api:80"), "empty": _start(b"GET  HTTP/1.1"),
                     "question": get(b"?a=b")}),
    *_many(28, BAD, {"GET": get(b"*"), "POST": _start(b"POST * HTTP/1.1"),
                     "OPTIONS **": _start(b"OPTIONS ** HTTP/1.1")}),
    *_many(29, (405,), {"authority": b"CONNECT api:80 HTTP/1.1\r\nHost: api:80\r\n\r\n" + HIDDEN}),
    *_many(30, (400, 405), {
        "CL": b"CONNECT api:80 HTTP/1.1\r\nHost: a\r\nContent-Length: 35\r\n\r\n" + HIDDEN,
        "TE": b"CONNECT api:80 HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\n\r\n" + END + HIDDEN,
    }),
    *_many(31, BAD, {"path": get(b"/a#b"), "query": get(b"/a?b#c"), "alone": get(b"#"),
                     "absolute": get(b"http://api/#a")}),
    *_many(32, BAD, {"space": get(b"/a b"), "control": get(b"/a\x01"), "high": get(b"/\xc3\xa4"), "DEL": get(b"/\x7f"),
                     "NUL": get(b"/\0"), "query": get(b"/a?b c")}),
    *_many(33, BAD, {
        "TAB": _start(b"GET\t/ HTTP/1.1"), "TAB behind": _start(b"GET /\tHTTP/1.1"),
        "two spaces": _start(b"GET  / HTTP/1.1"), "two spaces behind": _start(b"GET /  HTTP/1.1"),
        "space at the end": _start(b"GET / HTTP/1.1 "), "space at the beginning": _start(b" GET / HTTP/1.1"),
        "VT": _start(b"GET\x0b/ HTTP/1.1"), "no space": _start(b"GET/ HTTP/1.1"),
    }),
    *_many(34, BAD, {"three": b"\r\n\r\n\r\n" + get(b"/a"), "bare LF": b"\n" + get(b"/a"), "CR": b"\r" + get(b"/a"),
                     "LF CR": b"\n\r" + get(b"/a"), "a thousand": b"\r\n" * 1000 + get(b"/a")}),
    *_many(35, BAD, {"GET": b"GET /\r\n\r\n", "without end": b"GET /\r\n"}),
    *_many(36, (400, 505), {repr(version): get(b"/", version=version) for version in (
        b"HTTP/1.9", b"HTTP/1.32", b"HTTP/2.0", b"http/1.1", b"HTTP/0.9", b"HTTP/3", b"ICE/1.0", b"HTTP/1", b"HTTP/1.",
        b"HTTP/01.1", b"HTTP/1.01", b"HTTP/11", b"RTSP/1.0", b"HTTP 1.1", b"HTTP/+1.1")}),
    *_many(37, BAD, {"PRI": b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"}),
    *_many(38, (400, 501), {"separator": _start(b"GE(T / HTTP/1.1"), "get": _start(b"get / HTTP/1.1"),
                            "unknown": _start(b"FROBNICATE / HTTP/1.1"), "1 KB": _start(b"A" * 1024 + b" / HTTP/1.1"),
                            "empty": _start(b" / HTTP/1.1"), "colon": _start(b"GET: / HTTP/1.1")}),
    *_many(39, (414,), {"8 KB": get(b"/" + b"a" * 8200), "query": get(b"/?" + b"a" * 8200),
                        "70 KB": get(b"/" + b"a" * 70_000)}),
    *_many(40, (431,), {"one of 70 KB": get(b"/", b"A: " + b"a" * 70_000),
                        "a name of 70 KB": get(b"/", b"a" * 70_000 + b": b"),
                        "61 KB in all": get(b"/", *[b"A: " + b"a" * 1000] * 62)}),
    *_many(41, (431,), {"102": get(b"/", *[b"A: b"] * 101), "5000": get(b"/", *[b"A: b"] * 5000)}),
    *_many(43, BAD, {repr(size): _size(size) for size in (
        b"0x1", b"+1", b"-1", b"1_0", b"", b" 1", b"g", b"\t1", b"1,", b"1.0", b"\xef\xbc\x91")}),
    *_many(44, BAD, {"17 digits": _size(b"10000000000000001"), "1000 zeros": _size(b"0" * 1000 + b"1"),
                     "2^64 - 1": _size(b"f" * 16)}),
    *_many(45, BAD, {
        "one of 20 KB": _size(b"1;" + b"a" * 20_000),
        "17 of 1 KB": CHUNKED + (b"1;" + b"a" * 1023 + b"\r\na\r\n") * 17 + END + HIDDEN,
        "150 KB": _size(b"1;" + b"a" * 150_000),
        "at the last chunk": CHUNKED + b"1\r\na\r\n0;" + b"a" * 20_000 + b"\r\n\r\n" + HIDDEN,
    }),
    *_many(46, BAD, {"LF": _size(b"1;a\nb"), "CR": _size(b"1;a\rb"),
                     "LF in quotes": _size(b'1;a="\n"'), "NUL": _size(b"1;\0")}),
    *_many(47, BAD, {"space": _size(b"1 "), "TAB": _size(b"1\t"), "before an extension": _size(b"1 ;a=b")}),
    *_many(48, BAD, {
        "LF after the size": CHUNKED + b"1\na\r\n" + END + HIDDEN,
        "no CRLF after the data": CHUNKED + b"1\r\nab\r\n" + END + HIDDEN,
        "LF after the data": CHUNKED + b"1\r\na\n" + END + HIDDEN,
        "CR after the data": CHUNKED + b"1\r\na\r" + END + HIDDEN,
        "LF after the last chunk": CHUNKED + b"1\r\na\r\n0\n\n" + HIDDEN,
        "LF for the end": CHUNKED + b"1\r\na\r\n0\r\n\n" + HIDDEN,
        "shorter than it says": CHUNKED + b"5\r\na\r\n" + END + HIDDEN,
    }),
    *_many(51, (431,), {"many": CHUNKED + b"0\r\n" + b"a: b\r\n" * 200 + b"\r\n" + HIDDEN,
                        "180 KB": CHUNKED + b"0\r\n" + b"a: b\r\n" * 30_000 + b"\r\n" + HIDDEN,
                        "one of 70 KB": CHUNKED + b"0\r\na: " + b"b" * 70_000 + b"\r\n\r\n" + HIDDEN}),
    *_many(51, BAD, {"folded": CHUNKED + b"0\r\na: b\r\n c\r\n\r\n" + HIDDEN,
                     "space": CHUNKED + b"0\r\na : b\r\n\r\n" + HIDDEN,
                     "bare LF": CHUNKED + b"0\r\na: b\nc: d\r\n\r\n" + HIDDEN}),
    *_many(54, (417,), {"other": post(b"Expect: the-unexpected", b"Content-Length: 35", body=HIDDEN),
                        "list": post(b"Expect: 100-continue, x", b"Content-Length: 35", body=HIDDEN)}),
    *_many(56, BAD, {
        "with a body": post(b"Connection: Upgrade", b"Upgrade: websocket", b"Content-Length: 35", body=HIDDEN),
        "chunked": get(b"/", b"Connection: Upgrade", b"Upgrade: websocket", b"Transfer-Encoding: chunked") + END,
    }),
    *_many(59, (405,), {"TRACE": _start(b"TRACE / HTTP/1.1") + HIDDEN,
                        "TRACE, Max-Forwards": b"TRACE / HTTP/1.1\r\nHost: api\r\nMax-Forwards: 0\r\n\r\n",
                        "OPTIONS, Max-Forwards 0": b"OPTIONS / HTTP/1.1\r\nHost: api\r\nMax-Forwards: 0\r\n\r\n"}),
    *_many("path", BAD, {"above the root": get(b"/a/../../b"), "escaped": get(b"/%2e%2e/a"),
                         "backslashes": get(b"/a\\..\\..\\b"),
                         "escaped NUL": get(b"/a%00b"), "half an escape": get(b"/a%2"),
                         "escape in an escape": get(b"/%%32e%%32e/a"),
                         "no escape": get(b"/a%zz")}),
]  # fmt: skip

ACCEPTED = [
    (5, "Chunked", post(b"Transfer-Encoding: Chunked", body=b"1\r\na\r\n" + END), [(b"POST", b"/p", b"a")]),
    (5, "CHUNKED", post(b"TRANSFER-ENCODING: CHUNKED", body=b"1\r\na\r\n" + END), [(b"POST", b"/p", b"a")]),
    (12, "GET with a body", get(b"/g", b"Content-Length: 35") + HIDDEN, [(b"GET", b"/g", HIDDEN)]),
    (12, "GET with chunks", get(b"/g", b"Transfer-Encoding: chunked") + b"23\r\n" + HIDDEN + b"\r\n" + END,
     [(b"GET", b"/g", HIDDEN)]),
    (12, "DELETE with a body", _start(b"DELETE /d HTTP/1.1")[:-2] + b"Content-Length: 35\r\n\r\n" + HIDDEN,
     [(b"DELETE", b"/d", HIDDEN)]),
    (20, "high bytes", get(b"/", b"A: \xff\x80"), [(b"GET", b"/", b"")]),
    (20, "UTF-8", get(b"/", b"A: \xc3\xa4"), [(b"GET", b"/", b"")]),
    (26, "other Host", get(b"http://other:80/a?b=/../c"), [(b"GET", b"/a?b=/../c", b"")]),
    (26, "no path", get(b"http://other"), [(b"GET", b"/", b"")]),
    (26, "scheme in capitals", get(b"HTTP://other/a"), [(b"GET", b"/a", b"")]),
    (28, "OPTIONS *", _start(b"OPTIONS * HTTP/1.1"), [(b"OPTIONS", b"*", b"")]),
    (34, "one", b"\r\n" + get(b"/a"), [(b"GET", b"/a", b"")]),
    (34, "two", b"\r\n\r\n" + get(b"/a"), [(b"GET", b"/a", b"")]),
    (34, "behind a body", _cl(b"1", b"a") + b"\r\n" + get(b"/a"), [(b"POST", b"/p", b"a"), (b"GET", b"/a", b"")]),
    (39, "no more than 8 KB", get(b"/" + b"a" * 8191), [(b"GET", b"/" + b"a" * 8191, b"")]),
    (41, "95", get(b"/", *[b"A: b"] * 95), [(b"GET", b"/", b"")]),
    (44, "15 zeros", CHUNKED + b"0" * 15 + b"1\r\na\r\n" + END, [(b"POST", b"/c", b"a")]),
    (44, "capitals", CHUNKED + b"A\r\naaaaaaaaaa\r\n" + END, [(b"POST", b"/c", b"a" * 10)]),
    (44, "zeros at the end", CHUNKED + b"1\r\na\r\n000\r\n\r\n", [(b"POST", b"/c", b"a")]),
    (45, "extension", CHUNKED + b'1;a=b;c="d"\r\na\r\n' + END, [(b"POST", b"/c", b"a")]),
    (45, "16 KB", CHUNKED + (b"1;" + b"a" * 1023 + b"\r\na\r\n") * 16 + END, [(b"POST", b"/c", b"a" * 16)]),
    (48, "body of line ends", CHUNKED + b"8\r\n\r\n\r\n\r\n\r\n\r\n" + END, [(b"POST", b"/c", b"\r\n" * 4)]),
    (48, "body that looks like an end", CHUNKED + b"5\r\n" + END + b"\r\n" + END, [(b"POST", b"/c", END)]),
    (49, "one-byte chunks", CHUNKED + b"1\r\na\r\n" * 50_000 + END, [(b"POST", b"/c", b"a" * 50_000)]),
    (50, "routing and credentials", CHUNKED + b"1\r\na\r\n0\r\nHost: other\r\nAuthorization: x\r\nCookie: y\r\n\r\n",
     [(b"POST", b"/c", b"a")]),
    (50, "CL", CHUNKED + b"1\r\na\r\n0\r\nContent-Length: 35\r\n\r\n", [(b"POST", b"/c", b"a")]),
    (50, "TE", CHUNKED + b"1\r\na\r\n0\r\nTransfer-Encoding: chunked\r\n\r\n", [(b"POST", b"/c", b"a")]),
    (50, "identity", CHUNKED + b"0\r\nX-Forwarded-Client-Cert: a\r\nx_forwarded_for: b\r\n\r\n",
     [(b"POST", b"/c", b"")]),
    (55, "h2c", get(b"/u", b"Connection: Upgrade, HTTP2-Settings", b"Upgrade: h2c", b"HTTP2-Settings: AAMAAABkAAQ"),
     [(b"GET", b"/u", b"")]),
    (55, "h2c with a body", post(b"Connection: Upgrade", b"Upgrade: h2c", b"Content-Length: 35", body=HIDDEN),
     [(b"POST", b"/p", HIDDEN)]),
    (55, "h2c with chunks", post(b"Connection: Upgrade", b"Upgrade: h2c", b"Transfer-Encoding: chunked",
                                 body=b"23\r\n" + HIDDEN + b"\r\n" + END), [(b"POST", b"/p", HIDDEN)]),
    (55, "Upgrade without Connection", get(b"/u", b"Upgrade: websocket"), [(b"GET", b"/u", b"")]),
    (55, "TLS", get(b"/u", b"Connection: Upgrade", b"Upgrade: TLS/1.0"), [(b"GET", b"/u", b"")]),
    (57, "nominated", get(b"/", b"Connection: x-private, host, content-length", b"X-Private: 1"),
     [(b"GET", b"/", b"")]),
    (59, "Max-Forwards", b"OPTIONS /o HTTP/1.1\r\nHost: api\r\nMax-Forwards: 5\r\n\r\n", [(b"OPTIONS", b"/o", b"")]),
    ("path", "dot segments", get(b"/a/./b/../%63%2F%2e%2E/d"), [(b"GET", b"/a/c%2F../d", b"")]),
    ("path", "backslash", get(b"/a\\b"), [(b"GET", b"/a/b", b"")]),
    ("path", "question in the query", get(b"/a?b?c=/../%2e"), [(b"GET", b"/a?b?c=/../%2e", b"")]),
    ("pipeline", "three", get(b"/1") + get(b"/2") + get(b"/3"), [(b"GET", b"/%d" % n, b"") for n in (1, 2, 3)]),
    ("pipeline", "bodies between", _cl(b"35", HIDDEN) + CHUNKED + b"1\r\na\r\n" + END + get(b"/3"),
     [(b"POST", b"/p", HIDDEN), (b"POST", b"/c", b"a"), (b"GET", b"/3", b"")]),
]  # fmt: skip


def _answer(*lines, body=b""):
    return b"\r\n".join((*lines, b"", body))


FORGED = b"HTTP/1.1 200 OK\r\nContent-Length: 6\r\n\r\nforged"
_OK = b"HTTP/1.1 200 OK"
_CHUNKS = _answer(_OK, b"Transfer-Encoding: chunked")

# What the application answers, and what the caller gets: 502; or "cut", when the head had gone out before the fault; or
# (status, body). `HEAD` in a name is how it is asked.
RESPONSES = [
    (60, "LF splits a field", _answer(_OK, b"A: b\nC: d", b"Content-Length: 0"), 502),
    (60, "CR in a field", _answer(_OK, b"A: b\rC: d", b"Content-Length: 0"), 502),
    (60, "NUL", _answer(_OK, b"A: b\0", b"Content-Length: 0"), 502),
    (60, "control", _answer(_OK, b"A: \x01", b"Content-Length: 0"), 502),
    (60, "folded", _answer(_OK, b"A: b", b" c", b"Content-Length: 0"), 502),
    (60, "no token", _answer(_OK, b"A(: b", b"Content-Length: 0"), 502),
    (60, "bare LF", b"HTTP/1.1 200 OK\nContent-Length: 0\n\n", 502),
    (13, "space before a colon", _answer(_OK, b"A : b", b"Content-Length : 2", body=b"ok"), (200, b"ok")),
    (61, "HEAD with a body", _answer(_OK, b"Content-Length: %d" % len(FORGED), body=FORGED), (200, b"")),
    (61, "HEAD with chunks", _CHUNKS + b"2\r\nok\r\n" + END, (200, b"")),
    (61, "204 with a body", b"HTTP/1.1 204 No Content\r\n\r\n" + FORGED, (204, b"")),
    (61, "204 with CL", b"HTTP/1.1 204 No Content\r\nContent-Length: %d\r\n\r\n" % len(FORGED) + FORGED, (204, b"")),
    (61, "304 with a body", b"HTTP/1.1 304 Not Modified\r\n\r\n" + FORGED, (304, b"")),
    (61, "103 with CL", b"HTTP/1.1 103 E\r\nContent-Length: 6\r\n\r\n" + FORGED, (200, b"forged")),
    (61, "more than CL", _answer(_OK, b"Content-Length: 2", body=b"ok" + FORGED), (200, b"ok")),
    (61, "behind chunks", _CHUNKS + b"2\r\nok\r\n" + END + FORGED, (200, b"ok")),
    (62, "CL and TE", _answer(_OK, b"Content-Length: 2", b"Transfer-Encoding: chunked", body=END), 502),
    (62, "TE and CL", _answer(_OK, b"Transfer-Encoding: chunked", b"Content-Length: 2", body=END), 502),
    (62, "two CL", _answer(_OK, b"Content-Length: 2", b"Content-Length: 3", body=b"abc"), 502),
    (62, "two equal CL", _answer(_OK, b"Content-Length: 2", b"Content-Length: 2", body=b"ab"), 502),
    (62, "CL list", _answer(_OK, b"Content-Length: 2, 2", body=b"ab"), 502),
    (62, "CL -1", _answer(_OK, b"Content-Length: -1", body=b"ab"), 502),
    (62, "content_length", _answer(_OK, b"content_length: 9", b"Content-Length: 2", body=b"ab"), 502),
    (62, "TE gzip", _answer(_OK, b"Transfer-Encoding: gzip", body=b"ab"), 502),
    (62, "TE twice", _answer(_OK, b"Transfer-Encoding: chunked", b"Transfer-Encoding: chunked", body=END), 502),
    (62, "bad chunk", _CHUNKS + b"2\r\nok\r\nx\r\n", "cut"),
    (62, "chunk too short", _CHUNKS + b"5\r\nok\r\n" + END, "cut"),
    (62, "bad trailer", _CHUNKS + b"2\r\nok\r\n0\r\na b: c\r\n\r\n", "cut"),
    (64, "101 unasked", b"HTTP/1.1 101 Switching\r\nConnection: upgrade\r\nUpgrade: websocket\r\n\r\nabc", 502),
    (64, "099", _answer(b"HTTP/1.1 099 Low", b"Content-Length: 0"), 502),
    (64, "2000", _answer(b"HTTP/1.1 2000 High", b"Content-Length: 0"), 502),
    (64, "600", _answer(b"HTTP/1.1 600 High", b"Content-Length: 0"), 502),
    (64, "no status", _answer(b"HTTP/1.1 OK", b"Content-Length: 0"), 502),
    (64, "HTTP/2.0", _answer(b"HTTP/2.0 200 OK", b"Content-Length: 0"), 502),
    (64, "lower case", _answer(b"http/1.1 200 OK", b"Content-Length: 0"), 502),
    (64, "another protocol", b"SSH-2.0-OpenSSH_9.6\r\n", 502),
    (64, "1000 x 103", b"HTTP/1.1 103 Early\r\n\r\n" * 1000 + _answer(_OK, b"Content-Length: 0"), 502),
    (64, "70 KB", _answer(_OK, b"A: " + b"a" * 70_000, b"Content-Length: 0"), 502),
    (64, "101 headers", _answer(_OK, *[b"A: b"] * 101, b"Content-Length: 0"), 502),
]  # fmt: skip
