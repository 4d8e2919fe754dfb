"""Circuit breakers: what is refused, and what is counted."""

import pytest

from mesh.proxy.breaker import Breaker
from mesh.proxy.retry_budget import ConcurrencyBudget, TokenBudget
from mesh.proxy.sidecar_config import LimitsConfig


def breaker(connections=2, pending=2, requests=2, retries=2):
    return Breaker(LimitsConfig(connections, pending, requests, retries))


@pytest.mark.parametrize(("take", "count"), [("take_request", "requests"), ("take_pending", "pending")])
def test_requests_are_refused_at_the_limit_and_admitted_again_below_it(take, count):
    circuit = breaker()
    assert [getattr(circuit, take)() for _ in range(4)] == [True, True, False, False]
    assert (getattr(circuit, count), circuit.pending_overflow) == (2, 2)
    setattr(circuit, count, 1)
    assert getattr(circuit, take)()


def test_an_endpoint_may_always_have_one_connection():
    """Envoy with one connection allowed over two hosts serves from both."""
    circuit = breaker(connections=1)
    assert circuit.take_connection(0)
    assert circuit.take_connection(0)  # of the other endpoint
    assert not circuit.take_connection(1)
    assert (circuit.connections, circuit.connection_overflow) == (2, 2)
    assert circuit.remaining_connections == 0


def test_retries_have_a_limit_of_their_own():
    circuit = breaker()
    assert [circuit.take_retry(0.0) for _ in range(3)] == [True, True, False]
    assert (circuit.retries, circuit.retry_overflow) == (2, 1)
    circuit.retry_ended(0.0)
    assert circuit.take_retry(0.0)


def test_a_budget_replaces_the_limit_of_retries():
    circuit = Breaker(LimitsConfig(retries_max=1), ConcurrencyBudget(20.0, 0))
    assert not circuit.take_retry(0.0)
    for _ in range(10):
        assert circuit.take_request()
    assert [circuit.take_retry(0.0) for _ in range(3)] == [True, True, False]
    assert circuit.retry_overflow == 2


def test_requests_are_told_to_a_budget_only_when_it_counts_them():
    circuit = Breaker(LimitsConfig(), ConcurrencyBudget(20.0, 3))
    assert circuit.deposit is None
    circuit.set_limits(LimitsConfig(), TokenBudget(0.5, 0.0, 10.0, now=0.0))
    assert not circuit.take_retry(0.0)
    circuit.deposit(0.0)
    circuit.deposit(0.0)
    assert circuit.take_retry(0.0)
    circuit.set_limits(LimitsConfig())
    assert circuit.deposit is None


def test_defaults_are_envoys():
    circuit = Breaker(LimitsConfig())
    assert (circuit.remaining_connections, circuit.remaining_pending, circuit.remaining_requests) == (1024, 1024, 1024)
    assert [circuit.take_retry(0.0) for _ in range(4)] == [True, True, True, False]


def test_limits_that_shrink_refuse_until_enough_is_over():
    circuit = breaker(requests=4)
    for _ in range(4):
        assert circuit.take_request()
    circuit.set_limits(LimitsConfig(2, 2, 2, 2))
    assert circuit.remaining_requests == 0
    circuit.requests -= 2
    assert not circuit.take_request()
    circuit.requests -= 1
    assert circuit.take_request()
