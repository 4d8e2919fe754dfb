"""The table of who called what: windows, bounds, and the shape of paths."""

import random
from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mesh.authz.observed import (
    CELLS_MAX,
    OVERFLOW_CELLS_MAX,
    OVERFLOW_PATH,
    REPORT_EDGES_MAX,
    SAMPLES_MAX,
    SPELLINGS_MAX,
    Edge,
    EdgeTable,
    ObservedListener,
    merged,
    path_template,
)


@pytest.mark.parametrize(
    ("path", "template"),
    [
        (b"/", "/"),
        (b"/orders/1234/items", "/orders/*/items"),
        (b"/users/550e8400-e29b-41d4-a716-446655440000", "/users/*"),
        (b"/blob/deadbeefcafe", "/blob/*"),
        (b"/v2/orders", "/v2/orders"),
        (b"/a/b/c/d/e/f/g", "/a/b/c/d/e/**"),
        (b"/a/", "/a/"),
        (b"/session/eyJhbGciOiJIUzI1NiJ9abc", "/session/*"),
        (b"*", "/"),
    ],
)
def test_identifiers_in_a_path_are_replaced(path, template):
    assert path_template(path) == template


@given(st.binary(max_size=400))
def test_every_path_has_a_short_template(tail):
    assert len(path_template(b"/" + tail)) <= 200


def test_counts_fall_out_of_the_window_minute_by_minute():
    table = EdgeTable(0.0)
    for minute in range(5):
        for _ in range(minute + 1):
            table.count("web", b"GET", b"/a", minute * 60.0 + 1, allowed=True)
    table.count("web", b"GET", b"/a", 241.0, allowed=False)
    assert table.report(0.0, 241.0)[1] == (Edge("web", "GET", "/a", 5, 1, ("/a",)),)
    assert table.report(60.0, 241.0)[1][0].allowed == 5 + 4
    assert table.report(3600.0, 241.0)[:2] == (241.0, (Edge("web", "GET", "/a", 15, 1, ("/a",)),))
    assert table.report(60.0, 420.0)[1] == ()
    assert table.report(3600.0, 60.0 * 61)[1][0].allowed == 3 + 4 + 5  # an hour, this minute included
    table.count("cart", b"GET", b"/a", 60.0 * 70, allowed=True)
    assert [edge.source for edge in table.report(3600.0, 60.0 * 70)[1]] == ["cart"]
    assert len(table) == 1  # what has been idle for an hour is forgotten


@pytest.mark.parametrize("seed", range(6))
def test_windows_agree_with_a_naive_count(seed):
    rng = random.Random(seed)
    table, seen, now = EdgeTable(0.0), [], 0.0
    for _ in range(600):
        now += rng.choice((0.1, 5.0, 61.0)) * rng.random()
        source, allowed = rng.choice("ab"), rng.random() < 0.5
        table.count(source, b"GET", b"/x", now, allowed=allowed)
        seen.append((now // 60, source, allowed))
    since_s = rng.choice((0.0, 60.0, 300.0))
    first = now // 60 - since_s // 60
    wanted = Counter((source, allowed) for minute, source, allowed in seen if minute >= first)
    got = {edge.source: (edge.allowed, edge.denied) for edge in table.report(since_s, now)[1]}
    assert got == {one: (wanted[one, True], wanted[one, False]) for one in sorted({source for source, _ in wanted})}


def test_a_flood_of_callers_and_paths_stays_bounded_and_is_counted():
    table = EdgeTable(0.0)
    total = 30_000
    for number in range(total):
        table.count(f"s{number % 400}", b"GET", b"/p%sx/%d" % (b"q" * (number % 7), number), 1.0, allowed=True)
    for number in range(5000):
        table.count(f"other{number}", b"GET", b"/", 1.0, allowed=False)
    assert len(table) <= CELLS_MAX + OVERFLOW_CELLS_MAX + 1
    assert len(table._spellings) <= SPELLINGS_MAX
    _, edges, left_out = table.report(60.0, 2.0)
    assert len(edges) <= REPORT_EDGES_MAX
    assert sum(edge.allowed + edge.denied for edge in edges) + left_out == total + 5000
    assert all(len(edge.samples) <= SAMPLES_MAX for edge in edges)
    assert any(edge.path == OVERFLOW_PATH for edge in edges)


def test_a_tcp_service_has_neither_method_nor_path():
    table = EdgeTable(0.0)
    table.count("web", b"", b"", 1.0, allowed=True)
    assert table.report(60.0, 2.0)[1] == (Edge("web", "", "", 1, 0),)


def test_instances_of_a_service_are_seen_as_one():
    one = ObservedListener("api", True, 900.0, (Edge("web", "GET", "/a", 1, 2, ("/a",)),), 3)
    two = ObservedListener("api", True, 60.0, (Edge("web", "GET", "/a", 4, 0, ("/a",)), Edge("x", "GET", "/", 1, 0)))
    echo = ObservedListener("echo", False, 5.0, (Edge("web", "", "", 1, 0),))
    edges = (Edge("web", "GET", "/a", 5, 2, ("/a",)), Edge("x", "GET", "/", 1, 0))
    assert merged([one, echo, two]) == (ObservedListener("api", True, 60.0, edges, 3), echo)
