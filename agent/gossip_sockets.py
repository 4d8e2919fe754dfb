"""Where gossip listens, and whom the addresses to join mean."""

import errno
import os
import socket

import trio

from agent.addresses import Address, join_address, split_address
from mesh.errors import ConfigError, Unreachable

# The kernel holds what arrives while the loop is busy.
_RECEIVE_BUFFER_BYTES = 2 * 1024 * 1024
_BIND_ATTEMPTS = 10


def bind_sockets(host: str, port: int, *, backlog: int) -> tuple[socket.socket, socket.socket]:
    """UDP and TCP sockets on one port, a free one for port 0; TCP listens. Raises ConfigError naming the address."""
    for attempt in range(_BIND_ATTEMPTS):
        try:
            tcp = _bound_socket(host, port, socket.SOCK_STREAM)
        except OSError as error:
            raise ConfigError(_bind_failure(host, port, "TCP", error)) from error
        bound_port = tcp.getsockname()[1]
        try:
            udp = _bound_socket(host, bound_port, socket.SOCK_DGRAM)
        except OSError as error:
            tcp.close()
            # A free TCP port may be taken for UDP: with port 0 there are others.
            if port == 0 and error.errno == errno.EADDRINUSE and attempt + 1 < _BIND_ATTEMPTS:
                continue
            raise ConfigError(_bind_failure(host, bound_port, "UDP", error)) from error
        tcp.listen(backlog)
        return udp, tcp
    raise AssertionError("unreachable: the last attempt returns or raises")


def _bound_socket(host: str, port: int, kind: socket.SocketKind) -> socket.socket:
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    created = socket.socket(family, kind)
    try:
        if kind == socket.SOCK_STREAM:
            # A restarted agent gets its port back while old connections are in TIME_WAIT.
            created.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        else:
            created.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, _RECEIVE_BUFFER_BYTES)
        created.settimeout(0)
        created.bind((host, port))
    except BaseException:
        created.close()
        raise
    return created


def _bind_failure(host: str, port: int, kind: str, error: OSError) -> str:
    what = os.strerror(error.errno) if error.errno else str(error)
    where = f"{join_address((host, port))} ({kind})"
    return f"cannot listen for gossip on {where}: {what}; free the port or set -bind or -serf-lan-port"


async def resolve(address: str, *, default_port: int, timeout_s: float) -> list[Address]:
    """The endpoints that `host`, `host:port` or `[v6]:port` names. Raises Unreachable."""
    endpoint = split_address(address, default_port=default_port)
    if endpoint is None:
        raise Unreachable(f"{address!r} is not host, host:port or [v6]:port")
    host, port = endpoint
    try:
        with trio.fail_after(timeout_s):
            found = await trio.socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
    except (OSError, UnicodeError) as error:
        raise Unreachable(f"the name does not resolve: {error}") from error
    except trio.TooSlowError as error:
        raise Unreachable("the name did not resolve in time") from error
    return list(dict.fromkeys((str(info[4][0]), int(info[4][1])) for info in found))
