"""Outlier detection: equal to Envoy's counters and times, item by item."""

import random

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from mesh.proxy.outlier import EJECTION_KINDS, OutlierDetector, status_of_grpc, success_rate_threshold
from mesh.traffic.policy import OutlierDetection

INTERVAL_S = 10.0


class Bench:
    """A detector with its endpoints and a clock; `changes` are what the balancer heard."""

    def __init__(self, hosts=10, **policy):
        self.now = 1000.0
        self.changes = []
        self.detector = OutlierDetector(
            OutlierDetection(**policy),
            random.Random(1),
            lambda record: self.changes.append((record.endpoint_id, record.ejected)),
            now=self.now,
        )
        self.ids = [str(number) for number in range(hosts)]
        self.detector.endpoints_changed(self.ids)

    @property
    def stats(self):
        return self.detector.stats

    def record(self, number=0):
        return self.detector.record(str(number))

    def respond(self, *statuses, host=0):
        for status in statuses:
            self.record(host).responded(status, self.now)

    def fail(self, kind, times=1, host=0):
        for _ in range(times):
            self.record(host).failed(kind, self.now)

    def tick(self, times=1):
        for _ in range(times):
            self.now = self.detector.next_tick_at
            self.detector.tick(self.now)

    def ejected(self):
        return [number for number in self.ids if self.detector.is_ejected(number)]


# ---- 1 to 3: failures in a row


def test_the_fifth_5xx_in_a_row_ejects_at_once():
    bench = Bench()
    bench.respond(500, 500, 500, 500)
    assert bench.ejected() == []
    bench.respond(500)
    assert bench.changes == [("0", True)]
    assert (bench.stats.active, bench.stats.enforced_total, bench.stats.overflow) == (1, 1, 0)
    assert bench.stats.detected["consecutive_5xx"] == bench.stats.enforced["consecutive_5xx"] == 1
    assert bench.record().reason == "consecutive_5xx"


@pytest.mark.parametrize("good", [100, 200, 404, 429, 499, 600])
def test_anything_else_starts_the_count_again(good):
    bench = Bench()
    bench.respond(500, 500, 500, 500, good, 500, 500, 500, 500)
    assert bench.ejected() == []
    bench.respond(599)
    assert bench.ejected() == ["0"]


def test_gateway_failures_are_only_502_503_and_504():
    bench = Bench(consecutive_5xx=0, enforcing_consecutive_gateway_failure=100)
    bench.respond(502, 503, 504, 502, 500, 502, 503, 504, 502, 501)
    assert bench.stats.detected["consecutive_gateway_failure"] == 0
    bench.respond(502, 503, 504, 502, 503)
    assert bench.stats.enforced["consecutive_gateway_failure"] == 1


def test_gateway_failures_are_looked_at_before_5xx_and_by_default_only_counted():
    bench = Bench()
    bench.respond(503, 503, 503, 503, 503)
    assert bench.stats.detected["consecutive_gateway_failure"] == 1
    assert bench.stats.enforced["consecutive_gateway_failure"] == 0
    assert bench.stats.enforced["consecutive_5xx"] == 1


def test_a_counter_that_fired_starts_again_though_nobody_was_ejected():
    bench = Bench(enforcing_consecutive_5xx=0)
    bench.respond(*[500] * 14)
    assert bench.stats.detected["consecutive_5xx"] == 2
    bench.respond(500)
    assert bench.stats.detected["consecutive_5xx"] == 3
    assert (bench.ejected(), bench.changes, bench.stats.overflow) == ([], [], 0)


def test_who_is_ejected_is_not_detected_again():
    bench = Bench()
    bench.respond(*[500] * 50)
    assert bench.stats.detected["consecutive_5xx"] == 1


