"""The caller's side: one shared connection per server."""

import logging
import math
import random
import ssl

import trio

from agent.addresses import Address, join_address
from agent.backoff import backoff_s
from agent.rpc.connection import IN_FLIGHT_MAX, RECONNECT_S_MAX, RECONNECT_S_MIN, leaves_of, open_connection
from agent.rpc.failures import failure_to_error
from agent.rpc.frames import (
    ANSWER_BYTES_MAX,
    SERVER_MESSAGES,
    Call,
    Cancel,
    Failure,
    FrameStream,
    Ping,
    Pong,
    Purpose,
    Reply,
    close_quietly,
    message_frame,
)
from mesh.errors import LimitExceeded, MeshError, OutcomeUnknown, ProtocolError, Unreachable

_LOG = logging.getLogger("mesh.rpc")
PING_INTERVAL_S = 5.0
SILENCE_MAX_S = 15.0  # a client that hears nothing for this long takes the connection for half-open
CALLS_BUFFERED_BYTES_MAX = 16 * 1024 * 1024


class _PendingCall:
    """A call in the client's hands: an answer or an error will be set."""

    __slots__ = ("body", "done", "error")

    def __init__(self) -> None:
        self.done = trio.Event()
        self.body: bytes | None = None
        self.error: MeshError | None = None


class _ClientConnection:
    """One connection to a server, owned by the pool's nursery."""

    def __init__(self, address: Address, context: ssl.SSLContext | None, server_name: str | None) -> None:
        self._address = address
        self._context = context
        self._server_name = server_name
        self._frames: FrameStream | None = None
        self._pending: dict[int, _PendingCall] = {}
        self._next_id = 1
        self._scope = trio.CancelScope()
        self.settled = trio.Event()  # connected, or failed to
        self.failure: MeshError | None = None

    def close(self) -> None:
        """Ends it: its open calls end with OutcomeUnknown."""
        self._scope.cancel()

    async def run(self) -> bool:
        """Connects and reads answers until the connection ends. Returns whether it ever was connected."""
        with self._scope:
            return await self._run()
        return True

    async def _run(self) -> bool:
        try:
            stream = await open_connection(self._address, Purpose.CALLS, self._context, self._server_name)
        except Unreachable as error:
            self._fail(error)
            return False
        except BaseException:
            self._fail(Unreachable(f"the agent stopped connecting to {self._name}"))
            raise
        try:
            self._frames = FrameStream(
                stream, frame_bytes_max=ANSWER_BYTES_MAX, buffered_bytes_max=CALLS_BUFFERED_BYTES_MAX
            )
            self.settled.set()
            async with trio.open_nursery() as nursery:
                nursery.start_soon(self._frames.run_writer)
                nursery.start_soon(self._keep_alive, self._frames)
                await self._read_answers(self._frames)
                nursery.cancel_scope.cancel()
        except* (Unreachable, ProtocolError) as group:
            _LOG.debug("the RPC connection to %s ended: %s", self._name, leaves_of(group)[0])
        finally:
            self._fail(Unreachable(f"the connection to {self._name} ended"))
            await close_quietly(stream)
        return True

    @property
    def _name(self) -> str:
        return join_address(self._address)

    def _fail(self, error: MeshError) -> None:
        self.failure = error
        self.settled.set()
        pending, self._pending = self._pending, {}
        for call in pending.values():
            call.error = OutcomeUnknown(f"the connection to {self._name} broke before it answered")
            call.done.set()

    async def _read_answers(self, frames: FrameStream) -> None:
        while (data := await frames.read(idle_s=math.inf)) is not None:
            match SERVER_MESSAGES.decode(data, bytes_max=ANSWER_BYTES_MAX):
                case Reply(request_id, body):
                    call = self._pending.pop(request_id, None)
                    if call is not None:
                        call.body = body
                        call.done.set()
                case Failure(request_id) as failure:
                    call = self._pending.pop(request_id, None)
                    if call is not None:
                        call.error = failure_to_error(failure)
                        call.done.set()
                case Pong():
                    pass

    async def _keep_alive(self, frames: FrameStream) -> None:
        while True:
            await trio.sleep(PING_INTERVAL_S)
            silence_s = trio.current_time() - frames.last_received_at
            if silence_s > SILENCE_MAX_S:
                raise Unreachable(f"{self._name} has been silent for {silence_s:.0f} s")
            # Always, not only when idle: the server closes connections on which nothing arrives.
            frames.write_nowait(message_frame(Ping()))

    async def call(self, body: bytes) -> bytes:
        """The answer. Raises Unreachable when nothing was sent, OutcomeUnknown when it was and no answer came."""
        await self.settled.wait()
        if self.failure is not None or self._frames is None:
            raise Unreachable(str(self.failure))
        if len(self._pending) >= IN_FLIGHT_MAX:
            raise LimitExceeded(f"{IN_FLIGHT_MAX} calls to {self._name} are open; wait for answers")
        request_id = self._next_id
        self._next_id += 1
        if not self._frames.write_nowait(message_frame(Call(request_id, body))):
            raise LimitExceeded(f"more than {CALLS_BUFFERED_BYTES_MAX} bytes wait to be sent to {self._name}")
        call = _PendingCall()
        self._pending[request_id] = call
        try:
            await call.done.wait()
        finally:
            # Still there: the caller was cancelled or ran out of time, so the server may stop working on it.
            if self._pending.pop(request_id, None) is not None:
                self._frames.write_nowait(message_frame(Cancel(request_id)))
        if call.error is not None:
            raise call.error
        assert call.body is not None, "a call ended with neither answer nor error"
        return call.body


