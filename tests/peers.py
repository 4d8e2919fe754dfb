"""Clients and applications that tests play themselves, on blocking sockets and threads."""

import contextlib
import random
import socket
import ssl
import struct
import threading
import time
from collections import Counter

TIMEOUT_S = 10


class Peer:
    """A blocking socket with the few reads that tests need."""

    def __init__(self, sock):
        self.sock = sock
        self.buffer = b""
        sock.settimeout(TIMEOUT_S)
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)

    def send(self, data):
        self.sock.sendall(data)

    def _fill(self):
        data = self.sock.recv(65536)
        self.buffer += data
        return bool(data)

    def read(self, count):
        while len(self.buffer) < count:
            assert self._fill(), f"ended after {self.buffer[-200:]!r}"
        data, self.buffer = self.buffer[:count], self.buffer[count:]
        return data

    def read_until(self, mark):
        while mark not in self.buffer:
            assert self._fill(), f"ended after {self.buffer[-200:]!r}"
        position = self.buffer.index(mark) + len(mark)
        data, self.buffer = self.buffer[:position], self.buffer[position:]
        return data

    def read_head(self):
        return self.read_until(b"\r\n\r\n")

    def read_message(self):
        """(head, body) by Content-Length or chunks; none of both: no body."""
        head = self.read_head()
        lower = head.lower()
        if b"transfer-encoding: chunked" in lower:
            body = b""
            while True:
                size = int(self.read_until(b"\r\n"), 16)
                body += self.read(size)
                assert self.read(2) == b"\r\n"
                if not size:
                    return head, body
        if b"content-length: " in lower:
            return head, self.read(int(lower.split(b"content-length: ")[1].split(b"\r\n")[0]))
        return head, b""

    def at_end(self):
        """Whether the stream ends here: closed, or reset."""
        try:
            return not self.buffer and not self._fill()
        except (ConnectionResetError, ssl.SSLError):
            return True

    def was_reset(self):
        try:
            while self._fill():
                pass
        except ConnectionResetError:
            return True
        return False

    def reset(self):
        self.sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.sock.close()

    def end(self):
        self.sock.shutdown(socket.SHUT_WR)

    def close(self):
        self.sock.close()


class Application:
    """A program that serves one port: HTTP with keep-alive (`kind` "http"), or an echo of bytes ("tcp")."""

    def __init__(self, address, port, *, name="app", kind="http"):
        self._address = (address, port)
        self._name = name.encode()
        self._serve_one = self._answer if kind == "http" else self._echo
        self._connections = set()
        self._listener = None
        self.start()

    def start(self):
        self._listener = socket.create_server(self._address, backlog=512)
        threading.Thread(target=self._accept, args=(self._listener,), daemon=True).start()

    def stop(self):
        """As if the program had been killed: nobody listens, every connection is gone."""
        # shutdown, for a thread that waits in accept keeps a closed socket listening.
        self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()
        for connection in tuple(self._connections):
            with contextlib.suppress(OSError):
                connection.shutdown(socket.SHUT_RDWR)

    def _accept(self, listener):
        with contextlib.suppress(OSError):
            while True:
                connection, _address = listener.accept()
                self._connections.add(connection)
                threading.Thread(target=self._serve, args=(connection,), daemon=True).start()

    def _serve(self, connection):
        with contextlib.suppress(OSError, AssertionError):
            connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            self._serve_one(connection)
        self._connections.discard(connection)
        connection.close()

    def _answer(self, connection):
        peer = Peer(connection)
        connection.settimeout(None)
        answer = b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n%b" % (len(self._name), self._name)
        while True:
            peer.read_message()
            peer.send(answer)

    def _echo(self, connection):
        while data := connection.recv(65536):
            connection.sendall(data)
        connection.shutdown(socket.SHUT_WR)


def get(address, port, *, path="/", peer=None):
    """(status, body) of a GET, over a connection of its own unless one is given."""
    own = peer or Peer(socket.create_connection((address, port), TIMEOUT_S))
    try:
        own.send(b"GET %b HTTP/1.1\r\nHost: test\r\n\r\n" % path.encode())
        head, body = own.read_message()
        return int(head[9:12]), body
    finally:
        if peer is None:
            own.close()


class Load:
    """A steady stream of GETs over kept-alive connections, a new one now and then; what they met is kept."""

    def __init__(self, address, port, *, requests_per_s=300, connections=8):
        self._address = (address, port)
        self._interval_s = connections / requests_per_s
        self._ended = threading.Event()
        self._threads = [
            threading.Thread(target=self._run, args=(random.Random(number),), daemon=True)
            for number in range(connections)
        ]
        self.answers = Counter()
        self.failures = []
        self.slowest_s = 0.0

    def _run(self, rng):
        peer = None
        due = time.monotonic() + rng.random() * self._interval_s
        while not self._ended.is_set():
            time.sleep(max(0.0, due - time.monotonic()))
            due = max(due + self._interval_s, time.monotonic() - 1.0)
            started = time.monotonic()
            try:
                if peer is None:
                    peer = Peer(socket.create_connection(self._address, TIMEOUT_S))
                status, body = get(*self._address, peer=peer)
            except (OSError, AssertionError) as error:
                status, body = 0, repr(error).encode()
                if peer is not None:
                    peer.close()
                peer = None
            if status == 200:
                self.answers[body.decode()] += 1
            else:
                self.failures.append((round(started, 3), status, body))
            self.slowest_s = max(self.slowest_s, time.monotonic() - started)
            if peer is not None and rng.random() < 0.02:
                peer.close()
                peer = None
        if peer is not None:
            peer.close()

    def __enter__(self):
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *_exception):
        self._ended.set()
        for thread in self._threads:
            thread.join(TIMEOUT_S + 5)

    @property
    def count(self):
        return self.answers.total() + len(self.failures)

    def wait(self, count):
        """Until so many more requests are answered."""
        target = self.answers.total() + count
        deadline = time.monotonic() + TIMEOUT_S
        while self.answers.total() < target:
            assert time.monotonic() < deadline, self.failures[-5:]
            time.sleep(0.01)