@pytest.mark.parametrize(
    ("kinds", "statistics"),
    [
        (["connect"] * 5, {"consecutive_gateway_failure": 1, "consecutive_5xx": 1}),
        (["connect-timeout"] * 5, {"consecutive_gateway_failure": 1, "consecutive_5xx": 1}),
        (["per-try-timeout"] * 5, {"consecutive_gateway_failure": 1, "consecutive_5xx": 1}),
        (["reset", "connect", "refused-stream"] * 2, {"consecutive_gateway_failure": 1, "consecutive_5xx": 1}),
        (["protocol"] * 5, {"consecutive_gateway_failure": 1, "consecutive_5xx": 1}),
        (["overflow"] * 50, {}),
    ],
)
def test_failures_without_a_response_count_as_the_status_they_would_give(kinds, statistics):
    bench = Bench()
    for kind in kinds:
        bench.fail(kind)
    assert {kind: count for kind, count in bench.stats.detected.items() if count} == statistics


def test_connections_alone_say_nothing_unless_errors_are_split():
    bench = Bench()
    bench.respond(500, 500, 500, 500)
    bench.record().connected()
    bench.respond(500)
    assert bench.ejected() == ["0"]


def test_an_opaque_connection_that_was_set_up_is_a_success():
    bench = Bench()
    bench.fail("connect", 4)
    bench.record().served(bench.now)
    bench.fail("connect", 4)
    assert bench.ejected() == []


def test_split_errors_keep_reachability_and_answers_apart():
    bench = Bench(split_external_local_origin_errors=True)
    bench.fail("connect", 4)
    bench.respond(500, 500, 500, 500, 200)
    assert bench.ejected() == []
    bench.fail("reset")
    assert bench.stats.enforced["consecutive_local_origin_failure"] == 1
    assert bench.stats.detected["consecutive_5xx"] == bench.stats.detected["consecutive_gateway_failure"] == 0


def test_with_split_errors_a_connection_forgives_only_unreachability():
    bench = Bench(split_external_local_origin_errors=True)
    bench.fail("per-try-timeout", 4)
    bench.record().connected()
    bench.fail("connect", 4)
    bench.respond(500, 500, 500, 500)
    bench.record().connected()
    bench.record().served(bench.now)
    bench.respond(500)
    assert bench.ejected() == ["0"]
    assert bench.record().reason == "consecutive_5xx"


# ---- 4 and 5: how many, and whether


def test_of_two_hosts_none_is_ejected_at_ten_percent():
    """Measured on Envoy: 2 hosts, one always failing, 50 failures: 0 ejected, 10 overflows."""
    bench = Bench(hosts=2)
    bench.respond(*[500] * 50)
    assert bench.ejected() == []
    assert (bench.stats.detected["consecutive_5xx"], bench.stats.overflow) == (10, 10)
    assert bench.stats.enforced_total == 0


@pytest.mark.parametrize(
    ("hosts", "percent", "ejected"),
    [(9, 10, 0), (10, 10, 1), (19, 10, 1), (20, 10, 2), (4, 50, 2), (5, 50, 2), (3, 100, 3), (3, 200, 3), (3, 0, 0)],
)
def test_the_share_that_may_be_out_counts_the_next_one(hosts, percent, ejected):
    bench = Bench(hosts=hosts, max_ejection_percent=percent)
    for host in range(hosts):
        bench.respond(*[500] * 5, host=host)
    assert bench.stats.active == len(bench.ejected()) == ejected
    assert bench.stats.overflow == hosts - ejected


def test_one_host_can_always_be_ejected_if_so_configured():
    bench = Bench(hosts=2, always_eject_one_host=True)
    bench.respond(*[500] * 5)
    bench.respond(*[500] * 5, host=1)
    assert bench.ejected() == ["0"]
    assert bench.stats.overflow == 1


def test_enforcing_is_rolled_and_a_failed_roll_is_only_detected():
    bench = Bench(hosts=4000, max_ejection_percent=100, enforcing_consecutive_5xx=30)
    for host in range(4000):
        bench.respond(*[500] * 5, host=host)
    assert bench.stats.detected["consecutive_5xx"] == 4000
    assert bench.stats.overflow == 0
    assert bench.stats.enforced["consecutive_5xx"] == len(bench.ejected()) == pytest.approx(1200, abs=120)


# ---- 6 to 8: how long


def ejected_for(bench):
    """Ejects endpoint 0 right after a tick and returns after how many seconds it is back."""
    bench.respond(*[500] * 5)
    assert bench.ejected() == ["0"]
    began = bench.now
    while bench.ejected():
        bench.tick()
    return bench.now - began


