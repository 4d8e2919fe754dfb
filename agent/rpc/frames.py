"""The wire between agents on the server port: a preface, then length-prefixed frames.

```
preface   b"MESHRP" version purpose        8 bytes, both ways; the server's is its answer
frame     length (4 bytes, big-endian) payload
```
Purpose `C` carries calls: each payload is one msgpack `ClientMessage` or `ServerMessage`. Purpose `R` carries Raft: the
first payload names the sender, every further one is one message of `mesh.raft`, one way, on a connection of its own so
that neither a large read nor a snapshot of another peer stands before a heartbeat.
"""

import math
import struct
from enum import Enum

import msgspec
import trio

from mesh.errors import LimitExceeded, ProtocolError, Unreachable
from mesh.wire import WIRE_BYTES_MAX, Codec

MAGIC = b"MESHRP"
VERSION = 1
PREFACE_BYTES = len(MAGIC) + 2

_LENGTH = struct.Struct(">I")

# What a peer may send in one piece. A call is a command (a KV value is at most 512 KiB, JSON bodies 4 MiB), a Raft
# message a batch of entries of which the last may be one such command, an answer at most one wire value.
CALL_BYTES_MAX = 8 * 1024 * 1024
RAFT_BYTES_MAX = 16 * 1024 * 1024
ANSWER_BYTES_MAX = WIRE_BYTES_MAX + 4096
HELLO_BYTES_MAX = 1024

# A frame that has begun must end: this long, plus its size at the slowest rate we put up with.
FRAME_DEADLINE_S = 10.0
FRAME_RATE_MIN = 128 * 1024  # bytes per second
WRITE_DEADLINE_S = 10.0
WRITE_CHUNK_BYTES = 1024 * 1024

_READ_BYTES = 64 * 1024
_FRAMES_PER_TURN = 64  # then other tasks get their turn, however much one peer has sent


class Purpose(Enum):
    """What a connection carries."""

    CALLS = b"C"
    RAFT = b"R"


class Call(msgspec.Struct, frozen=True, tag="call", array_like=True):
    """Answer `body`; the request ID is the client's choice, unique among its open calls."""

    request_id: int
    body: bytes


class Cancel(msgspec.Struct, frozen=True, tag="cancel", array_like=True):
    """Nobody waits for this answer any more."""

    request_id: int


class Ping(msgspec.Struct, frozen=True, tag="ping", array_like=True):
    """Are you still there?"""


class Pong(msgspec.Struct, frozen=True, tag="pong", array_like=True):
    """Yes."""


class Reply(msgspec.Struct, frozen=True, tag="reply", array_like=True):
    """The answer of a call."""

    request_id: int
    body: bytes


class Failure(msgspec.Struct, frozen=True, tag="failure", array_like=True):
    """The call raised an error of `mesh.errors`: its class, its text, and the leader's ID when NotLeader knows it."""

    request_id: int
    kind: str
    text: str
    leader_id: str | None = None


class Hello(msgspec.Struct, frozen=True, tag="hello", array_like=True):
    """Who sends on this Raft connection."""

    node_id: str


ClientMessage = Call | Cancel | Ping
ServerMessage = Reply | Failure | Pong

CLIENT_MESSAGES: Codec[ClientMessage] = Codec(ClientMessage)
SERVER_MESSAGES: Codec[ServerMessage] = Codec(ServerMessage)
HELLO: Codec[Hello] = Codec(Hello)

_ENCODE = msgspec.msgpack.Encoder().encode


def preface(purpose: Purpose) -> bytes:
    """The 8 bytes that open a connection."""
    return MAGIC + bytes((VERSION,)) + purpose.value


def parse_preface(data: bytes) -> Purpose:
    """What the peer wants. Raises ProtocolError when it does not speak this protocol or this version of it."""
    if len(data) != PREFACE_BYTES or not data.startswith(MAGIC):
        raise ProtocolError(f"the connection opened with {data[:PREFACE_BYTES]!r}, which is not mesh RPC")
    version = data[len(MAGIC)]
    if version != VERSION:
        raise ProtocolError(f"the peer speaks mesh RPC version {version}; this agent speaks version {VERSION}")
    try:
        return Purpose(data[-1:])
    except ValueError:
        raise ProtocolError(f"the peer asked for the unknown purpose {data[-1:]!r}") from None


