"""Which tries are repeated, how often, and after how long (Envoy's retry table)."""

import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mesh.http.head import RequestHead, ResponseHead
from mesh.model.match import NamedMatch, StringMatch
from mesh.proxy.retry import (
    OVERRIDE_HEADERS,
    RETRY_AFTER_MAX_S,
    asked_pause_s,
    compile_retry,
    hedge_verdict,
    lost_keepalive_race,
    retry_verdict,
)
from mesh.traffic.policy import RetryPolicy

KINDS = (
    "connect", "connect-timeout", "reset-before-request", "reset", "per-try-timeout", "refused-stream", "protocol",
    "overflow",
)  # fmt: skip


def rules(*conditions, **fields):
    return compile_retry(RetryPolicy(conditions=conditions, **fields))


def response(status=200, **headers):
    return ResponseHead(status, tuple((name.replace("_", "-").encode(), value) for name, value in headers.items()))


def request(**headers):
    pairs = tuple((name.replace("_", "-").encode(), value) for name, value in headers.items())
    return RequestHead(b"GET", b"/", None, b"api", pairs)


# ---- what is worth a retry

ANY = set(KINDS) - {"overflow"}


@pytest.mark.parametrize(
    ("condition", "kinds"),
    [
        ("5xx", ANY),
        ("gateway-error", ANY),
        ("reset", ANY),
        ("reset-before-request", {"connect", "connect-timeout", "reset-before-request"}),
        ("connect-failure", {"connect", "connect-timeout"}),
        ("refused-stream", {"refused-stream"}),
        ("retriable-4xx", set()),
        ("retriable-status-codes", set()),
        ("retriable-headers", set()),
        ("envoy-ratelimited", set()),
        ("unavailable", set()),
    ],
)
def test_failures_that_each_condition_covers(condition, kinds):
    compiled = rules(condition)
    assert {kind for kind in KINDS if compiled.after_failure(kind)} == kinds


@pytest.mark.parametrize(
    ("condition", "statuses"),
    [
        ("5xx", set(range(500, 600))),
        ("gateway-error", {502, 503, 504}),
        ("retriable-4xx", {409}),
        ("retriable-status-codes", {418, 425}),
        ("reset", set()),
        ("connect-failure", set()),
        ("envoy-ratelimited", set()),
        ("unavailable", set()),
    ],
)
def test_statuses_that_each_condition_covers(condition, statuses):
    compiled = rules(condition, statuses=(418, 425))
    assert {status for status in range(200, 1000) if compiled.after_response(response(status))} == statuses


def test_conditions_add_up_and_no_condition_covers_nothing():
    both = rules("retriable-4xx", "gateway-error")
    assert both.after_response(response(409))
    assert both.after_response(response(503))
    assert not both.after_response(response(500))
    none = rules()
    assert not any(none.after_failure(kind) for kind in KINDS)
    assert not none.after_response(response(503))


@pytest.mark.parametrize(
    ("condition", "code"),
    [("cancelled", 1), ("deadline-exceeded", 4), ("resource-exhausted", 8), ("internal", 13), ("unavailable", 14)],
)
def test_grpc_statuses_are_read_from_the_head(condition, code):
    compiled = rules(condition)
    good = {number for number in range(17) if compiled.after_response(response(grpc_status=str(number).encode()))}
    assert good == {code}
    assert not compiled.after_response(response())


def test_a_rate_limiters_mark_forbids_a_retry_unless_it_is_asked_for():
    limited = response(503, x_envoy_ratelimited=b"true")
    assert not rules("5xx").after_response(limited)
    assert not rules("5xx", "unavailable").after_response(limited)
    assert rules("envoy-ratelimited").after_response(limited)
    assert rules("envoy-ratelimited").after_response(response(429, x_envoy_ratelimited=b"true"))
    assert not rules("envoy-ratelimited").after_response(response(429))


