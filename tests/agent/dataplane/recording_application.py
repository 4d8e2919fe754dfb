"""An application that accepts only what needs no interpretation, and remembers every request it was sent."""

import contextlib
import re
import threading

from peers import Peer

_REQUEST_LINE = re.compile(rb"([A-Z-]+) ((?:/[!-~]*|\*)) HTTP/1\.1")
_FIELD = re.compile(rb"([a-z0-9!#$%&'*+.^_`|~-]+): ([\x20-\x7e\t\x80-\xff]*)")


class Request:
    """One request as it was parsed. `headers` in the order received."""

    def __init__(self, method, target, headers):
        self.method = method
        self.target = target
        self.headers = headers
        self.body = b""
        self.trailers = []

    @property
    def seen(self):
        return self.method, self.target, self.body

    def header(self, name):
        return dict(self.headers).get(name)


class RecordingApplication:
    """Answers each request with its own method and target, so that an answer tells whose it is; a target in `answers`
    (path: bytes, close afterwards) is answered with those bytes instead.
    """

    def __init__(self, listener):
        self.requests = []
        self.faults = []  # bytes that a strict reader does not take: there must never be any
        self.answers = {}
        self._listener = listener
        threading.Thread(target=self._accept, daemon=True).start()

    def clear(self):
        self.requests.clear()
        self.faults.clear()

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
            while self._serve_one(peer):
                pass
        peer.close()

    def _serve_one(self, peer):
        head = peer.read_head()
        try:
            request = _parse(head)
            if request.header(b"expect") and request.target != b"/silent":
                peer.send(b"HTTP/1.1 100 Continue\r\n\r\n")
            _read_body(peer, request)
        except ValueError as error:
            self.faults.append((str(error), head))
            return False
        self.requests.append(request)
        answer, close = self.answers.get(request.target, (None, False))
        if answer is None:
            seen = b"%b %b" % (request.method, request.target)
            length = b"Content-Length: %d\r\n" % len(seen)
            answer = b"HTTP/1.1 200 OK\r\n" + length + b"\r\n" + (b"" if request.method == b"HEAD" else seen)
        peer.send(answer)
        return not close


def _parse(head):
    start, *lines = head.removesuffix(b"\r\n\r\n").split(b"\r\n")
    request_line = _REQUEST_LINE.fullmatch(start)
    if request_line is None:
        raise ValueError("request line")
    headers = [_field(line) for line in lines]
    names = [name for name, _ in headers]
    if names.count(b"host") != 1 or names.count(b"content-length") + names.count(b"transfer-encoding") > 1:
        raise ValueError("host or framing")
    return Request(*request_line.groups(), headers)


def _field(line):
    field = _FIELD.fullmatch(line)
    if field is None:
        raise ValueError(f"field {line!r}")
    return field.groups()


def _read_body(peer, request):
    coding = request.header(b"transfer-encoding")
    if coding is not None:
        if coding != b"chunked":
            raise ValueError("transfer-encoding")
        _read_chunks(peer, request)
        return
    length = request.header(b"content-length") or b"0"
    if re.fullmatch(rb"0|[1-9][0-9]{0,18}", length) is None:
        raise ValueError("content-length")
    request.body = peer.read(int(length))


def _read_chunks(peer, request):
    pieces = []
    while True:
        line = peer.read_until(b"\r\n")
        if re.fullmatch(rb"[1-9a-f][0-9a-f]{0,7}\r\n|0\r\n", line) is None:
            raise ValueError(f"chunk {line!r}")
        if line == b"0\r\n":
            break
        pieces.append(peer.read(int(line, 16)))
        if peer.read(2) != b"\r\n":
            raise ValueError("chunk end")
    request.body = b"".join(pieces)
    while (line := peer.read_until(b"\r\n")) != b"\r\n":
        request.trailers.append(_field(line.removesuffix(b"\r\n")))
