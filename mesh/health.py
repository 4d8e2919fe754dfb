"""What checks add up to, and when a check's result becomes its status."""

from collections.abc import Iterable
from typing import Literal

import msgspec

from mesh.model.check import NODE_MAINTENANCE_ID, SERVICE_MAINTENANCE_PREFIX, Check, CheckStatus

AggregatedStatus = Literal["passing", "warning", "critical", "maintenance"]

NO_CHECKS_OUTPUT = "No checks found."
ALL_PASSING_OUTPUT = "All checks passing."


def aggregate(checks: Iterable[Check]) -> AggregatedStatus:
    """The worst of the checks, where maintenance is worst of all; passing when there are none."""
    worst: AggregatedStatus = "passing"
    for check in checks:
        if check.check_id == NODE_MAINTENANCE_ID or check.check_id.startswith(SERVICE_MAINTENANCE_PREFIX):
            return "maintenance"
        if check.status == "critical" or (check.status == "warning" and worst == "passing"):
            worst = check.status
    return worst


class AliasResult(msgspec.Struct, frozen=True):
    """What an alias check reports."""

    status: CheckStatus
    output: str


def alias_result(checks: Iterable[Check], *, target: str, target_exists: bool) -> AliasResult:
    """The worst of the target's checks (its node's among them), with the output of the first that is that bad.

    `target` names what is aliased, for the text; a target that does not exist is critical.
    """
    if not target_exists:
        return AliasResult("critical", f"{target} could not be found")
    worst: Check | None = None
    found = False
    for check in checks:
        found = True
        if check.status == "critical" or (check.status == "warning" and worst is None):
            worst = check
            if check.status == "critical":
                break
    if worst is not None:
        return AliasResult(worst.status, f'Aliased check "{worst.name}" failing: {worst.output}')
    return AliasResult("passing", ALL_PASSING_OUTPUT if found else NO_CHECKS_OUTPUT)


class Thresholds:
    """Turns the results of a check's runs into its status: a change needs so many results in a row.

    Zero means at once; `failures_before_warning` of zero means as many as `failures_before_critical`, so that the
    check goes straight to critical. A result of warning counts as a success, as in Consul.
    """

    def __init__(
        self, *, success_before_passing: int = 0, failures_before_warning: int = 0, failures_before_critical: int = 0
    ) -> None:
        self._success_before_passing = success_before_passing
        self._failures_before_critical = failures_before_critical
        self._failures_before_warning = failures_before_warning or failures_before_critical
        self._successes = 0
        self._failures = 0

    def record(self, result: CheckStatus) -> CheckStatus | None:
        """The status to report after a run, or None while there are too few such results to report anything."""
        if result != "critical":
            self._failures = 0
            self._successes += 1
            return result if self._successes >= self._success_before_passing else None
        self._successes = 0
        self._failures += 1
        if self._failures >= self._failures_before_critical:
            return "critical"
        if self._failures >= self._failures_before_warning:
            return "warning"
        return None