def test_every_way_to_retry_works_beside_every_other():
    """What decides by header must not hide what decides by status, and the reverse."""
    absent = NamedMatch("x-final", StringMatch("present", invert=True))
    compiled = rules("unavailable", "gateway-error", "retriable-headers", headers=(absent,))
    assert compiled.after_response(response(503, x_final=b"1"))
    assert compiled.after_response(response(503, x_final=b"1", grpc_status=b"0"))
    assert compiled.after_response(response(200, x_final=b"1", grpc_status=b"14"))
    assert compiled.after_response(response(200))
    assert compiled.after_response(response(200, grpc_status=b"0"))
    assert not compiled.after_response(response(200, x_final=b"1", grpc_status=b"0"))
    assert not compiled.after_response(response(503, x_envoy_ratelimited=b"true"))


def test_response_headers_are_matched_only_under_their_condition():
    matches = (NamedMatch("x-again", StringMatch("exact", "yes")), NamedMatch("x-shed", StringMatch("present")))
    compiled = rules("retriable-headers", headers=matches)
    assert compiled.after_response(response(x_again=b"yes"))
    assert compiled.after_response(response(x_shed=b""))
    assert not compiled.after_response(response(x_again=b"no"))
    assert not rules("5xx", headers=matches).after_response(response(x_again=b"yes"))


def test_without_a_policy_only_what_no_server_can_have_acted_on_is_retried():
    compiled = compile_retry(None)
    assert {kind for kind in KINDS if compiled.after_failure(kind)} == {
        "connect", "connect-timeout", "reset-before-request", "refused-stream",
    }  # fmt: skip
    assert not compiled.after_response(response(503))
    assert compiled.retries == 2
    assert compiled.pause_s(1, random.Random(1)) == 0.0


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({}, True),
        ({"method": b"DELETE"}, True),
        ({"method": b"POST"}, False),
        ({"method": b"PATCH"}, False),
        ({"reused": False}, False),
        ({"resets": 1}, False),
        ({"replayable": False}, False),
    ],
)
def test_a_request_that_lost_the_keepalive_race_is_repeated_once_when_that_is_harmless(changes, expected):
    arguments = {"method": b"GET", "reused": True, "resets": 0, "replayable": True, **changes}
    assert lost_keepalive_race(**arguments) is expected


# ---- the order of checks


class Admission:
    def __init__(self, answer=True):
        self.answer = answer
        self.asked = 0

    def __call__(self):
        self.asked += 1
        return self.answer


@pytest.mark.parametrize(
    ("retries", "replayable", "admitted", "verdict", "asked"),
    [
        (0, True, True, "retry", 1),
        (1, True, True, "retry", 1),
        (2, True, True, "limit_exceeded", 0),
        (2, True, False, "limit_exceeded", 0),  # before the budget, which must not pay for it
        (0, True, False, "overflow", 1),
        (0, False, True, "no", 0),  # dropped, and nothing is exceeded
    ],
)
def test_tries_left_are_checked_before_the_budget(retries, replayable, admitted, verdict, asked):
    admission = Admission(admitted)
    got = retry_verdict(rules("5xx", retries=2), retries=retries, replayable=replayable, admitted=admission)
    assert (got, admission.asked) == (verdict, asked)


def test_three_tries_that_time_out_use_the_retries_up():
    """Measured on Envoy: 2 retries of 100 ms each, then 504 with URX,UT."""
    compiled = rules("5xx", retries=2, per_try_timeout_s=0.1)
    now, retries = 0.0, 0
    rng = random.Random(7)
    while True:
        now += compiled.try_timeout_s(15.0)
        assert compiled.after_failure("per-try-timeout")
        verdict = retry_verdict(compiled, retries=retries, replayable=True, admitted=Admission())
        if verdict != "retry":
            break
        retries += 1
        now += compiled.pause_s(retries, rng)
    assert (verdict, retries) == ("limit_exceeded", 2)
    assert 0.3 <= now < 0.3 + 0.025 + 0.075  # 371 ms were measured


# ---- pauses


@pytest.mark.parametrize(
    ("retry_number", "most"), [(1, 0.025), (2, 0.075), (3, 0.175), (4, 0.25), (9, 0.25), (10**6, 0.25)]
)
def test_pauses_are_uniform_below_a_growing_bound(retry_number, most):
    rng = random.Random(1)
    pauses = [rules("5xx").pause_s(retry_number, rng) for _ in range(2000)]
    assert min(pauses) >= 0.0
    assert most * 0.99 < max(pauses) < most
    assert sum(pauses) / len(pauses) == pytest.approx(most / 2, rel=0.05)


