"""Reads msgpack maps in the old raw-string encoding with a limit on everything, field by field."""

import ipaddress
from functools import lru_cache

import msgpack

from mesh.gossip.wire_error import WireError

NAME_BYTES_MAX = 128
# Tags and addresses are short; user payloads are bounded by the packet they came in.
_PACKET_LENGTH_MAX = 65_536
_PACKET_ITEMS_MAX = 1_024


def pack(value: object) -> bytes:
    """`value` as msgpack with strings and bytes both as old raw, which is what go-msgpack's peers read."""
    packed = msgpack.packb(value, use_bin_type=False)
    assert isinstance(packed, bytes)
    return packed


def unpack(data: bytes) -> object:
    """The one msgpack value in `data`, a part of a datagram. Raises WireError."""
    try:
        value: object = msgpack.unpackb(
            data,
            raw=True,
            strict_map_key=True,
            object_pairs_hook=unique_keys,
            max_str_len=_PACKET_LENGTH_MAX,
            max_bin_len=_PACKET_LENGTH_MAX,
            max_array_len=_PACKET_ITEMS_MAX,
            max_map_len=_PACKET_ITEMS_MAX,
            max_ext_len=64,
        )
    except (ValueError, TypeError, OverflowError, msgpack.UnpackException) as error:
        raise WireError("msgpack", f"malformed msgpack: {error}") from error
    return value


def unique_keys(pairs: list[tuple[object, object]]) -> dict[object, object]:
    """A map from msgpack's pairs; a duplicate key, which two decoders may read differently, is a ValueError."""
    mapping = dict(pairs)
    if len(mapping) != len(pairs):
        raise ValueError("duplicate key in a map")
    return mapping


class Fields:
    """Typed access to one decoded struct: names as on the wire, absent fields read as the zero value (as in Go)."""

    __slots__ = ("_map", "_what")

    def __init__(self, what: str, value: object) -> None:
        if not isinstance(value, dict):
            raise WireError("field", f"{what} is not a map")
        self._map: dict[bytes, object] = value
        self._what = what

    def unsigned(self, name: bytes, maximum: int) -> int:
        """An integer in 0..maximum."""
        value = self._map.get(name, 0)
        if value is None:
            return 0
        if isinstance(value, bool) or not isinstance(value, int) or not 0 <= value <= maximum:
            raise WireError("field", f"{self._what}: {name.decode()} is not an integer in 0..{maximum}")
        return value

    def boolean(self, name: bytes) -> bool:
        value = self._map.get(name, False)
        if not isinstance(value, bool):
            raise WireError("field", f"{self._what}: {name.decode()} is not a boolean")
        return value

    def raw(self, name: bytes, bytes_max: int) -> bytes:
        """Bytes of at most `bytes_max`."""
        value = self._map.get(name)
        if value is None:
            return b""
        if not isinstance(value, bytes) or len(value) > bytes_max:
            raise WireError("field", f"{self._what}: {name.decode()} is not a string of at most {bytes_max} bytes")
        return value

    def name(self, name: bytes, *, optional: bool = False) -> str:
        """A member's name: 1..128 bytes of printable UTF-8 without slash or space (empty too where optional)."""
        return member_name(self.raw(name, NAME_BYTES_MAX), self._what, optional=optional)

    def address(self, name: bytes, *, optional: bool = False) -> bytes:
        """An IP address of 4 or 16 bytes, as it was sent (none where optional)."""
        value = self.raw(name, 16)
        if len(value) not in (4, 16) and not (optional and not value):
            raise WireError("field", f"{self._what}: {name.decode()} is not an IP address")
        return value

    def items(self, name: bytes, items_max: int) -> list[object]:
        value = self._map.get(name)
        if value is None:
            return []
        if not isinstance(value, list) or len(value) > items_max:
            raise WireError("field", f"{self._what}: {name.decode()} is not a list of at most {items_max} items")
        return value

    def mapping(self, name: bytes, items_max: int) -> dict[bytes, object]:
        value = self._map.get(name)
        if value is None:
            return {}
        if not isinstance(value, dict) or len(value) > items_max:
            raise WireError("field", f"{self._what}: {name.decode()} is not a map of at most {items_max} items")
        return value

    def versions(self, name: bytes) -> tuple[int, ...]:
        """Six version bytes; zeros when the peer sends none. Go sends them as a string, others as a list."""
        value = self._map.get(name)
        if isinstance(value, bytes):
            numbers = tuple(value)
        elif isinstance(value, list):
            numbers = tuple(item for item in value if isinstance(item, int) and 0 <= item <= 255)
            if len(numbers) != len(value):
                raise WireError("field", f"{self._what}: {name.decode()} holds something that is not a byte")
        elif value is None:
            numbers = ()
        else:
            raise WireError("field", f"{self._what}: {name.decode()} is not a list of versions")
        if len(numbers) > 64:
            raise WireError("field", f"{self._what}: {name.decode()} is too long")
        if len(numbers) < 6:
            return (0,) * 6
        if numbers[0] == 0 or numbers[0] > numbers[1]:
            raise WireError("versions", f"{self._what}: protocol versions {numbers[:6]} make no range")
        return numbers[:6]


def member_name(value: object, what: str, *, optional: bool = False) -> str:
    """A wire string as a member's name; raises WireError for what no member may be called."""
    if not isinstance(value, bytes) or len(value) > NAME_BYTES_MAX or not (value or optional):
        raise WireError("name", f"{what}: a member name has 1 to {NAME_BYTES_MAX} bytes")
    text = text_name(value)
    if text is None:
        raise WireError("name", f"{what}: {value[:NAME_BYTES_MAX]!r} is not a member name")
    return text


@lru_cache(maxsize=4096)
def text_name(value: bytes) -> str | None:
    """The name as text; None when it is not UTF-8 or holds a slash, a space or an unprintable character."""
    try:
        text = value.decode("utf-8")
    except UnicodeDecodeError:
        return None
    # A slash would let a name climb out of a path or split "name/address"; control characters would forge log lines.
    return text if not text or (text.isprintable() and "/" not in text and " " not in text) else None


@lru_cache(maxsize=4096)
def host_of(address: bytes) -> str:
    """Text of a 4 or 16 byte address; an IPv4 address in IPv6 clothes (Go's usual form) is told as IPv4."""
    ip = ipaddress.ip_address(address)
    if isinstance(ip, ipaddress.IPv6Address) and ip.ipv4_mapped is not None:
        return str(ip.ipv4_mapped)
    return str(ip)


def address_of(host: str) -> bytes:
    """Wire bytes of an IP address in text: 4 for IPv4, 16 for IPv6. Raises ValueError for anything else."""
    return ipaddress.ip_address(host).packed
