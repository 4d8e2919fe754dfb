"""Listening sockets: bound once, then passed on from worker to worker for as long as their listener exists.

Each worker of a host has a socket of its own on every address (SO_REUSEPORT): the kernel spreads new connections over
them by a hash. A socket that is closed takes the connections with it that wait in it to be accepted, so none is closed
while its listener is configured: the agent keeps a copy of every one, and a worker that follows another gets the very
same sockets.
"""

import socket
from collections.abc import Iterable, Mapping, Sequence

from mesh.errors import ConfigError
from mesh.proxy.resources import ListenerKey

BACKLOG = 4096  # the kernel caps it at net.core.somaxconn


def listen(key: ListenerKey, *, alongside: bool = False) -> socket.socket:
    """A non-blocking listening socket. With `alongside` there already are some of ours on that address.

    Raises ConfigError naming the address when it cannot be bound: without `alongside` also when any other program
    (another agent of the same user, say) listens there.
    """
    sock = socket.socket(socket.AF_INET6 if ":" in key.address else socket.AF_INET, socket.SOCK_STREAM)
    try:
        sock.settimeout(0)
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        if alongside:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        sock.bind((key.address, key.port))
        # Only after bind: a socket that may share its port from the start would join a stranger's without an error.
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        sock.listen(BACKLOG)
    except OSError as error:
        sock.close()
        raise ConfigError(f"cannot listen on {key.address} port {key.port}: {error.strerror or error}") from error
    return sock


class SocketTable:
    """The agent's copies, for each of its workers' places."""

    def __init__(self, places: int) -> None:
        self._places: list[dict[ListenerKey, socket.socket]] = [{} for _ in range(places)]

    def of(self, place: int) -> Mapping[ListenerKey, socket.socket]:
        """The sockets of one place."""
        return self._places[place]

    def bind(self, keys: Iterable[ListenerKey], places: Sequence[int]) -> tuple[tuple[int, ListenerKey], ...]:
        """Binds what is missing in some places, those with a worker: what nobody accepts is not to wait anywhere.
        Returns what was bound. Raises ConfigError, with everything as it was.
        """
        bound: list[tuple[int, ListenerKey]] = []
        try:
            for key in sorted(keys):
                alongside = any(key in place for place in self._places)
                for number in places:
                    place = self._places[number]
                    if key not in place:
                        place[key] = listen(key, alongside=alongside)
                        bound.append((number, key))
                        alongside = True
        except ConfigError:
            self.close(bound)
            raise
        return tuple(bound)

    def put(self, place: int, sockets: Mapping[ListenerKey, socket.socket]) -> None:
        """Takes over copies of a worker's sockets."""
        for key, sock in sockets.items():
            former = self._places[place].pop(key, None)
            if former is not None:
                former.close()
            self._places[place][key] = sock

    def close(self, bound: Iterable[tuple[int, ListenerKey]]) -> None:
        """Closes our copies of single sockets; those that are gone already are passed over."""
        for number, key in bound:
            sock = self._places[number].pop(key, None)
            if sock is not None:
                sock.close()

    def keep_only(self, keys: Iterable[ListenerKey]) -> None:
        """Closes our copies for addresses that are no longer served."""
        kept = set(keys)
        self.close([(number, key) for number, place in enumerate(self._places) for key in set(place) - kept])

    def close_place(self, place: int) -> None:
        """Closes all of one place: with no worker there, its share of connections is to go to the others."""
        self.close([(place, key) for key in list(self._places[place])])

    def close_all(self) -> None:
        """Closes every copy; the workers' own stay."""
        for number in range(len(self._places)):
            self.close_place(number)
