"""What a proposed set of rules would change for the traffic that was seen."""

import random

import pytest
from policy_cases import SERVICE, make_case, make_rules

from mesh.authz import Policy, source_rules
from mesh.authz.dry_run import judge, replaced
from mesh.authz.observed import OVERFLOW_PATH, Edge, EdgeTable, ObservedListener
from mesh.model.intention import Intention

ALLOW = [Intention("web", "api", "allow")]


def l7(*permissions, source="web", **fields) -> Intention:
    return Intention(source, "api", None, tuple(permissions), **fields)


def permit(action: str, **http) -> dict:
    return {"Action": action, "HTTP": http}


def change(edge: Edge, current, proposed, *, default_allow=False, http=True):
    (judged,) = judge([ObservedListener("api", http, 60.0, (edge,))], current, proposed, default_allow=default_allow)
    return judged.change


GET_A = Edge("web", "GET", "/a", 10, 0, ("/a",))


@pytest.mark.parametrize(
    ("current", "proposed", "expected"),
    [
        (ALLOW, ALLOW, "none"),
        (ALLOW, [], "cut"),
        (ALLOW, [Intention("web", "api", "deny")], "cut"),
        (ALLOW, [l7(permit("allow", PathPrefix="/a"))], "none"),
        (ALLOW, [l7(permit("allow", PathPrefix="/b"))], "cut"),
        (ALLOW, [l7(permit("allow", PathPrefix="/a", Header=[{"Name": "x", "Present": True}]))], "may-cut"),
        (ALLOW, [l7(permit("deny", PathPrefix="/a"), audit=True)], "audited"),
        ([l7(permit("deny", PathPrefix="/a"), audit=True)], [l7(permit("deny", PathPrefix="/a"))], "cut"),
        ([l7(permit("deny", PathPrefix="/a"), audit=True)], ALLOW, "none"),
        ([], ALLOW, "opened"),
        ([], [Intention("*", "*", "allow")], "opened"),
        ([], [l7(permit("allow", Header=[{"Name": "x", "Present": True}]))], "may-open"),
        ([], [Intention("web", "api", "deny", audit=True)], "opened"),
        ([], [Intention("cart", "api", "allow")], "none"),
    ],
)
def test_each_kind_of_change(current, proposed, expected):
    assert change(GET_A, current, proposed) == expected


def test_the_same_rule_changes_nothing_even_where_it_depends_on_headers():
    rule = l7(permit("allow", Header=[{"Name": "x", "Exact": "1"}]))
    other = l7(permit("allow", Header=[{"Name": "x", "Exact": "2"}]))
    assert change(GET_A, [rule], [rule]) == "none"
    assert change(GET_A, [rule], [other]) == "may-cut"


def test_paths_under_one_template_that_disagree_may_be_cut():
    edge = Edge("web", "GET", "/users/*", 10, 0, ("/users/1", "/users/2"))
    assert change(edge, ALLOW, [l7(permit("allow", PathExact="/users/1"))]) == "may-cut"
    assert change(edge, ALLOW, [l7(permit("allow", PathRegex="/users/[0-9]+"))]) == "none"


def test_what_found_no_room_in_the_table_may_be_anything():
    edge = Edge("web", "*", OVERFLOW_PATH, 10, 0)
    assert change(edge, ALLOW, [l7(permit("allow", PathPrefix="/a"))]) == "may-cut"
    assert change(edge, ALLOW, []) == "cut"


def test_permissions_cut_a_tcp_service():
    edge = Edge("web", "", "", 3, 0)
    assert change(edge, ALLOW, [l7(permit("allow", PathPrefix="/"))], http=False) == "cut"


def test_callers_without_an_identity_need_a_wildcard():
    edge = Edge("", "GET", "/", 3, 0, ("/",))
    assert change(edge, [Intention("*", "api", "allow")], ALLOW) == "cut"


def test_only_the_named_destinations_are_replaced():
    current = [*ALLOW, Intention("web", "pay", "allow")]
    proposed = [Intention("cart", "api", "allow")]
    assert replaced(current, proposed, ["api"]) == [current[1], *proposed]


def test_worst_first():
    edges = tuple(Edge(source, "GET", "/", count, 0, ("/",)) for source, count in (("a", 1), ("b", 9), ("c", 5)))
    current = [Intention(source, "api", "allow") for source in "ab"]
    judged = judge(
        [ObservedListener("api", True, 9.0, edges)], current, [Intention("c", "api", "allow")], default_allow=False
    )
    assert [(one.source, one.change) for one in judged] == [("b", "cut"), ("a", "cut"), ("c", "opened")]


@pytest.mark.parametrize("seed", range(20))
def test_what_is_said_to_be_cut_or_kept_is(seed):
    """Random traffic under random rules, then judged under others: a definite answer is never wrong."""
    rng = random.Random(seed)
    for _ in range(10):
        current, proposed = make_rules(rng), make_rules(rng)
        table, cases = EdgeTable(0.0), []
        policies = [
            Policy(source_rules(rules), default_allow=False, service=SERVICE, http=True)
            for rules in (current, proposed)
        ]
        for _ in range(30):
            case = make_case(rng, current)
            request = case.head
            before, after = (policy.verdict(case.source, request).allowed for policy in policies)
            table.count(case.source, request.method, request.path, 1.0, allowed=before)
            cases.append((case.source, case.method, request.path.decode(), before, after))
        edges = table.report(60.0, 2.0)[1]
        listener = ObservedListener(SERVICE, True, 2.0, edges)
        for judged in judge([listener], current, proposed, default_allow=False):
            for source, method, path, before, after in cases:
                if (source, method) == (judged.source, judged.method) and path in judged.samples:
                    if judged.change == "cut":
                        assert not after
                    elif judged.change == "opened":
                        assert after
                    elif judged.change == "none" and judged.proposed != "depends":
                        assert after is before
