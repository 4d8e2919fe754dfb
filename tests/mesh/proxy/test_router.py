"""What a route makes of a request: targets, rewrites, redirects, hosts, edits."""

import random

import pytest

from mesh.errors import ConfigError
from mesh.http.head import RequestHead
from mesh.model.match import NamedMatch, PathMatch, RouteMatch, StringMatch
from mesh.proxy.header_edits import EditContext
from mesh.proxy.router import HOSTS_REMEMBERED_MAX, Router, compile_routes, rewritten
from mesh.traffic.policy import Timeouts
from mesh.traffic.route import (
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

API = (WeightedTarget("api"),)


def request(target="/", method="GET", authority="web", headers=()):
    path, mark, query = target.partition("?")
    return RequestHead(method.encode(), path.encode(), query.encode() if mark else None, authority.encode(), headers)


def router(*rules, hosts=None, source="web", metadata=(), port=80, scheme="http", **fields):
    table = RouteTable(hosts or (VirtualHost(rules),), "t", **fields)
    return Router(
        table, default_target="app", source=source, source_metadata=metadata, port=port, scheme=scheme
    )  # fmt: skip


def rule(action, *paths, **fields):
    return Rule(action, matches=tuple(RouteMatch(path) for path in paths), **fields)


def forwarded(action, path, target, **fields):
    routes = router(rule(action, *(() if path is None else (path,)), **fields))
    route = routes.route(request(target), "web")
    assert route is not None
    return rewritten(route, route.choose(random.Random(1)), request(target))


def test_without_hosts_every_request_goes_to_the_listeners_own_target_and_nothing_is_looked_up():
    routes = Router(RouteTable(), default_target="app", source=None, source_metadata=None, port=80, scheme="http")
    assert routes.constant is not None
    assert routes.constant.plain
    assert routes.route(request(), "web") is routes.constant
    assert routes.constant.choose(random.Random(1)).name == "app"


def test_a_table_whose_first_rule_takes_everything_needs_no_look_up():
    assert router(rule(Forward(API)), rule(DirectResponse(200))).constant is not None
    assert router(rule(Forward(API), PathMatch("prefix", "/"))).constant is None
    assert router(hosts=(VirtualHost((rule(Forward(API)),), "", ("a",)),)).constant is None


def test_no_rule_is_no_route():
    assert router(rule(Forward(API), PathMatch("exact", "/a"))).route(request("/b"), "web") is None
    assert router(hosts=(VirtualHost((rule(Forward(API)),), "", ("a",)),)).route(request(), "web") is None


def test_hosts_that_clients_make_up_are_not_all_remembered():
    routes = router(hosts=(VirtualHost((rule(Forward(API)),), "", ("*.mesh",)),))
    for number in range(3 * HOSTS_REMEMBERED_MAX):
        assert routes.route(request(authority=f"{number}.mesh"), "web") is not None
    assert len(routes._domains._remembered) <= HOSTS_REMEMBERED_MAX


@pytest.mark.parametrize(
    ("path", "replacement", "target", "result"),
    [
        (PathMatch("prefix", "/a"), "/x", "/a/b?q=1", "/x/b?q=1"),
        (PathMatch("prefix", "/a"), "/", "/a/b", "//b"),  # by character, as Envoy
        (PathMatch("prefix", "/a/"), "/", "/a/b?", "/b?"),
        (PathMatch("prefix", "/A", ignore_case=True), "/x", "/a/b", "/x/b"),
        (PathMatch("exact", "/a"), "/x", "/a?q", "/x?q"),
        (PathMatch("regex", "/a.*"), "/x", "/abc", "/x"),
        (PathMatch("segment", "/a"), "/", "/a/b", "/b"),
        (PathMatch("segment", "/a"), "/x/", "/a/b", "/x/b"),
        (PathMatch("segment", "/a/"), "/x", "/a/b", "/x/b"),
        (PathMatch("segment", "/a"), "/x", "/a", "/x"),
        (PathMatch("segment", "/a"), "", "/a", "/"),
        (PathMatch("segment", "/a"), "/x", "/a/", "/x/"),
        (None, "/x/", "/a/b", "/x/a/b"),
        (PathMatch("prefix", "/a"), "", "/abc", "/bc"),
        (PathMatch("prefix", "/a"), "/b/", "/a../../c", "/c"),  # never a dot segment
        (PathMatch("exact", "/a"), "/x?new=1", "/a?q=2", "/x?new=1?q=2"),  # Envoy only puts texts together
    ],
)
def test_prefixes_are_replaced(path, replacement, target, result):
    head = forwarded(Forward(API, replacement), path, target)
    assert head.target == result.encode()
    assert head.header(b"x-envoy-original-path") == target.encode()


@pytest.mark.parametrize(
    ("pattern", "substitution", "target", "result"),
    [
        ("/v([0-9]+)/(.*)", r"/\2/\1", "/v1/a?q=v1/", "/a/1?q=v1/"),
        ("a", "b", "/aXa", "/bXb"),
        ("x*", "-", "/", "/-/-"),
        ("(?i)/A", r"\0\\", "/a", "/a\\"),
        ("(b)|(a)", r"<\1>", "/a", "/<>"),
    ],
)
def test_expressions_are_replaced_and_the_query_is_kept(pattern, substitution, target, result):
    head = forwarded(Forward(API, None, RegexRewrite(pattern, substitution)), None, target)
    assert head.target == result.encode()


def test_a_rule_with_several_matches_rewrites_what_each_matched():
    routes = router(rule(Forward(API, "/x"), PathMatch("prefix", "/long/prefix"), PathMatch("prefix", "/a")))
    for target, result in (("/long/prefix/c", b"/x/c"), ("/a/c", b"/x/c")):
        route = routes.route(request(target), "web")
        assert rewritten(route, route.choose(random.Random(1)), request(target)).path == result


def test_a_callers_own_original_path_is_replaced():
    route = router(rule(Forward(API, "/x"), PathMatch("prefix", "/a"))).route(request("/a"), "web")
    head = rewritten(route, route.targets[0], request("/a", headers=((b"x-envoy-original-path", b"/forged"),)))
    assert head.headers == ((b"x-envoy-original-path", b"/a"),)


def test_the_targets_host_goes_before_the_rules():
    assert forwarded(Forward(API, host_rewrite="b:81"), None, "/").authority == b"b:81"
    own = (WeightedTarget("api", host_rewrite="own"),)
    assert forwarded(Forward(own, host_rewrite="b"), None, "/").authority == b"own"


def test_what_only_forwards_is_plain_and_not_copied():
    route = router(rule(Forward(API), PathMatch("prefix", "/"), timeouts=Timeouts(1.0))).route(request(), "web")
    head = request()
    assert route.plain
    assert rewritten(route, route.targets[0], head) is head
    mirrored = router(rule(Forward(API), mirrors=(Mirror("b"),))).constant
    assert not mirrored.plain


def test_targets_get_their_shares_and_none_without_weight():
    targets = (WeightedTarget("a", 90), WeightedTarget("b", 10), WeightedTarget("c", 0))
    route = router(rule(Forward(targets))).constant
    rng = random.Random(1)
    names = [route.choose(rng).name for _ in range(10_000)]
    assert {*names} == {"a", "b"}
    assert 850 < names.count("b") < 1150


@pytest.mark.parametrize(
    ("redirect", "authority", "target", "forwarded_proto", "location"),
    [
        (Redirect(scheme="https"), "a:80", "/p?q", "", "https://a/p?q"),
        (Redirect(scheme="https"), "a:8080", "/p", "", "https://a:8080/p"),
        (Redirect(scheme="https"), "[::1]:80", "/p", "", "https://[::1]/p"),
        (Redirect(scheme="https"), "[::1]", "/p", "", "https://[::1]/p"),
        (Redirect(scheme="https", port=8443), "a:80", "/p", "", "https://a:8443/p"),
        (Redirect(host="b"), "a:80", "/p", "https", "https://b/p"),
        (Redirect(port=81), "a", "/p", "", "http://a:81/p"),
        (Redirect(path="/x"), "a:80", "/p?q=1", "", "http://a:80/x?q=1"),
        (Redirect(path="/x", strip_query=True), "a", "/p?q=1", "", "http://a/x"),
        (Redirect(path="/x?y"), "a", "/p?q=1", "", "http://a/x?y"),
        (Redirect(prefix_rewrite="/x"), "a", "/p/b?q=1", "", "http://a/x/b?q=1"),
        (Redirect(strip_query=True), "a", "/p/b?q=1", "", "http://a/p/b"),
        (Redirect(host="b", scheme="http"), "a", "/p", "javascript", "http://b/p"),
        (Redirect(path="/x"), "", "/p", "", "/x"),
    ],
)
def test_redirects_say_where_as_envoy_does(redirect, authority, target, forwarded_proto, location):
    headers = ((b"x-forwarded-proto", forwarded_proto.encode()),) if forwarded_proto else ()
    route = router(rule(redirect, PathMatch("prefix", "/p"))).route(request(target), "web")
    answer = route.answer(request(target, authority=authority, headers=headers))
    assert (answer.status, answer.headers, answer.body) == (301, ((b"location", location.encode()),), b"")
    assert not route.targets
    assert not route.plain


def test_direct_responses_are_answered_here():
    route = router(rule(DirectResponse(404, "gone", "text/html"))).constant
    answer = route.answer(request())
    assert (answer.status, answer.body, answer.headers) == (404, b"gone", ((b"content-type", b"text/html"),))
    assert route.direct == answer


def test_conditions_on_the_caller_are_decided_by_the_listener_or_per_request():
    rules = (
        Rule(DirectResponse(200), "source", (RouteMatch(sources=("web",)),)),
        Rule(DirectResponse(200), "meta", (RouteMatch(source_metadata=(("v", "1"),)),)),
        Rule(DirectResponse(200), "other"),
    )
    assert router(*rules, source="web").constant.name == "source"
    assert router(*rules, source="api", metadata=(("v", "1"),)).constant.name == "meta"
    for_any = router(*rules, source=None, metadata=None)
    assert [for_any.route(request(), one).name for one in ("web", "api")] == ["source", "other"]


def test_edits_apply_from_the_target_outwards():
    def level(name):
        return HeaderEdits(set=(("x-set", name),), add=(("x-add", name),), remove=(f"x-{name}",))

    target = WeightedTarget("api", request_headers=level("target"), response_headers=level("target"))
    routes = router(
        hosts=(
            VirtualHost(
                (
                    Rule(
                        Forward((target,)),
                        request_headers=level("rule"), response_headers=level("rule"),
                    ),
                ),
                request_headers=level("host"), response_headers=level("host"),
            ),
        ),
        request_headers=level("table"), response_headers=level("table"),
    )  # fmt: skip
    headers = tuple((name, b"old") for name in (b"x-rule", b"x-kept", b"x-table", b"x-set", b"x-add"))
    expected = (
        (b"x-kept", b"old"), (b"x-add", b"old"), (b"x-add", b"target"), (b"x-add", b"rule"), (b"x-add", b"host"),
        (b"x-set", b"table"), (b"x-add", b"table"),
    )  # fmt: skip
    route = routes.constant
    assert rewritten(route, route.targets[0], request(headers=headers)).headers == expected
    assert route.targets[0].response_edits.apply(headers, None) == expected
    assert not route.reads_context


def edited(headers, values, *, response=False, **context):
    edits = HeaderEdits(set=values)
    fields = {"response_headers": edits} if response else {"request_headers": edits}
    route = router(Rule(Forward(API), "r1", **fields)).constant
    assert route.reads_context
    head = request("/p?q", headers=headers)
    known = EditContext(head, route_name="r1", **context)
    if response:
        return dict(route.targets[0].response_edits.apply((), known, headers))
    return dict(rewritten(route, route.targets[0], head, known).headers)


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("%REQ(x-b)%", b"b"),
        ("a-%REQ(x-none?X-B)%-%%", b"a-b-%"),
        ("%REQ(:path)% %REQ(:METHOD)% %REQ(:authority)%", b"/p?q GET web"),
        ("%REQ(:path):2%", b"/p"),
        ("%DOWNSTREAM_REMOTE_ADDRESS_WITHOUT_PORT%|%DOWNSTREAM_REMOTE_PORT%", b"::1|5"),
        ("%DOWNSTREAM_PEER_URI_SAN%", b"spiffe://a/b"),
        ("%PROTOCOL% %ROUTE_NAME% %START_TIME%", b"HTTP/1.1 r1 1970-01-01T00:00:01.500Z"),
    ],
)
def test_operators_are_filled_in(text, value):
    headers = edited(
        ((b"x-b", b"b"),), (("x-new", text),),
        remote_address="[::1]:5", peer_uri_san="spiffe://a/b", started_at_s=1.5,
    )  # fmt: skip
    assert headers[b"x-new"] == value


