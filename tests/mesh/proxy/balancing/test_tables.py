"""Ring hash and maglev: shares, how little moves, and where the requests of a lost endpoint go."""

import random
from collections import Counter

import pytest
from endpoints import backend, backends
from hypothesis import given
from hypothesis import strategies as st

from mesh.proxy.balancing import make_balancer
from mesh.proxy.hashing import xxh64
from mesh.traffic.policy import LoadBalancing

KINDS = ("ring_hash", "maglev")
KEYS = [xxh64(b"key%d" % number) for number in range(10_000)]


def _balancer(endpoints, **policy):
    return make_balancer(endpoints, LoadBalancing(**policy), random.Random(1), now=0.0)


def _places(balancer, keys=KEYS):
    return [balancer.choose(0.0, key).id for key in keys]


def _moved(before, after):
    return sum(one != other for one, other in zip(before, after, strict=True)) / len(before)


@pytest.mark.parametrize("kind", KINDS)
def test_a_hash_leads_to_the_same_endpoint_in_every_sidecar(kind):
    endpoints = backends(7)
    before = _places(_balancer(endpoints, kind=kind))
    shuffled = random.Random(9).sample(endpoints, 7)
    again = make_balancer(shuffled, LoadBalancing(kind=kind), random.Random(77), now=5.0)
    assert _places(again) == before


@pytest.mark.parametrize("kind", KINDS)
def test_without_a_hash_requests_go_anywhere(kind):
    balancer = _balancer(backends(4), kind=kind)
    assert {balancer.choose(0.0).id for _ in range(200)} == {"e0", "e1", "e2", "e3"}


@pytest.mark.parametrize(("kind", "tolerance"), [("ring_hash", 0.35), ("maglev", 0.12)])
def test_equal_endpoints_get_equal_shares(kind, tolerance):
    counts = Counter(_places(_balancer(backends(10), kind=kind)))
    assert all(abs(counts[f"e{number}"] / len(KEYS) - 0.1) < 0.1 * tolerance for number in range(10))


@pytest.mark.parametrize(("kind", "tolerance"), [("ring_hash", 0.3), ("maglev", 0.1)])
def test_weights_are_followed(kind, tolerance):
    counts = Counter(_places(_balancer([backend(0), backend(1, weight=3), backend(2, weight=6)], kind=kind)))
    for number, share in enumerate((0.1, 0.3, 0.6)):
        assert counts[f"e{number}"] / len(KEYS) == pytest.approx(share, rel=tolerance)


def test_a_larger_ring_is_a_more_even_one():
    def spread(size):
        counts = Counter(_places(_balancer(backends(10), kind="ring_hash", ring_size_min=size)))
        return max(counts.values()) - min(counts.values())

    assert spread(65536) < spread(256)


@pytest.mark.parametrize(("kind", "most"), [("ring_hash", 2.2 / 11), ("maglev", 1.6 / 11)])
def test_little_moves_when_an_endpoint_comes_or_goes(kind, most):
    # 1/n has to. Envoy's ring has ceil(1024/n) entries for each: 103 become 94, whose requests move as well.
    ten, eleven = backends(10), backends(11)
    moved = _moved(_places(_balancer(ten, kind=kind)), _places(_balancer(eleven, kind=kind)))
    assert 0.6 / 11 < moved < most


@pytest.mark.parametrize("kind", KINDS)
def test_only_the_requests_of_an_unusable_endpoint_move_and_they_spread(kind):
    endpoints = backends(10)
    balancer = _balancer(endpoints, kind=kind)
    before = _places(balancer)
    endpoints[3].usable = False
    balancer.health_changed(0.0)
    after = _places(balancer)
    assert all(one == other for one, other in zip(before, after, strict=True) if one != "e3")
    heirs = Counter(other for one, other in zip(before, after, strict=True) if one == "e3")
    assert set(heirs) == {f"e{number}" for number in range(10)} - {"e3"}
    endpoints[3].usable = True
    balancer.health_changed(0.0)
    assert _places(balancer) == before


@pytest.mark.parametrize("kind", KINDS)
def test_a_retry_goes_where_the_request_would_go_without_the_first(kind):
    endpoints = backends(5)
    balancer = _balancer(endpoints, kind=kind)
    first = [balancer.choose(0.0, key) for key in KEYS[:500]]
    second = [balancer.choose(0.0, key, (one,)) for key, one in zip(KEYS, first, strict=False)]
    for key, one, other in zip(KEYS, first, second, strict=False):
        assert one is not other
        one.usable = False
        balancer.health_changed(0.0)
        assert balancer.choose(0.0, key) is other
        one.usable = True
        balancer.health_changed(0.0)
    assert balancer.choose(0.0, 5, endpoints) is None


def test_very_unequal_weights_do_not_make_an_endless_ring():
    light, heavy = backend(0), backend(1, weight=10_000_000)
    balancer = _balancer((light, heavy, backend(2, weight=10_000_000)), kind="ring_hash")
    assert set(_places(balancer)) == {"e1", "e2"}
    for endpoint in balancer.endpoints[1:]:
        endpoint.usable = False
    balancer.health_changed(0.0)  # a third of them: panic
    assert set(_places(balancer)) == {"e1", "e2"}
    assert balancer.choose(0.0, 1, balancer.endpoints[1:]) is light


def test_a_ring_has_at_most_the_size_it_may_have():
    endpoints = backends(10)
    assert len(set(_places(_balancer(endpoints, kind="ring_hash", ring_size_min=1, ring_size_max=4)))) <= 4
    assert len(set(_places(_balancer(endpoints, kind="ring_hash", ring_size_min=1, ring_size_max=10)))) == 10


def test_a_maglev_table_may_be_small():
    places = _places(_balancer(backends(5), kind="maglev", maglev_table_size=11))
    assert min(Counter(places).values()) > 0.1 * len(KEYS)


@given(
    st.lists(st.tuples(st.integers(1, 50), st.booleans()), min_size=1, max_size=12),
    st.sampled_from(KINDS),
    st.lists(st.integers(0, 2**64 - 1), min_size=1, max_size=20),
)
def test_every_hash_finds_a_usable_endpoint(rows, kind, hashes):
    endpoints = [backend(number, weight=weight, usable=usable) for number, (weight, usable) in enumerate(rows)]
    balancer = _balancer(endpoints, kind=kind, panic_threshold=0.0, maglev_table_size=101, ring_size_min=32)
    for value in hashes:
        chosen = balancer.choose(0.0, value)
        assert chosen is balancer.choose(0.0, value)
        assert chosen.usable if any(usable for _, usable in rows) else chosen is None
