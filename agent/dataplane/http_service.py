"""What the HTTP listeners of either direction share: starting exchanges, and keeping their accounts."""

import bisect
import time
from functools import lru_cache

import msgspec

from agent.dataplane.access_log import AccessLog
from agent.dataplane.http_accepted import HttpAccepted
from agent.dataplane.metrics import LATENCY_BOUNDS_MS, ListenerMetrics
from agent.dataplane.reactor import Reactor
from agent.dataplane.routing import Dress, Routing, rate_limited, with_cookie
from agent.dataplane.taps import Watcher
from agent.dataplane.target import Target
from agent.dataplane.tracing import Tracer
from mesh.http.head import Headers, RequestHead
from mesh.proxy.client_cert import without
from mesh.proxy.exchange import Exchange
from mesh.proxy.rate_limit import TokenBucket
from mesh.proxy.replies import Reply
from mesh.proxy.retry import OVERRIDE_HEADERS
from mesh.proxy.router import compile_routes
from mesh.proxy.trace_context import TraceContext
from mesh.traffic.policy import RateLimit
from mesh.traffic.route import RouteTable

Metadata = tuple[tuple[str, str], ...]

_EXPECTED_TIMEOUT = b"x-envoy-expected-rq-timeout-ms"


@lru_cache(maxsize=256)
def _expected_timeout(seconds: float) -> Headers:
    return ((_EXPECTED_TIMEOUT, b"%d" % round(seconds * 1000.0)),)


class HttpService:
    """One HTTP listener's side: starts exchanges, keeps their accounts. See inbound and outbound for the two kinds."""

    def __init__(self, reactor: Reactor, metrics: ListenerMetrics, target: Target, tracer: Tracer) -> None:
        self.reactor = reactor
        self.metrics = metrics
        self.target = target
        self.targets: dict[str, Target] = {target.name: target}
        self.routing: Routing | None = None
        self.bucket: TokenBucket | None = None
        self.dress: Dress | None = None
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
        if self.draining:
            accepted.codec.must_close = True
        if self.inbound and (refusal := self.refusal(accepted, exchange)) is not None:
            self.metrics.denied += 1
            exchange.request_ended = ended
            exchange.fail(refusal)
            return exchange
        bucket, routing = self.bucket, self.routing
        answer: Reply | None = None
        if bucket is not None and not bucket.take(now):
            answer = rate_limited(bucket.policy)
        elif routing is not None:
            answer = routing.choose(exchange, accepted)
            target = exchange.target
        else:
            exchange.request_timeout_s = self.request_timeout_s
            exchange.dress = self.dress
        exchange.forwarded = self._forwarded(accepted, exchange, request)
        if exchange.request_timeout_s and ended:
            exchange.request_deadline = now + exchange.request_timeout_s
        accepted.set_deadline(min(now + exchange.idle_s, exchange.request_deadline))
        if target.request_hash is not None:
            exchange.request_hash, cookie = target.request_hash(request, accepted.peer.encode())
            if cookie is not None:
                exchange.dress = with_cookie(exchange.dress, cookie)
        if routing is not None:
            routing.begin(exchange, accepted, body, answer, ended=ended)
        else:
            exchange.begin(body, ended=ended, answer=answer)
        return exchange

    def set_routes(
        self, table: RouteTable, *, default_target: str, source: str | None, metadata: Metadata | None, port: int
    ) -> None:
        """The listener's routes from now on. `source` is the calling service when all callers are one."""
        if not table.hosts and table == RouteTable(name=table.name):
            self.routing = None
            return
        router = compile_routes(table, default_target, source, metadata, port)
        former = self.routing
        if former is None or former.router is not router:
            self.routing = Routing(self.reactor, self.rng, router, outbound=not self.inbound)
            self.routing.adopt(former)
        assert self.routing is not None
        self.routing.targets = self.targets
        self.routing.request_timeout_s = self.request_timeout_s

    def set_rate_limit(self, policy: RateLimit | None) -> None:
        """The listener's own limit from now on; its tokens stay."""
        if policy is None:
            self.bucket = None
        elif self.bucket is None:
            self.bucket = TokenBucket(policy, self.rng, now=self.reactor.now)
        elif self.bucket.policy != policy:
            self.bucket.set_policy(policy, self.reactor.now)

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
        if not self.inbound:
            expected_s = exchange.retry.per_try_timeout_s or exchange.request_timeout_s
            if _EXPECTED_TIMEOUT in named:
                headers = tuple(pair for pair in headers if pair[0] != _EXPECTED_TIMEOUT)
            if expected_s:
                headers += _expected_timeout(expected_s)
        if not OVERRIDE_HEADERS.isdisjoint(named):
            head = msgspec.structs.replace(request, headers=headers)
            head, exchange.retry, exchange.request_timeout_s = exchange.retry.with_headers(
                head, exchange.request_timeout_s, honored=not self.inbound
            )
            return head
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
            self.tracer.finish(exchange, exchange.context, ended_at, service=self.service_name, inbound=self.inbound)

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
        for target in self.targets.values():
            target.close()
