"""Outlier detection: endpoints that fail are ejected for a while, as Envoy 1.40 does it.

A request's outcome goes to its endpoint's `OutlierRecord`; consecutive failures eject at once, statistics are looked at
on the interval tick, which also ends ejections. Ejected endpoints are out of the balancer's choice, unless it panics.

Two deviations from Envoy. A change reaches the balancer at once, where Envoy merges changes for up to a second (and an
endpoint that was just ejected goes on getting requests). An endpoint that the success rate has ejected is not ejected
once more by the failure percentage of the same tick: Envoy would count it twice.
"""

import math
import random
from collections.abc import Callable, Iterable
from typing import Literal

from mesh.proxy.retry import FailureKind
from mesh.traffic.policy import OutlierDetection

EjectionKind = Literal[
    "consecutive_5xx",
    "consecutive_gateway_failure",
    "consecutive_local_origin_failure",
    "success_rate",
    "local_origin_success_rate",
    "failure_percentage",
    "local_origin_failure_percentage",
]
EJECTION_KINDS: tuple[EjectionKind, ...] = (
    "consecutive_5xx", "consecutive_gateway_failure", "consecutive_local_origin_failure", "success_rate",
    "local_origin_success_rate", "failure_percentage", "local_origin_failure_percentage",
)  # fmt: skip

_GATEWAY_ERRORS = (502, 503, 504)
_NEVER = float("-inf")

# gRPC's codes as HTTP statuses (google.rpc.Code's mapping): only 5xx matter here.
_HTTP_OF_GRPC = {
    b"0": 200, b"1": 499, b"2": 500, b"3": 400, b"4": 504, b"5": 404, b"6": 409, b"7": 403, b"8": 429, b"9": 400,
    b"10": 409, b"11": 400, b"12": 501, b"13": 500, b"14": 503, b"15": 500, b"16": 401,
}  # fmt: skip


def status_of_grpc(grpc_status: bytes) -> int:
    """The HTTP status that a response with this `grpc-status` counts as: 500 for a code that there is not."""
    return _HTTP_OF_GRPC.get(grpc_status, 500)


class OutlierStats:
    """Counters since the start, named as Envoy's `outlier_detection.ejections_*`; `active` is a gauge."""

    __slots__ = ("active", "detected", "enforced", "overflow")

    def __init__(self) -> None:
        self.active = 0
        self.overflow = 0
        self.detected: dict[EjectionKind, int] = dict.fromkeys(EJECTION_KINDS, 0)
        self.enforced: dict[EjectionKind, int] = dict.fromkeys(EJECTION_KINDS, 0)

    @property
    def enforced_total(self) -> int:
        """Ejections of every kind."""
        return sum(self.enforced.values())


