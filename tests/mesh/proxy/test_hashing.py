"""XXH64 against its published vectors; hash policies as Envoy reads and combines them."""

import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mesh.errors import ConfigError
from mesh.http.head import RequestHead
from mesh.proxy.hashing import compile_hash, xxh64
from mesh.traffic.policy import HashPolicy

PRIME_32 = 2654435761
PRIME_64 = 11400714785074694797


def _sanity_buffer(length: int) -> bytes:
    """The buffer of xxHash's own sanity check."""
    value, data = PRIME_32, bytearray()
    for _ in range(length):
        data.append(value >> 56)
        value = value * PRIME_64 % 2**64
    return bytes(data)


@pytest.mark.parametrize(
    ("length", "seed", "expected"),
    [
        (0, 0, 0xEF46DB3751D8E999),
        (0, PRIME_32, 0xAC75FDA2929B17EF),
        (1, 0, 0xE934A84ADB052768),
        (1, PRIME_32, 0x5014607643A9B4C3),
        (4, 0, 0x9136A0DCA57457EE),
        (14, 0, 0x8282DCC4994E35C8),
        (14, PRIME_32, 0xC3BD6BF63DEB6DF0),
        (222, 0, 0xB641AE8CB691C174),
        (222, PRIME_32, 0x20CB8AB7AE10C14A),
    ],
)
def test_xxh64_gives_the_published_values(length, seed, expected):
    assert xxh64(_sanity_buffer(length), seed) == expected


def test_xxh64_of_short_texts():
    assert xxh64(b"a") == 0xD24EC4F1A98C6E5B
    assert xxh64(b"abc") == 0x44BC2CF5AD770999


@given(st.binary(max_size=200), st.integers(0, 2**64 - 1))
def test_xxh64_fits_64_bits_and_sees_every_byte(data, seed):
    value = xxh64(data, seed)
    assert 0 <= value < 2**64
    for at in range(len(data)):
        assert xxh64(data[:at] + bytes([data[at] ^ 1]) + data[at + 1 :], seed) != value


# ---- policies


def _head(*headers, path=b"/", query=None, authority=b"web.mesh"):
    return RequestHead(method=b"GET", path=path, query=query, authority=authority, headers=headers)


def _hash(policies, head, source_ip=b"10.0.0.9", seed=1):
    return compile_hash(tuple(policies), random.Random(seed))(head, source_ip)


def _rotated(value: int) -> int:
    return (value << 1 | value >> 63) % 2**64


def test_a_header_is_hashed_and_its_absence_is_no_hash():
    policy = HashPolicy("header", "X-User")
    assert _hash([policy], _head((b"x-user", b"ann"))) == (xxh64(b"ann"), None)
    assert _hash([policy], _head()) == (None, None)


def test_several_values_of_a_header_hash_the_same_in_any_order():
    policy = HashPolicy("header", "x-user")
    one = _hash([policy], _head((b"x-user", b"b"), (b"x-user", b"a")))
    assert one == _hash([policy], _head((b"x-user", b"a"), (b"x-user", b"b")))
    assert one == (xxh64(b"b", xxh64(b"a")), None)


def test_pseudo_headers_are_read_from_the_request_line():
    head = _head(path=b"/a", query=b"b=1")
    assert _hash([HashPolicy("header", ":path")], head)[0] == xxh64(b"/a?b=1")
    assert _hash([HashPolicy("header", "Host")], head)[0] == xxh64(b"web.mesh")
    assert _hash([HashPolicy("header", ":method")], head)[0] == xxh64(b"GET")


def test_source_ip_is_hashed_without_its_port():
    assert _hash([HashPolicy("source_ip")], _head()) == (xxh64(b"10.0.0.9"), None)
    assert _hash([HashPolicy("source_ip")], _head(), b"") == (None, None)


@pytest.mark.parametrize(
    ("query", "expected"),
    [
        (b"a=1&user=ann&user=bob", b"ann"),
        (b"user=", b""),
        (b"user", b""),
        (b"users=1&xuser=2", None),
        (b"", None),
        (None, None),
    ],
)
def test_the_first_value_of_a_query_parameter_is_hashed(query, expected):
    value, _ = _hash([HashPolicy("query", "user")], _head(query=query))
    assert value == (None if expected is None else xxh64(expected))


