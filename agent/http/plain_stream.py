"""A TCP or unix connection without TLS: as `trio.SocketStream`, and it can send without the chance of a wait.

Most answers fit the kernel's buffer. Sending them at once, without a task switch, a checkpoint and a deadline for a
wait that does not happen, is what this is for.
"""

import socket

import trio


class PlainStream:
    """Owns a connected socket. Read by one task at a time, written by one task at a time."""

    def __init__(self, stream: trio.SocketStream) -> None:
        """Takes the socket over from `stream`, which is of no use afterwards."""
        old = stream.socket
        self._socket = socket.socket(old.family, old.type, old.proto, fileno=old.detach())
        self._socket.settimeout(0.0)

    async def receive_some(self, max_bytes: int) -> bytes:
        """What has come, empty at the end of the stream. Raises BrokenResourceError, ClosedResourceError."""
        while True:
            await trio.lowlevel.wait_readable(self._socket)
            try:
                return self._socket.recv(max_bytes)
            except BlockingIOError:
                continue  # woken for nothing, which the kernel may do
            except OSError as error:
                raise trio.BrokenResourceError(str(error)) from error

    def send_now(self, data: bytes | memoryview) -> int:
        """How many of the bytes the kernel took, without waiting. Raises BrokenResourceError, ClosedResourceError."""
        if self._socket.fileno() < 0:
            raise trio.ClosedResourceError("the connection was closed")
        try:
            return self._socket.send(data)
        except BlockingIOError:
            return 0
        except OSError as error:
            raise trio.BrokenResourceError(str(error)) from error

    async def send_all(self, data: bytes) -> None:
        """Returns once the kernel has all of it. Raises BrokenResourceError, ClosedResourceError."""
        await trio.lowlevel.checkpoint()
        with memoryview(data) as view:
            sent = self.send_now(view)
            while sent < len(view):
                await trio.lowlevel.wait_writable(self._socket)
                sent += self.send_now(view[sent:])

    async def send_eof(self) -> None:
        """Ends our direction. Raises BrokenResourceError, ClosedResourceError."""
        await trio.lowlevel.checkpoint()
        try:
            self._socket.shutdown(socket.SHUT_WR)
        except OSError as error:
            raise trio.BrokenResourceError(str(error)) from error

    def close(self) -> None:
        """Closes the socket; a task that waits on it gets ClosedResourceError."""
        if self._socket.fileno() >= 0:
            trio.lowlevel.notify_closing(self._socket)
            self._socket.close()

    async def aclose(self) -> None:
        """As `close`."""
        self.close()
        await trio.lowlevel.checkpoint()
