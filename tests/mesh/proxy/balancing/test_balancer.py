"""Which endpoints a balancer lets its policy choose among: health, panic, priorities, localities, tries, subsets."""

import random
from collections import Counter
from typing import get_args

import pytest
from endpoints import backend, backends
from hypothesis import given
from hypothesis import strategies as st

from mesh.errors import ConfigError
from mesh.proxy.balancing import make_balancer, select
from mesh.proxy.sidecar_config import (
    EndpointConfig,
    OutboundListener,
    SidecarConfig,
    TargetConfig,
    WorkerConfig,
    check,
)
from mesh.traffic.policy import BalancerKind, HashPolicy, LoadBalancing, SlowStart

KINDS = get_args(BalancerKind)
HASHING = ("ring_hash", "maglev")
every_kind = pytest.mark.parametrize("kind", KINDS)


def _balancer(endpoints, seed=1, locality="", **policy):
    return make_balancer(
        endpoints, LoadBalancing(maglev_table_size=1009, **policy), random.Random(seed), now=0.0, locality=locality
    )


def _chosen(balancer, count=3000, tried=()):
    rng = random.Random(5)
    return Counter(balancer.choose(0.0, rng.getrandbits(64), tried) for _ in range(count))


def _share(chosen, endpoints):
    return sum(chosen[endpoint] for endpoint in endpoints) / sum(chosen.values())


# ---- health


@every_kind
def test_nobody_is_chosen_from_nobody(kind):
    assert _balancer((), kind=kind).choose(0.0, 1) is None
    assert _balancer((), kind=kind).choose(0.0, 1, backends(1)) is None


@every_kind
def test_everyone_who_is_usable_gets_requests_and_nobody_else(kind):
    endpoints = backends(6)
    endpoints[2].usable = False
    balancer = _balancer(endpoints, kind=kind)
    assert set(_chosen(balancer)) == {*endpoints} - {endpoints[2]}
    endpoints[2].usable, endpoints[4].usable = True, False
    balancer.health_changed(1.0)
    assert set(_chosen(balancer)) == {*endpoints} - {endpoints[4]}


@every_kind
def test_below_the_panic_threshold_everyone_is_used(kind):
    endpoints = backends(5)
    for endpoint in endpoints[:3]:
        endpoint.usable = False
    assert set(_chosen(_balancer(endpoints, kind=kind))) == {*endpoints}
    assert set(_chosen(_balancer(endpoints, kind=kind, panic_threshold=40.0))) == {*endpoints[3:]}


@every_kind
def test_without_panic_and_without_health_there_is_no_answer(kind):
    endpoints = [backend(number, usable=False) for number in range(3)]
    assert _balancer(endpoints, kind=kind, panic_threshold=0.0).choose(0.0, 1) is None
    assert _balancer(endpoints, kind=kind).choose(0.0, 1) is not None


# ---- priorities and nearness


@every_kind
def test_load_spills_over_to_the_next_priority(kind):
    first, second = backends(10), [backend(100 + number, priority=1) for number in range(10)]
    balancer = _balancer(first + second, kind=kind)
    assert _share(_chosen(balancer), first) == 1.0
    for endpoint in first[:5]:
        endpoint.usable = False
    balancer.health_changed(0.0)
    chosen = _chosen(balancer)
    assert _share(chosen, first) == pytest.approx(0.70, abs=0.04)
    assert set(chosen) == {*first[5:], *second}
    for endpoint in first:
        endpoint.usable = False
    balancer.health_changed(0.0)
    assert _share(_chosen(balancer), second) == 1.0


@pytest.mark.parametrize("kind", HASHING)
def test_spilling_is_a_matter_of_the_hash_not_of_the_moment(kind):
    first, second = backends(4, usable=False), [backend(100 + number, priority=1) for number in range(4)]
    first[0].usable = first[1].usable = True
    balancer = _balancer(first + second, kind=kind)
    for value in range(200):
        assert len({balancer.choose(0.0, value * 7919) for _ in range(5)}) == 1


@every_kind
def test_near_endpoints_are_preferred_and_far_ones_take_over(kind):
    zone = backends(4, locality="eu/a")
    region = [backend(10 + number, locality="eu/b/rack2") for number in range(4)]
    elsewhere = [backend(20 + number, locality="us/a") for number in range(4)]
    balancer = _balancer(elsewhere + region + zone, kind=kind, locality="eu/a/rack1")
    assert len(_chosen(balancer)) == 12  # the policy does not ask for it
    policy = LoadBalancing(kind=kind, locality="prefer")
    balancer = make_balancer(elsewhere + region + zone, policy, random.Random(1), now=0.0, locality="eu/a/rack1")
    assert _share(_chosen(balancer), zone) == 1.0
    for endpoint in zone[:2]:
        endpoint.usable = False
    balancer.health_changed(0.0)
    assert _share(_chosen(balancer), zone) == pytest.approx(0.7, abs=0.04)
    assert _share(_chosen(balancer), region) == pytest.approx(0.3, abs=0.04)
    for endpoint in zone + region:
        endpoint.usable = False
    balancer.health_changed(0.0)
    assert _share(_chosen(balancer), elsewhere) == 1.0


