"""Retries, time-outs, hedging, ejection and limits against applications that follow a script."""

import pytest
import trio
from routed_world import CLOSE, HANG, RoutedWorld, answer, get

from mesh.proxy.sidecar_config import LimitsConfig
from mesh.traffic.policy import (
    LoadBalancing,
    OutlierDetection,
    PoolPolicy,
    Probation,
    RateLimit,
    RetryBudget,
    RetryPolicy,
)

SLACK_S = 0.05


@pytest.fixture
async def world(nursery):
    world = RoutedWorld(nursery)
    yield world
    world.close()
    nursery.cancel_scope.cancel()


class Watched:
    """Sees every exchange that ends."""

    def __init__(self, world):
        self.exchanges = []
        world.service().tap = self

    def __call__(self, exchange, ended_at):
        self.exchanges.append(exchange)


CONDITIONS = [
    ("5xx", answer(500, b"")),
    ("5xx", CLOSE),
    ("gateway-error", answer(503, b"")),
    ("gateway-error", CLOSE),
    ("reset", CLOSE),
    ("retriable-4xx", answer(409, b"")),
    ("retriable-status-codes", answer(418, b"")),
    ("unavailable", answer(200, b"", b"grpc-status: 14")),
    ("internal", answer(200, b"", b"grpc-status: 13")),
    ("envoy-ratelimited", answer(429, b"", b"x-envoy-ratelimited: true")),
]


@pytest.mark.parametrize(("condition", "first"), CONDITIONS)
async def test_each_condition_leads_to_another_try(autojump_clock, world, condition, first):
    backend = world.backend(first, answer())
    world.apply(world.target("api", backend, retry=RetryPolicy((condition,), statuses=(418,))))
    status, _head, body = await world.ask(b"POST / HTTP/1.1\r\nhost: api\r\ncontent-length: 4\r\n\r\nbody")
    assert (status, body) == (200, b"ok")
    assert [body for _head, body in backend.requests] == [b"body", b"body"]
    assert world.counter("envoy_cluster_upstream_rq_retry") == 1


@pytest.mark.parametrize(("condition", "first"), [("connect-failure", answer(500, b"")), ("reset", answer(503, b""))])
async def test_what_no_condition_names_is_passed_on(autojump_clock, world, condition, first):
    backend = world.backend(first, answer())
    world.apply(world.target("api", backend, retry=RetryPolicy((condition,))))
    assert (await world.ask())[0] in (500, 503)
    assert len(backend.requests) == 1


async def test_a_retry_takes_another_endpoint_when_there_is_one(autojump_clock, world):
    backends = [world.backend(answer(503, b"")) for _ in range(3)]
    world.apply(world.target("api", *backends, retry=RetryPolicy(("5xx",), retries=2)))
    status, _head, _body = await world.ask()
    assert status == 503
    assert [len(backend.requests) for backend in backends] == [1, 1, 1]


async def test_connect_failures_go_to_other_endpoints_without_any_policy(autojump_clock, world):
    backend = world.backend()
    world.apply(world.target("api", world.dead_endpoint(), world.dead_endpoint(), backend))
    for _ in range(4):
        assert (await world.ask())[0] == 200


async def test_three_tries_that_time_out_are_504_with_both_flags(autojump_clock, world):
    backend = world.backend(HANG)
    retry = RetryPolicy(("5xx",), retries=2, per_try_timeout_s=0.1)
    world.apply(world.target("api", backend, retry=retry, request_timeout_s=5.0))
    watched = Watched(world)
    began = trio.current_time()
    status, _head, body = await world.ask()
    assert (status, body) == (504, b"upstream request timeout")
    assert 0.3 <= trio.current_time() - began <= 0.3 + 0.025 + 0.075 + 10 * SLACK_S
    (exchange,) = watched.exchanges
    assert (exchange.flags, exchange.attempts, exchange.details) == ("URX,UT", 3, "upstream_per_try_timeout")


async def test_the_request_timeout_spans_all_tries_and_is_not_retried(autojump_clock, world):
    backend = world.backend(HANG)
    retry = RetryPolicy(("5xx",), retries=10, per_try_timeout_s=1.0)
    world.apply(world.target("api", backend, retry=retry, request_timeout_s=2.5))
    watched = Watched(world)
    began = trio.current_time()
    assert (await world.ask())[0] == 504
    assert 2.5 <= trio.current_time() - began <= 2.5 + 10 * SLACK_S
    (exchange,) = watched.exchanges
    assert (exchange.flags, exchange.details) == ("UT", "response_timeout")
    assert 2 <= exchange.attempts <= 3


