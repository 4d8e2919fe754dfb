"""Names that cross module borders: what is a valid node, service and datacenter name, and SPIFFE IDs."""

import re

import msgspec

from mesh.errors import InvalidIdentity

# RFC 1123 label, as the DNS interface needs it; names outside it still work, but not in DNS.
_DATACENTER = re.compile(r"[a-z0-9_-]{1,64}", re.ASCII)
_NODE_NAME = re.compile(r"[A-Za-z0-9._-]{1,128}", re.ASCII)
_SPIFFE_HOST = re.compile(r"[a-z0-9._-]{1,255}", re.ASCII)
_SPIFFE_SEGMENT = re.compile(r"[A-Za-z0-9._-]+", re.ASCII)

SPIFFE_ID_BYTES_MAX = 2048  # SPIFFE ID specification, section 2.3
SERVICE_NAME_BYTES_MAX = 255
_NAMESPACE = "default"  # the only namespace there is; the segment keeps Consul's identities readable
_UPPER_TO_LOWER = {code: code + 32 for code in range(ord("A"), ord("Z") + 1)}


def fold(name: str) -> str:
    """The form in which node, service and check names are compared: ASCII letters in lower case.

    Only ASCII, because what other letters fold to depends on the Unicode version of the running Python, and servers
    must not differ.
    """
    return name.lower() if name.isascii() else name.translate(_UPPER_TO_LOWER)


def is_datacenter_name(name: str) -> bool:
    """Whether the name is lower-case letters, digits, `-` and `_`, 64 bytes at most."""
    return _DATACENTER.fullmatch(name) is not None


def is_node_name(name: str) -> bool:
    """Whether the name is safe in gossip, DNS, paths and logs: letters, digits, `.`, `_`, `-`, 128 bytes at most."""
    return _NODE_NAME.fullmatch(name) is not None and name not in (".", "..")


class SpiffeId(msgspec.Struct, frozen=True):
    """A parsed SPIFFE ID: trust domain (lower case) and path segments."""

    trust_domain: str
    path: tuple[str, ...]

    def __str__(self) -> str:
        return "/".join((f"spiffe://{self.trust_domain}", *self.path))

    @property
    def service(self) -> str | None:
        """The service this identity speaks for, or None when it is an agent's or a server's."""
        match self.path:
            case ("ns", "default", "dc", _, "svc", service):
                return service  # intentions name services without a namespace: another's `web` is not ours
        return None

    @property
    def datacenter(self) -> str | None:
        """The datacenter named in the path, or None when there is none."""
        match self.path:
            case ("ns", _, "dc", datacenter, "svc", _):
                return datacenter
            case ("agent", "client", "dc", datacenter, "id", _) | ("agent", "server", "dc", datacenter):
                return datacenter
        return None


def parse_spiffe_id(text: str) -> SpiffeId:
    """The ID in a URI. Raises InvalidIdentity unless it is exactly what the SPIFFE ID specification section 2 allows:
    scheme `spiffe`, a lower-case trust domain with no port or user, a non-empty path of plain segments, no query,
    fragment or percent-encoding.
    """
    if len(text) > SPIFFE_ID_BYTES_MAX:
        raise InvalidIdentity(f"SPIFFE ID of {len(text)} bytes is longer than {SPIFFE_ID_BYTES_MAX}")
    scheme, separator, rest = text.partition("://")
    if scheme != "spiffe" or not separator:
        raise InvalidIdentity(f"{text!r} is not a SPIFFE ID: its scheme is not spiffe")
    trust_domain, *path = rest.split("/")
    if _SPIFFE_HOST.fullmatch(trust_domain) is None:
        raise InvalidIdentity(f"{text!r} has no valid trust domain")
    if not path or any(_SPIFFE_SEGMENT.fullmatch(part) is None or part in (".", "..") for part in path):
        raise InvalidIdentity(f"{text!r} has no valid path")
    return SpiffeId(trust_domain, tuple(path))


def service_spiffe_id(trust_domain: str, datacenter: str, service: str) -> SpiffeId:
    """The identity of a service: `spiffe://<td>/ns/default/dc/<dc>/svc/<service>`."""
    return SpiffeId(trust_domain, ("ns", _NAMESPACE, "dc", datacenter, "svc", service))


def agent_spiffe_id(trust_domain: str, datacenter: str, node: str) -> SpiffeId:
    """The identity of a client agent: `spiffe://<td>/agent/client/dc/<dc>/id/<node>`."""
    return SpiffeId(trust_domain, ("agent", "client", "dc", datacenter, "id", node))


def server_spiffe_id(trust_domain: str, datacenter: str) -> SpiffeId:
    """The identity shared by the servers of a datacenter: `spiffe://<td>/agent/server/dc/<dc>`."""
    return SpiffeId(trust_domain, ("agent", "server", "dc", datacenter))
