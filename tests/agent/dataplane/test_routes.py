"""What routes make of requests on their way: splits, answers, faults, copies, cookies, trailers, upgrades."""

import pytest
import trio
from routed_world import HANG, RoutedWorld, answer, forward, get

from mesh.errors import ConfigError
from mesh.model.match import PathMatch, RouteMatch, StringMatch
from mesh.traffic.policy import HashPolicy, LoadBalancing, RateLimit, RetryPolicy, Timeouts
from mesh.traffic.route import (
    Abort,
    Cors,
    Delay,
    DirectResponse,
    Forward,
    HeaderEdits,
    Mirror,
    Redirect,
    Rule,
    WeightedTarget,
)


@pytest.fixture
async def world(nursery, autojump_clock):
    world = RoutedWorld(nursery)
    yield world
    world.close()
    nursery.cancel_scope.cancel()


def prefix(path):
    return (RouteMatch(path=PathMatch("prefix", path)),)


async def settled(backend, count):
    """Copies are waited for: nobody else does."""
    with trio.fail_after(30):
        while len(backend.requests) < count:
            await trio.sleep(0.1)


async def test_requests_follow_rules_to_their_targets_and_none_is_404(autojump_clock, world):
    api, other = world.backend(), world.backend(answer(200, b"other"))
    rules = (forward("other", matches=prefix("/other")), forward("api", matches=prefix("/api")))
    world.apply(world.target("api", api), world.target("other", other), rules=rules)
    ended = []
    world.service().tap = lambda each, ended_at: ended.append((each.flags, each.details, each.target_name))
    assert (await world.ask(get(b"/other/1")))[2] == b"other"
    assert (await world.ask(get(b"/api")))[2] == b"ok"
    assert (await world.ask(get(b"/none")))[0] == 404
    assert ended == [("", "via_upstream", "other"), ("", "via_upstream", "api"), ("NR", "route_not_found", "")]


async def test_paths_hosts_and_headers_are_rewritten_both_ways(autojump_clock, world):
    backend = world.backend(answer(200, b"ok", b"x-gone: 1"))
    action = Forward(
        (WeightedTarget("api", request_headers=HeaderEdits(add=(("x-level", "target"),))),),
        prefix_rewrite="/v2",
        host_rewrite="inside",
    )
    edits = HeaderEdits(set=(("x-status", "%RESPONSE_CODE%"),), remove=("x-gone",))
    world.apply(world.target("api", backend), rules=(Rule(action, matches=prefix("/v1"), response_headers=edits),))
    _status, head, _body = await world.ask(get(b"/v1/a?b=c"))
    ((request, _),) = backend.requests
    assert request.startswith(b"GET /v2/a?b=c HTTP/1.1\r\nhost: inside\r\n")
    assert b"x-level: target\r\n" in request
    assert b"x-envoy-original-path: /v1/a?b=c\r\n" in request
    assert b"x-envoy-expected-rq-timeout-ms: 15000\r\n" in request
    assert b"x-status: 200\r\n" in head
    assert b"x-envoy-upstream-service-time: " in head
    assert b"x-gone" not in head


async def test_redirects_and_direct_responses_are_given_here(autojump_clock, world):
    backend = world.backend()
    rules = (
        Rule(Redirect(302, host="else.where"), matches=prefix("/go")),
        Rule(DirectResponse(418, "teapot"), matches=prefix("/tea")),
    )
    world.apply(world.target("api", backend), rules=rules)
    status, head, _body = await world.ask(get(b"/go"))
    assert (status, b"location: http://else.where/go\r\n" in head) == (302, True)
    assert (await world.ask(get(b"/tea")))[::2] == (418, b"teapot")
    assert backend.requests == []


async def test_a_delay_comes_before_an_abort(autojump_clock, world):
    backend = world.backend()
    world.apply(world.target("api", backend), rules=(forward("api", delay=Delay(3.0), abort=Abort(503)),))
    ended = []
    world.service().tap = lambda exchange, ended_at: ended.append((exchange.flags, exchange.details))
    began = trio.current_time()
    assert (await world.ask())[::2] == (503, b"fault filter abort")
    assert 3.0 <= trio.current_time() - began <= 4.0
    assert ended == [("DI,FI", "fault_filter_abort")]
    assert backend.requests == []


async def test_a_caller_that_leaves_during_a_delay_costs_nothing(autojump_clock, world):
    backend = world.backend()
    world.apply(world.target("api", backend), rules=(forward("api", delay=Delay(3.0)),))
    stream = await world.connect()
    await stream.send_all(get())
    await trio.sleep(1)
    await stream.aclose()
    await trio.sleep(5)
    assert backend.requests == []
    assert world.service().target.breaker.requests == 0


