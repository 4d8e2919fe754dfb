"""Listens for the API: TCP addresses, TLS where a context is given, unix sockets; one task per connection.

server = HttpServer(routes, (TcpListen("ports.http", "127.0.0.1", 8500),), HttpSettings(), runtime)
await server.listen()          # ConfigError when an address cannot be had
nursery.start_soon(server.run)
...
await server.drain(5.0)        # before the nursery is cancelled: answers in progress are finished
"""

import errno
import logging
import resource
import socket
import ssl
import stat
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from ipaddress import IPv6Address, ip_address
from pathlib import Path

import trio

from agent.http.connection import HttpConnection, HttpSettings, Stream
from agent.http.deadlines import Deadlines
from agent.http.plain_stream import PlainStream
from agent.http.request import Route
from agent.http.router import Router
from agent.repeats import RepeatedLog
from agent.runtime import Runtime
from agent.telemetry import Metrics
from mesh.errors import ConfigError

log = logging.getLogger("mesh.http")

BACKLOG = 1024  # connections the kernel keeps for us; a burst of clients larger than this retries
ACCEPT_PAUSE_S = 0.1  # after an accept failed for want of descriptors or memory
REFUSAL_S = 1.0  # for a client over its limit to take the 429
_EXHAUSTED = frozenset((errno.EMFILE, errno.ENFILE, errno.ENOMEM, errno.ENOBUFS))
_TOO_MANY = (
    b"HTTP/1.1 429 Too Many Requests\r\nContent-Type: text/plain; charset=utf-8\r\nContent-Length: 47\r\n"
    b"Connection: close\r\n\r\nYour IP is issuing too many concurrent connects"
)


@dataclass(frozen=True)
class TcpListen:
    """A TCP address to serve. `key` is the configuration key that errors name; port 0 takes any free one."""

    key: str
    host: str  # an IP address
    port: int
    tls: ssl.SSLContext | None = None


@dataclass(frozen=True)
class UnixListen:
    """A unix socket to serve; `mode` are its permissions. A stale socket file of a dead process is replaced."""

    key: str
    path: Path
    mode: int = 0o600


class HttpServer:
    """The API's listeners and connections. `listen`, then `run` until cancelled."""

    def __init__(
        self,
        routes: Sequence[Route],
        listens: Sequence[TcpListen | UnixListen],
        settings: HttpSettings,
        runtime: Runtime,
        *,
        metrics: Metrics | None = None,
    ) -> None:
        """`metrics`: where requests are timed and refusals counted (`consul.api.http`, `consul.http.*`)."""
        self._metrics = metrics
        self._repeats = RepeatedLog(log)
        if metrics is not None:
            metrics.gauge("consul.http.connections", lambda: self.connection_count)
        self._router = Router(routes)
        self._listens = tuple(listens)
        self._settings = settings
        self._limits = settings.limits
        self._runtime = runtime
        self._connections_max = settings.limits.connections_max or _connections_max()
        self._listeners: list[tuple[TcpListen | UnixListen, trio.SocketListener]] = []
        self._accepting = trio.CancelScope()
        self._deadlines = Deadlines()
        self._connections: set[HttpConnection] = set()
        self._open = 0  # sockets, those being refused included
        self._per_client: Counter[str] = Counter()
        self._emptied = trio.Event()
        self._warned_exhausted = False

    @property
    def addresses(self) -> tuple[tuple[str, int], ...]:
        """Host and port of each TCP listener, in the order given, with the port that was really taken."""
        return tuple(
            listener.socket.getsockname()[:2] for listen, listener in self._listeners if isinstance(listen, TcpListen)
        )

    @property
    def connection_count(self) -> int:
        """Connections being served."""
        return len(self._connections)

    async def listen(self) -> None:
        """Takes every address. Raises ConfigError naming the key and the address of one that cannot be had."""
        try:
            for listen in self._listens:
                if isinstance(listen, TcpListen):
                    self._listeners.append((listen, await _listen_tcp(listen)))
                else:
                    self._listeners.append((listen, await _listen_unix(listen)))
        except BaseException:
            self._close_listeners()
            raise

    async def run(self) -> None:
        """Serves until cancelled or drained; closes every listener and connection on the way out."""
        try:
            async with trio.open_nursery() as watchers:
                watchers.start_soon(self._deadlines.run)
                async with trio.open_nursery() as nursery:
                    with self._accepting:
                        async with trio.open_nursery() as acceptors:
                            for listen, listener in self._listeners:
                                acceptors.start_soon(self._accept, listen, listener, nursery)
                watchers.cancel_scope.cancel()
        finally:
            self._close_listeners()

    async def drain(self, timeout_s: float) -> None:
        """Stops accepting, ends idle and waiting connections, and gives the others up to `timeout_s` to be answered."""
        self._accepting.cancel()
        for connection in tuple(self._connections):
            connection.drain()
        with trio.move_on_after(timeout_s):
            while self._connections:
                self._emptied = trio.Event()
                await self._emptied.wait()

    def _close_listeners(self) -> None:
        for listen, listener in self._listeners:
            listener.socket.close()
            if isinstance(listen, UnixListen):
                listen.path.unlink(missing_ok=True)
        self._listeners = []

    async def _accept(
        self, listen: TcpListen | UnixListen, listener: trio.SocketListener, nursery: trio.Nursery
    ) -> None:
        while True:
            try:
                stream = await listener.accept()
            except OSError as error:
                if error.errno not in _EXHAUSTED:
                    raise
                if not self._warned_exhausted:
                    self._warned_exhausted = True
                    text = "cannot accept connections: %s; raise the limit of open files (ulimit -n)"
                    log.warning(text, error.strerror)
                await trio.sleep(ACCEPT_PAUSE_S)
                continue
            if self._open >= self._connections_max:
                text = "connection refused: %d are open, the most this agent takes"
                self._repeats.warning("full", text, self._open)
                self._count_refused()
                stream.socket.close()
                continue
            self._open += 1
            nursery.start_soon(self._serve, listen, stream)

    async def _serve(self, listen: TcpListen | UnixListen, tcp: trio.SocketStream) -> None:
        """One connection, from accept to close. Nothing that it raises gets past here."""
        client, over_loopback, tls = "", False, None
        plain: PlainStream | None = None
        try:
            if isinstance(listen, TcpListen):
                client, over_loopback = _ends(tcp)
                tls = listen.tls
            self._per_client[client] += 1
            if client and 0 < self._limits.connections_per_client < self._per_client[client]:
                await self._refuse(tcp, client, encrypted=tls is not None)
                return
            stream: Stream
            if tls is None:
                stream = plain = PlainStream(tcp)
            else:
                stream = await self._handshake(tcp, tls)
            connection = HttpConnection(
                stream,
                self._router,
                self._settings,
                self._runtime,
                self._deadlines,
                client_address=client,
                over_loopback=over_loopback,
                metrics=self._metrics,
                repeats=self._repeats,
            )
            self._connections.add(connection)
            if self._accepting.cancel_called:
                connection.drain()  # it was shaking hands when everyone else was told
            try:
                await connection.run()
            finally:
                self._connections.discard(connection)
        except (trio.BrokenResourceError, trio.ClosedResourceError, trio.TooSlowError, OSError) as error:
            reason = error or type(error).__name__
            self._repeats.log("lost", logging.INFO, "%s: connection lost: %s", client or "client", reason)
        except Exception:
            log.exception("%s: the connection was closed by an internal error", client or "client")
        finally:
            tcp.socket.close()
            if plain is not None:
                plain.close()
            self._open -= 1
            self._per_client[client] -= 1
            if self._per_client[client] <= 0:
                del self._per_client[client]
            if not self._connections:
                self._emptied.set()

    def _count_refused(self) -> None:
        if self._metrics is not None:
            self._metrics.count("consul.http.refused")

    async def _refuse(self, tcp: trio.SocketStream, client: str, *, encrypted: bool) -> None:
        self._count_refused()
        open_here = self._per_client[client] - 1
        self._repeats.warning("refused", "%s: connection refused: it has %d open", client, open_here)
        if not encrypted:
            with trio.move_on_after(REFUSAL_S):
                await tcp.send_all(_TOO_MANY)
                await tcp.send_eof()
                while await tcp.receive_some(4096):
                    pass

    async def _handshake(self, tcp: trio.SocketStream, context: ssl.SSLContext) -> Stream:
        stream = trio.SSLStream(tcp, context, server_side=True, https_compatible=True)
        with trio.fail_after(self._limits.handshake_s):
            await stream.do_handshake()
        return stream