def test_priority_comes_before_nearness():
    far, near = backend(0, locality="us/a"), backend(1, locality="eu/a", priority=1)
    policy = LoadBalancing(locality="prefer")
    balancer = make_balancer((far, near), policy, random.Random(1), now=0.0, locality="eu/a")
    assert set(_chosen(balancer)) == {far}


def _located(kind, **policy):
    eu, us = backends(4, locality="eu/a"), [backend(10 + number, locality="us/a") for number in range(4)]
    balancing = LoadBalancing(kind=kind, locality="weighted", locality_weights=(("eu", 90), ("us", 10)), **policy)
    return eu, us, make_balancer(eu + us, balancing, random.Random(1), now=0.0)


@every_kind
def test_locality_weights_share_the_load(kind):
    eu, us, balancer = _located(kind)
    chosen = _chosen(balancer, 6000)
    assert _share(chosen, us) == pytest.approx(0.1, abs=0.035 if kind == "ring_hash" else 0.015)
    assert set(chosen) == {*eu, *us}


@pytest.mark.parametrize("kind", sorted(set(KINDS) - set(HASHING)))
def test_an_unwell_locality_takes_less(kind):
    eu, us, balancer = _located(kind)
    eu[0].usable = eu[1].usable = False
    balancer.health_changed(0.0)
    chosen = _chosen(balancer, 6000)
    assert _share(chosen, us) == pytest.approx(10 / (10 + 90 * 0.7), abs=0.02)
    assert set(chosen) == {*eu[2:], *us}


@every_kind
def test_localities_without_a_weight_are_used_only_when_nothing_else_is(kind):
    eu, other = backends(2, locality="eu/a"), backend(9, locality="us/a")
    policy = LoadBalancing(kind=kind, locality="weighted", locality_weights=(("eu", 1),), panic_threshold=0.0)
    balancer = make_balancer((*eu, other), policy, random.Random(1), now=0.0)
    assert set(_chosen(balancer)) == {*eu}
    assert balancer.choose(0.0, 7, eu) is other
    for endpoint in eu:
        endpoint.usable = False
    balancer.health_changed(0.0)
    assert set(_chosen(balancer)) == {other}


@every_kind
def test_weights_that_fit_no_endpoint_are_as_good_as_none(kind):
    endpoints = backends(3, locality="eu/a")
    balancer = _balancer(endpoints, kind=kind)
    policy = LoadBalancing(kind=kind, locality="weighted", locality_weights=(("us", 1),), maglev_table_size=1009)
    assert set(_chosen(make_balancer(endpoints, policy, random.Random(1), now=0.0))) == set(_chosen(balancer))


# ---- tries


@every_kind
def test_tried_endpoints_are_passed_over_until_none_is_left(kind):
    one, two, three = backends(3)
    balancer = _balancer((one, two, three), kind=kind)
    assert set(_chosen(balancer, tried=(one,))) == {two, three}
    assert set(_chosen(balancer, tried=(one, two))) == {three}
    assert set(_chosen(balancer, tried=(three, one, two))) == {None}
    assert _balancer((one,), kind=kind).choose(0.0, 1) is one


@every_kind
def test_a_retry_does_not_go_to_an_unusable_endpoint(kind):
    endpoints = backends(4)
    endpoints[3].usable = False
    assert set(_chosen(_balancer(endpoints, kind=kind), tried=endpoints[:3])) == {None}


@every_kind
def test_when_a_priority_has_been_tried_the_next_one_is(kind):
    first, second = backend(0), backend(1, priority=1)
    assert _balancer((first, second), kind=kind).choose(0.0, 1, (first,)) is second


def test_endpoints_of_an_earlier_set_among_the_tried_do_not_matter():
    gone, here = backends(2)
    assert _balancer((here,)).choose(0.0, None, (gone,)) is here


# ---- whatever the set

_ROWS = st.lists(
    st.tuples(
        st.integers(1, 10),  # weight
        st.integers(0, 2),  # priority
        st.booleans(),  # usable
        st.sampled_from(["", "eu/a", "eu/b", "us/a"]),
        st.floats(-50.0, 0.0),  # joined
    ),
    max_size=12,
)


