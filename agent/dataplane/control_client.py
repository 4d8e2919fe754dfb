"""The agent's end of a worker's control connection: calls in order, each with a deadline."""

import socket
import struct
from collections import deque
from pathlib import Path

import trio

from agent.dataplane.control import REPLIES, FrameReader, Reply, Request, frame
from mesh.errors import LimitExceeded, ProtocolError, Unreachable

CONNECT_TIMEOUT_S = 2.0
CALLS_MAX = 64  # waiting for their replies; the agent's own parts are few

_CREDENTIALS = struct.Struct("3i")  # pid, uid, gid


class _Call:
    def __init__(self) -> None:
        self.done = trio.Event()
        self.reply: Reply | None = None


class ControlClient:
    """One connection to one worker. `run` reads the replies and returns when the connection has ended."""

    def __init__(self, stream: trio.SocketStream) -> None:
        self._stream = stream
        self._sending = trio.Lock()
        self._calls: deque[_Call] = deque()
        self.over = trio.Event()  # the connection has ended; every further call raises Unreachable

    @property
    def pid(self) -> int:
        """The worker's process, as the kernel knows it; 0 where it does not say (other systems than Linux)."""
        option = getattr(socket, "SO_PEERCRED", None)
        if option is None:
            return 0
        data = self._stream.socket.getsockopt(socket.SOL_SOCKET, option, _CREDENTIALS.size)
        pid: int = _CREDENTIALS.unpack(data)[0]
        return pid

    async def run(self, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Until the worker, or `close`, ends the connection. Never raises for what the worker does."""
        reader = FrameReader(self._stream)
        task_status.started()
        try:
            while (data := await reader.read()) is not None:
                reply = REPLIES.decode(data)
                if not self._calls:
                    break  # an answer to no question: this is no worker of ours
                call = self._calls.popleft()
                call.reply = reply
                call.done.set()
        except (ProtocolError, Unreachable):
            pass
        finally:
            self.close()

    def close(self) -> None:
        """Ends the connection and every call that waits."""
        self.over.set()
        self._stream.socket.close()
        while self._calls:
            self._calls.popleft().done.set()

    async def call(self, request: Request, *, timeout_s: float) -> Reply:
        """The worker's reply. Raises Unreachable when the connection ends or the deadline passes first (the connection
        is closed then: a worker that does not answer is of no use), LimitExceeded over CALLS_MAX calls.
        """
        if len(self._calls) >= CALLS_MAX:
            raise LimitExceeded(f"more than {CALLS_MAX} calls wait for the worker's reply")
        data = frame(request)
        call = _Call()
        with trio.move_on_after(timeout_s):
            async with self._sending:
                if self.over.is_set():
                    raise Unreachable("the control connection to the worker has ended")
                await self._send(data, call)
            await call.done.wait()  # cancelled here, the reply still comes, and is dropped
            if call.reply is None:
                raise Unreachable(f"the worker's control connection ended before it answered {type(request).__name__}")
            return call.reply
        self.close()
        raise Unreachable(f"the worker gave no answer to {type(request).__name__} within {timeout_s:g} s")

    async def _send(self, data: bytes, call: _Call) -> None:
        self._calls.append(call)
        sent = False
        try:
            await self._stream.send_all(data)
            sent = True
        except (trio.BrokenResourceError, trio.ClosedResourceError) as error:
            raise Unreachable(f"the control connection to the worker broke: {error}") from error
        finally:
            if not sent:
                self.close()  # also when cancelled: half a request may be on its way


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
