"""Host names among endpoint addresses, resolved beside the traffic: a lookup on the reactor would stop everyone."""

import ipaddress
import logging
import socket

import trio

_LOG = logging.getLogger("mesh.dataplane")

REFRESH_INTERVAL_S = 5.0  # Envoy's default for DNS clusters
LOOKUP_TIMEOUT_S = 5.0
NAMES_MAX = 1024  # of one configuration; the rest stays unresolved


def is_ip(address: str) -> bool:
    """Whether it is an IP address already."""
    try:
        ipaddress.ip_address(address)
    except ValueError:
        return False
    return True


class Names:
    """Keeps the addresses of a set of names fresh. The last answer stays while lookups fail."""

    def __init__(self) -> None:
        self._wanted: tuple[str, ...] = ()
        self._known: dict[str, str] = {"localhost": "127.0.0.1"}
        self._failed: set[str] = set()
        self._changed = trio.Event()

    def want(self, addresses: set[str]) -> None:
        """From now on these are looked up; those that are IP addresses need no lookup."""
        names = sorted(address for address in addresses if not is_ip(address) and address != "localhost")
        self._wanted = tuple(names[:NAMES_MAX])
        self._known = {name: ip for name, ip in self._known.items() if name in names or name == "localhost"}
        self._changed.set()

    def address_of(self, address: str) -> str:
        """The IP address to connect to. Raises OSError while a name has none."""
        if address in self._known:
            return self._known[address]
        if is_ip(address):
            return address
        raise OSError(f"no address is known for the name {address}")

    async def run(self) -> None:
        """Looks names up until cancelled."""
        while True:
            for name in self._wanted:
                await self._look_up(name)
            with trio.move_on_after(REFRESH_INTERVAL_S if self._wanted else float("inf")):
                await self._changed.wait()
            self._changed = trio.Event()

    async def _look_up(self, name: str) -> None:
        reason = "no answer in time"
        with trio.move_on_after(LOOKUP_TIMEOUT_S):
            try:
                found = await trio.socket.getaddrinfo(name, None, type=socket.SOCK_STREAM)
            except OSError as error:
                reason = error.strerror or str(error)
            else:
                self._known[name] = str(found[0][4][0])
                self._failed.discard(name)
                return
        if name not in self._failed:
            self._failed.add(name)
            _LOG.warning("the endpoint name %s cannot be resolved: %s", name, reason)
