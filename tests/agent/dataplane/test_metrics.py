"""Counters: bounded label sets, Prometheus text, OTLP, and what a real worker counts."""

import http.server
import threading
import time

import pytest
from hypothesis import given
from hypothesis import strategies as st
from msgspec.structs import replace
from opentelemetry.proto.collector.metrics.v1.metrics_service_pb2 import ExportMetricsServiceRequest

from agent.dataplane.control import Ack
from agent.dataplane.exposition import Exposition, sample_name
from agent.dataplane.metrics import (
    ENDPOINTS_MAX,
    FLAGS_MAX,
    LATENCY_BOUNDS_MS,
    OTHER,
    ROUTES_MAX,
    Histogram,
    ListenerMetrics,
    TargetMetrics,
)
from agent.dataplane.otlp_metrics import MetricsExport, encode_metrics, interval_from_environment

LABELS = {"direction": "outbound", "upstream": "api", "envoy_listener_address": "x", "local_cluster": "web"}


def test_routes_endpoints_and_flags_beyond_the_limit_count_as_others():
    listener, target = ListenerMetrics(LABELS), TargetMetrics({})
    for number in range(ROUTES_MAX + 5):
        listener.route(f"r{number}").classes[2] += 1
    for number in range(ENDPOINTS_MAX + 5):
        target.endpoint(f"10.0.0.1:{number}").requests += 1
    for number in range(FLAGS_MAX + 5):
        listener.flagged(f"F{number}")
    assert len(listener.routes) == ROUTES_MAX + 1
    assert listener.routes[OTHER].classes[2] == 5
    assert (len(target.endpoints), target.endpoints[OTHER].requests) == (ENDPOINTS_MAX + 1, 5)
    assert (len(listener.flags), listener.flags[OTHER]) == (FLAGS_MAX + 1, 5)


def test_what_left_the_configuration_is_no_longer_counted():
    listener, target = ListenerMetrics(LABELS), TargetMetrics({})
    kept = listener.route("kept")
    listener.route("gone")
    listener.keep_routes({"kept"})
    assert listener.routes == {"kept": kept}
    target.endpoint("a")
    target.endpoint("b")
    target.keep_endpoints({"b"})
    assert list(target.endpoints) == ["b"]


def test_flags_that_came_together_are_counted_one_by_one():
    listener = ListenerMetrics(LABELS)
    listener.flagged("URX,UF")
    listener.flagged("UF")
    counted = {labels["flag"]: value for name, labels, value in listener.samples("http") if "flags" in name}
    assert counted == {"URX": 1, "UF": 2}


def test_text_groups_samples_by_metric_and_says_what_did_not_fit(monkeypatch):
    monkeypatch.setattr("agent.dataplane.exposition.SERIES_MAX", 3)
    exposition = Exposition()
    exposition.add([("b", {"x": 'a"\n\\'}, 1.0), ("a_active", {}, 2.0)])
    exposition.add([("b", {}, 3.0), ("c", {}, 1.0), ("d", {}, 1.0)])
    assert exposition.text() == (
        '# TYPE a_active gauge\na_active 2\n# TYPE b counter\nb{x="a\\"\\n\\\\"} 1\nb 3\n'
        "# TYPE mesh_metrics_series_dropped counter\nmesh_metrics_series_dropped 2\n"
    )
    assert exposition.counters[sample_name("b", {})] == 3.0


@given(st.lists(st.floats(0, 4e6), max_size=50))
def test_histograms_reach_otlp_as_they_are(latencies):
    import bisect

    histogram = Histogram()
    for latency in latencies:
        histogram.observe(latency, bisect.bisect_left(LATENCY_BOUNDS_MS, latency))
    samples = [*histogram.samples("h", {"a": "b"}), ("c_total", {"k": "v"}, 5.0), ("g_active", {}, 2.0)]
    request = ExportMetricsServiceRequest()
    request.ParseFromString(encode_metrics(samples, hostname="h1", started_ns=7))
    (scope,) = request.resource_metrics[0].scope_metrics
    metrics = {metric.name: metric for metric in scope.metrics}
    (point,) = metrics["h"].histogram.data_points
    assert list(point.bucket_counts) == histogram.counts
    assert list(point.explicit_bounds) == list(LATENCY_BOUNDS_MS)
    assert (point.count, point.start_time_unix_nano) == (len(latencies), 7)
    assert point.sum == pytest.approx(sum(latencies))
    assert (point.attributes[0].key, point.attributes[0].value.string_value) == ("a", "b")
    assert metrics["c_total"].sum.is_monotonic
    assert metrics["c_total"].sum.data_points[0].as_double == 5.0
    assert metrics["g_active"].gauge.data_points[0].as_double == 2.0


