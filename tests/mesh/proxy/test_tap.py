"""Which requests a tap shows, what of them, and routes in words."""

from types import SimpleNamespace

import pytest

from mesh.errors import ConfigError
from mesh.http.head import RequestHead, ResponseHead
from mesh.model.match import NamedMatch, PathMatch, RouteMatch, StringMatch
from mesh.proxy.description import described_routes
from mesh.proxy.tap import HEADERS_SHOWN_MAX, VALUE_BYTES_MAX, TapFilter, compile_filter, record_of
from mesh.traffic.policy import RateLimit, RetryPolicy, Timeouts
from mesh.traffic.route import (
    Abort,
    Cors,
    Delay,
    DirectResponse,
    Forward,
    HeaderEdits,
    Mirror,
    Redirect,
    RegexRewrite,
    RouteTable,
    Rule,
    VirtualHost,
    WeightedTarget,
)


def exchange(**fields):
    headers = ((b"x-request-id", b"id-1"), (b"authorization", b"secret"), (b"accept", b"*/*"))
    head = RequestHead(b"GET", fields.pop("path", b"/api/x"), b"token=1", b"api", headers)
    values = {
        "request": head, "forwarded": head, "started_at": 10.0, "status": 503, "flags": "UF", "bytes_received": 1,
        "bytes_sent": 2, "target_name": "api", "endpoint_host": "10.0.0.1:80", "route_name": "r", "attempts": 2,
        "decision": "", "caller": SimpleNamespace(source="web"),
        "response_head": ResponseHead(503, ((b"Set-Cookie", b"secret"), (b"a", b"b"))),
    }  # fmt: skip
    return SimpleNamespace(**{**values, **fields})


@pytest.mark.parametrize(
    ("wanted", "matches"),
    [
        (TapFilter(), True),
        (TapFilter(method="get", path_prefix="/api", status="503", source="web", target="api"), True),
        (TapFilter(method="POST"), False),
        (TapFilter(path_prefix="/apis"), False),
        (TapFilter(status="5xx"), True),
        (TapFilter(status="4XX"), False),
        (TapFilter(status="0"), False),
        (TapFilter(source="other"), False),
        (TapFilter(target="other"), False),
    ],
)
def test_all_that_is_asked_for_must_hold(wanted, matches):
    assert compile_filter(wanted)(exchange()) is matches


def test_status_zero_is_no_answer():
    assert compile_filter(TapFilter(status="0"))(exchange(status=0))


@pytest.mark.parametrize("status", ["5", "6xx", "5x", "99", "abc", "0xx", "600", "5xxx"])
def test_a_status_that_is_none_is_refused(status):
    with pytest.raises(ConfigError, match="neither a status"):
        compile_filter(TapFilter(status=status))


def test_credentials_are_never_shown_and_queries_only_when_asked_for():
    brief = record_of(exchange(), 10.5, 1000.0, service="web", direction="outbound", headers=False)
    assert (brief.path, brief.request_headers, brief.response_headers) == ("/api/x", (), ())
    assert (brief.at_s, brief.duration_s, brief.request_id, brief.source) == (1010.0, 0.5, "id-1", "web")
    full = record_of(exchange(), 10.5, 1000.0, service="web", direction="outbound", headers=True)
    assert full.path == "/api/x?token=1"
    assert full.request_headers == (("x-request-id", "id-1"), ("authorization", "(hidden)"), ("accept", "*/*"))
    assert full.response_headers == (("Set-Cookie", "(hidden)"), ("a", "b"))


def test_a_record_is_bounded_whatever_the_request():
    head = RequestHead(b"GET", b"/" + b"\xff" * 9000, None, b"a" * 9000, tuple([(b"n" * 5000, b"v" * 5000)] * 100))
    record = record_of(
        exchange(request=head, forwarded=head), 10.5, 0.0, service="web", direction="inbound", headers=True
    )
    assert len(record.path) <= 4 * VALUE_BYTES_MAX
    assert len(record.request_headers) == HEADERS_SHOWN_MAX
    assert max(map(len, record.request_headers[0])) == VALUE_BYTES_MAX


def described(*rules):
    table = RouteTable((VirtualHost(rules, "host", ("a.b",)),))
    return list(described_routes(table, proxy_id="p", listener="127.0.0.1:1", target="api"))


def test_routes_in_words():
    (default,) = described_routes(RouteTable(), proxy_id="p", listener="127.0.0.1:1", target="api")
    assert (default.matches, default.action) == ((), "to api")
    match = RouteMatch(
        PathMatch("segment", "/a", ignore_case=True), (NamedMatch("x", StringMatch("regex", "v.*", invert=True)),),
        (NamedMatch("q", StringMatch("present")),), ("GET", "POST"), (StringMatch("suffix", ".b", ignore_case=True),),
        ("http",), (80,), ("web",), (("version", "2"),),
    )  # fmt: skip
    split = Forward(
        (WeightedTarget("a", 1), WeightedTarget("b", 3)), prefix_rewrite="", regex_rewrite=RegexRewrite("x", "y"),
        host_rewrite="h",
    )  # fmt: skip
    rule = Rule(
        split, "named", (match, RouteMatch()), Timeouts(2.0, 30.0), RetryPolicy(("5xx",), 3), (Mirror("m", 50.0),),
        Delay(0.5), Abort(503, 10.0), Cors((StringMatch("exact", "x"),)), RateLimit(10),
        HeaderEdits(remove=("a",)), HeaderEdits((("a", "b"),)),
    )  # fmt: skip
    moved = Rule(Redirect(302, "https", "h", path="/x"))
    first, second, third = described(rule, moved, Rule(DirectResponse(418)))
    assert first.matches == (
        "path segment /a (any case), method GET,POST, header x not ~ v.*, query q present, authority $= .b (any case), "
        "scheme http, port 80, source web, source metadata version=2",
        "every request",
    )
    assert first.action == "to a 1/4, b 3/4, prefix becomes (empty), x becomes y, host becomes h"
    assert first.extras == (
        "timeout 2s", "idle timeout 30s", "retries 3 on 5xx", "mirror 50% to m", "delay 0.5s for 100%",
        "abort 503 for 10%", "cors", "rate limit 1 per 1s", "1 request header edits", "1 response header edits",
    )  # fmt: skip
    assert (second.rule, second.action) == ("#2", "redirect 302 https h /x")
    assert third.action == "answer 418"
