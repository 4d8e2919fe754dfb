"""The server port's side: answers calls and takes Raft messages in."""

import logging
import math
import resource
import ssl
from collections import Counter
from collections.abc import Awaitable, Callable, Sequence

import trio

from agent.repeats import RepeatedLog
from agent.rpc.connection import IN_FLIGHT_MAX, leaves_of, tune_socket
from agent.rpc.failures import error_to_failure
from agent.rpc.frames import (
    CALL_BYTES_MAX,
    CLIENT_MESSAGES,
    HELLO,
    HELLO_BYTES_MAX,
    PREFACE_BYTES,
    RAFT_BYTES_MAX,
    Call,
    Cancel,
    Failure,
    FrameStream,
    Ping,
    Pong,
    Purpose,
    Reply,
    UnfinishedBytes,
    close_quietly,
    message_frame,
    parse_preface,
    preface,
    receive_exactly,
)
from mesh.errors import LimitExceeded, MeshError, OutcomeUnknown, ProtocolError, Unreachable

_LOG = logging.getLogger("mesh.rpc")
Handler = Callable[[bytes], Awaitable[bytes]]
RaftReceiver = Callable[[str, bytes], None]
HANDSHAKE_DEADLINE_S = 5.0  # Consul's limits.rpc_handshake_timeout
CONNECTIONS_PER_IP_MAX = 100  # Consul's limits.rpc_max_conns_per_client
CONNECTIONS_MAX = 4096
DESCRIPTOR_SHARE = 4  # at most a quarter of the process's descriptors: the rest is for Raft, HTTP and files
DRAIN_POLL_S = 0.02
SERVER_IDLE_MAX_S = 60.0  # clients ping every 5 s, so this silence means that nobody is there
ANSWERS_BUFFERED_BYTES_MAX = 1024 * 1024
UNFINISHED_BYTES_MAX = 64 * 1024 * 1024  # of frames that have not ended, all connections together


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
        self._unfinished = UnfinishedBytes(UNFINISHED_BYTES_MAX)
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
            reasons = leaves_of(error)
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
        frames = FrameStream(
            stream,
            frame_bytes_max=CALL_BYTES_MAX,
            buffered_bytes_max=ANSWERS_BUFFERED_BYTES_MAX,
            unfinished=self._unfinished,
        )
        connection = _ServerConnection(frames, self._handler, self.counters, peer)
        connection.is_draining = self._is_draining
        self._callers.add(connection)
        try:
            await connection.run()
        finally:
            self._callers.discard(connection)
            frames.release()

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
        frames = FrameStream(stream, frame_bytes_max=RAFT_BYTES_MAX, buffered_bytes_max=0, unfinished=self._unfinished)
        try:
            await self._take_raft_messages(frames)
        finally:
            frames.release()

    async def _take_raft_messages(self, frames: FrameStream) -> None:
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

    def __init__(self, frames: FrameStream, handler: Handler, counters: Counter[str], peer: str) -> None:
        self._frames = frames
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


def _peer_host(stream: trio.SocketStream) -> str:
    try:
        return str(stream.socket.getpeername()[0])
    except OSError:
        return "a peer that has gone"
