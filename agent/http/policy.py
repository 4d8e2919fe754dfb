"""Which requests a browser on this host may not make for a page from elsewhere.

An agent listens on loopback, and without ACLs whoever reaches it may do anything. Two kinds of page could reach it
through a browser: one whose name was rebound to 127.0.0.1 (its requests carry its own name in Host), and any page at
all with a request that needs no preflight (it carries Origin). Other clients are not meant to notice either rule.
"""

from collections.abc import Collection
from functools import lru_cache
from ipaddress import ip_address

# Names below these can be registered by nobody in the public DNS, so no page can be served from them by rebinding.
_PRIVATE_SUFFIXES = (".localhost", ".local", ".internal", ".consul", ".lan", ".test", ".home.arpa", ".cluster.local")
_WRITING = frozenset(("PUT", "POST", "DELETE"))


def host_allowed(authority: str, allowed: Collection[str]) -> bool:
    """Whether a Host value may address an agent on a loopback address.

    Allowed: IP addresses, single-label names (`localhost`, a container's or host's short name), names under suffixes
    that are never public, and `allowed` (lower case, without port). An empty Host is HTTP/1.0: no browser sends it.
    """
    host = _host(authority)
    if not host or host in allowed or "." not in host or host.endswith(_PRIVATE_SUFFIXES):
        return True
    return _is_ip_address(host)


def origin_allowed(method: str, origin: str | None, authority: str) -> bool:
    """Whether a request that may write comes from a page of this very server, or from no page at all."""
    if origin is None or method not in _WRITING:
        return True
    _, separator, host = origin.partition("://")
    return bool(separator) and host.lower() == authority.lower()


@lru_cache(maxsize=256)  # callers send the same few over and over
def _is_ip_address(host: str) -> bool:
    try:
        ip_address(host)
    except ValueError:
        return False
    return True


@lru_cache(maxsize=256)
def _host(authority: str) -> str:
    """The host of `host`, `host:port` or `[v6]:port`, in lower case, without brackets and final dot."""
    if authority.startswith("["):
        return authority[1:].partition("]")[0]
    return authority.partition(":")[0].lower().removesuffix(".")
