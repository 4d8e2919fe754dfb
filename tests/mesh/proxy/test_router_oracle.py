"""The router's index against a naive interpreter of the same tables."""

import os
import random

from routing_cases import PORT, SCHEME, make_case, make_table, oracle

from mesh.model.match import NamedMatch, PathMatch, RouteMatch, StringMatch
from mesh.proxy import route_index
from mesh.proxy.router import Router
from mesh.traffic.route import DirectResponse, RouteTable, Rule, VirtualHost

CASES = int(os.environ.get("ROUTE_CASES", "20000"))
SEED = int(os.environ.get("ROUTE_SEED", "1"))
REQUESTS_PER_TABLE = 50


def router_of(case):
    return Router(
        case.table,
        default_target="app",
        source=case.source if case.fixed_source else None,
        source_metadata=case.metadata,
        port=PORT,
        scheme=SCHEME,
    )


def disagreements(cases, seed):
    """How many cases were tried, how many met a rule, and those in which the router and the oracle differ."""
    rng = random.Random(seed)
    hits, wrong = 0, []
    for _ in range(cases // REQUESTS_PER_TABLE):
        first = make_case(rng, make_table(rng))
        router = router_of(first)
        for _ in range(REQUESTS_PER_TABLE):
            other = make_case(rng, first.table)
            case = type(other)(
                first.table,
                other.head,
                first.source if first.fixed_source else other.source,
                first.fixed_source,
                first.metadata,
            )
            route = router.route(case.head, case.source)
            expected = oracle(case)
            hits += expected is not None
            if (None if route is None else route.name) != expected:
                wrong.append((case, expected, route and route.name))
    return hits, wrong


def test_the_router_finds_the_rule_that_trying_one_by_one_finds():
    hits, wrong = disagreements(CASES, SEED)
    assert wrong == []
    assert CASES // 4 < hits < CASES  # the cases say something


def test_an_index_too_large_to_merge_in_advance_finds_the_same(monkeypatch):
    monkeypatch.setattr(route_index, "MERGED_MAX", 5)
    assert disagreements(2000, SEED + 1)[1] == []


def test_many_rules_for_one_path_are_told_apart_by_values_of_the_request():
    rng = random.Random(SEED)
    rules = tuple(
        Rule(
            DirectResponse(200),
            str(number),
            tuple(
                RouteMatch(
                    rng.choice((PathMatch("prefix", "/"), PathMatch("prefix", "/a"), None)),
                    headers=(NamedMatch("x-version", StringMatch("exact", rng.choice(("v1", "v2", "V1", "can")))),)
                    if rng.random() < 0.9
                    else (),
                    query=(NamedMatch("q", StringMatch("exact", rng.choice(("v1", "v2", "can")))),),
                    methods=rng.choice((("GET",), ("PUT", "POST"), ())),
                )
                for _ in range(2)
            ),
        )
        for number in range(40)
    )
    table = RouteTable((VirtualHost(rules),))
    router = router_of(make_case(rng, table))
    names = set()
    for _ in range(3000):
        case = make_case(rng, table)
        route = router.route(case.head, case.source)
        assert (None if route is None else route.name) == oracle(case), case
        names.add(route and route.name)
    assert len(names) > 10