class OutlierRecord:
    """What is known of one endpoint. Requests in flight may outlive its membership: their outcomes change nothing.

    `success_rate` (percent, the last interval's) is -1 while there were too few requests to judge by it.
    """

    __slots__ = (
        "_consecutive_5xx", "_consecutive_gateway", "_consecutive_local", "_detector", "_local_requests",
        "_local_successes", "_requests", "_successes", "ejected", "ejected_at", "ejections", "endpoint_id",
        "jitter_s", "multiplier", "reason", "removed", "success_rate", "unejected_at",
    )  # fmt: skip

    def __init__(self, detector: "OutlierDetector", endpoint_id: str) -> None:
        self._detector = detector
        self.endpoint_id = endpoint_id
        self.removed = False
        self.ejected = False
        self.ejections = 0
        self.reason: EjectionKind | None = None  # of the last ejection
        self.ejected_at = _NEVER
        self.unejected_at = _NEVER
        self.multiplier = 0  # of the base ejection time
        self.jitter_s = 0.0
        self.success_rate = -1.0
        self._consecutive_5xx = 0
        self._consecutive_gateway = 0
        self._consecutive_local = 0
        self._requests = 0  # since the last tick, as the next three
        self._successes = 0
        self._local_requests = 0
        self._local_successes = 0

    def responded(self, status: int, now: float) -> None:
        """The endpoint answered with this status (for gRPC see `status_of_grpc`)."""
        self._requests += 1
        if status < 500 or status > 599:
            self._successes += 1
            self._consecutive_5xx = self._consecutive_gateway = 0
            return
        policy = self._detector.policy
        if status in _GATEWAY_ERRORS:
            self._consecutive_gateway += 1
            if self._consecutive_gateway == policy.consecutive_gateway_failure and self._suspect(
                "consecutive_gateway_failure", now
            ):
                self._consecutive_gateway = 0
        else:
            self._consecutive_gateway = 0
        self._consecutive_5xx += 1
        if self._consecutive_5xx == policy.consecutive_5xx and self._suspect("consecutive_5xx", now):
            self._consecutive_5xx = 0

    def connected(self) -> None:
        """A connection to it is at hand (a new one or an idle one); what is sent on it may still fail.

        Counts only with `split_external_local_origin_errors`: call it for each request then.
        """
        if self._detector.split:
            self._local_requests += 1
            self._local_successes += 1
            self._consecutive_local = 0

    def served(self, now: float) -> None:
        """An opaque connection was set up, and nothing more will be known of it: a success."""
        if self._detector.split:
            self.connected()
        else:
            self.responded(200, now)

    def failed(self, kind: FailureKind, now: float) -> None:
        """No response: it counts as the 503 (or, for a timeout, the 504) that the caller would get.

        With `split_external_local_origin_errors` it counts against the endpoint's reachability instead, whatever it
        was: like Envoy we do not tell what the peer did from what the network did. An overflow is our own doing.
        """
        if kind == "overflow":
            return
        if not self._detector.split:
            self.responded(503, now)
            return
        self._local_requests += 1
        self._consecutive_local += 1
        threshold = self._detector.policy.consecutive_local_origin_failure
        if self._consecutive_local == threshold and self._suspect("consecutive_local_origin_failure", now):
            self._consecutive_local = 0

    def _suspect(self, kind: EjectionKind, now: float) -> bool:
        """Whether it was judged: what is ejected already, or gone, is not."""
        if self.ejected or self.removed:
            return False
        self._detector.suspect(self, kind, now)
        return True

    # ---- for the detector

    def close_interval(self) -> tuple[int, int, int, int]:
        """Requests and successes, and the same of local origin, since the last call."""
        counts = (self._requests, self._successes, self._local_requests, self._local_successes)
        self._requests = self._successes = self._local_requests = self._local_successes = 0
        self.success_rate = -1.0
        return counts

    def forgive(self) -> None:
        """Failures in a row start from none."""
        self._consecutive_5xx = self._consecutive_gateway = self._consecutive_local = 0