@pytest.mark.parametrize(
    ("headers", "asked"),
    [
        ({}, 0.0),
        ({"retry_after": b"7"}, 7.0),
        ({"retry_after": b"300"}, RETRY_AFTER_MAX_S),
        ({"retry_after": b"301"}, 0.0),
        ({"retry_after": b"0"}, 0.0),
        ({"retry_after": b"-5"}, 0.0),
        ({"retry_after": b"Wed, 21 Oct 2026 07:28:00 GMT"}, 0.0),
        ({"retry_after": b"9" * 400}, 0.0),
        ({"x_ratelimit_reset": b"1012"}, 12.0),
        ({"x_ratelimit_reset": b"990"}, 0.0),
        ({"x_ratelimit_reset": b"2000"}, 0.0),
        ({"retry_after": b"301", "x_ratelimit_reset": b"1012"}, 12.0),
        ({"retry_after": b"3", "x_ratelimit_reset": b"1012"}, 3.0),
    ],
)
def test_what_a_server_asks_for(headers, asked):
    assert asked_pause_s(response(503, **headers), 1000.0) == asked


def test_a_server_is_waited_for_only_when_the_policy_says_so():
    rng = random.Random(1)
    head = response(503, retry_after=b"10")
    assert rules("5xx").pause_s(1, rng, head) < 0.025
    honoring = rules("5xx", honor_retry_after=True)
    pauses = [honoring.pause_s(1, rng, head) for _ in range(1000)]
    assert 10.0 <= min(pauses) < 10.1
    assert 14.9 < max(pauses) < 15.0
    assert honoring.pause_s(1, rng, response(503)) < 0.025
    assert honoring.pause_s(1, rng, None) < 0.025


@pytest.mark.parametrize(
    ("per_try", "request_timeout", "expected"),
    [(1.0, 15.0, 1.0), (15.0, 15.0, 0.0), (16.0, 15.0, 0.0), (1.0, 0.0, 1.0), (0.0, 15.0, 0.0)],
)
def test_a_try_timeout_that_could_not_pass_is_none(per_try, request_timeout, expected):
    assert rules("5xx", per_try_timeout_s=per_try).try_timeout_s(request_timeout) == expected


# ---- override headers


def test_without_override_headers_nothing_is_copied():
    head = request(x_other=b"1")
    compiled = rules("5xx")
    assert compiled.with_headers(head, 15.0, honored=True) == (head, compiled, 15.0)
    assert compiled.with_headers(head, 15.0, honored=True)[0] is head


def test_override_headers_add_to_the_policy_and_go_no_further():
    head = request(
        a=b"1",
        x_envoy_retry_on=b"gateway-error, retriable-status-codes,nonsense",
        x_envoy_retry_grpc_on=b"unavailable,5xx",
        x_envoy_max_retries=b"4",
        x_envoy_retriable_status_codes=b"418, 4x9,425",
        x_envoy_retriable_header_names=b"X-Again",
        x_envoy_upstream_rq_timeout_ms=b"2500",
        x_envoy_upstream_rq_per_try_timeout_ms=b"500",
        x_envoy_hedge_on_per_try_timeout=b"true",
    )
    assert {name for name, _ in head.headers} >= OVERRIDE_HEADERS
    forwarded, compiled, timeout_s = rules("retriable-4xx", "retriable-headers").with_headers(head, 15.0, honored=True)
    assert forwarded.headers == ((b"a", b"1"),)
    assert timeout_s == 2.5
    assert compiled.retries == 4
    assert compiled.try_timeout_s(timeout_s) == 0.5
    assert compiled.hedge
    assert compiled.policy.conditions == (
        "retriable-4xx", "retriable-headers", "gateway-error", "retriable-status-codes", "unavailable",
    )  # fmt: skip
    for status in (409, 418, 425, 502, 503):
        assert compiled.after_response(response(status))
    assert not compiled.after_response(response(500))
    assert compiled.after_response(response(x_again=b"anything"))
    assert compiled.after_response(response(grpc_status=b"14"))


