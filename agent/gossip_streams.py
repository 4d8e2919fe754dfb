"""Gossip messages over TCP: one request, one reply, read within limits on time and memory."""

import os
import socket
from collections.abc import Callable

import trio

from agent.addresses import Address
from mesh.errors import Unreachable
from mesh.gossip.stream import StreamDecoder, StreamMessage
from mesh.gossip.wire_error import WireError

# What all unfinished stream messages together may hold: room for three states of the largest size that one may have,
# so that a crowd of senders which never finish cannot fill the memory.
STREAM_BUFFER_BYTES_MAX = 64 * 1024 * 1024
_READ_BYTES = 65_536
# Parsing more than this takes milliseconds, so a worker thread does it.
_INLINE_PARSE_BYTES = 256 * 1024


class GossipStreams:
    """Reads the stream messages of one agent; together its unfinished ones hold at most STREAM_BUFFER_BYTES_MAX."""

    def __init__(self, make_decoder: Callable[[], StreamDecoder]) -> None:
        self._make_decoder = make_decoder
        self._parse_limiter = trio.CapacityLimiter(1)
        self.buffered_bytes = 0

    async def exchange(self, endpoint: Address, request: bytes, timeout_s: float) -> StreamMessage:
        """Connects, writes, reads one message. Raises Unreachable or WireError."""
        host, port = endpoint
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        try:
            with trio.fail_after(timeout_s), trio.socket.socket(family, socket.SOCK_STREAM) as raw:
                await raw.connect((host, port))
                stream = trio.SocketStream(raw)
                await stream.send_all(request)
                return await self.read_message(stream)
        except trio.TooSlowError as error:
            raise Unreachable(f"no answer within {timeout_s:g} s") from error
        except trio.BrokenResourceError as error:
            raise Unreachable(f"the connection broke: {error.__cause__ or error}") from error
        except OSError as error:
            raise Unreachable(os.strerror(error.errno) if error.errno else str(error)) from error

    async def read_message(self, stream: trio.SocketStream) -> StreamMessage:
        """One whole message. Raises WireError, or Unreachable when the stream ends before it."""
        decoder = self._make_decoder()
        held = 0
        try:
            while True:
                data = await stream.receive_some(_READ_BYTES)
                if not data:
                    raise Unreachable("the peer closed the connection before its message was whole")
                held += len(data)
                self.buffered_bytes += len(data)
                if self.buffered_bytes > STREAM_BUFFER_BYTES_MAX:
                    raise WireError(
                        "stream-memory", "too much unfinished gossip state is held already; try again later"
                    )
                if decoder.received_bytes + len(data) > _INLINE_PARSE_BYTES:
                    message = await trio.to_thread.run_sync(decoder.feed, bytes(data), limiter=self._parse_limiter)
                else:
                    message = decoder.feed(bytes(data))
                if message is not None:
                    return message
        finally:
            self.buffered_bytes -= held