async def test_a_per_try_timeout_ends_with_the_head(autojump_clock, world):
    backend = world.backend((0.5, b"HTTP/1.1 200 X\r\ncontent-length: 2\r\n\r\n"))
    world.apply(world.target("api", backend, retry=RetryPolicy(("5xx",), per_try_timeout_s=1.0), request_timeout_s=9.0))
    stream = await world.connect()
    await stream.send_all(get())
    assert (await stream.receive_some()).startswith(b"HTTP/1.1 200 ")
    await trio.sleep(5)
    assert len(backend.requests) == 1


async def test_a_body_past_the_buffer_is_sent_on_and_not_retried(autojump_clock, world):
    backend = world.backend(answer(503, b""), answer())
    world.apply(world.target("api", backend, retry=RetryPolicy(("5xx",), buffer_bytes_max=10)))
    status, _head, _body = await world.ask(b"POST / HTTP/1.1\r\nhost: api\r\ncontent-length: 11\r\n\r\nhello world")
    assert status == 503
    assert [body for _head, body in backend.requests] == [b"hello world"]


async def test_a_hedged_try_races_the_first_and_the_loser_is_reset(autojump_clock, world):
    slow, quick = world.backend((3.0, answer(200, b"slow"))), world.backend((0.2, answer(200, b"quick")))
    retry = RetryPolicy(("5xx",), per_try_timeout_s=1.0, hedge_on_per_try_timeout=True)
    balancing = LoadBalancing("round_robin")
    world.apply(world.target("api", slow, quick, retry=retry, load_balancing=balancing))
    answers = []
    for _ in range(2):
        began = trio.current_time()
        _status, _head, body = await world.ask()
        answers.append((body, round(trio.current_time() - began, 1)))
    assert {body for body, _ in answers} == {b"quick"}
    slowest = max(seconds for _, seconds in answers)
    assert 1.2 <= slowest <= 1.2 + 10 * SLACK_S
    assert world.service().target.breaker.requests == 0
    assert world.service().target.breaker.retries == 0


async def test_a_hedged_try_that_fails_leaves_the_first_one_going(autojump_clock, world):
    slow, bad = world.backend((3.0, answer(200, b"slow"))), world.backend((0.2, answer(503, b"")))
    retry = RetryPolicy(("5xx",), retries=2, per_try_timeout_s=1.0, hedge_on_per_try_timeout=True)
    world.apply(world.target("api", slow, bad, retry=retry, load_balancing=LoadBalancing("round_robin")))
    for _ in range(2):
        _status, _head, body = await world.ask()
        assert body == b"slow"


async def test_retries_are_bounded_by_the_budget(autojump_clock, world):
    backend = world.backend((1.0, answer(503, b"")))
    limits = LimitsConfig(retries_max=1)
    world.apply(world.target("api", backend, limits=limits, retry=RetryPolicy(("5xx",), retries=1)))
    watched = Watched(world)
    async with trio.open_nursery() as nursery:
        for _ in range(4):
            nursery.start_soon(world.ask)
    flags = sorted(exchange.flags for exchange in watched.exchanges)
    assert flags == ["UO", "UO", "UO", "URX"]
    assert world.service().target.breaker.retries == 0


async def test_a_token_budget_is_fed_by_requests(autojump_clock, world):
    backend = world.backend(answer(503, b""))
    budget = RetryBudget("tokens", ratio=0.5, min_retries_per_s=0.0)
    world.apply(world.target("api", backend, retry_budget=budget, retry=RetryPolicy(("5xx",), backoff_base_s=0.0)))
    for _ in range(6):
        await world.ask()
    assert len(backend.requests) == 6 + 3


async def test_over_its_limits_a_target_answers_at_once(autojump_clock, world):
    backend = world.backend((1.0, answer()))
    limits = LimitsConfig(connections_max=1, pending_requests_max=1)
    world.apply(world.target("api", backend, limits=limits, retry=RetryPolicy(("5xx",), retries=3)))
    watched = Watched(world)
    results = []

    async def ask():
        results.append(await world.ask())

    async with trio.open_nursery() as nursery:
        for _ in range(4):
            nursery.start_soon(ask)
    assert sorted(status for status, _head, _body in results) == [200, 200, 503, 503]
    refused = next(result for result in results if result[0] == 503)
    assert b"x-envoy-overloaded: true\r\n" in refused[1]
    assert refused[2].endswith(b"reset reason: overflow")
    assert sum(exchange.flags == "UO" for exchange in watched.exchanges) == 2


async def test_requests_max_counts_what_is_under_way(autojump_clock, world):
    backend = world.backend((1.0, answer()))
    world.apply(world.target("api", backend, limits=LimitsConfig(requests_max=2)))
    statuses = []

    async def ask():
        statuses.append((await world.ask())[0])

    async with trio.open_nursery() as nursery:
        for _ in range(3):
            nursery.start_soon(ask)
    assert sorted(statuses) == [200, 200, 503]
    assert world.service().target.breaker.requests == 0