@pytest.mark.parametrize(("percent", "least", "most"), [(0.0, 0, 0), (50.0, 20, 80), (100.0, 100, 100)])
async def test_a_share_of_requests_is_copied(autojump_clock, world, percent, least, most):
    api, shadow = world.backend(), world.backend(answer(500, b""))
    rule = forward("api", mirrors=(Mirror("shadow", percent),))
    world.apply(world.target("api", api), world.target("shadow", shadow), rules=(rule,))
    stream = await world.connect()
    for _ in range(100):
        assert (await world.ask(stream=stream))[0] == 200
    await trio.sleep(5)
    assert least <= len(shadow.requests) <= most
    assert all(b"\r\nhost: api-shadow\r\n" in head for head, _ in shadow.requests)


async def test_a_copy_holds_its_body_and_a_dead_or_silent_target_delays_nobody(autojump_clock, world):
    api, shadow, silent = world.backend(), world.backend(), world.backend(HANG)
    rule = forward("api", mirrors=(Mirror("dead"), Mirror("silent"), Mirror("shadow")))
    dead = world.target("dead", world.dead_endpoint())
    targets = (world.target("silent", silent), world.target("shadow", shadow))
    world.apply(world.target("api", api), dead, *targets, rules=(rule,))
    began = trio.current_time()
    assert (await world.ask(b"POST / HTTP/1.1\r\nhost: api\r\ncontent-length: 5\r\n\r\nhello"))[0] == 200
    assert trio.current_time() - began < 1.0
    await settled(shadow, 1)
    assert shadow.requests[0][1] == b"hello"
    await trio.sleep(30)  # the silent one has its time-out
    assert world.service().routing._mirrors.in_flight == 0


async def test_a_generated_cookie_keeps_a_caller_at_its_endpoint(autojump_clock, world):
    backends = [world.backend(answer(200, b"%d" % number)) for number in range(4)]
    balancing = LoadBalancing("ring_hash", hash_policies=(HashPolicy("cookie", "stick", ttl_s=60.0),))
    world.apply(world.target("api", *backends, load_balancing=balancing))
    _status, head, body = await world.ask()
    cookie = next(line for line in head.split(b"\r\n") if line.startswith(b"set-cookie: "))[12:].split(b";")[0]
    for _ in range(8):
        _status, head, again = await world.ask(get(b"/", b"cookie: " + cookie))
        assert again == body
        assert b"set-cookie" not in head


async def test_a_route_has_its_own_limits_rules_and_time(autojump_clock, world):
    backend = world.backend(HANG)
    retry = RetryPolicy(("5xx",), retries=0)
    rules = (
        forward("api", name="limited", matches=prefix("/limited"), rate_limit=RateLimit(1, 1, 3600.0)),
        forward("api", matches=prefix("/slow"), timeouts=Timeouts(request_s=2.0), retry=retry),
    )
    world.apply(world.target("api", backend), rules=rules)
    began = trio.current_time()
    assert (await world.ask(get(b"/slow")))[0] == 504
    assert 2.0 <= trio.current_time() - began <= 3.0
    stream = await world.connect()
    await stream.send_all(get(b"/limited"))
    await trio.sleep(1)
    assert (await world.ask(get(b"/limited")))[0] == 429
    world.apply(world.target("api", backend), rules=(*rules, forward("api")))  # the tokens outlive a change
    assert (await world.ask(get(b"/limited")))[0] == 429


async def test_a_preflight_is_answered_and_answers_are_marked(autojump_clock, world):
    backend = world.backend()
    cors = Cors((StringMatch("exact", "https://a"),), allow_methods=("GET",))
    world.apply(world.target("api", backend), rules=(forward("api", cors=cors),))
    preflight = b"OPTIONS / HTTP/1.1\r\nhost: api\r\norigin: https://a\r\naccess-control-request-method: GET\r\n\r\n"
    status, head, _body = await world.ask(preflight)
    assert (status, b"access-control-allow-methods: GET\r\n" in head) == (200, True)
    assert backend.requests == []
    _status, head, _body = await world.ask(get(b"/", b"origin: https://a"))
    assert b"access-control-allow-origin: https://a\r\n" in head


async def test_override_headers_of_the_application_count_and_go_no_further(autojump_clock, world):
    backend = world.backend(answer(503, b""), answer())
    world.apply(world.target("api", backend))
    status, _head, _body = await world.ask(get(b"/", b"x-envoy-retry-on: 5xx", b"x-envoy-max-retries: 1"))
    assert status == 200
    assert all(b"x-envoy-retry-on" not in head and b"x-envoy-max" not in head for head, _ in backend.requests)


async def test_what_cannot_be_served_is_refused_and_the_rest_stays(autojump_clock, world):
    backend = world.backend()
    world.apply(world.target("api", backend))
    with pytest.raises(ConfigError, match="nowhere"):
        world.apply(world.target("api", backend), rules=(forward("nowhere"),))
    with pytest.raises(ConfigError, match="backoff_base_s"):
        world.apply(world.target("api", backend, retry=RetryPolicy(backoff_base_s=-1.0)))
    assert (await world.ask())[0] == 200
