"""Cross-origin answers as Envoy's filter gives them; faults and mirrors by percentage."""

import random

import pytest

from mesh.http.head import RequestHead
from mesh.model.match import StringMatch
from mesh.proxy.cors import CorsRules
from mesh.proxy.faults import abort_status, delay_s, mirror_targets, shadow_authority
from mesh.traffic.route import Abort, Cors, Delay, Mirror

ORIGIN = b"https://a.example"
RULES = Cors(
    (StringMatch("exact", "https://a.example"), StringMatch("regex", "https://[a-z]+\\.b\\.example")),
    ("GET", "PUT"), ("x-a", "x-b"), ("x-c",), 60, allow_credentials=True,
)  # fmt: skip


def request(method="GET", **headers):
    pairs = tuple((name.replace("_", "-").encode(), value) for name, value in headers.items())
    return RequestHead(method.encode(), b"/", None, b"web", pairs)


def test_only_allowed_origins_count():
    rules = CorsRules(RULES)
    assert rules.allowed_origin(request(origin=ORIGIN)) == ORIGIN
    assert rules.allowed_origin(request(origin=b"https://x.b.example")) == b"https://x.b.example"
    for other in (request(), request(origin=b""), request(origin=b"https://a.example.evil"), request(origin=b"*")):
        assert rules.allowed_origin(other) is None


@pytest.mark.parametrize("match", [StringMatch("exact", "*"), StringMatch("regex", ".*")])
def test_a_wildcard_allows_every_origin_and_echoes_it(match):
    rules = CorsRules(Cors((match,)))
    assert rules.allowed_origin(request(origin=b"null")) == b"null"
    assert rules.response_headers((), b"null") == ((b"access-control-allow-origin", b"null"),)


def test_preflights_are_answered_and_other_requests_go_on():
    rules = CorsRules(RULES)
    preflight = request("OPTIONS", origin=ORIGIN, access_control_request_method=b"PUT")
    assert rules.preflight(preflight, ORIGIN) == (
        (b"access-control-allow-origin", ORIGIN),
        (b"access-control-allow-credentials", b"true"),
        (b"access-control-allow-methods", b"GET,PUT"),
        (b"access-control-allow-headers", b"x-a,x-b"),
        (b"access-control-max-age", b"60"),
    )
    assert rules.preflight(request("OPTIONS", origin=ORIGIN), ORIGIN) is None
    assert rules.preflight(request("PUT", origin=ORIGIN, access_control_request_method=b"PUT"), ORIGIN) is None


def test_ours_replace_what_the_application_said():
    said = ((b"access-control-allow-origin", b"*"), (b"x", b"y"), (b"access-control-expose-headers", b"all"))
    assert CorsRules(RULES).response_headers(said, ORIGIN) == (
        (b"x", b"y"),
        (b"access-control-allow-origin", ORIGIN),
        (b"access-control-allow-credentials", b"true"),
        (b"access-control-expose-headers", b"x-c"),
    )


def test_faults_strike_their_share():
    rng = random.Random(1)
    assert delay_s(None, rng) == abort_status(None, rng) == 0
    assert delay_s(Delay(0.5), rng) == 0.5
    assert abort_status(Abort(503, 0.0), rng) == 0
    assert 2800 < sum(abort_status(Abort(503, 30.0), rng) == 503 for _ in range(10_000)) < 3200


def test_each_mirror_is_drawn_on_its_own():
    rng = random.Random(1)
    drawn = [mirror_targets((Mirror("a"), Mirror("b", 50.0), Mirror("c", 0.0)), rng) for _ in range(1000)]
    assert {*drawn} == {("a",), ("a", "b")}
    assert 430 < drawn.count(("a", "b")) < 570


@pytest.mark.parametrize(
    ("authority", "copy"),
    [(b"a", b"a-shadow"), (b"a:80", b"a-shadow:80"), (b"[::1]", b"[::1]-shadow"), (b"[::1]:80", b"[::1]-shadow:80")],
)
def test_copies_say_that_they_are(authority, copy):
    assert shadow_authority(authority) == copy