def frame(payload: bytes) -> bytes:
    """The payload with its length before it."""
    return _LENGTH.pack(len(payload)) + payload


def message_frame(message: ClientMessage | ServerMessage | Hello) -> bytes:
    """One message as a frame. Raises LimitExceeded when no peer would take it."""
    payload = _ENCODE(message)
    limit = ANSWER_BYTES_MAX if isinstance(message, Reply | Failure | Pong) else CALL_BYTES_MAX
    if len(payload) > limit:
        raise LimitExceeded(f"an RPC message of {len(payload)} bytes is larger than the limit of {limit}")
    return _LENGTH.pack(len(payload)) + payload


class FrameDecoder:
    """Cuts a byte stream into frames; holds at most one frame and one read beyond it."""

    def __init__(self, frame_bytes_max: int) -> None:
        self._frame_bytes_max = frame_bytes_max
        self._buffer = bytearray()

    @property
    def buffered_bytes(self) -> int:
        """Bytes received and not yet part of a returned frame."""
        return len(self._buffer)

    @property
    def missing_bytes(self) -> int:
        """How many bytes the frame in progress still wants, as far as is known."""
        if len(self._buffer) < _LENGTH.size:
            return _LENGTH.size - len(self._buffer)
        (length,) = _LENGTH.unpack_from(self._buffer)
        return max(0, _LENGTH.size + int(length) - len(self._buffer))

    def feed(self, data: bytes | bytearray) -> None:
        """Adds received bytes."""
        self._buffer += data

    def next_frame(self) -> bytes | None:
        """The next whole payload, or None. Raises ProtocolError for a length above the limit, before its bytes come."""
        if len(self._buffer) < _LENGTH.size:
            return None
        (length,) = _LENGTH.unpack_from(self._buffer)
        if length > self._frame_bytes_max:
            raise ProtocolError(f"a frame of {length} bytes is larger than the limit of {self._frame_bytes_max}")
        end = _LENGTH.size + length
        if len(self._buffer) < end:
            return None
        with memoryview(self._buffer) as view:
            payload = bytes(view[_LENGTH.size : end])
        del self._buffer[:end]
        return payload


class UnfinishedBytes:
    """What the unfinished frames of many connections hold together: each may be of megabytes, and need never end."""

    def __init__(self, bytes_max: int) -> None:
        self._bytes_max = bytes_max
        self.total = 0

    def change(self, difference: int) -> None:
        """Counts. Raises ProtocolError when there is too much now."""
        self.total += difference
        if difference > 0 and self.total > self._bytes_max:
            raise ProtocolError(f"unfinished frames hold more than {self._bytes_max} bytes already")


