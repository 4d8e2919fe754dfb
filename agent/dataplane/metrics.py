"""Counters and histograms of one worker, and their Prometheus text.

Names and labels are those that dashboards for Envoy under Consul query. Handles are plain attributes, made once per
listener and target, so that a request costs a few integer additions.
"""

from collections.abc import Iterable, Iterator

# Upper bounds in milliseconds: Envoy's default histogram buckets.
LATENCY_BOUNDS_MS = (
    0.5, 1.0, 5.0, 10.0, 25.0, 50.0, 100.0, 250.0, 500.0, 1000.0, 2500.0, 5000.0, 10000.0, 30000.0, 60000.0, 300000.0,
    600000.0, 1800000.0, 3600000.0,
)  # fmt: skip

Sample = tuple[str, dict[str, str], float]


class Histogram:
    """Latencies in milliseconds."""

    __slots__ = ("counts", "total_ms")

    def __init__(self) -> None:
        self.counts = [0] * (len(LATENCY_BOUNDS_MS) + 1)
        self.total_ms = 0.0

    def observe(self, milliseconds: float, bucket: int) -> None:
        """One latency; `bucket` is its place among LATENCY_BOUNDS_MS, which the caller finds once for several."""
        self.counts[bucket] += 1
        self.total_ms += milliseconds

    def samples(self, name: str, labels: dict[str, str]) -> Iterator[Sample]:
        """Cumulative buckets, sum and count."""
        seen = 0
        for bound, count in zip((*map(str, LATENCY_BOUNDS_MS), "+Inf"), self.counts, strict=True):
            seen += count
            yield f"{name}_bucket", {**labels, "le": bound.removesuffix(".0")}, seen
        yield f"{name}_sum", labels, self.total_ms
        yield f"{name}_count", labels, seen


class ListenerMetrics:
    """What one listener saw. `classes[n]` counts responses with status n00 to n99; 0: the caller left before one."""

    __slots__ = (
        "accept_failures", "active", "bytes_received", "bytes_sent", "classes", "connections", "denied",
        "idle_timeouts", "labels", "latency", "overflow", "protocol_errors", "requests", "tls_errors",
    )  # fmt: skip

    def __init__(self, labels: dict[str, str]) -> None:
        self.labels = labels
        self.connections = 0
        self.active = 0
        self.overflow = 0
        self.accept_failures = 0
        self.tls_errors = 0
        self.protocol_errors = 0
        self.idle_timeouts = 0
        self.denied = 0
        self.requests = 0
        self.classes = [0] * 6
        self.latency = Histogram()
        self.bytes_received = 0
        self.bytes_sent = 0

    def samples(self, protocol: str) -> Iterator[Sample]:
        """In the shape of an Envoy listener with one HTTP or TCP filter."""
        prefix = "public_listener" if self.labels["direction"] == "inbound" else self.labels["upstream"]
        base = {key: value for key, value in self.labels.items() if key not in ("direction", "upstream")}
        if self.labels["direction"] == "outbound":
            base["consul_upstream_service"] = self.labels["upstream"]
        address = {**base, "envoy_listener_address": self.labels["envoy_listener_address"]}
        yield "envoy_listener_downstream_cx_total", address, self.connections
        yield "envoy_listener_downstream_cx_active", address, self.active
        yield "envoy_listener_downstream_cx_overflow", address, self.overflow
        yield "mesh_listener_accept_failures", address, self.accept_failures
        yield "envoy_listener_ssl_connection_error", address, self.tls_errors
        if protocol == "tcp":
            tcp = {**base, "envoy_tcp_prefix": prefix}
            yield "envoy_tcp_downstream_cx_total", tcp, self.connections
            yield "envoy_tcp_downstream_cx_rx_bytes_total", tcp, self.bytes_received
            yield "envoy_tcp_downstream_cx_tx_bytes_total", tcp, self.bytes_sent
            yield "envoy_rbac_denied", tcp, self.denied
            return
        http = {**base, "envoy_http_conn_manager_prefix": prefix}
        yield "envoy_http_downstream_rq_total", http, self.requests
        yield "envoy_http_downstream_cx_protocol_error", http, self.protocol_errors
        yield "envoy_http_downstream_cx_idle_timeout", http, self.idle_timeouts
        yield "envoy_http_rbac_denied", http, self.denied
        for number in range(1, 6):
            classed = {**http, "envoy_response_code_class": str(number)}
            yield "envoy_http_downstream_rq_xx", classed, self.classes[number]
            yield "envoy_listener_http_downstream_rq_xx", classed, self.classes[number]
        yield "envoy_http_downstream_rq_rx_reset", http, self.classes[0]
        yield from self.latency.samples("envoy_http_downstream_rq_time", http)


