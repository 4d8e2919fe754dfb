"""Counters and histograms of one worker. `exposition` makes text of them, `otlp_metrics` protobuf.

Names and labels are those that dashboards for Envoy under Consul query. Handles are plain attributes, made once per
listener and target, so that a request costs a few integer additions. No label takes its values from requests; those
that come from configuration (routes, endpoints) are bounded, and what is beyond counts under `other`.
"""

from collections.abc import Iterator, Set

# Upper bounds in milliseconds: Envoy's default histogram buckets.
LATENCY_BOUNDS_MS = (
    0.5, 1.0, 5.0, 10.0, 25.0, 50.0, 100.0, 250.0, 500.0, 1000.0, 2500.0, 5000.0, 10000.0, 30000.0, 60000.0, 300000.0,
    600000.0, 1800000.0, 3600000.0,
)  # fmt: skip

ROUTES_MAX = 256  # per listener, with counters of their own
ENDPOINTS_MAX = 256  # per target: those that get requests
FLAGS_MAX = 64  # combinations of response flags, per listener
OTHER = "other"

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


class RouteMetrics:
    """What became of the requests of one named rule. `classes` as in ListenerMetrics."""

    __slots__ = ("classes", "latency")

    def __init__(self) -> None:
        self.classes = [0] * 6
        self.latency = Histogram()

    def samples(self, labels: dict[str, str]) -> Iterator[Sample]:
        """As those of an Envoy route with a `stat_prefix`."""
        yield "envoy_vhost_route_upstream_rq_total", labels, sum(self.classes)
        for number in range(1, 6):
            classed = {**labels, "envoy_response_code_class": str(number)}
            yield "envoy_vhost_route_upstream_rq_xx", classed, self.classes[number]
        yield from self.latency.samples("envoy_vhost_route_upstream_rq_time", labels)


class ListenerMetrics:
    """What one listener saw. `classes[n]` counts responses with status n00 to n99; 0: the caller left before one."""

    __slots__ = (
        "accept_failures", "active", "bytes_received", "bytes_sent", "classes", "connections", "denied", "flags",
        "idle_timeouts", "labels", "latency", "overflow", "protocol_errors", "requests", "routes", "tls_errors",
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
        self.flags: dict[str, int] = {}  # by what the access log shows, such as `URX,UT`
        self.routes: dict[str, RouteMetrics] = {}

    def flagged(self, flags: str) -> None:
        """A request ended with response flags."""
        if flags not in self.flags and len(self.flags) >= FLAGS_MAX:
            flags = OTHER
        self.flags[flags] = self.flags.get(flags, 0) + 1

    def route(self, name: str) -> RouteMetrics:
        """The counters of a named rule."""
        found = self.routes.get(name)
        if found is None:
            if len(self.routes) >= ROUTES_MAX:
                name = OTHER
            found = self.routes.setdefault(name, RouteMetrics())
        return found

    def keep_routes(self, names: Set[str]) -> None:
        """Forgets rules that are no longer there."""
        for name in [name for name in self.routes if name not in names and name != OTHER]:
            del self.routes[name]

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
        yield "envoy_http_downstream_rq_rx_bytes", http, self.bytes_received
        yield "envoy_http_downstream_rq_tx_bytes", http, self.bytes_sent
        by_flag: dict[str, int] = {}
        for flags, count in tuple(self.flags.items()):
            for flag in flags.split(","):
                by_flag[flag] = by_flag.get(flag, 0) + count
        for flag, count in by_flag.items():
            yield "mesh_response_flags_total", {**http, "flag": flag}, count
        for name, route in tuple(self.routes.items()):
            yield from route.samples({**http, "envoy_route": name})


class EndpointMetrics:
    """What one endpoint was asked, and how often it failed: by its last answer, or by a try that another followed."""

    __slots__ = ("errors", "requests")

    def __init__(self) -> None:
        self.requests = 0
        self.errors = 0


class TargetMetrics:
    """What one target answered, over all its endpoints."""

    __slots__ = (
        "active", "classes", "connect_failures", "connections", "connections_active", "endpoints", "healthy",
        "identity_failures", "labels", "latency", "overflow", "pending", "requests", "resets", "retries", "total",
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
        self.total = 0
        self.endpoints: dict[str, EndpointMetrics] = {}  # by address and port

    def endpoint(self, host: str) -> EndpointMetrics:
        """The counters of one endpoint."""
        found = self.endpoints.get(host)
        if found is None:
            if len(self.endpoints) >= ENDPOINTS_MAX:
                host = OTHER
            found = self.endpoints.setdefault(host, EndpointMetrics())
        return found

    def keep_endpoints(self, hosts: Set[str]) -> None:
        """Forgets endpoints that are no longer there."""
        for host in [host for host in self.endpoints if host not in hosts and host != OTHER]:
            del self.endpoints[host]

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
        yield "envoy_cluster_membership_total", labels, self.total
        for host, endpoint in tuple(self.endpoints.items()):
            of_endpoint = {**labels, "envoy_endpoint_address": host}
            yield "envoy_cluster_endpoint_rq_total", of_endpoint, endpoint.requests
            yield "envoy_cluster_endpoint_rq_error", of_endpoint, endpoint.errors
