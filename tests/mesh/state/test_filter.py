"""The filter grammar and its meaning; and regular expressions against the standard library's."""

from contextlib import suppress

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mesh.errors import InvalidRequest
from mesh.model.pattern import Pattern
from mesh.state.filter import DEPTH_MAX, EXPRESSION_CHARS_MAX, Filter

VALUE = {
    "ID": "web-1",
    "Port": 80,
    "Ratio": 0.5,
    "Native": True,
    "Tags": ["v1", "blue"],
    "Numbers": [1, 2],
    "Meta": {"env": "prod", "a.b": "dotted", "empty": ""},
    "Nothing": None,
    "Node": {"Name": "n1", "Meta": {"rack": "7"}},
    "Checks": [{"CheckID": "a", "Status": "passing"}, {"CheckID": "b", "Status": "critical"}],
}


@pytest.mark.parametrize(
    ("expression", "expected"),
    [
        ("ID == web-1", None),  # a bare word ends at `-`
        ('ID == "web-1"', True),
        ("ID == `web-1`", True),
        ('ID != "web-1"', False),
        ('"eb" in ID', True),
        ('"eb" not in ID', False),
        ("ID contains web", True),
        ('ID not contains "web-2"', True),
        ("Port == 80", True),
        ("Port == 0x50", None),
        ('Port == "0x50"', True),
        ("Port != 81", True),
        ("Ratio == 0.5", True),
        ("Native == true", True),
        ("Native == T", True),
        ("Native != false", True),
        ("v1 in Tags", True),
        ("v2 not in Tags", True),
        ("Tags contains blue", True),
        ("Tags is empty", False),
        ("Tags is not empty", True),
        ("2 in Numbers", True),
        ("Meta.env == prod", True),
        ('Meta["a.b"] == dotted', True),
        ('Meta[ "a.b" ] == dotted', True),
        ("env in Meta", True),
        ("Meta contains other", False),
        ("Meta.other == x", False),
        ("Meta.other != x", True),
        ("Meta.other is empty", True),
        ("Meta.other is not empty", False),
        ("Nothing is empty", True),
        ("x in Nothing", False),
        ("Node.Meta.rack == 7", True),
        ("Checks.Status == critical", True),
        ("Checks.Status == warning", False),
        ("Checks.Status != critical", True),
        ("Checks is not empty", True),
        ("ID matches `^web-[0-9]$`", True),
        ("ID not matches web", False),
        ("ID matches `eb`", True),
        ("not Port == 80", False),
        ("not not Port == 80", True),
        ("not (Port == 80 and Native == false)", True),
        ("Port == 81 or Port == 80 and Native == true", True),
        ("(Port == 80 or Port == 81) and Native == false", False),
        ("not Port == 81 and Native == true", True),
        ("Port == 80 or ID == 7 and Port == x", True),  # the right side is not looked at
        ("  Port\t==\n80  ", True),
        ('ID == "web\\x2d1"', True),
    ],
)
def test_expressions(expression, expected):
    if expected is None:
        with pytest.raises(InvalidRequest):
            Filter(expression).matches(VALUE)
    else:
        assert Filter(expression).matches(VALUE) is expected


@pytest.mark.parametrize(
    "expression",
    [
        "",
        " ",
        "ID",
        "ID ==",
        "== ID",
        "ID = x",
        "ID is",
        "ID is nil",
        "ID < 3",
        "(ID == x",
        "ID == x)",
        "ID == x y",
        "ID == x and",
        "or ID == x",
        "not",
        "()",
        'ID == "open',
        'ID == "bad \\q escape"',
        "ID == 01",
        "ID == 1x",
        "any Tags as t",
        "/ID == x",
        "ID matches `(`",
        "ID matches `(?=x)`",
        "ID matches `(x)\\1`",
        "x in",
        "x in 7",
        "Meta[env] == x",
        "(" * (DEPTH_MAX + 1) + "ID == x" + ")" * (DEPTH_MAX + 1),
        "not " * 5000 + "ID == x",
        "ID == `" + "x" * EXPRESSION_CHARS_MAX + "`",
    ],
)
def test_expressions_that_are_not_valid_say_so(expression):
    with pytest.raises(InvalidRequest, match="Failed to create boolean expression evaluator: "):
        Filter(expression)


@pytest.mark.parametrize(
    "expression",
    [
        "Port == x",
        "Native == 2",
        "Port is empty",
        "ID is empty",
        "Port matches x",
        "7 in Port",
        "ID.Name == x",
        "Meta == x",
    ],
)
def test_operators_that_the_type_does_not_have_say_so(expression):
    with pytest.raises(InvalidRequest, match="Failed to create boolean expression evaluator: "):
        Filter(expression).matches(VALUE)


FIELDS = dict.fromkeys(VALUE)


def test_selectors_of_unknown_fields_are_refused_where_the_fields_are_known():
    for expression in ("Bogus == x", "x in Bogus", "Bogus.ID is empty", "ID == x or Bogus == x"):
        with pytest.raises(InvalidRequest, match=r'Selector "Bogus[.ID]*" is not valid'):
            Filter(expression, fields=FIELDS)
        assert Filter(expression).matches(VALUE) is ("empty" in expression)
    assert Filter("Meta.any == x or Port == 80", fields=FIELDS).matches(VALUE)
    with pytest.raises(InvalidRequest, match=r'Selector "Outer\.Bogus" is not valid'):
        Filter("Outer.Bogus == x", fields={"Outer": {"Inner": None}})
    assert Filter("Outer.Inner.Any == x", fields={"Outer": {"Inner": None}}).matches({"Outer": {"Inner": {"Any": "x"}}})


@settings(max_examples=150, deadline=None)
@given(st.text(alphabet='IDxot nand()=!"`.[]in 7es', max_size=40) | st.text(max_size=20))
def test_any_text_parses_or_is_refused(text):
    with suppress(InvalidRequest):
        assert Filter(text).matches(VALUE) in (True, False)


# Patterns


@pytest.mark.parametrize(
    ("text", "subject", "expected"),
    [
        ("^(web|api)-[0-9]{2,3}$", "api-007", True),
        ("^b$", "a\nb\nc", False),
        ("(?m)^b$", "a\nb\nc", True),
        ("(?i)abc", "xABCx", True),
        ("é", "café", True),
        ("", "", True),
    ],
)
def test_patterns_match_anywhere_in_re2_s_syntax(text, subject, expected):
    assert Pattern(text).search(subject) is expected


@pytest.mark.parametrize("text", ["(", "a**", "(?=a)", r"(a)\1", "((a{100}){100}){100}", "a" * 2000, "\ud800"])
def test_patterns_that_re2_lacks_or_that_are_too_large_are_refused(text):
    with pytest.raises(InvalidRequest, match="error parsing regexp"):
        Pattern(text)


@settings(max_examples=200, deadline=None)
@given(st.text(alphabet="ab()[]{}?*+|^$\\.-,:<>P=!ix12QE\n", max_size=14))
def test_any_pattern_compiles_or_is_refused(text):
    with suppress(InvalidRequest):
        Pattern(text).search("ab12")


@pytest.mark.parametrize("text", ["(a+)+$", "^(a|a)*$", "(a*)*b", "(.*)*x", "(a?){30}a{30}$"])
def test_patterns_that_make_a_backtracking_engine_explode_end(text):
    assert Pattern(text).search("a" * 50_000 + "!") is False
