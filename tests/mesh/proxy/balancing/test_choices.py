"""What each policy makes of a healthy set: shares, load and speed."""

import random
from collections import Counter

import pytest
from endpoints import backend, backends
from hypothesis import given
from hypothesis import strategies as st

from mesh.errors import ConfigError
from mesh.proxy.balancing import PeakEwma, check_policy, make_balancer
from mesh.traffic.policy import LoadBalancing, SlowStart


def _balancer(endpoints, seed=1, **policy):
    return make_balancer(endpoints, LoadBalancing(**policy), random.Random(seed), now=0.0)


def _shares(balancer, count, now=0.0):
    chosen = Counter(balancer.choose(now).id for _ in range(count))
    return [chosen[endpoint.id] / count for endpoint in balancer.endpoints]


# ---- round robin


def test_round_robin_takes_turns():
    balancer = _balancer(backends(3), kind="round_robin")
    chosen = [balancer.choose(0.0).id for _ in range(9)]
    assert chosen[:3] == chosen[3:6] == chosen[6:]
    assert sorted(chosen[:3]) == ["e0", "e1", "e2"]


def test_round_robins_do_not_all_begin_with_the_same_endpoint():
    endpoints = backends(5)
    assert len({_balancer(endpoints, seed, kind="round_robin").choose(0.0) for seed in range(40)}) == 5


@given(st.lists(st.integers(1, 20), min_size=2, max_size=8), st.integers(0, 1000))
def test_weighted_round_robin_is_never_more_than_a_turn_off(weights, seed):
    endpoints = [backend(number, weight=weight) for number, weight in enumerate(weights)]
    balancer = _balancer(endpoints, seed, kind="round_robin")
    chosen = Counter()
    for turn in range(1, 3 * sum(weights) + 1):
        chosen[balancer.choose(0.0)] += 1
        for endpoint in endpoints:
            assert abs(chosen[endpoint] - turn * endpoint.weight / sum(weights)) <= len(weights)
    for endpoint in endpoints:
        assert abs(chosen[endpoint] - 3 * endpoint.weight) <= 1


def test_heavy_endpoints_do_not_come_in_runs():
    balancer = _balancer([backend(0, weight=5), backend(1, weight=5), backend(2)], kind="round_robin")
    text = "".join(balancer.choose(0.0).id[1] for _ in range(110))
    assert "000" not in text
    assert text.count("2") == 10


# ---- random


def test_random_follows_weights():
    balancer = _balancer([backend(0), backend(1, weight=3), backend(2, weight=6)], kind="random")
    assert _shares(balancer, 20_000) == pytest.approx([0.1, 0.3, 0.6], abs=0.015)


# ---- least request


@pytest.mark.parametrize("choice_count", [2, 3])
def test_of_two_the_less_busy_is_always_taken(choice_count):
    busy, idle = backend(0, active=5), backend(1)
    balancer = _balancer((busy, idle), choice_count=choice_count)
    assert {balancer.choose(0.0) for _ in range(100)} == {idle}


@pytest.mark.parametrize("choice_count", [2, 3, 50])
def test_equally_busy_ones_share_evenly(choice_count):
    balancer = _balancer(backends(10), choice_count=choice_count)
    assert _shares(balancer, 20_000) == pytest.approx([0.1] * 10, abs=0.015)


def test_more_choices_find_an_idle_endpoint_more_often():
    endpoints = [backend(number, active=0 if number == 0 else 3) for number in range(20)]
    found = [_shares(_balancer(endpoints, choice_count=count), 5000)[0] for count in (2, 5, 20)]
    assert found[0] == pytest.approx(2 / 20, abs=0.02)
    assert found[1] == pytest.approx(1 - (19 / 20) ** 5, abs=0.03)
    assert found[2] == 1.0


def test_two_choices_keep_load_even_where_one_endpoint_is_slow():
    rng = random.Random(4)
    endpoints = backends(10)
    balancer = _balancer(endpoints)
    for _ in range(5000):
        balancer.choose(0.0).active += 1
        for index, endpoint in enumerate(endpoints):
            if endpoint.active and rng.random() < (0.01 if index == 0 else 0.2):
                endpoint.active -= 1
    assert endpoints[0].active < 40  # it finishes one in a hundred steps: a blind choice would leave some 450 there


def test_unequal_weights_share_by_weight_when_nobody_is_busy():
    balancer = _balancer([backend(0), backend(1, weight=9)])
    assert _shares(balancer, 1000) == pytest.approx([0.1, 0.9], abs=0.002)


def test_unequal_weights_give_way_to_load_by_the_bias():
    def share(bias):
        return _shares(
            _balancer([backend(0, weight=2), backend(1, weight=4, active=3)], active_request_bias=bias), 6000
        )

    assert share(0.0) == pytest.approx([1 / 3, 2 / 3], abs=0.002)
    assert share(1.0) == pytest.approx([2 / 3, 1 / 3], abs=0.002)  # 2 against 4/4
    assert share(2.0) == pytest.approx([8 / 9, 1 / 9], abs=0.002)  # 2 against 4/16


# ---- peak EWMA


def test_a_slower_answer_counts_at_once_and_a_faster_one_by_and_by():
    ewma = PeakEwma(decay_s=10.0, initial_s=0.03, now=0.0)
    ewma.observe(1.0, 0.0)
    assert ewma.read(0.0) == 1.0
    ewma.observe(0.1, 10.0)
    assert ewma.read(10.0) == pytest.approx(1.0 / 2.71828 + 0.1 * (1 - 1 / 2.71828), rel=1e-4)
    ewma.observe(2.0, 10.0)
    assert ewma.read(10.0) == 2.0


