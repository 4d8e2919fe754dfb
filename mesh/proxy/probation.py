"""A gate per endpoint: after failures it shuts for a penalty, then lets one request through to find out.

Linkerd's failure accrual (2.20). The gate is open until `failures` in a row, or, with `success_rate_min`, until too few
of the last WINDOW_S succeed; in a row is looked at first. Shut, it waits out the penalty; then one request is admitted
on probation. Its success opens the gate, its failure doubles the penalty.

One deviation: on probation only the admitted request decides. In Linkerd any response that comes then does, also a
late one to a request from before the gate shut.
"""

import random
from typing import Literal

from mesh.traffic.policy import Probation

WINDOW_S = 10.0
BUCKETS = 10
REQUESTS_MIN = 5  # in the window, before its success rate is believed
ASKED_MAX_S = 300.0  # of a Retry-After that may lengthen the first penalty

GateState = Literal["open", "shut", "probation"]
Outcome = Literal["success", "failure", "limited"]  # limited: the endpoint is overloaded and says so

# DATA_LOSS, DEADLINE_EXCEEDED, INTERNAL, PERMISSION_DENIED, UNAVAILABLE
_GRPC_FAILURES = frozenset((b"15", b"4", b"13", b"7", b"14"))
_GRPC_RESOURCE_EXHAUSTED = b"8"
_BUCKET_S = WINDOW_S / BUCKETS
_NEVER = float("inf")


def outcome_of(status: int, grpc_status: bytes | None = None) -> Outcome:
    """What a response counts as. `grpc_status` (from the head or the trailers) decides when there is one."""
    if grpc_status is not None:
        if grpc_status in _GRPC_FAILURES:
            return "failure"
        return "limited" if grpc_status == _GRPC_RESOURCE_EXHAUSTED else "success"
    if status >= 500:
        return "failure"
    return "limited" if status == 429 else "success"


class _Window:
    """Successes and totals of the last WINDOW_S, in buckets."""

    __slots__ = ("_current", "_rolled_at", "_successes", "_totals")

    def __init__(self, now: float) -> None:
        self._successes = [0] * BUCKETS
        self._totals = [0] * BUCKETS
        self._current = 0
        self._rolled_at = now

    def add(self, *, success: bool, now: float) -> None:
        steps = int((now - self._rolled_at) / _BUCKET_S)
        if steps > 0:
            for step in range(1, min(steps, BUCKETS) + 1):
                index = (self._current + step) % BUCKETS
                self._successes[index] = self._totals[index] = 0
            self._current = (self._current + steps) % BUCKETS
            self._rolled_at += steps * _BUCKET_S
        self._totals[self._current] += 1
        self._successes[self._current] += success

    def below(self, rate: float) -> bool:
        total = sum(self._totals)
        return total >= REQUESTS_MIN and sum(self._successes) < rate * total


class ProbationGate:
    """One endpoint's. `usable` says whether a request may be sent to it now; see `began` for the one on probation.

    The owner calls `wake` when `wakes_at` has come (infinite while there is nothing to wait for), and tells the
    balancer when a call has returned True: `usable` has changed.
    """

    __slots__ = ("_asked_s", "_failures", "_penalties", "_policy", "_rng", "_window", "state", "usable", "wakes_at")

    def __init__(self, policy: Probation, rng: random.Random, *, now: float) -> None:
        self.state: GateState = "open"
        self.usable = True
        self.wakes_at = _NEVER
        self._policy = policy
        self._rng = rng
        self._failures = 0
        self._penalties = 0  # since the gate was last open
        self._asked_s = 0.0
        self._window = _Window(now) if policy.success_rate_min > 0.0 else None

    def set_policy(self, policy: Probation, now: float) -> None:
        """From now on; the state stays, and so does a penalty that is running."""
        if (policy.success_rate_min > 0.0) != (self._window is not None):
            self._window = _Window(now) if policy.success_rate_min > 0.0 else None
        self._policy = policy

    def began(self) -> bool:
        """A request is being sent to the endpoint. Returns True when it is the one on probation.

        Remember that: `ended` or `withdrawn` of this request must be told. The gate is not `usable` until then. In
        panic a balancer may use an endpoint whose gate is shut: such a request is on no probation.
        """
        if self.state == "probation" and self.usable:
            self.usable = False
            return True
        return False

    def ended(self, outcome: Outcome, now: float, *, probe: bool = False, asked_s: float = 0.0) -> bool:
        """The request's outcome: of its response, or `failure` when there was none. Whether `usable` has changed.

        `probe`: what `began` returned. `asked_s`: seconds that a limited response asks to be left alone (Retry-After);
        with `success_rate_min` that is the least that the first penalty takes.
        """
        if self.state == "open":
            return self._counted(outcome, now, asked_s)
        if not probe or self.state != "probation":
            return False  # a late answer to what was sent before the gate shut
        good = outcome == "success" or (outcome == "limited" and self._window is None)
        if good:
            self._open(now)
        else:
            self._shut(now)
        return good

    def withdrawn(self) -> bool:
        """The request on probation ended without telling anything: its caller left. Another one may be sent."""
        if self.state != "probation" or self.usable:
            return False
        self.usable = True
        return True

    def wake(self, now: float) -> bool:
        """The penalty may be over. Whether `usable` has changed."""
        if self.state != "shut" or now < self.wakes_at:
            return False
        self.state = "probation"
        self.usable = True
        self.wakes_at = _NEVER
        return True

    def _counted(self, outcome: Outcome, now: float, asked_s: float) -> bool:
        policy, window = self._policy, self._window
        self._failures = self._failures + 1 if outcome == "failure" else 0
        if window is not None:
            window.add(success=outcome == "success", now=now)
            if outcome == "limited":
                self._asked_s = max(self._asked_s, min(asked_s, ASKED_MAX_S))
        tripped = 0 < policy.failures <= self._failures
        if not tripped and (window is None or not window.below(policy.success_rate_min)):
            return False
        self._shut(now)
        return True

    def _open(self, now: float) -> None:
        self.state = "open"
        self.usable = True
        self.wakes_at = _NEVER
        self._failures = 0
        self._penalties = 0
        if self._window is not None:
            self._window = _Window(now)

    def _shut(self, now: float) -> None:
        policy = self._policy
        base = min(policy.penalty_min_s * 2.0 ** min(self._penalties, 64), policy.penalty_max_s)
        penalty = min(base + base * policy.jitter_ratio * self._rng.random(), policy.penalty_max_s)
        self._penalties += 1
        self.state = "shut"
        self.usable = False
        self.wakes_at = now + max(penalty, self._asked_s)
        self._asked_s = 0.0
