"""What a request is hashed by: XXH64, and hash policies compiled to one function (Envoy's rules).

XXH64 is Yann Collet's (xxHash specification 0.8, section XXH64). It is written out here because it runs once per hashed
request (about 3 us) and when a hash balancer builds its table, which does not earn a native dependency.
"""

import random
import re
from collections.abc import Callable
from struct import unpack_from

from mesh.errors import ConfigError
from mesh.http.head import RequestHead
from mesh.traffic.policy import HashPolicy

# (request, source IP as text) -> (hash or None when no policy gave one, value of a Set-Cookie to add or None)
RequestHash = Callable[[RequestHead, bytes], tuple[int | None, bytes | None]]
_Part = Callable[[RequestHead, bytes], int | None]

_MASK = 0xFFFF_FFFF_FFFF_FFFF
_PRIME_1 = 0x9E37_79B1_85EB_CA87
_PRIME_2 = 0xC2B2_AE3D_27D4_EB4F
_PRIME_3 = 0x1656_67B1_9E37_79F9
_PRIME_4 = 0x85EB_CA77_C2B2_AE63
_PRIME_5 = 0x27D4_EB2F_1656_67C5


def xxh64(data: bytes, seed: int = 0) -> int:
    """The 64-bit xxHash of `data`, as an unsigned integer."""
    length = len(data)
    at = 0
    if length >= 32:
        value, at = _stripes(data, seed)
    else:
        value = seed + _PRIME_5
    value = (value + length) & _MASK
    while at + 8 <= length:
        word = (int.from_bytes(data[at : at + 8], "little") * _PRIME_2) & _MASK
        value ^= (((word << 31) | (word >> 33)) * _PRIME_1) & _MASK
        value = (((value << 27) | (value >> 37)) & _MASK) * _PRIME_1 + _PRIME_4 & _MASK
        at += 8
    if at + 4 <= length:
        value ^= (int.from_bytes(data[at : at + 4], "little") * _PRIME_1) & _MASK
        value = (((value << 23) | (value >> 41)) & _MASK) * _PRIME_2 + _PRIME_3 & _MASK
        at += 4
    while at < length:
        value ^= (data[at] * _PRIME_5) & _MASK
        value = (((value << 11) | (value >> 53)) & _MASK) * _PRIME_1 & _MASK
        at += 1
    value ^= value >> 33
    value = value * _PRIME_2 & _MASK
    value ^= value >> 29
    value = value * _PRIME_3 & _MASK
    return value ^ (value >> 32)


def _round(lane: int, word: int) -> int:
    lane = (lane + word * _PRIME_2) & _MASK
    return (((lane << 31) | (lane >> 33)) & _MASK) * _PRIME_1 & _MASK


def _stripes(data: bytes, seed: int) -> tuple[int, int]:
    """The four lanes over all whole 32-byte stripes, merged; and how many bytes those were."""
    one, two, three, four = seed + _PRIME_1 + _PRIME_2, seed + _PRIME_2, seed, seed - _PRIME_1
    end = len(data) & ~31
    for at in range(0, end, 32):
        words = unpack_from("<4Q", data, at)
        one, two = _round(one, words[0]), _round(two, words[1])
        three, four = _round(three, words[2]), _round(four, words[3])
    value = 0
    for lane, bits in ((one, 1), (two, 7), (three, 12), (four, 18)):
        value += (lane << bits) | (lane >> (64 - bits))
    value &= _MASK
    for lane in (one, two, three, four):
        value = ((value ^ _round(0, lane)) * _PRIME_1 + _PRIME_4) & _MASK
    return value, end


# ---- hash policies

_TOKEN = re.compile(r":?[!#$%&'*+.^_`|~0-9A-Za-z-]+")  # RFC 9110 5.6.2; `:authority` and its like are names too
_COOKIE_PATH = re.compile(r"[\x20-\x3a\x3c-\x7e]*")  # RFC 6265 4.1.1 path-value