def test_reading_decays_and_changes_nothing():
    ewma = PeakEwma(decay_s=10.0, initial_s=0.03, now=0.0)
    assert ewma.read(10.0) == pytest.approx(0.03 / 2.71828, rel=1e-4)
    assert ewma.read(10.0) == ewma.read(10.0)
    assert ewma.read(0.0) == 0.03


@given(st.lists(st.tuples(st.floats(0.0, 100.0), st.floats(0.0, 60.0)), max_size=30))
def test_the_estimate_stays_between_nothing_and_the_worst_seen(samples):
    ewma, now = PeakEwma(decay_s=10.0, initial_s=0.03, now=0.0), 0.0
    for rtt_s, pause_s in samples:
        now += pause_s
        ewma.observe(rtt_s, now)
        assert ewma.read(now) >= rtt_s * (1 - 2.72 ** (-pause_s / 10.0)) * 0.99
    assert 0.0 <= ewma.read(now) <= max([0.03, *(rtt_s for rtt_s, _ in samples)]) * 1.0000001


def test_the_quicker_of_two_is_taken_until_it_has_too_much_in_flight():
    slow, quick = (backend(number, ewma=PeakEwma(10.0, 0.03, 0.0)) for number in range(2))
    slow.ewma.observe(0.5, 0.0)
    quick.ewma.observe(0.1, 0.0)
    balancer = _balancer((slow, quick), kind="peak_ewma")
    assert {balancer.choose(0.0) for _ in range(50)} == {quick}
    quick.active = 5  # six times 0.1 s against 0.5 s
    assert {balancer.choose(0.0) for _ in range(50)} == {slow}


def test_weights_count_against_the_cost():
    light, heavy = backend(0, active=1), backend(1, weight=3, active=2)
    balancer = _balancer((light, heavy), kind="peak_ewma")  # nothing measured yet: 2 against 3/3
    assert {balancer.choose(0.0) for _ in range(50)} == {heavy}


# ---- slow start

WARM_UP = SlowStart(window_s=100.0)


@pytest.mark.parametrize("kind", ["round_robin", "least_request"])
@pytest.mark.parametrize(("age_s", "factor"), [(0.0, 0.1), (5.0, 0.1), (25.0, 0.25), (50.0, 0.5), (100.0, 1.0)])
def test_a_new_endpoints_share_grows_with_its_age(kind, age_s, factor):
    old, new = backend(0), backend(1, joined_at=1000.0)
    now = 1000.0 + age_s
    balancer = make_balancer((old, new), LoadBalancing(kind=kind, slow_start=WARM_UP), random.Random(1), now=now)
    # Two plain choices by load are a coin toss while nobody is busy.
    assert _shares(balancer, 4000, now)[1] == pytest.approx(
        factor / (1 + factor), abs=0.03 if age_s == 100.0 else 0.002
    )


def test_aggression_makes_the_beginning_quicker():
    old, new = backend(0), backend(1, joined_at=0.0)
    policy = LoadBalancing(kind="round_robin", slow_start=SlowStart(window_s=100.0, aggression=2.0))
    balancer = make_balancer((old, new), policy, random.Random(1), now=25.0)
    assert _shares(balancer, 4000, 25.0)[1] == pytest.approx(0.5 / 1.5, abs=0.002)


def test_age_belongs_to_the_endpoint_and_outlives_a_change_of_the_set():
    endpoints = [backend(0), backend(1, joined_at=0.0)]
    policy = LoadBalancing(kind="round_robin", slow_start=WARM_UP)
    before = make_balancer(endpoints, policy, random.Random(1), now=0.0)
    assert before.choose(0.0) is not None
    after = make_balancer([*endpoints, backend(2)], policy, random.Random(1), now=50.0)
    assert _shares(after, 5000, 50.0) == pytest.approx([0.4, 0.2, 0.4], abs=0.002)


def test_the_ramp_ends_by_itself():
    old, new = backend(0), backend(1, joined_at=0.0)
    balancer = make_balancer(
        (old, new), LoadBalancing(kind="round_robin", slow_start=WARM_UP), random.Random(1), now=1.0
    )
    assert _shares(balancer, 1100, 1.0)[1] == pytest.approx(1 / 11, abs=0.002)
    assert _shares(balancer, 1000, 100.0)[1] == 0.5


# ---- policies that cannot work


@pytest.mark.parametrize(
    "policy",
    [
        LoadBalancing(choice_count=1),
        LoadBalancing(active_request_bias=-1.0),
        LoadBalancing(ring_size_min=10, ring_size_max=9),
        LoadBalancing(ring_size_min=0),
        LoadBalancing(maglev_table_size=65536),
        LoadBalancing(maglev_table_size=5000113),
        LoadBalancing(panic_threshold=101.0),
        LoadBalancing(overprovisioning=0.9),
        LoadBalancing(ewma_decay_s=0.0),
        LoadBalancing(locality_weights=(("eu", -1),)),
        LoadBalancing(slow_start=SlowStart(window_s=0.0)),
        LoadBalancing(slow_start=SlowStart(window_s=1.0, aggression=0.0)),
        LoadBalancing(slow_start=SlowStart(window_s=1.0, min_percent=101.0)),
    ],
)
def test_a_policy_that_cannot_work_is_refused_by_name(policy):
    with pytest.raises(ConfigError, match="load balancing: "):
        check_policy(policy)