def _connections_max() -> int:
    """Half of the descriptors this process may open: the rest is for gossip, RPC, checks and the state on disk."""
    soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    return 65536 if soft == resource.RLIM_INFINITY else max(16, soft // 2)


def _ends(stream: trio.SocketStream) -> tuple[str, bool]:
    """The client's IP address, and whether it came over loopback. Raises OSError when the client is already gone."""
    address = ip_address(stream.socket.getpeername()[0].partition("%")[0])
    if isinstance(address, IPv6Address) and address.ipv4_mapped is not None:
        address = address.ipv4_mapped
    return str(address), address.is_loopback


async def _listen_tcp(listen: TcpListen) -> trio.SocketListener:
    try:
        family = socket.AF_INET6 if ip_address(listen.host).version == 6 else socket.AF_INET
    except ValueError as error:
        raise ConfigError(f"{listen.key}: {listen.host!r} is not an IP address") from error
    sock = trio.socket.socket(family, socket.SOCK_STREAM)
    try:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        if family == socket.AF_INET6:
            # As in Go, the unspecified address takes IPv4 too; any other is what it says.
            sock.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, int(listen.host != "::"))
        await sock.bind((listen.host, listen.port))
        sock.listen(BACKLOG)
    except (OSError, OverflowError) as error:
        sock.close()
        shown = f"[{listen.host}]" if family == socket.AF_INET6 else listen.host
        hint = "; another process has it" if isinstance(error, OSError) and error.errno == errno.EADDRINUSE else ""
        text = error.strerror if isinstance(error, OSError) else str(error)
        raise ConfigError(f"{listen.key}: cannot listen on {shown}:{listen.port}: {text}{hint}") from error
    return trio.SocketListener(sock)


async def _listen_unix(listen: UnixListen) -> trio.SocketListener:
    sock = trio.socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        await _remove_stale(listen)
        await sock.bind(str(listen.path))
        listen.path.chmod(listen.mode)
        sock.listen(BACKLOG)
    except (OSError, ConfigError) as error:
        sock.close()
        if isinstance(error, ConfigError):
            raise
        raise ConfigError(f"{listen.key}: cannot listen on {listen.path}: {error.strerror or error}") from error
    return trio.SocketListener(sock)


async def _remove_stale(listen: UnixListen) -> None:
    """Removes a socket file that nobody serves. Raises ConfigError when somebody does, or it is no socket."""
    try:
        mode = listen.path.lstat().st_mode
    except FileNotFoundError:
        return
    if not stat.S_ISSOCK(mode):
        raise ConfigError(f"{listen.key}: {listen.path} exists and is not a socket")
    probe = trio.socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        with trio.move_on_after(1.0):
            await probe.connect(str(listen.path))
            raise ConfigError(f"{listen.key}: cannot listen on {listen.path}: another process has it")
    except ConnectionRefusedError:
        listen.path.unlink(missing_ok=True)
    finally:
        probe.close()
