"""How many retries each budget admits."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mesh.proxy.retry_budget import ConcurrencyBudget, FixedBudget, TokenBudget, make_budget
from mesh.traffic.policy import RetryBudget


def admitted(budget, now=0.0, *, most=10_000):
    """How many retries in a row it pays for."""
    count = 0
    while count < most and budget.may_retry(now, 0, 0, 0):
        count += 1
    return count


def deposit(budget, now, times=1):
    for _ in range(times):
        budget.request_began(now)


# ---- Envoy's


@pytest.mark.parametrize(
    ("active", "pending", "most"),
    [(0, 0, 3), (19, 0, 3), (20, 0, 4), (10, 10, 4), (24, 0, 4), (25, 0, 5), (500, 500, 200)],
)
def test_a_fifth_of_the_requests_at_hand_may_be_retries_and_always_three(active, pending, most):
    budget = ConcurrencyBudget(20.0, 3)
    assert budget.retries_max(active, pending) == most
    assert budget.may_retry(0.0, active, pending, most - 1)
    assert not budget.may_retry(0.0, active, pending, most)


def test_a_minimum_of_none_stops_retries_of_an_idle_target():
    assert not ConcurrencyBudget(20.0, 0).may_retry(0.0, 4, 0, 0)
    assert ConcurrencyBudget(20.0, 0).may_retry(0.0, 5, 0, 0)


def test_the_circuit_breakers_bound_does_not_know_the_load():
    budget = FixedBudget(3)
    assert [budget.may_retry(0.0, 1000, 1000, retrying) for retrying in range(5)] == [True, True, True, False, False]


# ---- tower's


def test_an_empty_budget_pays_for_nothing():
    assert admitted(TokenBudget(1.0, 0.0, 1.0, now=0.0)) == 0


def test_the_reserve_is_there_without_requests():
    assert admitted(TokenBudget(1.0, 5.0, 1.0, now=0.0)) == 5
    assert admitted(TokenBudget(0.2, 10.0, 10.0, now=0.0)) == 100


@pytest.mark.parametrize(
    ("ratio", "requests", "retries"),
    [
        (0.1, 10, 1),
        (0.1, 9, 0),
        (0.2, 100, 20),
        (1.0, 7, 7),
        (2.0, 3, 6),
        (0.0, 1000, 0),
        (0.3, 9, 3),
        (1000.0, 1, 1000),
    ],
)
def test_each_request_pays_for_a_share_of_a_retry(ratio, requests, retries):
    budget = TokenBudget(ratio, 0.0, 10.0, now=0.0)
    deposit(budget, 0.0, requests)
    assert admitted(budget) == retries


def test_without_a_ratio_only_the_reserve_is_spent():
    budget = TokenBudget(0.0, 2.0, 10.0, now=0.0)
    deposit(budget, 0.0, 100)
    assert admitted(budget) == 20


def test_a_deposit_is_gone_long_after_its_time():
    budget = TokenBudget(1.0, 0.0, 1.0, now=0.0)
    deposit(budget, 0.0)
    assert admitted(budget, 3.0) == 0


def test_slots_expire_one_by_one():
    """tower's own example of how slots expire."""
    budget = TokenBudget(0.5, 0.0, 1.0, now=0.0)
    deposit(budget, 0.0, 2)
    now = 0.901
    assert budget.may_retry(now, 0, 0, 0)
    now += 2.001
    deposit(budget, now)
    now += 0.301
    deposit(budget, now)
    now += 0.801
    deposit(budget, now)
    assert budget.may_retry(now, 0, 0, 0)  # the first is gone, the second and third pay


def test_what_was_withdrawn_comes_back_with_time():
    budget = TokenBudget(1.0, 5.0, 1.0, now=0.0)
    assert admitted(budget, 0.0) == 5
    assert admitted(budget, 0.5) == 0
    assert admitted(budget, 2.5) == 5


@pytest.mark.parametrize("ttl_s", [0.5, 61.0])
def test_a_time_to_live_outside_its_bounds_is_refused(ttl_s):
    with pytest.raises(ValueError, match="ttl_s"):
        TokenBudget(0.2, 10.0, ttl_s, now=0.0)


class Tower:
    """tower's bookkeeping step by step: as many slots are cleared as there were windows, without a bound."""

    def __init__(self, ttl_s):
        self.window, self.slots, self.index, self.writer, self.time = ttl_s / 10, [0] * 10, 0, 0, 0.0

    def expire(self, now):
        left = now - self.time
        if left < self.window:
            return
        self.slots[self.index] = self.writer
        self.writer = 0
        index = (self.index + 1) % 10
        while left > self.window:
            self.slots[index] = 0
            left -= self.window
            index = (index + 1) % 10
        self.index, self.time = index, now


@given(
    st.lists(
        st.tuples(st.sampled_from(["deposit", "withdraw"]), st.sampled_from([0, 0, 1, 3, 64, 100, 128, 500, 6400])),
        max_size=80,
    )
)
def test_balances_equal_towers_after_any_sequence(steps):
    ttl_s = 8.0  # windows of 0.8 s; steps are in 1/128 s, so that floats are exact enough to compare
    budget, tower = TokenBudget(0.25, 0.0, ttl_s, now=0.0), Tower(ttl_s)
    now = 0.0
    for action, step in steps:
        now += step / 128
        if action == "deposit":
            budget.request_began(now)
            tower.expire(now)
            tower.writer += 1
        else:
            tower.expire(now)
            enough = tower.writer + sum(tower.slots) >= 4
            assert budget.may_retry(now, 0, 0, 0) is enough
            tower.writer -= 4 * enough
        assert budget.balance(now) == tower.writer + sum(tower.slots)


# ---- which


def test_a_policy_takes_the_place_of_the_circuit_breaker():
    assert isinstance(make_budget(None, 3, now=0.0), FixedBudget)
    concurrency = make_budget(RetryBudget(percent=50.0, min_concurrency=1), 3, now=0.0)
    assert concurrency.may_retry(0.0, 20, 0, 9)
    assert not concurrency.may_retry(0.0, 20, 0, 10)
    tokens = make_budget(RetryBudget(kind="tokens", min_retries_per_s=1.0, ttl_s=2.0), 3, now=0.0)
    assert admitted(tokens) == 2
    for budget in (make_budget(None, 3, now=0.0), concurrency, tokens):
        budget.request_began(0.0)
        budget.request_ended(0.0)
        budget.retry_ended(0.0)
        assert budget.may_retry(100.0, 20, 0, 0)
