"""How a connection between two agents begins, for calls and for Raft messages alike."""

import socket
import ssl

import trio

from agent.addresses import Address, join_address
from agent.reasons import reason_of
from agent.rpc.frames import PREFACE_BYTES, Purpose, close_quietly, parse_preface, preface, receive_exactly
from mesh.errors import MeshError, ProtocolError, Unreachable

CONNECT_DEADLINE_S = 5.0
IN_FLIGHT_MAX = 4096  # open calls per connection; a blocking query is one for minutes
RECONNECT_S_MIN = 0.05
RECONNECT_S_MAX = 2.0
_USER_TIMEOUT_MS = 10_000  # unacknowledged bytes for this long break the connection (Linux)


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
    try:
        with trio.fail_after(CONNECT_DEADLINE_S):
            plain = await trio.open_tcp_stream(*address)
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
        cause = error if isinstance(error, OSError) else error.__cause__ or error
        reason = "no answer in time" if isinstance(error, trio.TooSlowError) else reason_of(cause)
        raise Unreachable(f"no RPC connection to {join_address(address)}: {reason}") from error
    except BaseException:
        if stream is not None:
            await close_quietly(stream)
        raise
    return stream


def leaves_of(error: BaseException) -> list[BaseException]:
    """The errors of a group, of its groups, and so on; of any other error itself."""
    if isinstance(error, BaseExceptionGroup):
        return [leaf for child in error.exceptions for leaf in leaves_of(child)]
    return [error]