def test_the_environment_says_how_often(monkeypatch):
    monkeypatch.delenv("OTEL_METRICS_EXPORTER", raising=False)
    monkeypatch.delenv("OTEL_METRIC_EXPORT_INTERVAL", raising=False)
    assert interval_from_environment() == 60.0
    monkeypatch.setenv("OTEL_METRIC_EXPORT_INTERVAL", "5000")
    assert interval_from_environment() == 5.0
    monkeypatch.setenv("OTEL_METRIC_EXPORT_INTERVAL", "1")
    assert interval_from_environment() == 1.0
    monkeypatch.setenv("OTEL_METRIC_EXPORT_INTERVAL", "soon")
    assert interval_from_environment() == 60.0
    monkeypatch.setenv("OTEL_METRICS_EXPORTER", "none")
    assert interval_from_environment() == 0.0


def test_samples_are_sent_each_interval_to_the_collector_of_the_moment():
    bodies = []

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_POST(self):
            bodies.append((self.path, self.rfile.read(int(self.headers["Content-Length"]))))
            self.send_response(200)
            self.send_header("Content-Length", "0")
            self.end_headers()

        def log_message(self, *arguments):
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        endpoint = f"http://127.0.0.1:{server.server_port}"
        export = MetricsExport("h", 60.0)
        assert not export.is_due("", 0.0)
        assert not export.is_due(endpoint, 100.0)
        assert not export.is_due(endpoint, 159.0)
        assert export.is_due(endpoint, 160.0)
        export.send([("a", {}, 1.0)])
        assert not export.is_due(endpoint, 161.0)
        deadline = time.monotonic() + 10
        while not bodies:
            assert time.monotonic() < deadline
            time.sleep(0.01)
        assert bodies[0][0] == "/v1/metrics"
        assert not export.is_due("", 300.0)
        export.send([("a", {}, 1.0)])
        assert not MetricsExport("h", 0.0).is_due(endpoint, 1e9)
    finally:
        server.shutdown()
        server.server_close()


def test_a_worker_counts_by_endpoint_and_by_flag(pair):
    hops = pair.hops()
    hops.serve()
    client = hops.client()
    for _ in range(2):
        client.send(b"GET /x HTTP/1.1\r\nHost: api\r\n\r\n")
        client.read_message()
    address = f'envoy_endpoint_address="{hops.address}:21000"'
    asked = {name: value for name, value in pair.worker.counters().items() if address in name}
    assert [value for name, value in asked.items() if name.startswith("envoy_cluster_endpoint_rq_total")] == [2]
    assert [value for name, value in asked.items() if name.startswith("envoy_cluster_endpoint_rq_error")] == [0]
    base = pair.authority.two_hops(
        outbound_port=9191, inbound_port=21000, app_port=8080, address=hops.address, version=pair.next_version()
    )
    web, api = base.sidecars
    (outbound,) = web.outbound
    nowhere = replace(web, outbound=(replace(outbound, target=replace(outbound.target, endpoints=())),))
    assert pair.worker.configure(replace(base, sidecars=(nowhere, api))) == Ack(base.version)
    client.send(b"GET /x HTTP/1.1\r\nHost: api\r\n\r\n")
    assert client.read_message()[0].startswith(b"HTTP/1.1 503 ")
    counters = pair.worker.counters()
    assert [
        value for name, value in counters.items() if name.startswith("mesh_response_flags_total") and '"UH"' in name
    ] == [1]
    assert not any(address in name for name in counters)