class TargetMetrics:
    """What one target answered, over all its endpoints."""

    __slots__ = (
        "active", "classes", "connect_failures", "connections", "connections_active", "healthy", "identity_failures",
        "labels",
        "latency", "overflow", "pending", "requests", "resets", "retries",
    )  # fmt: skip

    def __init__(self, labels: dict[str, str]) -> None:
        self.labels = labels
        self.requests = 0
        self.active = 0
        self.classes = [0] * 6
        self.latency = Histogram()
        self.connections = 0
        self.connections_active = 0
        self.connect_failures = 0
        self.identity_failures = 0
        self.overflow = 0
        self.pending = 0
        self.retries = 0
        self.resets = 0
        self.healthy = 0

    def samples(self) -> Iterator[Sample]:
        """In the shape of an Envoy cluster."""
        labels = self.labels
        yield "envoy_cluster_upstream_rq_total", labels, self.requests
        yield "envoy_cluster_upstream_rq_active", labels, self.active
        for number in range(1, 6):
            classed = {**labels, "envoy_response_code_class": str(number)}
            yield "envoy_cluster_upstream_rq_xx", classed, self.classes[number]
        yield from self.latency.samples("envoy_cluster_upstream_rq_time", labels)
        yield "envoy_cluster_upstream_cx_total", labels, self.connections
        yield "envoy_cluster_upstream_cx_active", labels, self.connections_active
        yield "envoy_cluster_upstream_cx_connect_fail", labels, self.connect_failures
        yield "envoy_cluster_ssl_fail_verify_san", labels, self.identity_failures
        yield "envoy_cluster_upstream_rq_pending_overflow", labels, self.overflow
        yield "envoy_cluster_upstream_rq_pending_active", labels, self.pending
        yield "envoy_cluster_upstream_rq_retry", labels, self.retries
        yield "envoy_cluster_upstream_cx_destroy_with_active_rq", labels, self.resets
        yield "envoy_cluster_membership_healthy", labels, self.healthy
        yield "envoy_cluster_membership_total", labels, self.healthy


def _escape(value: str) -> str:
    return value.replace("\\", "\\\\").replace('"', '\\"').replace("\n", "\\n")


def sample_name(name: str, labels: dict[str, str]) -> str:
    """`name{label="value",...}`, labels sorted."""
    if not labels:
        return name
    inner = ",".join(f'{key}="{_escape(value)}"' for key, value in sorted(labels.items()))
    return f"{name}{{{inner}}}"


_GAUGES = ("_active", "_healthy", "_total_gauge", "_live", "_uptime", "membership_total", "_open")


def _kind(name: str) -> str:
    return "gauge" if name.endswith(_GAUGES) else "counter"


def exposition(samples: Iterable[Sample]) -> str:
    """The Prometheus text format, version 0.0.4: samples grouped by metric, each with its type."""
    families: dict[str, list[str]] = {}
    kinds: dict[str, str] = {}
    for name, labels, value in samples:
        family, kind = name, _kind(name)
        for suffix in ("_bucket", "_sum", "_count"):
            if name.endswith(suffix):
                family, kind = name.removesuffix(suffix), "histogram"
        kinds[family] = kind
        families.setdefault(family, []).append(f"{sample_name(name, labels)} {value:.15g}")
    lines: list[str] = []
    for family in sorted(families):
        lines.append(f"# TYPE {family} {kinds[family]}")
        lines.extend(families[family])
    return "\n".join(lines) + "\n"
