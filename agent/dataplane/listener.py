"""A listening socket: accepts in bounded batches, and survives running out of descriptors."""

import contextlib
import errno
import logging
import os
import socket
from typing import Protocol

from agent.dataplane.metrics import ListenerMetrics
from agent.dataplane.reactor import READABLE, Reactor
from agent.dataplane.sockets import BACKLOG, listen
from mesh.proxy.resources import ListenerKey

_LOG = logging.getLogger("mesh.dataplane")

ACCEPTS_MAX = 32  # per turn: a flood of connections may not starve the ones that are open
EXHAUSTED_PAUSE_S = 0.1

_EXHAUSTED = (errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM)


class Acceptor(Protocol):
    """Whom a listener hands its connections to."""

    metrics: ListenerMetrics
    connections_max: int

    def accept(self, sock: socket.socket, peer: str) -> None:
        """Takes over a non-blocking connection."""


class ReservedDescriptor:
    """One descriptor kept free, so that a connection can be accepted and closed when there are none left."""

    def __init__(self) -> None:
        self._descriptor = -1
        self.take()

    def take(self) -> None:
        """Occupies it, if it is not."""
        if self._descriptor < 0:
            try:
                self._descriptor = os.open(os.devnull, os.O_RDONLY | os.O_CLOEXEC)
            except OSError:
                self._descriptor = -1  # still none left; tried again at the next chance

    def free(self) -> None:
        """Makes it available for a moment."""
        if self._descriptor >= 0:
            os.close(self._descriptor)
            self._descriptor = -1


class Listener:
    """One bound address. Its acceptor can be replaced while connections stay open."""

    def __init__(
        self, reactor: Reactor, key: ListenerKey, reserved: ReservedDescriptor, sock: socket.socket | None = None
    ) -> None:
        """Takes over a listening socket, or binds one. Raises ConfigError naming the address when it cannot."""
        self.key = key
        self._reactor = reactor
        self._reserved = reserved
        self._acceptor: Acceptor | None = None
        self._exhausted_logged = False
        self._suspended = False
        self._sock = sock or listen(key)
        self._descriptor = self._sock.fileno()

    @property
    def sock(self) -> socket.socket:
        """The listening socket, for a successor."""
        return self._sock

    def serve(self, acceptor: Acceptor) -> None:
        """Hands connections to an acceptor from now on."""
        begun = self._acceptor is not None
        self._acceptor = acceptor
        if not begun:
            self._reactor.register(self._descriptor, self, READABLE)

    def ready(self, mask: int) -> None:
        """Reactor callback."""
        self._accept_some()

    def _accept_some(self) -> bool:
        """Whether there may be more to accept."""
        acceptor = self._acceptor
        assert acceptor is not None
        for _ in range(ACCEPTS_MAX):
            try:
                sock, address = self._sock.accept()
            except BlockingIOError:
                return False
            except ConnectionError:
                continue  # it was gone before we came
            except OSError as error:
                if error.errno not in _EXHAUSTED:
                    raise
                self._shed(acceptor, error)
                return False
            self._take(acceptor, sock, address)
        return True

    def _take(self, acceptor: Acceptor, sock: socket.socket, address: tuple[str, int]) -> None:
        acceptor.metrics.connections += 1
        if acceptor.metrics.active >= acceptor.connections_max:
            acceptor.metrics.overflow += 1
            text = "port %d: connection from %s refused: %d are open, its limit"
            self._reactor.repeats.warning("overflow", text, self.key.port, address[0], acceptor.connections_max)
            sock.close()
            return
        try:
            sock.settimeout(0)
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        except OSError:
            sock.close()
            return
        acceptor.metrics.active += 1
        acceptor.accept(sock, address[0])

    def _shed(self, acceptor: Acceptor, error: OSError) -> None:
        """No descriptor left: refuse the connection that waits rather than leave it hanging, then pause."""
        acceptor.metrics.accept_failures += 1
        if not self._exhausted_logged:
            self._exhausted_logged = True
            _LOG.error(
                "port %d cannot accept: %s; raise the limit of open files (LimitNOFILE)", self.key.port, error.strerror
            )
        self._reserved.free()
        try:
            sock, _address = self._sock.accept()
            sock.close()
        except OSError:
            pass  # it left, or another process took the descriptor
        finally:
            self._reserved.take()
        self._suspended = True
        self._reactor.suspend(self._descriptor)
        self._reactor.call_at(self._reactor.now + EXHAUSTED_PAUSE_S, self._go_on)

    def _go_on(self) -> None:
        if self._acceptor is not None:
            self._reserved.take()
            self._suspended = False
            self._reactor.resume(self._descriptor, READABLE)

    def fault(self, error: Exception) -> None:
        """Reactor callback: an accept failed in a way of its own; the listener stays."""

    def close(self) -> None:
        """Accepts what waits already, then nothing more; open connections stay."""
        if self._acceptor is not None:
            with contextlib.suppress(OSError):
                for _ in range(0, BACKLOG, ACCEPTS_MAX):
                    if self._suspended or not self._accept_some():
                        break
            self._acceptor = None
            self._reactor.close(self._descriptor, self._sock, suspended=self._suspended)
        else:
            self._sock.close()
