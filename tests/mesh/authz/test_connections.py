"""Intentions against a naive oracle, over every shape of rules."""

from itertools import product

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from msgspec.structs import replace

from mesh.authz import Policy, authorize, source_rules
from mesh.model.intention import Intention

PERMISSIONS = ({"Action": "allow", "HTTP": {"PathPrefix": "/"}},)


def oracle(rules: list[Intention], source: str, destination: str, *, default_allow: bool) -> bool:
    """Looks for the pairs from the most to the least specific, one after the other."""
    for wanted in ((source, destination), ("*", destination), (source, "*"), ("*", "*")):
        for rule in rules:
            if (rule.source, rule.destination) == wanted:
                return rule.action == "allow"
    return default_allow


PAIRS = tuple(product(("web", "cart", "*"), ("api", "pay", "*")))
actions = st.sampled_from(("allow", "deny", "permissions"))


@st.composite
def rule_sets(draw: st.DrawFn) -> list[Intention]:
    pairs = draw(st.lists(st.sampled_from(PAIRS), unique=True))
    rules = []
    for source, destination in pairs:
        action = draw(actions)
        if action == "permissions":
            rules.append(Intention(source, destination, None, permissions=PERMISSIONS))
        else:
            rules.append(Intention(source, destination, action))
    return rules


@settings(max_examples=300, deadline=None)
@given(rule_sets(), st.booleans())
def test_decisions_agree_with_a_naive_oracle(rules: list[Intention], default_allow: bool) -> None:
    for source, destination in product(("web", "cart", "other", "we", "web2"), ("api", "pay", "other")):
        expected = oracle(rules, source, destination, default_allow=default_allow)
        decision = authorize(rules, source=source, destination=destination, default_allow=default_allow)
        assert decision.allowed is expected
        assert (decision.intention is None) == (decision.reason == "Default behavior configured by ACLs")
        inbound = sorted(
            (rule for rule in rules if rule.destination in (destination, "*")), key=lambda one: -one.precedence
        )
        assert Policy(source_rules(inbound), default_allow=default_allow).connection(source).allowed is expected


def test_every_combination_of_the_four_precedences():
    shapes = (None, "allow", "deny")
    for nine, eight, six, five in product(shapes, repeat=4):
        pairs = (("web", "api", nine), ("*", "api", eight), ("web", "*", six), ("*", "*", five))
        rules = [Intention(source, destination, action) for source, destination, action in pairs if action]
        for default_allow in (False, True):
            first = next((action for _, _, action in pairs if action), "allow" if default_allow else "deny")
            decision = authorize(rules, source="web", destination="api", default_allow=default_allow)
            assert decision.allowed is (first == "allow")


@pytest.mark.parametrize("source", ["web", "api"])
def test_wildcard_in_a_request_matches_no_exact_rule(source):
    rules = [Intention("web", "api", "allow")]
    assert not authorize(rules, source="*", destination="api", default_allow=False).allowed
    assert not authorize(rules, source=source, destination="*", default_allow=False).allowed


def test_names_are_compared_exactly():
    rules = [Intention("web", "api", "allow")]
    for source in ("Web", "web ", "web.", "w", "webb", ""):
        assert not authorize(rules, source=source, destination="api", default_allow=False).allowed


def test_reasons():
    rule = Intention("web", "api", "deny")
    decision = authorize([rule], source="web", destination="api", default_allow=True)
    assert decision.reason == "Matched L4 intention: default/web => default/api (Precedence: 9, Action: DENY)"
    assert decision.intention == rule
    named = replace(rule, intention_id="abc", action=None, permissions=PERMISSIONS)
    decision = authorize([named], source="web", destination="api", default_allow=True)
    assert not decision.allowed
    assert decision.reason == (
        "Matched L7 intention: default/web => default/api (ID: abc, Precedence: 9, Permissions: 1)"
    )
    decision = authorize([], source="web", destination="api", default_allow=True)
    assert (decision.allowed, decision.reason) == (True, "Default behavior configured by ACLs")


def test_two_rules_for_one_pair_refuse():
    rules = [Intention("web", "api", "allow"), Intention("web", "api", "deny")]
    assert not authorize(rules, source="web", destination="api", default_allow=True).allowed
