"""What the HTTP listeners of either direction share: starting exchanges, and keeping their accounts."""

import bisect
import time

from agent.dataplane.access_log import AccessLog
from agent.dataplane.http_accepted import HttpAccepted
from agent.dataplane.metrics import LATENCY_BOUNDS_MS, ListenerMetrics
from agent.dataplane.reactor import Reactor
from agent.dataplane.taps import Watcher
from agent.dataplane.target import Target
from agent.dataplane.tracing import Tracer
from mesh.http.head import Headers, RequestHead
from mesh.proxy.client_cert import without
from mesh.proxy.exchange import Exchange
from mesh.proxy.replies import Reply
from mesh.proxy.sidecar_config import IDLE_TIMEOUT_S
from mesh.proxy.trace_context import TraceContext


class HttpService:
    """One HTTP listener's side: starts exchanges, keeps their accounts. See inbound and outbound for the two kinds."""

    def __init__(self, reactor: Reactor, metrics: ListenerMetrics, target: Target, tracer: Tracer) -> None:
        self.reactor = reactor
        self.metrics = metrics
        self.target = target
        self.tracer = tracer
        self.rng = target.rng
        self.name = metrics.labels.get("upstream", "public_listener")
        self.draining = False
        self.inbound = False
        self.forwards_client_cert = False
        self.request_timeout_s = 0.0
        self.access_log: AccessLog | None = None
        self.tap: Watcher | None = None
        self.service_name = metrics.labels.get("local_cluster", "")
        self.accepted: set[HttpAccepted] = set()

    # ---- for accepted connections

    def begin(self, accepted: HttpAccepted, request: RequestHead, body: bytes, *, ended: bool) -> Exchange:
        """Authorises and starts an exchange."""
        # The batch's time: what waits for its turn in this process has been waiting since then.
        now = self.reactor.now
        exchange = Exchange(accepted, self, request, now)
        exchange.target = target = self.target
        exchange.retry = target.retry
        accepted.exchange = exchange
        self.metrics.requests += 1
        timeout_s = self.request_timeout_s
        if timeout_s:
            exchange.request_timeout_s = timeout_s
            if ended:
                exchange.request_deadline = now + timeout_s
        accepted.set_deadline(min(now + IDLE_TIMEOUT_S, exchange.request_deadline))
        if self.draining:
            accepted.codec.must_close = True
        if self.inbound and (refusal := self.refusal(accepted, exchange)) is not None:
            self.metrics.denied += 1
            exchange.request_ended = ended
            exchange.fail(refusal)
            return exchange
        exchange.forwarded = self._forwarded(accepted, exchange, request)
        exchange.begin(body, ended=ended)
        return exchange

    def refusal(self, accepted: HttpAccepted, exchange: Exchange) -> Reply | None:
        """Policy's answer to a request that the rules of the moment do not let in; its reason goes on the exchange."""
        return None

    def client_cert_headers(self, accepted: HttpAccepted, headers: Headers) -> Headers:
        """The headers as the endpoint gets them, as far as x-forwarded-client-cert goes: what came is dropped."""
        return without(headers)

    def identify(self, accepted: HttpAccepted) -> bool:
        """Plain listeners have no identities."""
        return True

    def accepted_gone(self, accepted: HttpAccepted) -> None:
        """An accepted connection is closed."""
        self.accepted.discard(accepted)
        self.metrics.active -= 1

    def _forwarded(self, accepted: HttpAccepted, exchange: Exchange, request: RequestHead) -> RequestHead:
        """The head as the endpoint gets it: identity headers from outside dropped, request ID and trace present."""
        headers = request.headers
        named = dict(headers)
        if self.forwards_client_cert or b"x-forwarded-client-cert" in named:
            headers = self.client_cert_headers(accepted, headers)
        if b"x-request-id" not in named:
            bits = b"%032x" % self.tracer.random_bits()
            request_id = b"%b-%b-4%b-a%b-%b" % (bits[:8], bits[8:12], bits[13:16], bits[17:20], bits[20:])
            headers += ((b"x-request-id", request_id),)
        headers, exchange.context = self.tracer.trace(headers, named)
        if headers is request.headers:
            return request
        return RequestHead(
            request.method, request.path, request.query, request.authority, headers, request.content_length,
            request.chunked, request.keep_alive, request.http_minor, request.expects_continue, request.upgrade,
            request.te_trailers,
        )  # fmt: skip

    # ---- for exchanges

    def unix_time(self) -> float:
        """Exchange callback."""
        return time.time()

    def finished(self, exchange: Exchange) -> None:
        """Exchange callback: the accounts."""
        ended_at = self.reactor.time()
        latency_ms = (ended_at - exchange.started_at) * 1000.0
        bucket = bisect.bisect_left(LATENCY_BOUNDS_MS, latency_ms)
        kind = exchange.status // 100
        metrics = self.metrics
        metrics.classes[kind] += 1
        metrics.latency.observe(latency_ms, bucket)
        metrics.bytes_received += exchange.bytes_received
        metrics.bytes_sent += exchange.bytes_sent
        target = exchange.target
        if exchange.attempts and isinstance(target, Target):
            target_metrics = target.metrics
            target_metrics.classes[kind] += 1
            target_metrics.latency.observe(latency_ms, bucket)
            endpoint = target_metrics.endpoint(exchange.endpoint_host)
            endpoint.requests += 1
            if not 1 <= kind <= 4:
                endpoint.errors += 1
            if exchange.attempts > 1:
                for host in exchange.hosts_tried[:-1]:
                    tried = target_metrics.endpoint(host)
                    tried.requests += 1
                    tried.errors += 1
        if exchange.flags:
            metrics.flagged(exchange.flags)
        if exchange.route is not None and exchange.route.name:
            route = metrics.route(exchange.route.name)
            route.classes[kind] += 1
            route.latency.observe(latency_ms, bucket)
        if self.access_log is not None:
            self.access_log.add(exchange, ended_at)
        if self.tap is not None:
            self.tap(exchange, ended_at)
        if isinstance(exchange.context, TraceContext):
            self.tracer.finish(
                exchange, exchange.context, ended_at, service=self.service_name, inbound=self.inbound
            )

    def drain(self, *, idle_s: float = 0.0) -> None:
        """Requests under way finish; idle connections close, or get `idle_s` for one more request, their last."""
        self.draining = True
        for accepted in tuple(self.accepted):
            if accepted.exchange is not None:
                accepted.codec.must_close = True
            elif idle_s:
                accepted.set_deadline(min(accepted.deadline, self.reactor.now + idle_s))
            else:
                accepted.close()
        self.target.close()