class RpcPool:
    """One shared connection per server. `run` owns them; calls may come from any task."""

    def __init__(
        self, rng: random.Random, *, context: ssl.SSLContext | None = None, server_name: str | None = None
    ) -> None:
        self._rng = rng
        self._context = context
        self._server_name = server_name
        self._nursery: trio.Nursery | None = None
        self._connections: dict[Address, _ClientConnection] = {}
        self._failures: dict[Address, tuple[int, float]] = {}  # failures in a row, and when to try again

    async def run(self, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Keeps the connections until cancelled."""
        async with trio.open_nursery() as nursery:
            self._nursery = nursery
            task_status.started()
            try:
                await trio.sleep_forever()
            finally:
                self._nursery = None

    async def call(self, address: Address, body: bytes, *, timeout_s: float) -> bytes:
        """What the server at `address` answers.

        Raises Unreachable when the call was certainly not delivered, OutcomeUnknown when it was and no answer came
        (connection broken, `timeout_s` over), LimitExceeded, or the error that the server raised. A caller that is
        cancelled has the server cancel the call.
        """
        connection = self._connection(address)
        answer: bytes | None = None
        with trio.move_on_after(timeout_s):
            answer = await connection.call(body)
        if answer is None:
            text = f"{join_address(address)} did not answer within {timeout_s:g} s"
            raise OutcomeUnknown(text) if connection.settled.is_set() else Unreachable(text)
        return answer

    def drop(self, address: Address) -> None:
        """Ends the connection to that server, which is known to be gone: who waits on it need wait no longer."""
        connection = self._connections.get(address)
        if connection is not None:
            connection.close()

    def _connection(self, address: Address) -> _ClientConnection:
        connection = self._connections.get(address)
        if connection is not None:
            return connection
        if self._nursery is None:
            raise Unreachable("the agent is stopping")
        _, not_before = self._failures.get(address, (0, 0.0))
        if trio.current_time() < not_before:
            raise Unreachable(f"no RPC connection to {join_address(address)}: the last attempt just failed")
        connection = _ClientConnection(address, self._context, self._server_name)
        self._connections[address] = connection
        self._nursery.start_soon(self._run_connection, address, connection)
        return connection

    async def _run_connection(self, address: Address, connection: _ClientConnection) -> None:
        connected = False
        try:
            connected = await connection.run()
        except Exception:
            _LOG.exception("the RPC connection to %s failed", join_address(address))
        finally:
            del self._connections[address]
            if connected:
                self._failures.pop(address, None)
            else:
                failures = self._failures.get(address, (0, 0.0))[0] + 1
                pause_s = backoff_s(failures, rng=self._rng, first_s=RECONNECT_S_MIN, last_s=RECONNECT_S_MAX)
                self._failures[address] = (failures, trio.current_time() + pause_s)
