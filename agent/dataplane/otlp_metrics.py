"""Samples as OTLP metrics: cumulative sums, gauges and explicit-bucket histograms, under their Prometheus names."""

import os
import time
from collections.abc import Sequence

from agent.dataplane.exposition import is_gauge
from agent.dataplane.metrics import Sample
from agent.dataplane.otlp import OtlpSender

INTERVAL_S_MIN = 1.0
YIELD_POINTS = 50  # encoding shares the interpreter with traffic: after so many points others may run

_Key = tuple[str, tuple[tuple[str, str], ...]]


def interval_from_environment() -> float:
    """Seconds between two exports: OTEL_METRIC_EXPORT_INTERVAL (milliseconds; 60000), at least INTERVAL_S_MIN. 0 when
    OTEL_METRICS_EXPORTER is `none`, or anything but OTLP: then nothing is exported.
    """
    if os.environ.get("OTEL_METRICS_EXPORTER", "").strip() not in ("", "otlp"):
        return 0.0
    try:
        milliseconds = float(os.environ.get("OTEL_METRIC_EXPORT_INTERVAL", "60000"))
    except ValueError:
        milliseconds = 60_000.0
    return max(INTERVAL_S_MIN, milliseconds / 1000.0)


class MetricsExport:
    """Sends all samples to the collector of the moment, every `interval_s` (0: never)."""

    def __init__(self, hostname: str, interval_s: float) -> None:
        self._hostname = hostname
        self._interval_s = interval_s
        self._started_ns = time.time_ns()
        self._due_at = 0.0
        self._endpoint = ""
        self._sender: OtlpSender[Sample] | None = None

    def is_due(self, endpoint: str, now: float) -> bool:
        """Whether it is time to send samples there. Asked about once a second; the first are due after an interval."""
        if not self._interval_s:
            return False
        if endpoint != self._endpoint:
            self.close()
            self._endpoint = endpoint
            self._sender = OtlpSender(endpoint, "/v1/metrics", self._encoded) if endpoint else None
            self._due_at = now + self._interval_s
        if self._sender is None or now < self._due_at:
            return False
        self._due_at = now + self._interval_s
        return True

    def send(self, samples: Sequence[Sample]) -> None:
        """Hands over what is due."""
        if self._sender is not None:
            self._sender.put(samples)

    def _encoded(self, samples: Sequence[Sample]) -> bytes:
        return encode_metrics(samples, hostname=self._hostname, started_ns=self._started_ns)

    def close(self) -> None:
        """No more; what is queued is still sent."""
        if self._sender is not None:
            self._sender.close(wait_s=0.0)
            self._sender = None


def encode_metrics(samples: Sequence[Sample], *, hostname: str, started_ns: int) -> bytes:
    """An ExportMetricsServiceRequest, cumulative since `started_ns` (Unix nanoseconds)."""
    from opentelemetry.proto.collector.metrics.v1.metrics_service_pb2 import ExportMetricsServiceRequest
    from opentelemetry.proto.metrics.v1.metrics_pb2 import AGGREGATION_TEMPORALITY_CUMULATIVE, Metric

    request = ExportMetricsServiceRequest()
    resource = request.resource_metrics.add()
    for name, text in (("service.name", "mesh"), ("host.name", hostname)):
        resource.resource.attributes.add(key=name).value.string_value = text
    scope = resource.scope_metrics.add()
    scope.scope.name = "mesh.dataplane"
    now_ns = time.time_ns()
    metrics: dict[str, Metric] = {}

    def metric_of(name: str) -> Metric:
        found = metrics.get(name)
        if found is None:
            found = metrics[name] = scope.metrics.add(name=name)
        return found

    plain, histograms = _sorted_out(samples)
    for number, (name, labels, value) in enumerate(plain):
        metric = metric_of(name)
        if is_gauge(name):
            point = metric.gauge.data_points.add(time_unix_nano=now_ns)
        else:
            metric.sum.aggregation_temporality = AGGREGATION_TEMPORALITY_CUMULATIVE
            metric.sum.is_monotonic = True
            point = metric.sum.data_points.add(time_unix_nano=now_ns, start_time_unix_nano=started_ns)
        point.as_double = value
        for key, text in labels.items():
            point.attributes.add(key=key).value.string_value = text
        if number % YIELD_POINTS == 0:
            time.sleep(0)
    for number, ((name, pairs), histogram) in enumerate(histograms.items()):
        metric = metric_of(name)
        metric.unit = "ms"
        metric.histogram.aggregation_temporality = AGGREGATION_TEMPORALITY_CUMULATIVE
        bars = metric.histogram.data_points.add(time_unix_nano=now_ns, start_time_unix_nano=started_ns)
        bars.explicit_bounds.extend(histogram.bounds)
        bars.bucket_counts.extend(
            int(count - before)
            for before, count in zip((0.0, *histogram.cumulative[:-1]), histogram.cumulative, strict=True)
        )
        bars.count, bars.sum = int(histogram.cumulative[-1]), histogram.total
        for key, text in pairs:
            bars.attributes.add(key=key).value.string_value = text
        if number % YIELD_POINTS == 0:
            time.sleep(0)
    data: bytes = request.SerializeToString()
    return data


class _Bars:
    """One histogram, put together again from its Prometheus samples."""

    def __init__(self) -> None:
        self.bounds: list[float] = []
        self.cumulative: list[float] = []  # the last one is of all
        self.total = 0.0


def _sorted_out(samples: Sequence[Sample]) -> tuple[list[Sample], dict[_Key, _Bars]]:
    """Counters and gauges; and histograms by name and labels."""
    plain: list[Sample] = []
    histograms: dict[_Key, _Bars] = {}
    for sample in samples:
        name, labels, value = sample
        family, _, part = name.rpartition("_")
        if part not in ("bucket", "sum", "count"):
            plain.append(sample)
            continue
        key = family, tuple(sorted(pair for pair in labels.items() if pair[0] != "le"))
        bars = histograms.setdefault(key, _Bars())
        if part == "bucket":
            bars.cumulative.append(value)
            if labels["le"] != "+Inf":
                bars.bounds.append(float(labels["le"]))
        elif part == "sum":
            bars.total = value
    return plain, histograms