@pytest.mark.parametrize(
    ("cookies", "expected"),
    [
        ((b"a=1; sid=xyz; sid=other",), b"xyz"),
        ((b"a=1", b'sid="xyz"'), b"xyz"),
        ((b"sid=",), None),
        ((b'sid=""; a=1',), None),
        ((b"xsid=1; sidx=2; a=sid",), None),
        ((b"sid",), None),
    ],
)
def test_a_cookie_is_found_among_others(cookies, expected):
    value, set_cookie = _hash([HashPolicy("cookie", "sid")], _head(*((b"cookie", text) for text in cookies)))
    assert value == (None if expected is None else xxh64(expected))
    assert set_cookie is None


def test_a_missing_cookie_is_made_and_leads_back_to_the_same_hash():
    policy = HashPolicy("cookie", "sid", ttl_s=90.0, cookie_path="/shop")
    value, set_cookie = _hash([policy], _head())
    name, _, rest = set_cookie.partition(b"=")
    text, *attributes = rest.split(b"; ")
    assert name == b"sid"
    assert attributes == [b"Max-Age=90", b"Path=/shop", b"HttpOnly"]
    assert _hash([policy], _head((b"cookie", b"sid=" + text)), seed=2) == (value, None)


def test_a_session_cookie_has_no_age_and_every_client_gets_its_own():
    request_hash = compile_hash((HashPolicy("cookie", "sid", ttl_s=0.0),), random.Random(1))
    made = [request_hash(_head(), b"10.0.0.9") for _ in range(100)]
    assert len({value for value, _ in made}) == 100
    assert all(cookie.endswith(b'"; HttpOnly') and b"Max-Age" not in cookie for _, cookie in made)


def test_policies_are_combined_so_that_equal_ones_do_not_cancel_out():
    user, source = HashPolicy("header", "x-user"), HashPolicy("source_ip")
    head = _head((b"x-user", b"ann"))
    ann, nine = xxh64(b"ann"), xxh64(b"10.0.0.9")
    assert _hash([user, source], head)[0] == _rotated(ann) ^ nine
    assert _hash([user, user], head)[0] == _rotated(ann) ^ ann != 0
    assert _hash([user, source], _head())[0] == nine


def test_a_terminal_policy_ends_the_row_only_when_there_is_a_hash():
    user, source = HashPolicy("header", "x-user", terminal=True), HashPolicy("source_ip")
    assert _hash([user, source], _head((b"x-user", b"ann")))[0] == xxh64(b"ann")
    assert _hash([user, source], _head())[0] == xxh64(b"10.0.0.9")


def test_no_cookie_is_made_past_a_terminal_policy():
    policies = [HashPolicy("source_ip", terminal=True), HashPolicy("cookie", "sid", ttl_s=1.0)]
    assert _hash(policies, _head())[1] is None


@pytest.mark.parametrize(
    "policies",
    [
        (HashPolicy("header", ""),),
        (HashPolicy("header", "a b"),),
        (HashPolicy("cookie", "a;b"),),
        (HashPolicy("cookie", "a\r\nset-cookie: b"),),
        (HashPolicy("cookie", "sid", ttl_s=1.0, cookie_path="/; Domain=evil"),),
        (HashPolicy("cookie", "sid", ttl_s=1.0, cookie_path="/\r\n"),),
        (HashPolicy("query", ""),),
        (HashPolicy("cookie", "a", ttl_s=1.0), HashPolicy("cookie", "b", ttl_s=1.0)),
    ],
)
def test_policies_that_cannot_work_are_refused(policies):
    with pytest.raises(ConfigError, match="hash polic"):
        compile_hash(policies, random.Random(1))


@given(
    st.lists(st.tuples(st.sampled_from([b"cookie", b"x-user"]), st.binary(max_size=40)), max_size=4),
    st.none() | st.binary(max_size=40),
)
def test_any_bytes_can_be_hashed(headers, query):
    policies = (HashPolicy("cookie", "s"), HashPolicy("header", "x-user"), HashPolicy("query", "s"))
    value, set_cookie = _hash(policies, _head(*headers, query=query), b"")
    assert set_cookie is None
    assert value is None or 0 <= value < 2**64