def test_ejections_get_longer_up_to_the_maximum_and_end_only_on_a_tick():
    bench = Bench()
    bench.tick()
    assert [ejected_for(bench) for _ in range(12)] == [30.0 * k for k in range(1, 11)] + [300.0, 300.0]


def test_an_ejection_that_ends_between_ticks_ends_on_the_next():
    bench = Bench(base_ejection_time_s=30.0)
    bench.now += 4.0  # ticks are at +10, +20, +30, +40
    bench.respond(*[500] * 5)
    bench.tick(3)
    assert bench.ejected() == ["0"]  # 26 s
    bench.tick()
    assert bench.ejected() == []


def test_a_maximum_below_the_base_is_the_base():
    bench = Bench(base_ejection_time_s=50.0, max_ejection_time_s=20.0)
    bench.tick()
    assert [ejected_for(bench) for _ in range(3)] == [50.0, 50.0, 50.0]


def test_an_interval_in_peace_takes_one_step_back():
    bench = Bench()
    bench.tick()
    assert [ejected_for(bench) for _ in range(3)] == [30.0, 60.0, 90.0]
    bench.tick(2)  # 3 steps, now 1
    assert bench.record().multiplier == 1
    assert ejected_for(bench) == 60.0
    bench.tick(50)
    assert bench.record().multiplier == 0
    assert ejected_for(bench) == 30.0


def test_the_tick_that_ends_an_ejection_takes_no_step_back():
    bench = Bench()
    bench.tick()
    ejected_for(bench)
    assert bench.record().multiplier == 1
    bench.tick()
    assert bench.record().multiplier == 0


def test_jitter_lengthens_ejections_by_less_than_its_maximum():
    lengths = []
    for seed in range(200):
        bench = Bench(interval_s=0.5, max_ejection_time_jitter_s=5.0)
        bench.detector._rng.seed(seed)
        bench.tick()
        lengths.append(ejected_for(bench))
    assert min(lengths) >= 30.0
    assert max(lengths) <= 35.5
    assert len(set(lengths)) > 5


def test_counters_start_from_none_after_an_ejection():
    bench = Bench(consecutive_gateway_failure=7, enforcing_consecutive_gateway_failure=100)
    bench.respond(*[503] * 5)
    assert bench.record().reason == "consecutive_5xx"
    bench.respond(503)  # sent before the ejection: the gateway counter stands at 6
    bench.tick(3)
    assert bench.ejected() == []
    bench.respond(503, 503, 503, 503)
    assert bench.ejected() == []
    bench.respond(503)
    assert bench.ejected() == ["0"]


# ---- 9: statistics


def serve(bench, host, successes, failures):
    for number in range(max(successes, failures)):
        if number < failures:
            bench.respond(500, host=host)
        if number < successes:
            bench.respond(200, host=host)


def test_the_example_of_the_success_rate_threshold():
    assert success_rate_threshold([50.0, 100.0, 100.0, 100.0, 100.0], 1.9) == pytest.approx(52.0)


def test_success_rate_ejects_on_the_tick_whoever_is_below_the_threshold():
    bench = Bench(hosts=5, max_ejection_percent=20)
    serve(bench, 0, 50, 50)
    for host in range(1, 5):
        serve(bench, host, 100, 0)
    bench.tick()
    assert bench.ejected() == ["0"]  # 50 is below 52
    assert bench.stats.enforced["success_rate"] == 1
    assert bench.record().success_rate == 50.0
    assert bench.record(1).success_rate == 100.0


