"""The agent's end of a worker's control connection: calls in order, each with a deadline."""

import contextlib
import os
import signal
import socket
import struct
import weakref
from collections import deque
from collections.abc import Sequence
from pathlib import Path

import trio

from agent.dataplane.control import REPLIES, FrameReader, HandoverReply, Reply, Request, frame
from agent.dataplane.descriptors import DescriptorStream
from mesh.errors import LimitExceeded, ProtocolError, Unreachable

CONNECT_TIMEOUT_S = 2.0
CALLS_MAX = 64  # waiting for their replies; the agent's own parts are few

_CREDENTIALS = struct.Struct("3i")  # pid, uid, gid


class _Call:
    def __init__(self) -> None:
        self.done = trio.Event()
        self.reply: Reply | None = None
        self.abandoned = False
        self.sockets: tuple[socket.socket, ...] = ()


class ControlClient:
    """One connection to one worker. `run` reads the replies and returns when the connection has ended."""

    def __init__(self, stream: trio.SocketStream) -> None:
        self._stream = stream
        self._frames = DescriptorStream(stream)
        self._process = _process_behind(stream)
        if self._process[1] >= 0:
            weakref.finalize(self, os.close, self._process[1])
        self._sending = trio.Lock()
        self._calls: deque[_Call] = deque()
        self.over = trio.Event()  # the connection has ended; every further call raises Unreachable

    @property
    def pid(self) -> int:
        """The worker's process, as the kernel knows it; 0 where it does not say (other systems than Linux)."""
        return self._process[0]

    def kill(self) -> None:
        """SIGKILL to the worker, by a handle that no other process can have taken over; closes the connection."""
        pid, handle = self._process
        with contextlib.suppress(OSError):
            if handle >= 0:
                signal.pidfd_send_signal(handle, signal.SIGKILL)
            elif pid > 0:
                os.kill(pid, signal.SIGKILL)
        self.close()

    async def run(self, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Until the worker, or `close`, ends the connection. Never raises for what the worker does."""
        reader = FrameReader(self._frames)
        task_status.started()
        try:
            while (data := await reader.read()) is not None:
                reply = REPLIES.decode(data)
                if not self._calls:
                    break  # an answer to no question: this is no worker of ours
                call = self._calls.popleft()
                if isinstance(reply, HandoverReply):
                    call.sockets = self._frames.take(len(reply.keys))
                if call.abandoned:
                    _close_all(call.sockets)
                call.reply = reply
                call.done.set()
        except (ProtocolError, Unreachable):
            pass
        finally:
            self.close()

    def close(self) -> None:
        """Ends the connection and every call that waits."""
        if not self.over.is_set():
            self.over.set()
            self._stream.socket.close()
            self._frames.discard()
        while self._calls:
            self._calls.popleft().done.set()

    async def call(self, request: Request, *, timeout_s: float, sockets: Sequence[socket.socket] = ()) -> Reply:
        """The worker's reply; `sockets` go with the request. Raises Unreachable when the connection ends or the
        deadline passes first (the connection is closed then: a worker that does not answer is of no use), LimitExceeded
        over CALLS_MAX calls.
        """
        return (await self._call(request, timeout_s, sockets))[0]

    async def call_for_sockets(self, request: Request, *, timeout_s: float) -> tuple[Reply, tuple[socket.socket, ...]]:
        """As `call`; with the sockets that came with the reply, now the caller's."""
        return await self._call(request, timeout_s, ())

    async def _call(
        self, request: Request, timeout_s: float, sockets: Sequence[socket.socket]
    ) -> tuple[Reply, tuple[socket.socket, ...]]:
        if len(self._calls) >= CALLS_MAX:
            raise LimitExceeded(f"more than {CALLS_MAX} calls wait for the worker's reply")
        data = frame(request)
        call = _Call()
        try:
            with trio.move_on_after(timeout_s):
                async with self._sending:
                    if self.over.is_set():
                        raise Unreachable("the control connection to the worker has ended")
                    await self._send(data, call, sockets)
                await call.done.wait()  # cancelled here, the reply still comes, and is dropped
                if call.reply is None:
                    name = type(request).__name__
                    raise Unreachable(f"the worker's control connection ended before it answered {name}")
                return call.reply, call.sockets
        except trio.Cancelled:
            call.abandoned = True
            _close_all(call.sockets)
            raise
        self.close()
        raise Unreachable(f"the worker gave no answer to {type(request).__name__} within {timeout_s:g} s")

    async def _send(self, data: bytes, call: _Call, sockets: Sequence[socket.socket]) -> None:
        self._calls.append(call)
        sent = False
        try:
            await self._frames.send(data, sockets)
            sent = True
        except (trio.BrokenResourceError, trio.ClosedResourceError) as error:
            raise Unreachable(f"the control connection to the worker broke: {error}") from error
        finally:
            if not sent:
                self.close()  # also when cancelled: half a request may be on its way


def _close_all(sockets: Sequence[socket.socket]) -> None:
    for sock in sockets:
        sock.close()


def _process_behind(stream: trio.SocketStream) -> tuple[int, int]:
    """The process ID of the other end and a handle of it; 0 and -1 where the system does not say."""
    option = getattr(socket, "SO_PEERCRED", None)
    if option is None:
        return 0, -1
    data = stream.socket.getsockopt(socket.SOL_SOCKET, option, _CREDENTIALS.size)
    pid: int = _CREDENTIALS.unpack(data)[0]
    try:
        return pid, os.pidfd_open(pid)
    except OSError:
        return pid, -1  # it is gone, or the kernel is old


async def connect(path: Path) -> ControlClient:
    """A connection to the worker behind the socket. Raises Unreachable when none listens there."""
    sock = trio.socket.socket(trio.socket.AF_UNIX, trio.socket.SOCK_STREAM)
    try:
        with trio.fail_after(CONNECT_TIMEOUT_S):
            await sock.connect(str(path))
    except (OSError, trio.TooSlowError) as error:
        sock.close()
        raise Unreachable(f"no worker answers at {path}: {error}") from error
    except BaseException:
        sock.close()
        raise
    return ControlClient(trio.SocketStream(sock))
