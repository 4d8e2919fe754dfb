"""TLS or not, on one port: looks at a connection's first byte and leaves it where it is."""

import socket
from collections.abc import Callable
from typing import Literal

from agent.dataplane.reactor import READABLE, Reactor

TLS_RECORD = 0x16  # the first byte of a ClientHello's record (RFC 8446 section 5.1); no HTTP method begins with it
FIRST_BYTE_TIMEOUT_S = 10.0  # as long as a handshake may take
SERVER_FIRST_S = 1.0  # where the server may speak first, silence for so long means a plain client

Outcome = Literal["tls", "plain"]


class Sniffer:
    """One connection that has not said yet what it is. Calls `decided` or `gone`, once."""

    __slots__ = ("_decided", "_descriptor", "_gone", "_reactor", "_silence", "_sock", "_timer")

    def __init__(
        self,
        reactor: Reactor,
        sock: socket.socket,
        decided: Callable[["Sniffer", socket.socket, Outcome], None],
        gone: Callable[["Sniffer"], None],
        *,
        server_first: bool,
    ) -> None:
        """`server_first`: silence means a plain client, as many TCP protocols begin with the server."""
        self._reactor = reactor
        self._sock = sock
        self._descriptor = sock.fileno()
        self._decided = decided
        self._gone = gone
        self._silence = "plain" if server_first else None
        reactor.register(self._descriptor, self, READABLE)
        timeout_s = SERVER_FIRST_S if server_first else FIRST_BYTE_TIMEOUT_S
        self._timer = reactor.call_at(reactor.now + timeout_s, self._timed_out)

    def ready(self, mask: int) -> None:
        """Reactor callback."""
        try:
            first = self._sock.recv(1, socket.MSG_PEEK)
        except BlockingIOError:
            return
        except OSError:
            first = b""
        if first:
            self._decide("tls" if first[0] == TLS_RECORD else "plain")
        else:
            self.close()  # it left without a word

    def fault(self, error: Exception) -> None:
        """Reactor callback: a handler of ours raised."""
        self.close()

    def _timed_out(self) -> None:
        if self._silence is None:
            self.close()
        else:
            self._decide("plain")

    def _decide(self, outcome: Outcome) -> None:
        self._timer.cancel()
        self._reactor.suspend(self._descriptor)  # whoever takes it over registers it anew
        self._decided(self, self._sock, outcome)

    def close(self) -> None:
        """Gives the connection up."""
        self._timer.cancel()
        self._reactor.close(self._descriptor, self._sock)
        self._gone(self)
