"""Calls between agents on the server port: multiplexed, cancellable, every wait with a deadline.

`RpcServer` answers calls and takes Raft messages in; `RpcPool` keeps one connection per server and calls over it;
`agent.raft_transport` sends Raft messages. None of them knows what the payloads mean.
"""

import logging
import math
import random
import resource
import socket
import ssl
from collections import Counter
from collections.abc import Awaitable, Callable, Sequence

import trio

from agent.repeats import RepeatedLog
from agent.rpc_frames import (
    ANSWER_BYTES_MAX,
    CALL_BYTES_MAX,
    CLIENT_MESSAGES,
    HELLO,
    HELLO_BYTES_MAX,
    PREFACE_BYTES,
    RAFT_BYTES_MAX,
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
    parse_preface,
    preface,
    receive_exactly,
)
from mesh import errors
from mesh.errors import LimitExceeded, MeshError, NotLeader, OutcomeUnknown, ProtocolError, Unreachable

_LOG = logging.getLogger("mesh.rpc")

Address = tuple[str, int]
Handler = Callable[[bytes], Awaitable[bytes]]
RaftReceiver = Callable[[str, bytes], None]

HANDSHAKE_DEADLINE_S = 5.0  # Consul's limits.rpc_handshake_timeout
CONNECT_DEADLINE_S = 5.0
CONNECTIONS_PER_IP_MAX = 100  # Consul's limits.rpc_max_conns_per_client
CONNECTIONS_MAX = 4096
DESCRIPTOR_SHARE = 4  # at most a quarter of the process's descriptors: the rest is for Raft, HTTP and files
IN_FLIGHT_MAX = 4096  # open calls per connection; a blocking query is one for minutes
DRAIN_POLL_S = 0.02
PING_INTERVAL_S = 5.0
SILENCE_MAX_S = 15.0  # a client that hears nothing for this long takes the connection for half-open
SERVER_IDLE_MAX_S = 60.0  # clients ping every 5 s, so this silence means that nobody is there
ANSWERS_BUFFERED_BYTES_MAX = 1024 * 1024
CALLS_BUFFERED_BYTES_MAX = 16 * 1024 * 1024
BACKOFF_FIRST_S = 0.05
BACKOFF_MAX_S = 2.0
_USER_TIMEOUT_MS = 10_000  # unacknowledged bytes for this long break the connection (Linux)

_ERRORS: dict[str, type[MeshError]] = {
    kind.__name__: kind
    for kind in (
        errors.InvalidRequest,
        errors.NotFound,
        errors.Refused,
        errors.LimitExceeded,
        errors.NoLeader,
        errors.OutcomeUnknown,
        errors.Unreachable,
    )
}


def error_to_failure(request_id: int, error: MeshError) -> Failure:
    """The error as it crosses the wire."""
    leader_id = error.leader_id if isinstance(error, NotLeader) else None
    return Failure(request_id, type(error).__name__, str(error), leader_id)


def failure_to_error(failure: Failure) -> MeshError:
    """The error that the far side raised, as ours: the same class where a caller could handle it."""
    if failure.kind == NotLeader.__name__:
        return NotLeader(failure.leader_id)
    return _ERRORS.get(failure.kind, MeshError)(failure.text)


def tune_socket(stream: trio.SocketStream) -> None:
    """No delay for small frames, and a peer that is gone without a word is noticed in about ten seconds."""
    stream.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    if hasattr(socket, "TCP_USER_TIMEOUT"):
        stream.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, _USER_TIMEOUT_MS)


async def open_connection(
    address: Address, purpose: Purpose, context: ssl.SSLContext | None, server_name: str | None
) -> trio.abc.Stream:
    """A connection whose far side has answered the preface. Raises Unreachable: nothing has been asked yet."""
    stream: trio.abc.Stream | None = None
    host, port = address
    try:
        with trio.fail_after(CONNECT_DEADLINE_S):
            plain = await trio.open_tcp_stream(host, port)
            stream = plain
            tune_socket(plain)
            if context is not None:
                secure = trio.SSLStream(plain, context, server_hostname=server_name, https_compatible=True)
                stream = secure
                await secure.do_handshake()
            await stream.send_all(preface(purpose))
            answered = parse_preface(await receive_exactly(stream, PREFACE_BYTES))
            if answered is not purpose:
                raise ProtocolError(f"it answered {answered.name} to {purpose.name}")
    except (OSError, trio.TooSlowError, trio.BrokenResourceError, ssl.SSLError, MeshError) as error:
        if stream is not None:
            await close_quietly(stream)
        reason = "no answer in time" if isinstance(error, trio.TooSlowError) else str(error.__cause__ or error)
        raise Unreachable(f"no RPC connection to {host}:{port}: {reason}") from error
    except BaseException:
        if stream is not None:
            await close_quietly(stream)
        raise
    return stream