def test_a_header_that_was_to_name_the_caller_never_keeps_the_callers_own_word():
    assert edited(((b"x-peer", b"forged"),), (("x-peer", "%DOWNSTREAM_PEER_URI_SAN%"),)) == {}
    hostile = edited((), (("x-peer", "%DOWNSTREAM_PEER_URI_SAN%"),), peer_uri_san="a\r\nx-admin: 1")
    assert hostile == {}


def test_responses_know_the_upstream_and_requests_do_not():
    values = (("x-host", "%UPSTREAM_HOST% %RESPONSE_CODE% %REQ(x-b)%"),)
    headers = edited(((b"x-b", b"b"),), values, response=True, upstream_host="10.0.0.1:80", response_status=200)
    assert headers == {b"x-host": b"10.0.0.1:80 200 b"}
    with pytest.raises(ConfigError, match="UPSTREAM_HOST"):
        router(Rule(Forward(API), "r", request_headers=HeaderEdits(set=values)))


@pytest.mark.parametrize(
    "edits",
    [
        HeaderEdits(set=(("x", "%NOPE%"),)),
        HeaderEdits(set=(("x", "50%"),)),
        HeaderEdits(set=(("x", "%REQ%"),)),
        HeaderEdits(set=(("x", "%REQ(:nope)%"),)),
        HeaderEdits(set=(("x", "a\nb"),)),
        HeaderEdits(add=(("Transfer-Encoding", "x"),)),
        HeaderEdits(add=(("a b", "x"),)),
        HeaderEdits(remove=(":path",)),
    ],
)
def test_edits_that_mean_nothing_or_touch_what_is_not_theirs_are_refused_with_their_place(edits):
    with pytest.raises(ConfigError, match="route table 't', host '\\*', rule r"):
        router(Rule(Forward(API), "r", request_headers=edits))


def test_a_bad_expression_is_refused_with_its_place():
    bad = RouteMatch(headers=(NamedMatch("x", StringMatch("regex", "(")),))
    with pytest.raises(ConfigError, match="route table 't', host"):
        router(Rule(Forward(API), "r", (bad,)))


def test_equal_configurations_share_one_router():
    tables = [RouteTable((VirtualHost((rule(Forward(API)),)),), "same") for _ in range(2)]
    first, second = (compile_routes(table, "app", "web", (), 80) for table in tables)
    assert first is second