class OutlierDetector:
    """The records of a target's endpoints, and who of them is out.

    `changed` is called with a record right after its `ejected` changed, never while the endpoints change. The owner
    calls `tick` when `next_tick_at` has come.
    """

    def __init__(
        self, policy: OutlierDetection, rng: random.Random, changed: Callable[[OutlierRecord], None], *, now: float
    ) -> None:
        self.policy = policy
        self.split = policy.split_external_local_origin_errors
        self.stats = OutlierStats()
        self.next_tick_at = now + policy.interval_s
        self._rng = rng
        self._changed = changed
        self._records: dict[str, OutlierRecord] = {}

    def set_policy(self, policy: OutlierDetection, now: float) -> None:
        """From now on. What was counted and who is ejected stays; the running interval does not get longer."""
        self.policy = policy
        self.split = policy.split_external_local_origin_errors
        self.next_tick_at = min(self.next_tick_at, now + policy.interval_s)

    def endpoints_changed(self, endpoint_ids: Iterable[str]) -> None:
        """The target's endpoints are now these. One that left and comes back is a new one."""
        before = self._records
        self._records = {}
        for endpoint_id in endpoint_ids:
            kept = before.pop(endpoint_id, None)
            self._records[endpoint_id] = OutlierRecord(self, endpoint_id) if kept is None else kept
        for record in before.values():
            record.removed = True
            if record.ejected:
                record.ejected = False
                self.stats.active -= 1

    def record(self, endpoint_id: str) -> OutlierRecord:
        """The record to report to. Raises KeyError for what is no endpoint of the target."""
        return self._records[endpoint_id]

    def is_ejected(self, endpoint_id: str) -> bool:
        """Whether it is to be left out."""
        record = self._records.get(endpoint_id)
        return record is not None and record.ejected

    def check_passed(self, endpoint_id: str, now: float) -> None:
        """An active check of the endpoint has passed: that ends its ejection at once, unless the policy says no."""
        record = self._records.get(endpoint_id)
        if record is not None and record.ejected and self.policy.uneject_on_passing_check:
            self._uneject(record, now)

    def tick(self, now: float) -> None:
        """The interval is over: ends ejections, judges by statistics, and lets ejection times shrink again."""
        policy = self.policy
        self.next_tick_at = now + policy.interval_s
        records = tuple(self._records.values())
        external: list[tuple[OutlierRecord, int, float]] = []
        local: list[tuple[OutlierRecord, int, float]] = []
        for record in records:
            if record.ejected and now - record.ejected_at >= self._ejection_s(record):
                self._uneject(record, now)
            requests, successes, local_requests, local_successes = record.close_interval()
            if not record.ejected:
                if requests:
                    external.append((record, requests, 100.0 * successes / requests))
                if local_requests:
                    local.append((record, local_requests, 100.0 * local_successes / local_requests))
        volume_min = min(policy.success_rate_request_volume, policy.failure_percentage_request_volume)
        for record, volume, rate in external:
            if volume >= volume_min:
                record.success_rate = rate
        self._judge(external, "success_rate", "failure_percentage", now)
        self._judge(local, "local_origin_success_rate", "local_origin_failure_percentage", now)
        for record in records:
            if not record.ejected and now - record.unejected_at >= policy.interval_s and record.multiplier:
                record.multiplier -= 1

    def _judge(
        self,
        rates: list[tuple[OutlierRecord, int, float]],
        by_rate: EjectionKind,
        by_percentage: EjectionKind,
        now: float,
    ) -> None:
        policy = self.policy
        valid = [(record, rate) for record, volume, rate in rates if volume >= policy.success_rate_request_volume]
        if valid and len(valid) >= policy.success_rate_minimum_hosts:
            threshold = success_rate_threshold([rate for _, rate in valid], policy.success_rate_stdev_factor / 1000.0)
            for record, rate in valid:
                if rate < threshold:
                    self.suspect(record, by_rate, now)
        valid = [(record, rate) for record, volume, rate in rates if volume >= policy.failure_percentage_request_volume]
        if valid and len(valid) >= policy.failure_percentage_minimum_hosts:
            for record, rate in valid:
                if 100.0 - rate >= policy.failure_percentage_threshold:
                    self.suspect(record, by_percentage, now)

    def _ejection_s(self, record: OutlierRecord) -> float:
        return min(self.policy.base_ejection_time_s * record.multiplier, self._ejection_max_s) + record.jitter_s

    @property
    def _ejection_max_s(self) -> float:
        return max(self.policy.max_ejection_time_s, self.policy.base_ejection_time_s)

    def _enforced(self, kind: EjectionKind) -> bool:
        policy = self.policy
        percent = {
            "consecutive_5xx": policy.enforcing_consecutive_5xx,
            "consecutive_gateway_failure": policy.enforcing_consecutive_gateway_failure,
            "consecutive_local_origin_failure": policy.enforcing_consecutive_local_origin_failure,
            "success_rate": policy.enforcing_success_rate,
            "local_origin_success_rate": policy.enforcing_local_origin_success_rate,
            "failure_percentage": policy.enforcing_failure_percentage,
            "local_origin_failure_percentage": policy.enforcing_failure_percentage_local_origin,
        }[kind]
        return 100.0 * self._rng.random() < percent

    def suspect(self, record: OutlierRecord, kind: EjectionKind, now: float) -> None:
        """A detector has fired for the endpoint: it is ejected if there is room, and the roll enforces it."""
        stats, policy = self.stats, self.policy
        stats.detected[kind] += 1
        if record.ejected:
            return
        ejected_percent = 100.0 * (stats.active + 1) / len(self._records)
        if ejected_percent > policy.max_ejection_percent and not (policy.always_eject_one_host and stats.active == 0):
            stats.overflow += 1
            return
        if not self._enforced(kind):
            return
        stats.active += 1
        stats.enforced[kind] += 1
        record.ejected = True
        record.ejected_at = now
        record.ejections += 1
        record.reason = kind
        record.jitter_s = self._rng.random() * policy.max_ejection_time_jitter_s
        if record.multiplier * policy.base_ejection_time_s < self._ejection_max_s + policy.base_ejection_time_s:
            record.multiplier += 1
        self._changed(record)

    def _uneject(self, record: OutlierRecord, now: float) -> None:
        self.stats.active -= 1
        record.ejected = False
        record.unejected_at = now
        record.forgive()
        self._changed(record)


def success_rate_threshold(rates: list[float], stdev_factor: float) -> float:
    """Below this an endpoint is an outlier: the mean less `stdev_factor` times the population's standard deviation."""
    mean = math.fsum(rates) / len(rates)
    variance = math.fsum((rate - mean) ** 2 for rate in rates) / len(rates)
    return mean - stdev_factor * math.sqrt(variance)
