"""A connection that we open: connect, shake hands, verify the server, and only then use it."""

import socket
from typing import TYPE_CHECKING

from agent.dataplane.connection import Connection
from agent.dataplane.reactor import Reactor
from mesh.errors import InvalidIdentity

if TYPE_CHECKING:
    from agent.dataplane.endpoint import Endpoint


CONNECT_TIMED_OUT = "connection timeout"


def dial_socket(ip_address: str, keepalive_s: float = 0.0) -> socket.socket:
    """A non-blocking TCP socket of the address's family, without delay; `keepalive_s`: probed after so much silence.

    Raises OSError when there are no more.
    """
    family = socket.AF_INET6 if ":" in ip_address else socket.AF_INET
    sock = socket.socket(family, socket.SOCK_STREAM)
    sock.settimeout(0)
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    if keepalive_s:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPIDLE, max(1, round(keepalive_s)))
    return sock


class Dialed(Connection):
    """A connection that we opened to an endpoint. Subclasses say what happens on `ready_to_use` and `failed`."""

    __slots__ = ("endpoint", "established", "transport")

    def __init__(self, reactor: Reactor, sock: socket.socket, endpoint: "Endpoint") -> None:
        super().__init__(reactor, sock)
        self.endpoint = endpoint
        self.transport = endpoint.target.transport
        self.established = False

    def begin(self) -> None:
        """Connects, shakes hands, verifies; then `ready_to_use`, or `failed`, never before this returns."""
        self.set_deadline(self.reactor.now + self.endpoint.target.connect_timeout_s)
        self.connect((self.endpoint.ip_address(), self.endpoint.port))

    def connected(self) -> None:
        """Connection callback."""
        context = self.transport.context
        if context is None:
            self._establish()
        else:
            self.start_tls(context, server_side=False, server_name=self.transport.server_name)

    def opened(self) -> None:
        """Connection callback: nothing the peer sent has been used yet."""
        assert self.tls is not None
        try:
            self.transport.verify(self.tls)
        except InvalidIdentity as error:
            self.endpoint.target.metrics.identity_failures += 1
            self._lose(f"the server's identity was refused: {error}")
            return
        self._establish()

    def _establish(self) -> None:
        self.established = True
        self.endpoint.connect_succeeded()
        self.deadline = float("inf")
        self.ready_to_use()

    def deadline_passed(self) -> None:
        """Connection callback: only connecting has a deadline here."""
        self._lose(CONNECT_TIMED_OUT)

    def lost(self, reason: str) -> None:
        """Connection callback."""
        if self.established:
            self.broken(reason)
        else:
            self.endpoint.connect_failed(reason)
            self.failed(reason)

    def ready_to_use(self) -> None:
        """Connected and verified."""

    def failed(self, reason: str) -> None:
        """It could not be connected or verified."""

    def broken(self, reason: str) -> None:
        """It was in use, or idle, and is gone."""
