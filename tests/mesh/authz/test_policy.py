"""What the sidecar decides per request: against a naive evaluator, and the choices worth naming one by one."""

import random

import pytest
from policy_cases import SERVICE, SOURCES, make_case, make_rules, oracle

from mesh.authz import Policy, SourceRule, Verdict, source_rules
from mesh.errors import Refused
from mesh.http.head import RequestHead
from mesh.model.intention import Intention
from mesh.model.match import NamedMatch, PathMatch, StringMatch
from mesh.model.permission import Permission, permission_of


def head(method=b"GET", path=b"/", headers=(), **fields):
    return RequestHead(method, path, None, b"api", tuple(headers), **fields)


def allow(**fields) -> Permission:
    return Permission("allow", **fields)


def deny(**fields) -> Permission:
    return Permission("deny", **fields)


def policy(*rules: SourceRule, default_allow: bool = False, http: bool = True, audit: bool = False) -> Policy:
    return Policy(rules, default_allow=default_allow, service=SERVICE, http=http, audit=audit)


def under(prefix: str) -> PathMatch:
    return PathMatch("prefix", prefix)


@pytest.mark.parametrize("seed", range(40))
def test_verdicts_agree_with_a_naive_evaluator(seed):
    rng = random.Random(seed)
    for _ in range(15):
        rules = make_rules(rng)
        compiled = {
            default: Policy(source_rules(rules), default_allow=default, service=SERVICE, http=True)
            for default in (False, True)
        }
        for _ in range(10):
            case = make_case(rng, rules)
            assert compiled[case.default_allow].verdict(case.source, case.head).allowed is oracle(case), case


@pytest.mark.parametrize("default_allow", [False, True])
def test_no_permission_that_holds_means_the_default_and_not_the_next_rule(default_allow):
    rules = (
        SourceRule("web", None, (allow(path=under("/a")), deny(path=under("/b")))),
        SourceRule("*", "deny" if default_allow else "allow", precedence=8),
    )
    compiled = policy(*rules, default_allow=default_allow)
    assert compiled.verdict("web", head(path=b"/a")).allowed
    assert not compiled.verdict("web", head(path=b"/b")).allowed
    assert compiled.verdict("web", head(path=b"/c")).allowed is default_allow
    assert compiled.verdict("cart", head(path=b"/c")).allowed is not default_allow


def test_permissions_are_tried_in_their_order():
    narrow, wide = deny(path=under("/admin")), allow(path=under("/"))
    for permissions, expected in (((narrow, wide), False), ((wide, narrow), True)):
        compiled = policy(SourceRule("web", None, permissions))
        assert compiled.verdict("web", head(path=b"/admin/x")).allowed is expected


def test_a_rule_with_permissions_refuses_where_there_are_no_requests():
    compiled = policy(SourceRule("web", None, (allow(path=under("/")),)), default_allow=True, http=False)
    verdict = compiled.connection("web")
    assert (verdict.allowed, verdict.rule) == (False, "web=>api needs http")
    assert compiled.connection("cart").allowed
    assert compiled.problems == ("rule web=>api has permissions, and the service's protocol is not http: it refuses",)


@pytest.mark.parametrize("values", [(b"evil", b"good"), (b"good", b"evil"), (b"evil", b"evil")])
def test_a_repeated_header_evades_no_deny_and_earns_no_allow(values):
    headers = [(b"x-role", value) for value in values]
    evil = (NamedMatch("x-role", StringMatch("exact", "evil")),)
    refusing = policy(SourceRule("web", None, (deny(headers=evil), allow(path=under("/")))))
    assert not refusing.verdict("web", head(headers=headers)).allowed
    good = (NamedMatch("x-role", StringMatch("exact", "good")),)
    granting = policy(SourceRule("web", None, (allow(headers=good),)))
    assert not granting.verdict("web", head(headers=headers)).allowed
    prefix = (NamedMatch("x-role", StringMatch("prefix", "good")),)
    both = [(b"x-role", b"good-1"), (b"x-role", b"good-2")]
    assert policy(SourceRule("web", None, (allow(headers=prefix),))).verdict("web", head(headers=both)).allowed


@pytest.mark.parametrize(
    ("name", "value", "request_head"),
    [
        ("host", "api", head()),
        (":authority", "api", head()),
        (":method", "GET", head()),
        (":path", "/x?y=1", RequestHead(b"GET", b"/x", b"y=1", b"api", ())),
        ("upgrade", "websocket", head(upgrade=b"websocket")),
        ("content-length", "12", head(content_length=12)),
        ("transfer-encoding", "chunked", head(chunked=True)),
        ("expect", "100-continue", head(expects_continue=True)),
    ],
)
def test_what_a_head_keeps_outside_its_headers_is_decided_on(name, value, request_head):
    rule = SourceRule("web", None, (deny(headers=(NamedMatch(name, StringMatch("exact", value)),)),))
    assert not policy(rule, default_allow=True).verdict("web", request_head).allowed
    other = RequestHead(b"PUT", b"/", None, b"other", ())
    assert policy(rule, default_allow=True).verdict("web", other).allowed


def test_a_path_in_another_spelling_means_its_canonical_one():
    rule = SourceRule("web", None, (deny(path=PathMatch("exact", "/%61dmin/./x")),))
    assert not policy(rule, default_allow=True).verdict("web", head(path=b"/admin/x")).allowed