async def test_an_endpoint_that_fails_is_ejected_and_comes_back_on_a_tick(autojump_clock, world):
    bad = world.backend(*[answer(500, b"")] * 3, answer())
    good = world.backend()
    outlier = OutlierDetection(consecutive_5xx=3, max_ejection_percent=50, interval_s=1.0, base_ejection_time_s=5.0)
    balancing = LoadBalancing("round_robin", panic_threshold=0.0)
    world.apply(world.target("api", bad, good, outlier=outlier, load_balancing=balancing))
    statuses = [(await world.ask())[0] for _ in range(6)]
    assert statuses.count(500) == 3
    assert [(await world.ask())[0] for _ in range(6)] == [200] * 6
    assert len(bad.requests) == 3
    assert world.counter("envoy_cluster_membership_healthy") == 1
    await trio.sleep(7)
    for _ in range(2):
        await world.ask()
    assert len(bad.requests) == 4


@pytest.mark.parametrize(("panic_threshold", "expected"), [(0.0, 503), (50.0, 500)])
async def test_when_all_are_ejected_panic_decides(autojump_clock, world, panic_threshold, expected):
    backend = world.backend(answer(500, b""))
    outlier = OutlierDetection(consecutive_5xx=2, max_ejection_percent=100)
    balancing = LoadBalancing(panic_threshold=panic_threshold)
    world.apply(world.target("api", backend, outlier=outlier, load_balancing=balancing))
    watched = Watched(world)
    statuses = [(await world.ask())[0] for _ in range(3)]
    assert statuses == [500, 500, expected]
    assert watched.exchanges[-1].flags == ("UH" if expected == 503 else "")


async def test_probation_admits_one_request_after_the_penalty(autojump_clock, world):
    backend = world.backend(*[answer(500, b"")] * 2, answer())
    probation = Probation(failures=2, penalty_min_s=2.0, jitter_ratio=0.0)
    balancing = LoadBalancing(panic_threshold=0.0)
    world.apply(world.target("api", backend, probation=probation, load_balancing=balancing))
    assert [(await world.ask())[0] for _ in range(3)] == [500, 500, 503]
    await trio.sleep(2.5)
    assert [(await world.ask())[0] for _ in range(3)] == [200, 200, 200]


async def test_endpoints_whose_checks_fail_are_left_out(autojump_clock, world):
    from msgspec.structs import replace

    failing, passing = world.backend(), world.backend()
    world.apply(world.target("api", replace(failing.endpoint, healthy=False), passing))
    for _ in range(6):
        await world.ask()
    assert (len(failing.requests), len(passing.requests)) == (0, 6)


async def test_connections_are_replaced_after_so_many_requests(autojump_clock, world):
    backend = world.backend()
    world.apply(world.target("api", backend, pool=PoolPolicy(requests_max=2)))
    stream = await world.connect()
    for _ in range(6):
        await world.ask(stream=stream)
    assert backend.connections == 3


async def test_silence_is_408_while_the_request_is_owed_and_504_after(autojump_clock, world):
    backend = world.backend(HANG)
    world.apply(world.target("api", backend, request_timeout_s=0.0))
    watched = Watched(world)
    stream = await world.connect()
    began = trio.current_time()
    await stream.send_all(b"POST / HTTP/1.1\r\nhost: api\r\ncontent-length: 9\r\n\r\nhalf")
    assert (await stream.receive_some()).startswith(b"HTTP/1.1 408 ")
    assert 300.0 <= trio.current_time() - began <= 302.0
    assert (await world.ask())[0] == 504
    assert [exchange.flags for exchange in watched.exchanges] == ["SI", "SI"]


async def test_a_listener_s_rate_limit(autojump_clock, world):
    backend = world.backend()
    limit = RateLimit(2, 1, 1.0, response_headers=(("x-limit", "2"),))
    world.apply(world.target("api", backend), rate_limit=limit)
    watched = Watched(world)
    results = [await world.ask() for _ in range(3)]
    assert [status for status, _head, _body in results] == [200, 200, 429]
    assert b"x-limit: 2\r\n" in results[2][1]
    assert watched.exchanges[-1].flags == "RL"
    await trio.sleep(1.1)
    assert (await world.ask())[0] == 200


async def test_a_tcp_listener_s_rate_limit_closes_connections(autojump_clock, world):
    backend = world.backend()
    world.apply(world.target("api", backend), protocol="tcp", rate_limit=RateLimit(1, 1, 3600.0))
    assert (await world.ask())[0] == 200
    stream = await world.connect()
    assert await stream.receive_some() == b""
    assert world.service().metrics.active == 1
