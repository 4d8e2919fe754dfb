"""The gate per endpoint: shut after failures, one request on probation, open after its success."""

import random

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from mesh.proxy.probation import ProbationGate, outcome_of
from mesh.traffic.policy import Probation

INFINITE = float("inf")


def gate(now=0.0, seed=1, **policy):
    return ProbationGate(Probation(**{"jitter_ratio": 0.0, **policy}), random.Random(seed), now=now)


def tell(tested, *outcomes, now=0.0):
    """Tells outcomes of ordinary requests; returns whether each changed `usable`."""
    return [tested.ended(outcome, now) for outcome in outcomes]


def shut(now=0.0, **policy):
    tested = gate(now, **policy)
    assert any(tell(tested, *["failure"] * 7, now=now))
    return tested


def test_the_seventh_failure_in_a_row_shuts_it():
    tested = gate()
    assert tell(tested, *["failure"] * 6, "success", *["failure"] * 6) == [False] * 13
    assert tested.usable
    assert tell(tested, "failure") == [True]
    assert (tested.state, tested.usable, tested.wakes_at) == ("shut", False, 1.0)


def test_after_the_penalty_one_request_is_admitted_and_opens_it():
    tested = shut()
    assert not tested.wake(0.999)
    assert tested.wake(1.0)
    assert (tested.state, tested.usable, tested.wakes_at) == ("probation", True, INFINITE)
    assert tested.began()
    assert not tested.usable
    assert not tested.began()  # a balancer in panic sends another: it decides nothing
    assert not tested.ended("success", 1.1, probe=False)
    assert tested.ended("success", 1.2, probe=True)
    assert (tested.state, tested.usable) == ("open", True)


def test_failures_on_probation_double_the_penalty_up_to_the_maximum():
    tested = shut()
    penalties, now = [tested.wakes_at], 0.0
    for _ in range(8):
        now = tested.wakes_at
        assert tested.wake(now)
        assert tested.began()
        assert not tested.ended("failure", now, probe=True)
        penalties.append(tested.wakes_at - now)
    assert penalties == [1.0, 2.0, 4.0, 8.0, 16.0, 32.0, 60.0, 60.0, 60.0]


def test_a_success_forgets_earlier_penalties():
    tested = shut()
    for outcome in ("failure", "success"):
        now = tested.wakes_at
        tested.wake(now)
        tested.began()
        tested.ended(outcome, now, probe=True)
    tell(tested, *["failure"] * 7, now=100.0)
    assert tested.wakes_at == 101.0


def test_jitter_adds_up_to_half_and_never_passes_the_maximum():
    first = [shut(seed=seed, jitter_ratio=0.5).wakes_at for seed in range(300)]
    assert 1.0 <= min(first) < 1.05
    assert 1.45 < max(first) < 1.5
    assert {shut(seed=seed, jitter_ratio=0.5, penalty_min_s=60.0).wakes_at for seed in range(20)} == {60.0}


def test_late_answers_to_a_shut_gate_are_ignored():
    tested = shut()
    assert tell(tested, *["success"] * 10, *["failure"] * 10) == [False] * 20
    assert (tested.state, tested.wakes_at) == ("shut", 1.0)


def test_a_request_on_probation_that_went_away_makes_room_for_another():
    tested = shut()
    assert not tested.withdrawn()
    tested.wake(1.0)
    assert not tested.withdrawn()  # none is under way
    assert tested.began()
    assert tested.withdrawn()
    assert tested.usable
    assert tested.began()


# ---- success rate


def test_a_low_success_rate_shuts_it_once_there_are_five_requests():
    tested = gate(failures=100, success_rate_min=0.8)
    assert tell(tested, "failure", "success", "success", "failure") == [False] * 4
    assert tell(tested, "success") == [True]  # 3 of 5


def test_a_success_rate_at_the_minimum_is_enough():
    tested = gate(failures=100, success_rate_min=0.8)
    assert tell(tested, "failure", *["success"] * 4, "failure", *["success"] * 4) == [False] * 5 + [True] + [False] * 4


def test_the_window_forgets_what_is_older_than_ten_seconds():
    tested = gate(failures=100, success_rate_min=0.8)
    tell(tested, *["failure"] * 4, now=0.5)
    assert tell(tested, *["failure"] * 4, now=10.0) == [False] * 4  # the first bucket is gone
    assert tell(tested, "failure", now=10.9) == [True]


