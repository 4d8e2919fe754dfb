"""Which address of this host other agents reach when the configuration names none."""

import fcntl
import ipaddress
import socket
import struct

from mesh.errors import ConfigError

_SIOCGIFADDR = 0x8915  # Linux, <linux/sockios.h>
_DOCUMENTATION_ADDRESS = ("192.0.2.1", 9)  # RFC 5737; a UDP connect sends nothing


def advertised_address() -> str:
    """The address of the default route, else the first private IPv4 address of an interface.

    Raises ConfigError when the host has neither.
    """
    candidates = [*_default_route_address(), *_interface_addresses()]
    for address in candidates:
        if ipaddress.ip_address(address).is_private:
            return address
    if candidates:
        return candidates[0]
    raise ConfigError("no address to advertise to other agents was found: set -advertise or -bind")


def _default_route_address() -> list[str]:
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        try:
            probe.connect(_DOCUMENTATION_ADDRESS)
        except OSError:
            return []
        address: str = probe.getsockname()[0]
        return [] if ipaddress.ip_address(address).is_loopback else [address]


def _interface_addresses() -> list[str]:
    """IPv4 addresses by interface index, without loopback ones."""
    addresses: list[str] = []
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        for _, name in sorted(socket.if_nameindex()):
            try:
                reply = fcntl.ioctl(probe.fileno(), _SIOCGIFADDR, struct.pack("256s", name.encode()[:15]))
            except OSError:
                continue  # no IPv4 address on it
            address = socket.inet_ntoa(reply[20:24])
            if not ipaddress.ip_address(address).is_loopback:
                addresses.append(address)
    return addresses