def test_override_headers_of_others_are_dropped_unheard():
    head = request(x_envoy_retry_on=b"5xx", x_envoy_upstream_rq_timeout_ms=b"1", b=b"2")
    compiled = rules()
    forwarded, same, timeout_s = compiled.with_headers(head, 15.0, honored=False)
    assert (forwarded.headers, same, timeout_s) == (((b"b", b"2"),), compiled, 15.0)


def test_configured_header_conditions_work_once_a_header_asks_for_them():
    compiled = rules("5xx", headers=(NamedMatch("x-again", StringMatch("present")),))
    assert not compiled.after_response(response(x_again=b"1"))
    _, asked, _ = compiled.with_headers(request(x_envoy_retry_on=b"retriable-headers"), 0.0, honored=True)
    assert asked.after_response(response(x_again=b"1"))


@pytest.mark.parametrize("value", [b"", b"-1", b"1.5", b"soon", b"1" * 16, b"\xb2"])
def test_numbers_that_are_none_are_ignored(value):
    head = request(x_envoy_max_retries=value, x_envoy_upstream_rq_timeout_ms=value)
    _, compiled, timeout_s = rules("5xx", retries=3).with_headers(head, 15.0, honored=True)
    assert (compiled.retries, timeout_s) == (3, 15.0)


def test_what_a_header_asks_for_without_a_policy_pauses_between_tries():
    _, compiled, _ = compile_retry(None).with_headers(request(x_envoy_retry_on=b"5xx"), 0.0, honored=True)
    assert compiled.after_response(response(500))
    assert max(compiled.pause_s(1, random.Random(seed)) for seed in range(100)) > 0.02


def test_more_retries_without_any_condition_are_none():
    """Envoy looks at the count only when there is something to retry on."""
    _, compiled, _ = rules(retries=1).with_headers(request(x_envoy_max_retries=b"9"), 0.0, honored=True)
    assert compiled.retries == 1


def test_the_same_overrides_are_compiled_once_and_the_memory_is_bounded():
    compiled = rules("5xx")
    head = request(x_envoy_max_retries=b"2")
    first = compiled.with_headers(head, 0.0, honored=True)[1]
    assert compiled.with_headers(head, 0.0, honored=True)[1] is first
    for number in range(1000):
        compiled.with_headers(request(x_envoy_max_retries=str(number).encode()), 0.0, honored=True)
    assert len(compiled._derived) <= 64


@given(
    st.lists(st.tuples(st.sampled_from(sorted(OVERRIDE_HEADERS)), st.binary(max_size=40)), max_size=8), st.booleans()
)
def test_no_value_of_an_override_header_breaks_anything(pairs, honored):
    head = RequestHead(b"GET", b"/", None, b"api", ((b"a", b"1"), *pairs))
    forwarded, compiled, timeout_s = rules("5xx").with_headers(head, 15.0, honored=honored)
    assert forwarded.headers == ((b"a", b"1"),)
    assert timeout_s >= 0.0
    assert compiled.try_timeout_s(timeout_s) >= 0.0
    assert compiled.after_response(response(503))


# ---- hedging


@pytest.mark.parametrize(
    ("wanted", "hedged", "verdict", "others", "expected"),
    [
        (False, False, "no", 1, "answer"),  # a good response wins, whoever gave it
        (False, True, "no", 1, "answer"),
        (True, False, "retry", 0, "retry"),
        (True, False, "retry", 1, "retry"),
        (True, False, "limit_exceeded", 1, "drop"),  # the other may still do better
        (True, False, "overflow", 1, "drop"),
        (True, False, "limit_exceeded", 0, "answer"),
        (True, True, "no", 1, "drop"),  # it had its second try
        (True, True, "retry", 0, "answer"),
    ],
)
def test_hedged_tries(wanted, hedged, verdict, others, expected):
    assert hedge_verdict(wanted=wanted, hedged=hedged, verdict=verdict, others=others) == expected
