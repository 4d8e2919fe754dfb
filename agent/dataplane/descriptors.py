"""Sockets that travel with control frames: the same open socket in another process (SCM_RIGHTS, unix(7)).

A listening socket that two processes have open is one socket with one queue: it stays alive, and keeps what waits in
it, until the last of them closes it. That is what lets a worker take over from another one without a lost connection.
"""

import array
import socket
from collections import deque
from collections.abc import Sequence

import trio

from mesh.errors import ProtocolError

SOCKETS_PER_FRAME_MAX = 128  # Linux sends at most 253 with one message
_UNCLAIMED_MAX = 2 * SOCKETS_PER_FRAME_MAX  # received, and no frame has asked for them yet
_READ_BYTES = 65536
_ANCILLARY_BYTES = socket.CMSG_SPACE(253 * array.array("i").itemsize)


class DescriptorStream(trio.abc.ReceiveStream):
    """A unix socket's stream of bytes; sockets that come with them wait for `take`, in order."""

    def __init__(self, stream: trio.SocketStream) -> None:
        self._socket = stream.socket
        self._stream = stream
        self._received: deque[socket.socket] = deque()

    async def receive_some(self, max_bytes: int | None = None) -> bytes:
        """Some bytes, empty at the end. Raises as a SocketStream does, and ProtocolError for too many descriptors."""
        try:
            data, ancillary, flags, _ = await self._socket.recvmsg(
                max_bytes or _READ_BYTES, _ANCILLARY_BYTES, socket.MSG_CMSG_CLOEXEC
            )
        except trio.ClosedResourceError:
            raise
        except OSError as error:
            raise trio.BrokenResourceError(str(error)) from error
        for level, kind, content in ancillary:
            if level == socket.SOL_SOCKET and kind == socket.SCM_RIGHTS:
                self._keep(content)
        if flags & socket.MSG_CTRUNC or len(self._received) > _UNCLAIMED_MAX:
            raise ProtocolError("more descriptors came with a control frame than fit")
        return data

    def _keep(self, content: bytes) -> None:
        numbers = array.array("i")
        numbers.frombytes(content[: len(content) - len(content) % numbers.itemsize])
        for number in numbers:
            sock = socket.socket(fileno=number)
            sock.settimeout(0)
            self._received.append(sock)

    def take(self, count: int) -> tuple[socket.socket, ...]:
        """The next sockets that came, now the caller's. Raises ProtocolError when there are fewer."""
        if count > len(self._received):
            raise ProtocolError(f"a control frame names {count} sockets, and {len(self._received)} came with it")
        return tuple(self._received.popleft() for _ in range(count))

    async def send(self, data: bytes, sockets: Sequence[socket.socket] = ()) -> None:
        """Sends a frame, and copies of the sockets with its first byte. Raises as a SocketStream does."""
        if sockets:
            assert len(sockets) <= SOCKETS_PER_FRAME_MAX
            numbers = array.array("i", [sock.fileno() for sock in sockets])
            rights = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, numbers.tobytes())]
            try:
                sent = await self._socket.sendmsg([data], rights)
            except trio.ClosedResourceError:
                raise
            except OSError as error:
                raise trio.BrokenResourceError(str(error)) from error
            data = data[sent:]
        if data:
            await self._stream.send_all(data)

    def discard(self) -> None:
        """Closes what came and was never taken."""
        while self._received:
            self._received.popleft().close()

    async def aclose(self) -> None:
        """Closes the stream, and what was never taken."""
        self.discard()
        await self._stream.aclose()