class FrameStream:
    """Frames over one byte stream, every wait with a deadline. One task reads; any task may write.

    Writes are collected in a buffer that `run_writer` sends, so a cancelled caller never leaves half a frame behind.
    """

    def __init__(
        self,
        stream: trio.abc.Stream,
        *,
        frame_bytes_max: int,
        buffered_bytes_max: int,
        received: bytes = b"",
        unfinished: UnfinishedBytes | None = None,
    ) -> None:
        """`buffered_bytes_max`: writers wait (or are refused) while more than this waits to be sent. `unfinished`:
        where the bytes of unfinished frames are counted, until `release`.
        """
        self._stream = stream
        self._unfinished = unfinished
        self._counted_bytes = 0
        self._decoder = FrameDecoder(frame_bytes_max)
        self._decoder.feed(received)
        self._outgoing = bytearray()
        self._buffered_bytes_max = buffered_bytes_max
        self._wake_writer = trio.Event()
        self._room = trio.Event()
        self._frames_this_turn = 0
        self.last_received_at = trio.current_time()

    async def read(self, *, idle_s: float) -> bytes | None:
        """The next payload, or None at a clean end.

        Raises Unreachable when the connection breaks, when nothing came for `idle_s`, or a frame does not end in time;
        ProtocolError when it breaks the framing.
        """
        started_at = trio.current_time()
        while True:
            payload = self._decoder.next_frame()
            if payload is not None:
                if self._counted_bytes:
                    self._count_unfinished()
                self._frames_this_turn += 1
                if self._frames_this_turn >= _FRAMES_PER_TURN:
                    self._frames_this_turn = 0
                    await trio.lowlevel.checkpoint()
                return payload
            missing = self._decoder.missing_bytes
            if self._decoder.buffered_bytes:
                deadline = started_at + FRAME_DEADLINE_S + (missing + self._decoder.buffered_bytes) / FRAME_RATE_MIN
            else:
                deadline = started_at + idle_s
            data = await self._receive(deadline, min(max(_READ_BYTES, missing), WRITE_CHUNK_BYTES))
            if not data:
                if self._decoder.buffered_bytes:
                    raise ProtocolError("the connection ended in the middle of a frame")
                return None
            if not self._decoder.buffered_bytes:
                started_at = trio.current_time()
            self._decoder.feed(data)
            self._count_unfinished()

    def _count_unfinished(self) -> None:
        if self._unfinished is not None:
            # What any connection may hold does not count: small calls go on, however much large ones hold.
            difference = max(0, self._decoder.buffered_bytes - _READ_BYTES) - self._counted_bytes
            self._counted_bytes += difference
            self._unfinished.change(difference)

    def release(self) -> None:
        """The connection is over: what it holds no longer counts."""
        if self._unfinished is not None:
            self._unfinished.change(-self._counted_bytes)
            self._counted_bytes = 0

    async def _receive(self, deadline: float, bytes_max: int) -> bytes | bytearray:
        self._frames_this_turn = 0
        if deadline == math.inf:  # an idle Raft connection, many times a second: a scope would double its cost
            return await self._receive_some(bytes_max)
        with trio.move_on_at(deadline):
            return await self._receive_some(bytes_max)
        raise Unreachable("the peer went silent: no bytes before the deadline")

    async def _receive_some(self, bytes_max: int) -> bytes | bytearray:
        try:
            data = await self._stream.receive_some(bytes_max)
        except (trio.BrokenResourceError, trio.ClosedResourceError) as error:
            raise Unreachable(f"the connection broke: {error.__cause__ or error}") from error
        self.last_received_at = trio.current_time()
        return data

    def write_nowait(self, data: bytes) -> bool:
        """Hands bytes to the writer; False (and nothing done) when too much waits already."""
        if len(self._outgoing) > self._buffered_bytes_max:
            return False
        self._outgoing += data
        self._wake_writer.set()
        return True

    async def write(self, data: bytes) -> None:
        """As `write_nowait`, but waits for room; the writer's deadline bounds the wait."""
        while not self.write_nowait(data):
            await self._room.wait()

    async def run_writer(self) -> None:
        """Sends what is written until cancelled. Raises Unreachable when the peer stops taking bytes."""
        while True:
            if not self._outgoing:
                await self._wake_writer.wait()
                self._wake_writer = trio.Event()
                continue
            data, self._outgoing = self._outgoing, bytearray()
            self._room.set()
            self._room = trio.Event()
            await send_all(self._stream, data)


async def send_all(stream: trio.abc.SendStream, data: bytes | bytearray) -> None:
    """Sends everything, piece by piece under the write deadline. Raises Unreachable."""
    with memoryview(data) as view:
        for start in range(0, len(view), WRITE_CHUNK_BYTES):
            try:
                with trio.fail_after(WRITE_DEADLINE_S):
                    await stream.send_all(view[start : start + WRITE_CHUNK_BYTES])
            except trio.TooSlowError:
                raise Unreachable(f"the peer took no bytes for {WRITE_DEADLINE_S:.0f} s") from None
            except (trio.BrokenResourceError, trio.ClosedResourceError) as error:
                raise Unreachable(f"the connection broke: {error.__cause__ or error}") from error


async def receive_exactly(stream: trio.abc.ReceiveStream, count: int) -> bytes:
    """That many bytes. The caller sets the deadline. Raises Unreachable at the end of the stream or a break."""
    data = bytearray()
    while len(data) < count:
        try:
            received = await stream.receive_some(count - len(data))
        except (trio.BrokenResourceError, trio.ClosedResourceError) as error:
            raise Unreachable(f"the connection broke: {error.__cause__ or error}") from error
        if not received:
            raise Unreachable(f"the connection ended after {len(data)} of {count} bytes")
        data += received
    return bytes(data)


async def close_quietly(stream: trio.abc.AsyncResource, *, grace_s: float = 1.0) -> None:
    """Closes without letting a TLS goodbye, or a cancellation under way, hold things up."""
    with trio.CancelScope(deadline=trio.current_time() + grace_s, shield=True):
        try:
            await stream.aclose()
        except (trio.BrokenResourceError, OSError):
            return
