"""The token bucket: how much it lets through, and when."""

import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mesh.proxy.rate_limit import TokenBucket
from mesh.traffic.policy import RateLimit


def bucket(now=0.0, seed=1, **policy):
    return TokenBucket(RateLimit(**policy), random.Random(seed), now=now)


def test_it_starts_full_and_refuses_when_empty():
    limit = bucket(tokens_max=3)
    assert [limit.take(0.5) for _ in range(5)] == [True, True, True, False, False]
    assert (limit.refused, limit.enforced) == (2, 2)


def test_it_fills_all_the_time_and_no_further_than_its_size():
    """Measured on Envoy: 10 tokens in 2 s come one every 0.2 s."""
    limit = bucket(now=100.0, tokens_max=10, tokens_per_fill=10, fill_interval_s=2.0)
    assert [limit.take(100.0) for _ in range(14)] == [True] * 10 + [False] * 4
    times = [100.0 + step / 10 for step in range(1, 31)]
    assert [limit.take(now) for now in times] == [False, True] * 15
    assert limit.tokens(104.0) == 5
    assert limit.tokens(10_000.0) == 10


@pytest.mark.parametrize("rate", [1, 3, 7, 1000])
def test_no_token_is_lost_however_often_it_is_looked_at(rate):
    limit = bucket(now=5e6, tokens_max=1, tokens_per_fill=rate)
    taken = sum(limit.take(5e6 + number / 8000) for number in range(8000))
    assert taken in (rate, rate + 1)


@given(
    st.integers(1, 20),
    st.integers(1, 5),
    st.sampled_from([0.25, 1.0, 4.0]),
    st.lists(st.sampled_from([0.0, 0.125, 0.5, 3.0, 50.0]), min_size=1, max_size=100),
)
def test_no_window_lets_more_through_than_the_bucket_and_its_fills(tokens_max, per_fill, interval_s, pauses):
    limit = bucket(tokens_max=tokens_max, tokens_per_fill=per_fill, fill_interval_s=interval_s)
    now, taken = 0.0, 0
    for pause in pauses:
        now += pause
        before = limit.tokens(now)
        admitted = limit.take(now)
        assert admitted == (before > 0)
        assert 0 <= limit.tokens(now) <= tokens_max
        taken += admitted
    assert taken <= tokens_max + per_fill * now / interval_s + 1e-3


@pytest.mark.parametrize("percent", [0.0, 25.0, 100.0])
def test_a_share_of_the_refusals_is_enforced(percent):
    limit = bucket(tokens_max=1, fill_interval_s=1e12, enforced_percent=percent)
    assert limit.take(0.0)
    refused = sum(not limit.take(0.0) for _ in range(4000))
    assert limit.refused == 4000
    assert limit.enforced == refused == pytest.approx(40 * percent, abs=100 if 0 < percent < 100 else 0)


def test_a_new_policy_keeps_what_was_used_up():
    limit = bucket(tokens_max=10)
    for _ in range(8):
        limit.take(0.0)
    limit.set_policy(RateLimit(tokens_max=100, tokens_per_fill=50, fill_interval_s=2.0), 0.0)
    assert limit.tokens(0.0) == 2
    assert limit.tokens(2.0) == 52
    limit.set_policy(RateLimit(tokens_max=1), 2.0)
    assert limit.tokens(2.0) == 1
