"""How load is divided among priorities: Envoy's documented tables, and what must hold of any division."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mesh.proxy.balancing.levels import distance, divide, locality_weight


def _divide(*healthy_percents, panic_threshold=50.0, overprovisioning=1.4):
    counts = [(percent, 100) for percent in healthy_percents]
    return divide(counts, overprovisioning=overprovisioning, panic_threshold=panic_threshold)


def _loads(shares):
    return tuple(share.load for share in shares)


def _panics(shares):
    return tuple(share.panic for share in shares)


@pytest.mark.parametrize(("healthy", "load"), [(100, 100), (72, 100), (71, 99), (50, 70), (25, 35), (0, 0)])
def test_load_spills_to_a_healthy_second_level(healthy, load):
    shares = _divide(healthy, 100)
    assert _loads(shares) == (load, 100 - load)
    assert _panics(shares) == (False, False)


@pytest.mark.parametrize(
    ("healthy", "loads"),
    [
        ((100, 100), (100, 0)),
        ((72, 72), (100, 0)),
        ((71, 71), (99, 1)),
        ((50, 50), (70, 30)),
        ((25, 25), (50, 50)),
        ((100, 100, 100), (100, 0, 0)),
        ((72, 72, 100), (100, 0, 0)),
        ((71, 71, 100), (99, 1, 0)),
        ((50, 50, 100), (70, 30, 0)),
        ((25, 100, 100), (35, 65, 0)),
        ((25, 25, 100), (35, 35, 30)),
    ],
)
def test_levels_that_are_all_unwell_share_by_their_health(healthy, loads):
    assert _loads(_divide(*healthy)) == loads


def test_what_rounding_leaves_goes_to_the_first_healthy_level():
    # Healths 35, 35 and 28 of 98: 35, 35 and 28 in integers. (Envoy's documentation rounds this row differently.)
    assert _loads(_divide(25, 25, 20, panic_threshold=0.0)) == (37, 35, 28)
    assert _loads(_divide(0, 25, 20, panic_threshold=0.0)) == (0, 56, 44)


@pytest.mark.parametrize(
    ("healthy", "panics"),
    [
        ((72, 72), (False, False)),
        ((50, 60), (False, False)),
        ((25, 100), (False, False)),
        ((25, 25), (True, True)),
        ((5, 65), (True, False)),
        ((0, 0), (True, True)),
    ],
)
def test_a_level_panics_only_when_all_together_are_too_unwell(healthy, panics):
    assert _panics(_divide(*healthy)) == panics


def test_a_level_in_panic_keeps_the_share_of_its_health():
    assert _loads(_divide(5, 65)) == (8, 92)  # 7 of 98 and 91 of 98, and one that rounding left


def test_when_all_levels_panic_load_goes_by_their_size():
    shares = divide([(0, 30), (0, 10)], overprovisioning=1.4, panic_threshold=50.0)
    assert _loads(shares) == (75, 25)


def test_without_panic_nobody_stays_nobody():
    assert _loads(_divide(0, 0, panic_threshold=0.0)) == (100, 0)
    assert _panics(_divide(0, 0, panic_threshold=0.0)) == (False, False)


def test_the_panic_threshold_itself_is_no_panic():
    assert _panics(divide([(5, 10)], overprovisioning=1.4, panic_threshold=50.0)) == (False,)
    assert _panics(divide([(4, 10)], overprovisioning=1.4, panic_threshold=50.0)) == (True,)


_COUNTS = st.integers(1, 50).flatmap(lambda total: st.tuples(st.integers(0, total), st.just(total)))


@given(st.lists(_COUNTS, min_size=1, max_size=5), st.floats(1.0, 3.0), st.sampled_from([0.0, 20.0, 50.0, 100.0]))
def test_all_load_is_given_away_and_to_levels_that_can_take_it(counts, overprovisioning, panic_threshold):
    shares = divide(counts, overprovisioning=overprovisioning, panic_threshold=panic_threshold)
    assert sum(_loads(shares)) == 100
    assert all(load >= 0 for load in _loads(shares))
    if any(usable for usable, _ in counts) and not all(_panics(shares)):
        healthy_enough = [round(overprovisioning * 100) * usable // total > 0 for usable, total in counts]
        assert all(ok or not load for ok, load in zip(healthy_enough, _loads(shares), strict=True))
    if panic_threshold == 0.0:
        assert not any(_panics(shares))


@pytest.mark.parametrize(
    ("own", "other", "expected"),
    [
        ("eu/a", "eu/a", 0),
        ("eu/a/rack1", "eu/a/rack2", 0),
        ("eu/a", "eu/b", 1),
        ("eu/a", "eu", 1),
        ("eu/a", "us/a", 2),
        ("eu/a", "", 2),
        ("eu", "eu/a", 0),
        ("eu", "us/a", 1),
    ],
)
def test_distance_is_by_zone_then_region(own, other, expected):
    assert distance(own, other) == expected


def test_the_longest_listed_locality_gives_the_weight():
    weights = (("eu", 10), ("eu/a", 80), ("us", 5))
    assert locality_weight("eu/a/rack1", weights) == 80
    assert locality_weight("eu/b", weights) == 10
    assert locality_weight("europe", weights) == 0