def test_limited_responses_count_only_for_the_success_rate():
    plain = gate()
    assert tell(plain, *["limited"] * 50) == [False] * 50
    assert tell(plain, *["failure"] * 6, "limited", "failure") == [False] * 8
    rated = gate(success_rate_min=0.8)
    assert tell(rated, *["limited"] * 5) == [False] * 4 + [True]


@pytest.mark.parametrize(("success_rate_min", "opens"), [(0.0, True), (0.8, False)])
def test_a_limited_response_on_probation_fails_it_when_success_rate_counts(success_rate_min, opens):
    tested = shut(success_rate_min=success_rate_min)
    now = tested.wakes_at
    tested.wake(now)
    tested.began()
    assert tested.ended("limited", now, probe=True) is opens
    assert tested.usable is opens


def test_the_first_penalty_is_at_least_what_a_limited_endpoint_asked_for():
    tested = gate(success_rate_min=0.8)
    for asked in (3.0, 40.0, 7.0, 0.0, 0.0):
        tested.ended("limited", 0.0, asked_s=asked)
    assert tested.wakes_at == 40.0
    tested.wake(40.0)
    tested.began()
    tested.ended("limited", 40.0, probe=True)
    assert tested.wakes_at == 42.0


def test_an_open_gate_starts_with_an_empty_window():
    tested = gate(failures=100, success_rate_min=0.8)
    tell(tested, *["failure"] * 5)
    tested.wake(1.0)
    tested.began()
    tested.ended("success", 1.0, probe=True)
    assert tell(tested, *["failure"] * 4, now=1.0) == [False] * 4


def test_no_failures_in_a_row_are_too_many_when_turned_off():
    tested = gate(failures=0)
    assert not any(tell(tested, *["failure"] * 100))


def test_a_new_policy_takes_over_with_the_state():
    tested = shut()
    tested.set_policy(Probation(failures=1, success_rate_min=0.5), 0.5)
    assert tested.state == "shut"
    tested.wake(1.0)
    tested.began()
    tested.ended("success", 1.0, probe=True)
    assert tell(tested, "failure", now=1.0) == [True]


@pytest.mark.parametrize(
    ("status", "grpc_status", "outcome"),
    [
        (200, None, "success"),
        (404, None, "success"),
        (429, None, "limited"),
        (500, None, "failure"),
        (503, None, "failure"),
        (200, b"0", "success"),
        (200, b"5", "success"),
        (200, b"8", "limited"),
        (200, b"4", "failure"),
        (200, b"7", "failure"),
        (200, b"13", "failure"),
        (200, b"14", "failure"),
        (200, b"15", "failure"),
    ],
)
def test_outcomes(status, grpc_status, outcome):
    assert outcome_of(status, grpc_status) == outcome


class Machine(RuleBasedStateMachine):
    """Any order of requests and time: one request on probation at most, and the gate never stays shut for ever."""

    @initialize(success_rate_min=st.sampled_from([0.0, 0.8]))
    def start(self, success_rate_min):
        self.now = 0.0
        self.gate = gate(failures=2, success_rate_min=success_rate_min, jitter_ratio=0.5)
        self.usable = True
        self.flying = []  # whether each request under way is on probation

    def _heard(self, changed):
        if changed:
            self.usable = self.gate.usable

    @rule(panic=st.booleans())
    def send(self, panic):
        if self.gate.usable or panic:
            self.flying.append(self.gate.began())
            self.usable = self.gate.usable  # the sender sees that itself

    @rule(index=st.integers(0, 9), outcome=st.sampled_from(["success", "failure", "limited"]))
    def answer(self, index, outcome):
        if self.flying:
            probe = self.flying.pop(index % len(self.flying))
            self._heard(self.gate.ended(outcome, self.now, probe=probe))

    @rule(index=st.integers(0, 9))
    def leave(self, index):
        if self.flying and self.flying.pop(index % len(self.flying)):
            self._heard(self.gate.withdrawn())

    @rule(passed_s=st.sampled_from([0.0, 0.5, 1.0, 5.0, 60.0]))
    def wait(self, passed_s):
        self.now += passed_s
        if self.now >= self.gate.wakes_at:
            self._heard(self.gate.wake(self.now))

    @invariant()
    def consistent(self):
        assert self.usable == self.gate.usable
        assert sum(self.flying) <= 1
        if not self.gate.usable:
            assert self.gate.wakes_at <= self.now + 60.0 or sum(self.flying) == 1
        assert (self.gate.state == "shut") == (self.gate.wakes_at != INFINITE)


TestAnyOrder = Machine.TestCase
TestAnyOrder.settings = settings(max_examples=60, stateful_step_count=40, deadline=None)