@given(
    rows=_ROWS,
    later=st.lists(st.booleans(), min_size=12, max_size=12),
    kind=st.sampled_from(KINDS),
    locality=st.sampled_from(["ignore", "prefer", "weighted"]),
    panic_threshold=st.sampled_from([0.0, 50.0]),
    slow_start=st.sampled_from([None, SlowStart(window_s=30.0)]),
    tried_mask=st.lists(st.booleans(), min_size=12, max_size=12),
    seed=st.integers(0, 2**32),
)
def test_no_choice_is_unusable_outside_panic_or_tried_or_missing(
    rows, later, kind, locality, panic_threshold, slow_start, tried_mask, seed
):
    rng = random.Random(seed)
    endpoints = [
        backend(number, weight=weight, priority=priority, usable=usable, locality=where, joined_at=joined_at)
        for number, (weight, priority, usable, where, joined_at) in enumerate(rows)
    ]
    policy = LoadBalancing(
        kind=kind,
        locality=locality,
        locality_weights=(("eu", 3), ("us", 0)),
        panic_threshold=panic_threshold,
        slow_start=slow_start,
        maglev_table_size=101,
        ring_size_min=16,
    )
    balancer = make_balancer(endpoints, policy, rng, now=0.0, locality="eu/a")
    for change in ([endpoint.usable for endpoint in endpoints], later):
        for endpoint, usable in zip(endpoints, change, strict=False):
            endpoint.usable = usable
        balancer.health_changed(1.0)
        unwell = any(not endpoint.usable for endpoint in endpoints)
        panic_possible = panic_threshold > 0.0 and unwell
        for _ in range(5):
            chosen = balancer.choose(1.0, rng.getrandbits(64))
            assert chosen is None or (chosen in endpoints and (chosen.usable or panic_possible))
            assert (chosen is None) == (not any(endpoint.usable for endpoint in endpoints) and not panic_possible) or (
                not endpoints
            )
            tried = [endpoint for endpoint, is_tried in zip(endpoints, tried_mask, strict=False) if is_tried]
            again = balancer.choose(1.0, rng.getrandbits(64), tried)
            assert again not in tried
            if any(endpoint.usable and endpoint not in tried for endpoint in endpoints):
                assert again is not None


@given(rows=_ROWS.filter(bool), seed=st.integers(0, 2**32))
def test_a_level_in_panic_is_one_that_envoy_would_have_in_panic(rows, seed):
    endpoints = [
        backend(number, priority=priority, usable=usable) for number, (_, priority, usable, _, _) in enumerate(rows)
    ]
    healths, threshold_passed = [], {}
    for level in sorted({endpoint.priority for endpoint in endpoints}):
        members = [endpoint for endpoint in endpoints if endpoint.priority == level]
        share = 100 * sum(endpoint.usable for endpoint in members) / len(members)
        healths.append(min(100, int(1.4 * share + 1e-9)))
        threshold_passed[level] = share >= 50
    balancer = make_balancer(endpoints, LoadBalancing(kind="random"), random.Random(seed), now=0.0)
    for _ in range(50):
        chosen = balancer.choose(0.0)
        if not chosen.usable:
            assert sum(healths) < 100
            assert not threshold_passed[chosen.priority]


def test_what_was_removed_is_never_chosen_by_the_new_set():
    endpoints = backends(5)
    for kind in KINDS:
        _balancer(endpoints, kind=kind)
        assert endpoints[0] not in _chosen(_balancer(endpoints[1:], kind=kind))


# ---- making one


def test_a_policy_that_cannot_work_makes_no_balancer():
    with pytest.raises(ConfigError, match="choice_count"):
        make_balancer(backends(2), LoadBalancing(choice_count=0), random.Random(1), now=0.0)


def test_subsets_are_chosen_by_metadata():
    one = EndpointConfig("1", "10.0.0.1", 80, metadata=(("version", "v1"), ("stage", "prod")))
    two = EndpointConfig("2", "10.0.0.2", 80, metadata=(("version", "v2"), ("stage", "prod")))
    bare = EndpointConfig("3", "10.0.0.3", 80)
    every = (one, two, bare)
    assert select(every, ()) == every
    assert select(every, (("stage", "prod"),)) == (one, two)
    assert select(every, (("version", "v2"), ("stage", "prod"))) == (two,)
    assert select(every, (("version", "v3"),)) == ()


@pytest.mark.parametrize(
    "policy", [LoadBalancing(maglev_table_size=10), LoadBalancing(hash_policies=(HashPolicy("header", "a b"),))]
)
def test_a_worker_is_not_given_a_policy_that_cannot_work(policy):
    good = TargetConfig("web", ("spiffe://t/web",))
    bad = TargetConfig("web-v2", ("spiffe://t/web",), load_balancing=policy)
    listener = OutboundListener("127.0.0.1", 9000, good, targets=(bad,))
    sidecar = SidecarConfig(
        "p1", "shop", "dc1", "t", "spiffe://t/shop", "chain", "key", ("root",), outbound=(listener,)
    )
    with pytest.raises(ConfigError, match=r"sidecar p1, target web-v2: .*(prime|name of a header)"):
        check(WorkerConfig(1, (sidecar,)))
