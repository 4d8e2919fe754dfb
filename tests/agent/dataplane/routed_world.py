"""One outbound listener in this process, on a clock that jumps, in front of applications that follow a script."""

import random
import socket

import trio
from sidecars import Authority, loopback_address

from agent.dataplane.reactor import Reactor
from agent.dataplane.tables import Tables
from mesh.proxy.sidecar_config import EndpointConfig, OutboundListener, TargetConfig, WorkerConfig
from mesh.traffic.route import Forward, RouteTable, Rule, VirtualHost, WeightedTarget

AUTHORITY = Authority()
CLOSE = "close the connection without an answer"
HANG = "say nothing"


def answer(status=200, body=b"ok", *headers):
    lines = [b"HTTP/1.1 %d X" % status, b"content-length: %d" % len(body), *headers]
    return b"\r\n".join(lines) + b"\r\n\r\n" + body


def get(path=b"/", *headers):
    return b"\r\n".join((b"GET %b HTTP/1.1" % path, b"host: api", *headers)) + b"\r\n\r\n"


class Backend:
    """An application: `script` has an answer for each request, in order; the last one is repeated.

    An answer is bytes, CLOSE, HANG, or (seconds, any of these).
    """

    def __init__(self, address, port, nursery, script):
        self.endpoint = EndpointConfig(f"backend-{port}", address, port)
        self.host = f"{address}:{port}"
        self.requests = []
        self.connections = 0
        self._script = list(script)
        self._nursery = nursery
        self.listener = socket.create_server((address, port))
        self.listener.setblocking(False)

    async def run(self):
        listening = trio.socket.from_stdlib_socket(self.listener)
        while True:
            sock, _ = await listening.accept()
            self.connections += 1
            self._nursery.start_soon(self._serve, trio.SocketStream(sock))

    async def _serve(self, stream):
        data = b""
        with stream.socket:
            try:
                while True:
                    while b"\r\n\r\n" not in data:
                        piece = await stream.receive_some()
                        if not piece:
                            return
                        data += piece
                    head, _, data = data.partition(b"\r\n\r\n")
                    length = 0
                    for line in head.split(b"\r\n"):
                        if line.startswith(b"content-length: "):
                            length = int(line[16:])
                    while len(data) < length:
                        piece = await stream.receive_some()
                        if not piece:
                            return
                        data += piece
                    body, data = data[:length], data[length:]
                    self.requests.append((head + b"\r\n", body))
                    if not await self._say(stream, self._script.pop(0) if len(self._script) > 1 else self._script[0]):
                        return
            except (trio.BrokenResourceError, trio.ClosedResourceError):
                return

    async def _say(self, stream, step):
        if isinstance(step, tuple):
            await trio.sleep(step[0])
            step = step[1]
        if step == HANG:
            await stream.receive_some()
            return False
        if step == CLOSE:
            return False
        await stream.send_all(step)
        return True


class RoutedWorld:
    """`backends` by name of target; a target's further fields and the rules as given."""

    def __init__(self, nursery, seed=1):
        self.address = loopback_address()
        self.reactor = Reactor()
        self.tables = Tables(self.reactor, random.Random(seed))
        self._nursery = nursery
        self._port = 8000
        self._streams = []
        self._version = 0
        self.backends = []
        nursery.start_soon(self.reactor.run)

    def backend(self, *script):
        self._port += 1
        backend = Backend(self.address, self._port, self._nursery, script or (answer(),))
        self.backends.append(backend)
        self._nursery.start_soon(backend.run)
        return backend

    def dead_endpoint(self):
        self._port += 1
        return EndpointConfig(f"dead-{self._port}", self.address, self._port)

    def target(self, name, *backends, **fields):
        endpoints = tuple(getattr(backend, "endpoint", backend) for backend in backends)
        return TargetConfig(name, (), endpoints, plain=True, **fields)

    def apply(self, *targets, rules=(), protocol="http", **listener):
        """The first target is the listener's own."""
        table = RouteTable((VirtualHost(tuple(rules)),)) if rules else RouteTable()
        self._version += 1
        outbound = OutboundListener(
            self.address, 9191, targets[0], protocol, routes=table, targets=targets[1:], **listener
        )
        self.tables.apply(WorkerConfig(self._version, (AUTHORITY.sidecar("web", outbound=[outbound]),)))

    def service(self):
        (service,) = self.tables._services.values()
        return service

    async def connect(self):
        self._streams.append(await trio.open_tcp_stream(self.address, 9191))
        return self._streams[-1]

    async def ask(self, request=None, stream=None):
        """(status, head, body) of one answer; the connection stays open when it was given."""
        stream = stream or await self.connect()
        await stream.send_all(request or get())
        data = b""
        while b"\r\n\r\n" not in data:
            piece = await stream.receive_some()
            assert piece, data
            data += piece
        head, _, body = data.partition(b"\r\n\r\n")
        length = int(next(line[16:] for line in head.lower().split(b"\r\n") if line.startswith(b"content-length: ")))
        while len(body) < length:
            body += await stream.receive_some()
        return int(head[9:12]), head + b"\r\n", body

    def counter(self, name):
        return sum(value for sample, _labels, value in self.tables.samples() if sample == name)

    def close(self):
        self.tables.close()
        self.reactor.turn()
        assert self.reactor.faults == 0
        for backend in self.backends:
            backend.listener.close()
        for stream in self._streams:
            stream.socket.close()


def forward(*targets, **fields):
    """A rule to these targets, with equal weights."""
    return Rule(Forward(tuple(WeightedTarget(name) for name in targets)), **fields)
