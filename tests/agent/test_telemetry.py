"""Metrics in Consul's JSON and in Prometheus' text."""

import math

from agent.telemetry import Metrics


class Clock:
    def __init__(self) -> None:
        self.now = 1_000_000.0

    def __call__(self) -> float:
        return self.now


def test_json_shows_the_last_whole_interval():
    clock = Clock()
    metrics = Metrics(clock)
    metrics.count("consul.rpc.request")
    metrics.count("consul.rpc.request", 2)
    for value in (1.0, 2.0, 6.0):
        metrics.sample("consul.raft.apply.time", value)
    assert metrics.json_form()["Counters"] == []
    clock.now += 10
    form = metrics.json_form()
    assert form["Timestamp"] == "1970-01-12 13:46:40 +0000 UTC"
    assert form["Points"] == []
    (counter,) = form["Counters"]
    assert {key: counter[key] for key in ("Name", "Count", "Sum", "Rate")} == {
        "Name": "consul.rpc.request",
        "Count": 2,
        "Sum": 3.0,
        "Rate": 0.3,
    }
    (sample,) = form["Samples"]
    assert (sample["Min"], sample["Max"], sample["Mean"]) == (1.0, 6.0, 3.0)
    assert math.isclose(sample["Stddev"], math.sqrt(7))


def test_json_is_empty_after_a_quiet_interval():
    clock = Clock()
    metrics = Metrics(clock)
    metrics.count("consul.rpc.request")
    clock.now += 30
    assert metrics.json_form()["Counters"] == []


def test_gauges_are_read_when_shown():
    value = 1.0
    metrics = Metrics(Clock())
    metrics.gauge("consul.raft.leader", lambda: value, node="s1")
    value = 0.0
    assert metrics.json_form()["Gauges"] == [{"Name": "consul.raft.leader", "Value": 0.0, "Labels": {"node": "s1"}}]


def test_prometheus_text_counts_since_start_and_escapes_labels():
    clock = Clock()
    metrics = Metrics(clock)
    metrics.count("consul.rpc.request", path='a"b\\c\nd')
    clock.now += 100
    metrics.count("consul.rpc.request", path='a"b\\c\nd')
    metrics.sample("consul.raft.apply.time", 2.5)
    metrics.gauge("consul.serf.member.count", lambda: 3.0)
    text = metrics.prometheus_text()
    assert '# TYPE consul_rpc_request counter\nconsul_rpc_request{path="a\\"b\\\\c\\nd"} 2\n' in text
    assert '# TYPE consul_raft_apply_time summary\nconsul_raft_apply_time{quantile="0.5"} 2.5\n' in text
    assert "consul_raft_apply_time_sum 2.5\nconsul_raft_apply_time_count 1\n" in text
    assert "# TYPE consul_serf_member_count gauge\nconsul_serf_member_count 3\n" in text