def compile_hash(policies: tuple[HashPolicy, ...], rng: random.Random) -> RequestHash:
    """One function for all policies of a target; `rng` makes the values of new cookies.

    The hash of each policy that applies is combined with the rotated hash of those before it, so that equal ones do not
    cancel out; a `terminal` policy ends the row once there is a hash. Without any hash the request goes to a random
    endpoint. Raises ConfigError for a name no request can carry, and for more than one cookie to be made.
    """
    generating = [policy for policy in policies if policy.kind == "cookie" and policy.ttl_s is not None]
    if len(generating) > 1:
        raise ConfigError(f"hash policies: {generating[0].name} and {generating[1].name} cannot both make a cookie")
    parts = tuple((_part(policy), policy.terminal, policy) for policy in policies)

    def request_hash(head: RequestHead, source_ip: bytes) -> tuple[int | None, bytes | None]:
        value: int | None = None
        set_cookie: bytes | None = None
        for part, terminal, policy in parts:
            this = part(head, source_ip)
            if this is None and policy.ttl_s is not None and policy.kind == "cookie":
                text = b"%016x" % rng.getrandbits(64)
                set_cookie = _set_cookie(policy, text)
                this = xxh64(text)
            if this is not None:
                value = this if value is None else (((value << 1) | (value >> 63)) & _MASK) ^ this
            if terminal and value is not None:
                break
        return value, set_cookie

    return request_hash


def _part(policy: HashPolicy) -> _Part:
    """The hash of what one policy looks at, or None when the request does not have it."""
    if policy.kind == "source_ip":
        return lambda _head, source_ip: xxh64(source_ip) if source_ip else None
    if policy.kind == "query":
        if not policy.name:
            raise ConfigError("hash policy: a query parameter needs a name")
        return _query_part(policy.name.encode())
    if not _TOKEN.fullmatch(policy.name):
        raise ConfigError(f"hash policy: {policy.name!r} is not the name of a {policy.kind}")
    if policy.kind == "header":
        return _header_part(policy.name.lower().encode())
    if not _COOKIE_PATH.fullmatch(policy.cookie_path):
        raise ConfigError(f"hash policy: {policy.cookie_path!r} is not a path for cookie {policy.name}")
    return _cookie_part(policy.name.encode())


def _header_part(name: bytes) -> _Part:
    match name:
        case b":authority" | b"host":
            return lambda head, _source: xxh64(head.authority)
        case b":path":
            return lambda head, _source: xxh64(head.target)
        case b":method":
            return lambda head, _source: xxh64(head.method)

    def part(head: RequestHead, _source: bytes) -> int | None:
        values = [value for candidate, value in head.headers if candidate == name]
        if not values:
            return None
        hashed = 0
        for value in sorted(values):  # several headers of one name have no order that a client can rely on
            hashed = xxh64(value, hashed)
        return hashed

    return part


def _cookie_part(name: bytes) -> _Part:
    def part(head: RequestHead, _source: bytes) -> int | None:
        for header, value in head.headers:
            if header == b"cookie" and name in value:
                for pair in value.split(b";"):
                    key, equals, text = pair.strip(b" \t").partition(b"=")
                    if equals and key == name:
                        if len(text) >= 2 and text[:1] == b'"' == text[-1:]:
                            text = text[1:-1]
                        return xxh64(text) if text else None  # an empty one is as good as none
        return None

    return part


def _query_part(name: bytes) -> _Part:
    def part(head: RequestHead, _source: bytes) -> int | None:
        if head.query is not None and name in head.query:
            for pair in head.query.split(b"&"):
                key, _, text = pair.partition(b"=")
                if key == name:
                    return xxh64(text)
        return None

    return part


def _set_cookie(policy: HashPolicy, value: bytes) -> bytes:
    """RFC 6265 4.1. Without Max-Age it lives as long as the session."""
    cookie = policy.name.encode() + b'="' + value + b'"'
    if policy.ttl_s:
        cookie += b"; Max-Age=%d" % max(1, round(policy.ttl_s))
    if policy.cookie_path:
        cookie += b"; Path=" + policy.cookie_path.encode()
    return cookie + b"; HttpOnly"