class RpcServer:
    """Answers the server port. A connection that misbehaves is closed, counted and logged; it never ends the server."""

    def __init__(
        self,
        handler: Handler,
        *,
        receive_raft: RaftReceiver,
        context: ssl.SSLContext | None = None,
        connections_per_ip_max: int = CONNECTIONS_PER_IP_MAX,
    ) -> None:
        """`handler` answers a call's body or raises a MeshError; `receive_raft(sender_id, message)` never waits."""
        self._handler = handler
        self._receive_raft = receive_raft
        self._context = context
        self._connections_per_ip_max = connections_per_ip_max
        limit, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
        infinite = limit == resource.RLIM_INFINITY
        self._connections_max = CONNECTIONS_MAX if infinite else min(CONNECTIONS_MAX, limit // DESCRIPTOR_SHARE)
        self._connections: Counter[str] = Counter()
        self._callers: set[_ServerConnection] = set()
        self._is_draining = False
        self._repeats = RepeatedLog(_LOG)
        self.counters: Counter[str] = Counter()

    @property
    def connection_count(self) -> int:
        """Connections open now."""
        return self._connections.total()

    async def serve(
        self,
        listeners: Sequence[trio.SocketListener],
        *,
        task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED,
    ) -> None:
        """Serves until cancelled."""
        task_status.started()
        await trio.serve_listeners(self._serve_connection, list(listeners))

    async def _serve_connection(self, stream: trio.SocketStream) -> None:
        # An exception here would end every other connection too: serve_listeners has one nursery for all of them.
        peer = _peer_host(stream)
        if (
            self._connections[peer] >= self._connections_per_ip_max
            or self._connections.total() >= self._connections_max
        ):
            self.counters["connections_refused"] += 1
            open_here = self._connections[peer]
            self._repeats.warning("refused", "refused a connection from %s: it has %d open already", peer, open_here)
            await close_quietly(stream)
            return
        self._connections[peer] += 1
        self.counters["connections_accepted"] += 1
        try:
            await self._serve_stream(stream, peer)
        except Exception as error:
            reasons = _leaves(error)
            if any(isinstance(reason, ProtocolError | ssl.SSLError) for reason in reasons):
                self.counters["connections_malformed"] += 1
                self._repeats.warning("malformed", "closed the connection from %s: %s", peer, reasons[0])
            elif all(isinstance(reason, Unreachable | OSError | trio.BrokenResourceError) for reason in reasons):
                _LOG.debug("the connection from %s ended: %s", peer, reasons[0])
            else:
                self.counters["connections_crashed"] += 1
                _LOG.exception("closed the connection from %s after an internal error", peer)
        finally:
            self._connections[peer] -= 1
            if not self._connections[peer]:
                del self._connections[peer]
            await close_quietly(stream)

    async def _serve_stream(self, plain: trio.SocketStream, peer: str) -> None:
        tune_socket(plain)
        stream: trio.abc.Stream = plain
        with trio.move_on_after(HANDSHAKE_DEADLINE_S) as handshake:
            if self._context is not None:
                secure = trio.SSLStream(plain, self._context, server_side=True, https_compatible=True)
                stream = secure
                await secure.do_handshake()
            purpose = parse_preface(await receive_exactly(stream, PREFACE_BYTES))
            await stream.send_all(preface(purpose))
        if handshake.cancelled_caught:
            raise ProtocolError(f"the handshake did not end within {HANDSHAKE_DEADLINE_S:.0f} s")
        if purpose is Purpose.RAFT:
            await self._serve_raft(stream)
        else:
            await self._serve_calls(stream, peer)

    async def _serve_calls(self, stream: trio.abc.Stream, peer: str) -> None:
        connection = _ServerConnection(stream, self._handler, self.counters, peer)
        connection.is_draining = self._is_draining
        self._callers.add(connection)
        try:
            await connection.run()
        finally:
            self._callers.discard(connection)

    async def drain(self, timeout_s: float) -> None:
        """Refuses new calls, so that their callers go elsewhere, and lets those in progress end, `timeout_s` at most.

        What has not ended then, blocking queries above all, is answered with OutcomeUnknown. Raft goes on.
        """
        self._is_draining = True
        for connection in self._callers:
            connection.is_draining = True
        with trio.move_on_after(timeout_s):
            while any(connection.open_count for connection in self._callers):  # noqa: ASYNC110 — bounded, at the end
                await trio.sleep(DRAIN_POLL_S)
        for connection in self._callers:
            connection.abandon()
        await trio.sleep(DRAIN_POLL_S)  # for the last answers to reach the kernel

    async def _serve_raft(self, stream: trio.abc.Stream) -> None:
        frames = FrameStream(stream, frame_bytes_max=RAFT_BYTES_MAX, buffered_bytes_max=0)
        first = await frames.read(idle_s=HANDSHAKE_DEADLINE_S)
        if first is None:
            return
        sender_id = HELLO.decode(first, bytes_max=HELLO_BYTES_MAX).node_id
        # A follower sends nothing to another follower, so a Raft connection may be silent for ever; the socket's own
        # timeouts find a leader that is gone without a word.
        while (data := await frames.read(idle_s=math.inf)) is not None:
            self.counters["raft_messages_received"] += 1
            self._receive_raft(sender_id, data)


class _ServerConnection:
    """One client's calls, each a task that ends when the client cancels it or goes away."""

    def __init__(self, stream: trio.abc.Stream, handler: Handler, counters: Counter[str], peer: str) -> None:
        self._frames = FrameStream(
            stream, frame_bytes_max=CALL_BYTES_MAX, buffered_bytes_max=ANSWERS_BUFFERED_BYTES_MAX
        )
        self._handler = handler
        self._counters = counters
        self._peer = peer
        self._open_calls: dict[int, trio.CancelScope] = {}
        self.is_draining = False

    @property
    def open_count(self) -> int:
        """Calls in progress."""
        return len(self._open_calls)

    def abandon(self) -> None:
        """Ends the calls in progress; their callers hear that the outcome is not known."""
        for scope in self._open_calls.values():
            scope.cancel()

    async def run(self) -> None:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self._frames.run_writer)
            while (data := await self._frames.read(idle_s=SERVER_IDLE_MAX_S)) is not None:
                match CLIENT_MESSAGES.decode(data):
                    case Call(request_id) as call:
                        await self._start(call, request_id, nursery)
                    case Cancel(request_id):
                        scope = self._open_calls.get(request_id)
                        if scope is not None:
                            self._counters["calls_cancelled"] += 1
                            scope.cancel()
                    case Ping():
                        await self._frames.write(message_frame(Pong()))
            nursery.cancel_scope.cancel()

    async def _start(self, call: Call, request_id: int, nursery: trio.Nursery) -> None:
        self._counters["calls"] += 1
        if request_id in self._open_calls:
            raise ProtocolError(f"request ID {request_id} is in use already")
        if len(self._open_calls) >= IN_FLIGHT_MAX:
            self._counters["calls_refused"] += 1
            full = LimitExceeded(f"{IN_FLIGHT_MAX} calls are open on this connection; wait for answers")
            await self._frames.write(message_frame(error_to_failure(request_id, full)))
            return
        if self.is_draining:
            # Unreachable, as nothing was done: the caller may ask another server, also for a write.
            refusal = Unreachable("this server is stopping; ask another one")
            await self._frames.write(message_frame(error_to_failure(request_id, refusal)))
            return
        scope = trio.CancelScope()
        self._open_calls[request_id] = scope
        nursery.start_soon(self._answer, call, scope)

    async def _answer(self, call: Call, scope: trio.CancelScope) -> None:
        answer: bytes | None = None
        try:
            with scope:
                try:
                    body = await self._handler(call.body)
                    answer = message_frame(Reply(call.request_id, body))
                except MeshError as error:
                    self._counters["calls_failed"] += 1
                    answer = message_frame(error_to_failure(call.request_id, error))
                except Exception:
                    self._counters["calls_crashed"] += 1
                    _LOG.exception("a call from %s failed", self._peer)
                    text = "internal error; the server's log has the details"
                    answer = message_frame(Failure(call.request_id, MeshError.__name__, text))
        finally:
            del self._open_calls[call.request_id]
        if scope.cancelled_caught and self.is_draining:
            unknown = OutcomeUnknown("the server stopped before it could answer")
            answer = message_frame(error_to_failure(call.request_id, unknown))
        if answer is not None:
            await self._frames.write(answer)


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
            _LOG.debug("the RPC connection to %s ended: %s", self._name, _leaves(group)[0])
        finally:
            self._fail(Unreachable(f"the connection to {self._name} ended"))
            await close_quietly(stream)
        return True

    @property
    def _name(self) -> str:
        return f"{self._address[0]}:{self._address[1]}"

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
        self._backoff: dict[Address, tuple[float, float]] = {}  # address -> (not before, the pause it came from)

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
            text = f"{address[0]}:{address[1]} did not answer within {timeout_s:g} s"
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
        not_before, _ = self._backoff.get(address, (0.0, 0.0))
        if trio.current_time() < not_before:
            raise Unreachable(f"no RPC connection to {address[0]}:{address[1]}: the last attempt just failed")
        connection = _ClientConnection(address, self._context, self._server_name)
        self._connections[address] = connection
        self._nursery.start_soon(self._run_connection, address, connection)
        return connection

    async def _run_connection(self, address: Address, connection: _ClientConnection) -> None:
        connected = False
        try:
            connected = await connection.run()
        except Exception:
            _LOG.exception("the RPC connection to %s:%d failed", *address)
        finally:
            del self._connections[address]
            if connected:
                self._backoff.pop(address, None)
            else:
                pause_s = min(BACKOFF_MAX_S, 2 * self._backoff.get(address, (0.0, BACKOFF_FIRST_S / 2))[1])
                wait_s = pause_s * (0.5 + self._rng.random() / 2)
                self._backoff[address] = (trio.current_time() + wait_s, pause_s)


def _peer_host(stream: trio.SocketStream) -> str:
    try:
        return str(stream.socket.getpeername()[0])
    except OSError:
        return "a peer that has gone"


def _leaves(error: BaseException) -> list[BaseException]:
    if isinstance(error, BaseExceptionGroup):
        return [leaf for child in error.exceptions for leaf in _leaves(child)]
    return [error]
