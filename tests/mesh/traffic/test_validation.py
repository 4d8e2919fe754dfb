"""Route tables that cannot be served are refused, and the refusal says where."""

import pytest

from mesh.errors import ConfigError
from mesh.model.match import NamedMatch, PathMatch, RouteMatch, StringMatch
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
from mesh.traffic.validation import check_routes

API = Forward((WeightedTarget("api"),))


def table(*rules, **fields):
    return RouteTable((VirtualHost(rules, "all"),), "web", **fields)


def matching(**fields):
    return table(Rule(API, "r", (RouteMatch(**fields),)))


def header(kind, value="", name="x-a"):
    return matching(headers=(NamedMatch(name, StringMatch(kind, value)),))


@pytest.mark.parametrize(
    ("refused", "words"),
    [
        (matching(path=PathMatch("regex", "(")), "match 0, path"),
        (matching(path=PathMatch("regex", r"(a)\1")), "path"),
        (matching(path=PathMatch("exact", "a")), "begin with /"),
        (matching(path=PathMatch("prefix", "/a?b=c")), "query"),
        (matching(path=PathMatch("exact", "/a b")), "characters"),
        (header("regex", "["), "headers 'x-a'"),
        (header("present", "v"), "present"),
        (header("prefix"), "always hold"),
        (header("exact", "v", ":path"), "':path'"),
        (header("exact", "v", "a b"), "'a b'"),
        (matching(query=(NamedMatch("", StringMatch("present")),)), "query ''"),
        (matching(methods=("GET ",)), "methods"),
        (matching(schemes=("ftp",)), "schemes"),
        (matching(ports=(0,)), "ports"),
        (table(Rule(Forward(()), "r")), "no targets"),
        (table(Rule(Forward((WeightedTarget("nobody"),)), "r")), "target 'nobody'"),
        (table(Rule(Forward((WeightedTarget("api", 0),)), "r")), "sum 0"),
        (table(Rule(Forward((WeightedTarget("api", -1), WeightedTarget("api", 5))), "r")), "negative"),
        (table(Rule(Forward((WeightedTarget("api", host_rewrite="a b"),)), "r")), "host_rewrite"),
        (table(Rule(Forward(API.targets, "/x", RegexRewrite("a", "b")), "r")), "exclude"),
        (table(Rule(Forward(API.targets, "/x y"), "r")), "prefix_rewrite"),
        (table(Rule(Forward(API.targets, None, RegexRewrite("(a)", r"\2")), "r")), "groups"),
        (table(Rule(Redirect(302), "r")), "changes nothing"),
        (table(Rule(Redirect(300, host="a"), "r")), "status"),
        (table(Rule(Redirect(host="a/b"), "r")), "host"),
        (table(Rule(Redirect(port=70000), "r")), "port"),
        (table(Rule(Redirect(path="/a", prefix_rewrite="/b"), "r")), "exclude"),
        (table(Rule(Redirect(path="/a\r\nx: y"), "r")), "path"),
        (table(Rule(DirectResponse(99), "r")), "status"),
        (table(Rule(DirectResponse(200, "x" * 70_000), "r")), "body"),
        (table(Rule(API, "r", timeouts=Timeouts(-1.0))), "request_s"),
        (table(Rule(API, "r", retry=RetryPolicy(retries=-1))), "retries"),
        (table(Rule(API, "r", retry=RetryPolicy(statuses=(42,)))), "statuses"),
        (table(Rule(API, "r", mirrors=(Mirror("nobody"),))), "mirror 'nobody'"),
        (table(Rule(API, "r", mirrors=(Mirror("api", 101.0),))), "percent"),
        (table(Rule(API, "r", delay=Delay(-1.0))), "delay"),
        (table(Rule(API, "r", abort=Abort(700))), "abort"),
        (table(Rule(API, "r", abort=Abort(503, -1.0))), "abort, percent"),
        (table(Rule(API, "r", cors=Cors((StringMatch("regex", "("),)))), "allow_origins"),
        (table(Rule(API, "r", cors=Cors((StringMatch("exact", "a"),), ("G T",)))), "allow_methods"),
        (table(Rule(API, "r", rate_limit=RateLimit(0))), "tokens_max"),
        (table(Rule(API, "r", request_headers=HeaderEdits(set=(("host", "a"),)))), "request_headers, set 'host'"),
        (table(Rule(API, "r", request_headers=HeaderEdits(remove=("Content-Length",)))), "remove"),
        (table(Rule(API, "r", response_headers=HeaderEdits(add=(("x-a", "a\r\nb: c"),)))), "add 'x-a'"),
        (table(Rule(API, "r", request_headers=HeaderEdits(add=(("x-forwarded-client-cert", "a"),)))), "edited"),
    ],
)  # fmt: skip
def test_what_cannot_be_served_is_refused_with_its_place(refused, words):
    with pytest.raises(ConfigError) as raised:
        check_routes(refused, ("api",))
    assert str(raised.value).startswith("route table 'web', host 'all', rule 'r', ")
    assert words in str(raised.value)


@pytest.mark.parametrize("domains", [("a", "A"), ("a*b",), ("",), (), ("a:80",)])
def test_domains_are_checked(domains):
    with pytest.raises(ConfigError, match="host 'h'"):
        check_routes(RouteTable((VirtualHost((), "h", domains),)), ())


def test_a_domain_belongs_to_one_host():
    with pytest.raises(ConfigError, match="twice"):
        check_routes(RouteTable((VirtualHost((), "h", ("*",)), VirtualHost((), "i", ("*",)))), ())


def test_edits_of_the_table_are_checked():
    with pytest.raises(ConfigError, match="route table 'web', request_headers"):
        check_routes(table(request_headers=HeaderEdits(set=((":path", "/"),))), ())


def test_a_table_that_uses_everything_is_taken():
    match = RouteMatch(
        PathMatch("segment", "/a"), (NamedMatch("x-a", StringMatch("present")),),
        (NamedMatch("q", StringMatch("exact")),),
        ("GET",), (StringMatch("suffix", ".b"),), ("http",), (80,), ("web",), (("version", "1"),),
    )  # fmt: skip
    rule = Rule(
        Forward((WeightedTarget("api", 3), WeightedTarget("api", 0)), None, RegexRewrite("/a/(.*)", r"/\1")),
        "r", (match,), Timeouts(1.0, 0.0), RetryPolicy(), (Mirror("api", 0.5),), Delay(0.1, 1.0), Abort(503, 1.0),
        Cors((StringMatch("exact", "*"),), ("GET",), ("x-a",), ("x-b",), 5), RateLimit(5),
        HeaderEdits((("x-a", "%REQ(x-b)%"),), (("x-c", ""),), ("x-d",)),
    )  # fmt: skip
    others = (Rule(Redirect(strip_query=True)), Rule(DirectResponse(204)))
    check_routes(table(rule, *others), ("api",))
