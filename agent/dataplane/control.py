"""What an agent and its worker say to each other over the worker's unix socket (mode 0600).

Frames: a 4-byte big-endian length, then one msgpack message. The agent sends requests, the worker answers each one in
order with exactly one reply. The newest connection wins: the worker closes an older one. A worker keeps serving its
last configuration when its agent goes away.

| request | reply |
|---|---|
| `Configure(config)` | `Ack(version)`, or `Nack(version, error)`: the previous configuration stays in force |
| `Ping()` | `Pong(...)` |
| `Stats()` | `StatsReply(prometheus, counters)` |
| `Drain(deadline_s, ...)` | `Ack(version)`, then it stops accepting, finishes what is open, and exits |
| `Adopt(keys)` and sockets | `Ack(version)`: they are used where the next configuration has such a listener |
| `Handover(offset)` | `HandoverReply(keys, remaining)` and the sockets that it listens on, from the offset on |
| `Observed(since_s)` | `ObservedReply(listeners)`: who has called its services |
| `Describe(service)` | `DescribeReply(description)`: what it holds |
| `Tap(key, filter)` | `TapReply(records, dropped)`: requests since the last time; the first one begins to look |
| `EndTap(key)` | `Ack(version)` |

Versions: `Pong.protocol` says which requests a worker knows, and decides what an agent asks of it. Fields are only ever
added, with defaults; a message that the other side does not know is never sent to it. 1: Configure, Ping, Stats, Drain.
2: Adopt, Handover, and Drain's `idle_s` and `outbound_s`. 3: Observed.
4: Describe, Tap, EndTap.
"""

import struct

import msgspec
import trio

from mesh.authz.observed import ObservedListener
from mesh.errors import ProtocolError, Unreachable
from mesh.proxy.description import Description
from mesh.proxy.resources import ListenerKey
from mesh.proxy.sidecar_config import WorkerConfig
from mesh.proxy.tap import TapFilter, TapRecord
from mesh.wire import WIRE_BYTES_MAX, Codec

PROTOCOL = 4

_LENGTH = struct.Struct(">I")


class Configure(msgspec.Struct, frozen=True, tag=True):
    """Serve this from now on."""

    config: WorkerConfig


class Ping(msgspec.Struct, frozen=True, tag=True):
    """Are you there, and what are you serving?"""


class Stats(msgspec.Struct, frozen=True, tag=True):
    """Give me your counters."""


class Drain(msgspec.Struct, frozen=True, tag=True):
    """Stop accepting; exit when the last exchange is done, or after `deadline_s` at the latest.

    `idle_s`: how long connections without a request stay open for one, which is answered with `connection: close`;
    closing them at once can hit a request that is just being sent. `outbound_s`: outbound listeners go on accepting at
    least so long, and while inbound requests are under way: an application that shuts down still calls others.
    """

    deadline_s: float = 10.0
    idle_s: float = 0.0
    outbound_s: float = 0.0


class Adopt(msgspec.Struct, frozen=True, tag=True):
    """The sockets that come with this listen on these addresses: use them, and bind none of your own there."""

    keys: tuple[ListenerKey, ...]


class Handover(msgspec.Struct, frozen=True, tag=True):
    """Give me copies of the sockets that you listen on, without the first `offset` ones (sorted by address)."""

    offset: int = 0


class Observed(msgspec.Struct, frozen=True, tag=True):
    """Who called which service in the last `since_s` seconds?"""

    since_s: float


class Describe(msgspec.Struct, frozen=True, tag=True):
    """What do you hold for the sidecars of this service, or with this proxy ID? Empty: for all."""

    service: str = ""


class Tap(msgspec.Struct, frozen=True, tag=True):
    """Which requests that the filter fits have ended since I asked with this key? Not asking for a while ends it."""

    key: str
    wanted: TapFilter


class EndTap(msgspec.Struct, frozen=True, tag=True):
    """I look no more."""

    key: str


class Ack(msgspec.Struct, frozen=True, tag=True):
    """The configuration of this version is in force."""

    version: int


class Nack(msgspec.Struct, frozen=True, tag=True):
    """The configuration of this version was refused; the one before stays in force."""

    version: int
    error: str


class Pong(msgspec.Struct, frozen=True, tag=True):
    """Who answers. `config_version` is -1 before the first configuration."""

    pid: int
    uptime_s: float
    config_version: int
    package_version: str
    draining: bool = False
    protocol: int = 1  # what a worker speaks that does not say


class StatsReply(msgspec.Struct, frozen=True, tag=True):
    """Prometheus text, and the same counters by name (labels folded in) for programs."""

    prometheus: str
    counters: dict[str, float]


class HandoverReply(msgspec.Struct, frozen=True, tag=True):
    """One socket comes with it for each of `keys`; `remaining` ones are left for the next `Handover`."""

    keys: tuple[ListenerKey, ...]
    remaining: int


class ObservedReply(msgspec.Struct, frozen=True, tag=True):
    """One for each inbound listener."""

    listeners: tuple[ObservedListener, ...]


class DescribeReply(msgspec.Struct, frozen=True, tag=True):
    """What the worker holds."""

    description: Description


class TapReply(msgspec.Struct, frozen=True, tag=True):
    """In the order in which they ended. `dropped` counts, since the tap began, those that there was no room for."""

    records: tuple[TapRecord, ...]
    dropped: int


Request = Configure | Ping | Stats | Drain | Adopt | Handover | Observed | Describe | Tap | EndTap
Reply = Ack | Nack | Pong | StatsReply | HandoverReply | ObservedReply | DescribeReply | TapReply

REQUESTS: Codec[Request] = Codec(Request)
REPLIES: Codec[Reply] = Codec(Reply)


def frame(message: Request | Reply) -> bytes:
    """The bytes of one message with its length. Raises LimitExceeded when it is larger than the wire limit."""
    data = REQUESTS.encode(message) if isinstance(message, Request) else REPLIES.encode(message)
    return _LENGTH.pack(len(data)) + data


class FrameReader:
    """Reads frames from a stream. One reader task at a time."""

    def __init__(self, stream: trio.abc.ReceiveStream) -> None:
        self._stream = stream
        self._buffer = bytearray()

    async def _fill(self, count: int) -> bool:
        while len(self._buffer) < count:
            try:
                data = await self._stream.receive_some(65536)
            except (trio.BrokenResourceError, trio.ClosedResourceError) as error:
                raise Unreachable(f"the control connection broke: {error}") from error
            if not data:
                if self._buffer:
                    raise ProtocolError("the control connection ended in the middle of a frame")
                return False
            self._buffer += data
        return True

    async def read(self) -> bytes | None:
        """The next frame's payload, or None at the end. Raises ProtocolError, or Unreachable when it breaks."""
        if not await self._fill(_LENGTH.size):
            return None
        (length,) = _LENGTH.unpack_from(self._buffer)
        if length > WIRE_BYTES_MAX:
            raise ProtocolError(f"a control frame of {length} bytes is larger than the limit of {WIRE_BYTES_MAX}")
        await self._fill(_LENGTH.size + length)
        data = bytes(memoryview(self._buffer)[_LENGTH.size : _LENGTH.size + length])
        del self._buffer[: _LENGTH.size + length]
        return data