def test_a_rule_that_cannot_be_compiled_refuses():
    bad = SourceRule("web", None, (allow(path=under("/")), allow(path=PathMatch("regex", "("))))
    compiled = policy(bad, default_allow=True, audit=True)
    assert "cannot be understood" in compiled.problems[0]
    verdict = compiled.verdict("web", head())
    assert (verdict.allowed, verdict.rule) == (False, "web=>api cannot be understood")


def test_audit_lets_in_what_it_would_refuse_and_says_so():
    rules = (SourceRule("web", None, (deny(path=under("/admin")),), audit=True), SourceRule("cart", "deny"))
    compiled = policy(*rules)
    refused = compiled.verdict("web", head(path=b"/admin"))
    assert refused == Verdict(allowed=True, rule="web=>api permission 1 deny", audit_denied=True)
    assert refused.text == "audit-denied: rule web=>api permission 1 deny"
    assert compiled.verdict("web", head()).audit_denied  # no permission holds: refused by default, were it enforced
    assert not compiled.verdict("cart", head()).allowed
    whole = policy(*rules, audit=True)
    assert whole.verdict("cart", head()).audit_denied
    assert whole.verdict("other", head()) == Verdict(allowed=True, rule="", audit_denied=True)


def test_names_of_rules_say_which_one_decided():
    rules = (SourceRule("web", "deny"), SourceRule("*", "allow", precedence=5))
    compiled = policy(*rules)
    assert compiled.verdict("web", head()).details == "rbac_access_denied_matched_policy[web=>api_deny]"
    assert compiled.verdict("cart", head()).text == "allowed: *=>* allow"
    assert policy().verdict("web", head()).details == "rbac_access_denied_matched_policy[none]"
    assert policy().verdict("web", head()).text == "denied: default"


@pytest.mark.parametrize("seed", range(10))
def test_what_is_foreseen_without_headers_holds_the_verdict_that_comes(seed):
    rng = random.Random(seed)
    for _ in range(20):
        rules = make_rules(rng)
        case = make_case(rng, rules)
        compiled = Policy(source_rules(rules), default_allow=case.default_allow, service=SERVICE, http=True)
        request = case.head
        assert compiled.verdict(case.source, request) in compiled.foresee(case.source, request.method, request.path)


def test_callers_without_an_identity_are_only_under_wildcard_rules():
    for source in SOURCES:
        assert not policy(SourceRule(source, "allow")).verdict("", head()).allowed
    assert policy(SourceRule("*", "allow", precedence=8)).verdict("", head()).allowed


@pytest.mark.parametrize(
    ("permission", "reason"),
    [
        ({}, "Action must be set"),
        ({"Action": "maybe", "HTTP": {"PathPrefix": "/"}}, "Action must be set"),
        ({"Action": "allow"}, "HTTP is required"),
        ({"Action": "allow", "HTTP": {}}, "HTTP should not be empty"),
        ({"Action": "allow", "HTTP": []}, "HTTP must be an object"),
        ({"Action": "allow", "HTTP": {"PathExact": "/a", "PathPrefix": "/b"}}, "at most one of PathExact"),
        ({"Action": "allow", "HTTP": {"PathExact": "a"}}, "PathExact doesn't start with '/': \"a\""),
        ({"Action": "allow", "HTTP": {"PathGlob": "/*"}}, "HTTP.PathGlob is not supported"),
        ({"Action": "allow", "HTTP": {"Methods": ["GET", "get"]}}, 'Methods contains "GET" more than once'),
        ({"Action": "allow", "HTTP": {"Methods": ["FETCH"]}}, "invalid method 'FETCH'"),
        ({"Action": "allow", "HTTP": {"Methods": "GET"}}, "Methods must be a list"),
        ({"Action": "allow", "HTTP": {"Header": [{"Exact": "a"}]}}, "Header[0] missing required Name"),
        ({"Action": "allow", "HTTP": {"Header": [{"Name": "a"}]}}, "should only contain one of Present"),
        ({"Action": "allow", "HTTP": {"Header": [{"Name": "a", "Exact": "b", "Regex": "c"}]}}, "should only contain"),
        ({"Action": "allow", "HTTP": {"Header": [{"Name": "a", "Regex": "c", "IgnoreCase": True}]}}, "IgnoreCase"),
        ({"Action": "allow", "HTTP": {"Header": [{"Name": "TE", "Present": True}]}}, "each hop consumes it"),
        ({"Action": "allow", "HTTP": {"PathPrefix": "/"}, "JWT": {"Providers": []}}, "JWT is not supported"),
    ],
)
def test_permissions_that_say_nothing_or_too_much_are_refused(permission, reason):
    with pytest.raises(Refused) as raised:
        permission_of(permission, "Sources[0].Permissions[0].")
    assert reason in str(raised.value)
    assert str(raised.value).startswith("Sources[0].Permissions[0].")


def test_a_stored_rule_that_is_no_longer_understood_refuses():
    stored = Intention("web", "api", None, ({"Action": "allow", "HTTP": {"PathGlob": "/*"}},))
    assert source_rules([stored]) == (SourceRule("web", "deny"),)
