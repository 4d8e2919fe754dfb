"""Aggregation, alias checks and thresholds."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mesh.health import Thresholds, aggregate, alias_result
from mesh.model.check import Check


def check(status: str, check_id: str = "c", output: str = "") -> Check:
    return Check("n1", check_id, check_id, status=status, output=output)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("statuses", "expected"),
    [
        ((), "passing"),
        (("passing", "passing"), "passing"),
        (("passing", "warning"), "warning"),
        (("warning", "critical", "passing"), "critical"),
        (("critical", "warning"), "critical"),
    ],
)
def test_worst_check_decides(statuses, expected):
    assert aggregate(check(status) for status in statuses) == expected


@pytest.mark.parametrize("check_id", ["_node_maintenance", "_service_maintenance:web"])
def test_maintenance_is_worse_than_critical(check_id):
    assert aggregate([check("critical"), check("critical", check_id), check("passing")]) == "maintenance"


def test_alias_takes_the_worst_of_its_target():
    target = 'Service "web"'
    result = alias_result([check("passing"), check("warning", "w", "slow")], target=target, target_exists=True)
    assert (result.status, result.output) == ("warning", 'Aliased check "w" failing: slow')
    checks = [check("warning", "w", "slow"), check("critical", "x", "down"), check("critical", "y", "late")]
    result = alias_result(checks, target=target, target_exists=True)
    assert (result.status, result.output) == ("critical", 'Aliased check "x" failing: down')


def test_alias_of_nothing_passes_and_of_a_missing_target_does_not():
    assert alias_result([], target="x", target_exists=True).output == "No checks found."
    assert alias_result([check("passing")], target="x", target_exists=True).output == "All checks passing."
    missing = alias_result([check("passing")], target='Service "x"', target_exists=False)
    assert (missing.status, missing.output) == ("critical", 'Service "x" could not be found')


def test_without_thresholds_every_result_counts_at_once():
    thresholds = Thresholds()
    for status in ("critical", "passing", "warning", "critical"):
        assert thresholds.record(status) == status


def test_thresholds_need_results_in_a_row():
    thresholds = Thresholds(success_before_passing=3, failures_before_critical=3)
    assert [thresholds.record(one) for one in ("critical", "critical", "passing")] == [None, None, None]
    assert [thresholds.record("critical") for _ in range(4)] == [None, None, "critical", "critical"]
    assert [thresholds.record("passing") for _ in range(4)] == [None, None, "passing", "passing"]


def test_failures_pass_through_warning_before_critical():
    thresholds = Thresholds(failures_before_warning=1, failures_before_critical=3)
    assert [thresholds.record("critical") for _ in range(4)] == ["warning", "warning", "critical", "critical"]


@given(
    st.integers(0, 4),
    st.integers(0, 4),
    st.integers(0, 4),
    st.lists(st.sampled_from(("passing", "warning", "critical")), max_size=20),
)
def test_thresholds_agree_with_counting_from_the_end(
    success: int, warning: int, critical: int, results: list[str]
) -> None:
    thresholds = Thresholds(
        success_before_passing=success, failures_before_warning=warning, failures_before_critical=critical
    )
    for end, result in enumerate(results, start=1):
        run = 0
        while run < end and (results[end - 1 - run] == "critical") == (result == "critical"):
            run += 1
        if result != "critical":
            expected = result if run >= success else None
        elif run >= critical:
            expected = "critical"
        else:
            expected = "warning" if run >= (warning or critical) else None
        assert thresholds.record(result) == expected  # type: ignore[arg-type]
