"""Linkerd's experiment: one of twenty servers is slow, callers wait a second. Who notices, and how soon?"""

import random
from heapq import heappop, heappush

import pytest
from endpoints import backends

from mesh.proxy.balancing import PeakEwma, make_balancer
from mesh.traffic.policy import LoadBalancing

SERVERS = 20
REQUESTS = 20_000
REQUESTS_PER_S = 200.0
TIMEOUT_S = 1.0


def success_rate(kind: str, seed: int) -> float:
    """The share of requests that one balancer gets answered in time."""
    rng = random.Random(seed)
    endpoints = backends(SERVERS)
    for endpoint in endpoints:
        endpoint.ewma = PeakEwma(decay_s=10.0, initial_s=0.03, now=0.0)
    balancer = make_balancer(endpoints, LoadBalancing(kind=kind), rng, now=0.0)
    ends: list[tuple[float, int, float, int]] = []
    now, answered = 0.0, 0
    for number in range(REQUESTS):
        now += rng.expovariate(REQUESTS_PER_S)
        while ends and ends[0][0] <= now:
            end, _, took_s, index = heappop(ends)
            endpoints[index].active -= 1
            endpoints[index].ewma.observe(took_s, end)
        endpoint = balancer.choose(now)
        index = endpoints.index(endpoint)
        needs_s = 2.0 if index == 0 else rng.uniform(0.005, 0.02)
        answered += needs_s <= TIMEOUT_S
        endpoint.active += 1
        took_s = min(needs_s, TIMEOUT_S)
        heappush(ends, (now + took_s, number, took_s, index))
    return answered / REQUESTS


@pytest.mark.parametrize(
    ("kind", "least", "most"),
    [("round_robin", 0.94, 0.96), ("least_request", 0.985, 0.998), ("peak_ewma", 0.999, 1.0)],
)
def test_a_slow_server_costs_less_the_more_a_policy_looks(kind, least, most):
    assert least <= success_rate(kind, seed=1) <= most