@pytest.mark.parametrize(
    ("hosts", "volume"),
    [(4, 100), (5, 99)],
)
def test_success_rate_needs_hosts_and_requests(hosts, volume):
    bench = Bench(hosts=hosts, max_ejection_percent=100, failure_percentage_request_volume=1000)
    serve(bench, 0, volume // 2, volume // 2)
    for host in range(1, hosts):
        serve(bench, host, volume, 0)
    bench.tick()
    assert bench.stats.detected["success_rate"] == 0


def test_only_the_last_interval_counts():
    bench = Bench(hosts=5, max_ejection_percent=100)
    serve(bench, 0, 40, 40)
    for host in range(1, 5):
        serve(bench, host, 80, 0)
    bench.tick()
    serve(bench, 0, 40, 40)
    bench.tick()
    assert bench.ejected() == []


@pytest.mark.parametrize(("hosts", "volume", "detected"), [(5, 50, 1), (5, 49, 0), (4, 50, 0)])
def test_failure_percentage_is_counted_and_by_default_not_enforced(hosts, volume, detected):
    bench = Bench(hosts=hosts, max_ejection_percent=100, consecutive_5xx=0)
    serve(bench, 0, 0, volume)
    for host in range(1, hosts):
        serve(bench, host, volume, 0)
    bench.tick()
    assert bench.stats.detected["failure_percentage"] == detected
    assert (bench.ejected(), bench.stats.overflow) == ([], 0)


def test_failure_percentage_ejects_at_the_threshold_when_enforced():
    bench = Bench(
        hosts=5,
        max_ejection_percent=100,
        consecutive_5xx=0,
        success_rate_minimum_hosts=100,
        enforcing_failure_percentage=100,
    )
    serve(bench, 0, 15, 85)
    serve(bench, 1, 16, 84)
    for host in range(2, 5):
        serve(bench, host, 50, 0)
    bench.tick()
    assert bench.ejected() == ["0"]
    assert bench.record().reason == "failure_percentage"
    assert {kind: count for kind, count in bench.stats.detected.items() if count} == {"failure_percentage": 1}


def test_both_statistics_eject_an_endpoint_once():
    bench = Bench(hosts=10, max_ejection_percent=100, consecutive_5xx=0, enforcing_failure_percentage=100)
    serve(bench, 0, 0, 100)
    for host in range(1, 10):
        serve(bench, host, 100, 0)
    bench.tick()
    assert bench.stats.detected["success_rate"] == bench.stats.detected["failure_percentage"] == 1
    assert (bench.stats.active, bench.stats.enforced_total) == (1, 1)


def test_local_origin_statistics_are_their_own():
    bench = Bench(
        hosts=5,
        max_ejection_percent=100,
        split_external_local_origin_errors=True,
        consecutive_local_origin_failure=0,
        enforcing_failure_percentage_local_origin=100,
        enforcing_local_origin_success_rate=0,
    )
    bench.fail("connect", 100)
    for host in range(1, 5):
        for _ in range(100):
            bench.record(host).connected()
    bench.tick()
    assert bench.ejected() == ["0"]
    assert bench.record().reason == "local_origin_failure_percentage"
    assert bench.stats.detected["local_origin_success_rate"] == 1
    assert bench.stats.enforced["local_origin_success_rate"] == 0
    assert bench.stats.detected["success_rate"] == 0


# ---- 10, and what else ends an ejection


def test_a_passing_check_ends_an_ejection_at_once_unless_turned_off():
    bench = Bench()
    bench.respond(*[500] * 5)
    bench.detector.check_passed("0", bench.now)
    bench.detector.check_passed("1", bench.now)
    bench.detector.check_passed("unknown", bench.now)
    assert bench.changes == [("0", True), ("0", False)]
    assert bench.stats.active == 0
    stubborn = Bench(uneject_on_passing_check=False)
    stubborn.respond(*[500] * 5)
    stubborn.detector.check_passed("0", stubborn.now)
    assert stubborn.ejected() == ["0"]


def test_a_host_that_is_removed_while_ejected_makes_room():
    bench = Bench()
    bench.respond(*[500] * 5)
    gone = bench.record()
    bench.detector.endpoints_changed(["new", *bench.ids[1:]])
    assert bench.stats.active == 0
    assert bench.changes == [("0", True)]  # nobody asks the balancer to take it back
    for _ in range(50):
        gone.responded(500, bench.now)  # of requests that were in flight
    assert bench.stats.detected["consecutive_5xx"] == 1
    bench.respond(*[500] * 5, host=1)
    assert bench.ejected() == ["1"]
    bench.detector.endpoints_changed(["0", *bench.ids[1:]])
    assert not bench.record().ejected
    assert bench.record() is not gone


def test_what_is_known_of_a_host_survives_others_coming_and_going():
    bench = Bench()
    bench.respond(500, 500, 500, 500)
    bench.detector.endpoints_changed([*reversed(bench.ids), "new"])
    bench.respond(500)
    assert bench.ejected() == ["0"]


def test_a_new_policy_holds_at_once_and_does_not_postpone_the_tick():
    bench = Bench(max_ejection_percent=0)
    bench.respond(*[500] * 5)
    bench.now += 4.0
    bench.detector.set_policy(OutlierDetection(consecutive_5xx=2, interval_s=100.0), bench.now)
    assert bench.detector.next_tick_at == 1010.0
    bench.respond(500, 500)
    assert bench.ejected() == ["0"]


@pytest.mark.parametrize(
    ("grpc_status", "status"), [(b"0", 200), (b"14", 503), (b"4", 504), (b"7", 403), (b"13", 500), (b"99", 500)]
)
def test_grpc_statuses_count_as_http_statuses(grpc_status, status):
    assert status_of_grpc(grpc_status) == status


# ---- any order of events


class Machine(RuleBasedStateMachine):
    """Whatever happens: the gauge is what is ejected, the share is kept, times are kept, the balancer hears all."""

    @initialize(hosts=st.integers(2, 12), percent=st.sampled_from([0, 10, 34, 50, 100]), one=st.booleans())
    def start(self, hosts, percent, one):
        self.bench = Bench(hosts, max_ejection_percent=percent, always_eject_one_host=one, consecutive_5xx=2)
        self.percent, self.one = percent, one
        self.heard = set()

    @rule(host=st.integers(0, 11), status=st.sampled_from([200, 500, 503]), times=st.integers(1, 4))
    def respond(self, host, status, times):
        ids = list(self.bench.ids)
        before = self.bench.stats.active
        self.bench.respond(*[status] * times, host=ids[host % len(ids)])
        if self.bench.stats.active > before:
            share = 100.0 * self.bench.stats.active / len(ids)
            assert share <= self.percent or (self.one and before == 0)

    @rule()
    def tick(self):
        self.bench.tick()

    @rule(passed_s=st.floats(0.0, 9.0))
    def wait(self, passed_s):
        self.bench.now = min(self.bench.now + passed_s, self.bench.detector.next_tick_at)

    @rule(host=st.integers(0, 11))
    def check(self, host):
        self.bench.detector.check_passed(self.bench.ids[host % len(self.bench.ids)], self.bench.now)

    @precondition(lambda self: len(self.bench.ids) > 1)
    @rule(host=st.integers(0, 11))
    def remove(self, host):
        del self.bench.ids[host % len(self.bench.ids)]
        self.bench.detector.endpoints_changed(self.bench.ids)

    @rule()
    def add(self):
        if len(self.bench.ids) < 12:
            self.bench.ids.append(f"new-{self.bench.now}-{len(self.bench.ids)}-{len(self.bench.changes)}")
            self.bench.ids = list(dict.fromkeys(self.bench.ids))
            self.bench.detector.endpoints_changed(self.bench.ids)

    @invariant()
    def consistent(self):
        bench = self.bench
        out = set(bench.ejected())
        assert bench.stats.active == len(out)
        for endpoint_id, ejected in bench.changes:
            (self.heard.add if ejected else self.heard.discard)(endpoint_id)
        bench.changes.clear()
        assert self.heard & set(bench.ids) == out
        assert bench.stats.enforced_total + bench.stats.overflow <= sum(bench.stats.detected.values())
        for endpoint_id in out:
            record = bench.detector.record(endpoint_id)
            least = 30.0 * max(record.multiplier, 1)
            assert bench.now - record.ejected_at < min(least, 300.0) + INTERVAL_S
        assert set(bench.stats.detected) == set(EJECTION_KINDS)


TestAnyOrder = Machine.TestCase
TestAnyOrder.settings = settings(max_examples=40, stateful_step_count=40, deadline=None)
