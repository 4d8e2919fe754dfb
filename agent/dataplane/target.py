"""Where requests go: the endpoints of one target, and the way from an attempt to one of them."""

import random
from collections.abc import Iterator

from agent.dataplane.channel import HttpDialed
from agent.dataplane.endpoint import Endpoint
from agent.dataplane.metrics import Sample, TargetMetrics
from agent.dataplane.names import Names
from agent.dataplane.reactor import Reactor, Timer
from agent.dataplane.transport import Transport
from mesh.http.head import ResponseHead
from mesh.proxy.balancing import Balancer, PeakEwma, make_balancer, select
from mesh.proxy.breaker import Breaker
from mesh.proxy.exchange import SAFE_RULES, Exchange
from mesh.proxy.hashing import RequestHash, compile_hash
from mesh.proxy.outlier import OutlierDetector, OutlierRecord, status_of_grpc
from mesh.proxy.parties import Attempt, Channel
from mesh.proxy.pool import IDLE_TIMEOUT_S
from mesh.proxy.probation import ProbationGate, outcome_of
from mesh.proxy.replies import CONNECT_FAILED, NO_HEALTHY_UPSTREAM, OVERFLOW
from mesh.proxy.retry import FailureKind, RetryRules, asked_pause_s, compile_retry
from mesh.proxy.retry_budget import make_budget
from mesh.proxy.sidecar_config import EndpointConfig, TargetConfig
from mesh.traffic.policy import LoadBalancing, PoolPolicy

_NEVER = float("inf")

FAILURE_EWMA_S = 5.0  # what a failed try counts as, in the peak EWMA of its endpoint


class Target:
    """The endpoints behind one name. `update` swaps them; what is in flight keeps what it has.

    `watched`: outcomes are reported to outlier detection, probation or the balancer. `retry` are the rules for routes
    that have none of their own.
    """

    def __init__(self, reactor: Reactor, rng: random.Random, metrics: TargetMetrics, names: Names) -> None:
        self.names = names
        self.name = metrics.labels["envoy_cluster_name"]
        self.reactor = reactor
        self.metrics = metrics
        self.transport: Transport
        self.identity: object | None = None  # under which it was made
        self.config = TargetConfig(self.name, ())
        self.breaker = Breaker(self.config.limits)
        self.retry: RetryRules = SAFE_RULES
        self.request_hash: RequestHash | None = None
        self.pool_policy = PoolPolicy()
        self.connect_timeout_s = 0.0
        self.idle_timeout_s = IDLE_TIMEOUT_S
        self.watched = False
        self._default_idle_timeout_s = IDLE_TIMEOUT_S
        self._locality = ""
        self.rng = rng
        self._endpoints: dict[tuple[str, str, int], Endpoint] = {}
        self._members: tuple[EndpointConfig, ...] | None = None  # as they were last, the subset applied
        self._detector: OutlierDetector | None = None
        self._timer: Timer | None = None
        self._wakes_at = _NEVER
        self.balancer: Balancer[Endpoint] = make_balancer((), LoadBalancing(), rng, now=reactor.now)

    @property
    def endpoints(self) -> tuple[Endpoint, ...]:
        """Those of the configuration, its subset only."""
        return tuple(self._endpoints.values())

    @property
    def detector(self) -> OutlierDetector | None:
        """Who ejects endpoints, if anyone does."""
        return self._detector

    # ---- configuration

    def set_idle_timeout(self, seconds: float) -> None:
        """How long connections stay idle where the policy says nothing."""
        self._default_idle_timeout_s = seconds
        self.idle_timeout_s = self.pool_policy.idle_timeout_s or seconds

    def update(self, config: TargetConfig, *, locality: str = "") -> None:
        """New tables. Idle connections of endpoints that went, or of an old transport, close."""
        before, self.config = self.config, config
        now = self.reactor.now
        self.connect_timeout_s = config.connect_timeout_s
        self.pool_policy = config.pool
        self.idle_timeout_s = config.pool.idle_timeout_s or self._default_idle_timeout_s
        if (config.limits, config.retry_budget) != (before.limits, before.retry_budget):
            self.breaker.set_limits(config.limits, make_budget(config.retry_budget, config.limits.retries_max, now=now))
        if config.retry != before.retry:
            self.retry = SAFE_RULES if config.retry is None else compile_retry(config.retry)
        balancing = config.load_balancing
        if balancing.hash_policies != before.load_balancing.hash_policies:
            policies = balancing.hash_policies
            self.request_hash = compile_hash(policies, self.rng) if policies else None
        members = select(config.endpoints, config.subset)
        watching = (config.outlier, config.probation, balancing.kind == "peak_ewma")
        changed = (
            members != self._members
            or balancing != before.load_balancing
            or locality != self._locality
            or watching != (before.outlier, before.probation, before.load_balancing.kind == "peak_ewma")
        )
        self._locality = locality
        if changed:
            self._members = members
            self._swap(members, now)
        for endpoint in self._endpoints.values():
            endpoint.close_outdated()

    def _swap(self, members: tuple[EndpointConfig, ...], now: float) -> None:
        before = self._endpoints
        self._endpoints = {}
        recovered: list[Endpoint] = []
        for config in members:
            key = (config.id, config.address, config.port)
            endpoint = before.pop(key, None)
            if endpoint is None:
                endpoint = Endpoint(self, config)
            elif endpoint.update(config):
                recovered.append(endpoint)
            self._endpoints[key] = endpoint
        for endpoint in before.values():
            endpoint.removed = True
            endpoint.close_idle()
        self._watch(now)
        for endpoint in recovered:
            if self._detector is not None:
                self._detector.check_passed(endpoint.id, now)
        balancing = self.config.load_balancing
        self.balancer = make_balancer(self.endpoints, balancing, self.rng, now=now, locality=self._locality)

    def _watch(self, now: float) -> None:
        """Gives endpoints what watches over them, and takes away what does no longer."""
        config = self.config
        if config.outlier is None:
            self._detector = None
        elif self._detector is None:
            self._detector = OutlierDetector(config.outlier, self.rng, self._ejection_changed, now=now)
        else:
            self._detector.set_policy(config.outlier, now)
        if self._detector is not None:
            self._detector.endpoints_changed(endpoint.id for endpoint in self._endpoints.values())
        balancing = config.load_balancing
        ewma = balancing.kind == "peak_ewma"
        for endpoint in self._endpoints.values():
            endpoint.record = None if self._detector is None else self._detector.record(endpoint.id)
            if config.probation is None:
                endpoint.gate = None
            elif endpoint.gate is None:
                endpoint.gate = ProbationGate(config.probation, self.rng, now=now)
            else:
                endpoint.gate.set_policy(config.probation, now)
            if not ewma:
                endpoint.ewma = None
            elif endpoint.ewma is None:
                endpoint.ewma = PeakEwma(balancing.ewma_decay_s, balancing.ewma_initial_s, now)
        self.watched = self._detector is not None or config.probation is not None or ewma
        self._arm()

    def close(self) -> None:
        """No further requests come: idle connections close, busy ones when they are done."""
        for endpoint in self._endpoints.values():
            endpoint.removed = True
            endpoint.close_idle()
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    # ---- health

    def _ejection_changed(self, _record: OutlierRecord) -> None:
        self.health_changed()

    def health_changed(self) -> None:
        """Some endpoint became usable, or is no longer."""
        self.balancer.health_changed(self.reactor.now)

    def _arm(self) -> None:
        """The next thing that happens by itself: an outlier interval ends, a penalty is over."""
        at = _NEVER if self._detector is None else self._detector.next_tick_at
        for endpoint in self._endpoints.values():
            if endpoint.gate is not None:
                at = min(at, endpoint.gate.wakes_at)
        if self._timer is not None:
            if at == self._wakes_at:
                return
            self._timer.cancel()
            self._timer = None
        self._wakes_at = at
        if at != _NEVER:
            self._timer = self.reactor.call_at(at, self._wake)

    def _wake(self) -> None:
        self._timer = None
        now = self.reactor.now
        if self._detector is not None and now >= self._detector.next_tick_at:
            self._detector.tick(now)
        changed = [endpoint.gate.wake(now) for endpoint in self._endpoints.values() if endpoint.gate is not None]
        if any(changed):
            self.health_changed()
        self._arm()

    def responded(self, attempt: Attempt, head: ResponseHead, sent_at: float) -> None:
        """Exchange callback."""
        endpoint = attempt.endpoint
        if not isinstance(endpoint, Endpoint):
            return
        now = self.reactor.now
        if endpoint.ewma is not None:
            endpoint.ewma.observe(now - sent_at, now)
        grpc_status = head.header(b"grpc-status")
        if endpoint.record is not None:
            endpoint.record.responded(head.status if grpc_status is None else status_of_grpc(grpc_status), now)
        gate = endpoint.gate
        if gate is not None:
            outcome = outcome_of(head.status, grpc_status)
            asked_s = asked_pause_s(head, 0.0) if outcome == "limited" else 0.0
            if gate.ended(outcome, now, probe=attempt.probe, asked_s=asked_s):
                self.health_changed()
            attempt.probe = False
            self._arm()

    def failed(self, attempt: Attempt, kind: FailureKind, sent_at: float) -> None:
        """Exchange callback."""
        endpoint = attempt.endpoint
        if not isinstance(endpoint, Endpoint):
            return
        now = self.reactor.now
        if endpoint.ewma is not None:
            # One that refuses connections must not look fast: Linkerd's penalty.
            endpoint.ewma.observe(max(FAILURE_EWMA_S, now - sent_at if sent_at else 0.0), now)
        if endpoint.record is not None:
            endpoint.record.failed(kind, now)
        gate = endpoint.gate
        if gate is not None:
            if gate.ended("failure", now, probe=attempt.probe):
                self.health_changed()
            attempt.probe = False
            self._arm()

    # ---- attempts

    def acquire(self, attempt: Attempt, exchange: Exchange) -> None:
        """Gets the attempt a channel, or an answer that there is none."""
        breaker = self.breaker
        if breaker.requests >= breaker.requests_max:
            breaker.pending_overflow += 1
            attempt.refused(OVERFLOW)
            return
        now = self.reactor.now
        tried = exchange.tried
        endpoint = self.balancer.choose(now, exchange.request_hash, tried)  # type: ignore[arg-type]  # only ours are in it
        if endpoint is None:
            if tried and exchange.retry is SAFE_RULES:
                attempt.refused(CONNECT_FAILED)  # nobody is left who might be reached
                return
            endpoint = self.balancer.choose(now, exchange.request_hash) if tried else None
            if endpoint is None:
                attempt.refused(NO_HEALTHY_UPSTREAM)
                return
        self.metrics.requests += 1
        if breaker.deposit is not None and not exchange.hosts_tried:
            breaker.deposit(now)
        exchange.hosts_tried = exchange.hosts_tried + endpoint.hosts if exchange.hosts_tried else endpoint.hosts
        if not endpoint.carry(attempt):
            attempt.refused(OVERFLOW)

    def release(self, attempt: Attempt, channel: Channel, *, reusable: bool) -> None:
        """The attempt no longer uses the channel."""
        assert isinstance(channel, HttpDialed)
        endpoint = channel.endpoint
        endpoint.vacate(attempt)
        channel.attempt = None
        if reusable:
            endpoint.channel_free(channel, reusable=True)
        elif not channel.closed and not channel.closing:
            channel.abort()

    def give_up(self, attempt: Attempt) -> None:
        """The attempt no longer waits for a channel."""
        endpoint = attempt.endpoint
        if isinstance(endpoint, Endpoint):
            endpoint.forget(attempt)

    def take_retry(self) -> bool:
        """Exchange callback."""
        return self.breaker.take_retry(self.reactor.now)

    def retry_ended(self) -> None:
        """Exchange callback."""
        self.breaker.retry_ended(self.reactor.now)

    def retrying(self, *, hedged: bool) -> None:
        """Exchange callback."""
        self.metrics.retries += 1

    # ---- accounts

    def samples(self) -> Iterator[Sample]:
        """Its counters and gauges."""
        metrics, breaker = self.metrics, self.breaker
        metrics.active = breaker.requests
        metrics.pending = breaker.pending
        metrics.overflow = breaker.pending_overflow
        metrics.healthy = sum(endpoint.usable for endpoint in self._endpoints.values())
        metrics.total = len(self._endpoints)
        metrics.keep_endpoints({endpoint.host for endpoint in self._endpoints.values()})
        yield from metrics.samples()
        yield from self._health_samples()

    def _health_samples(self) -> Iterator[Sample]:
        """What keeps requests away: full circuit breakers, ejections."""
        labels, breaker = self.metrics.labels, self.breaker
        yield "envoy_cluster_upstream_cx_overflow", labels, breaker.connection_overflow
        yield "envoy_cluster_upstream_rq_retry_overflow", labels, breaker.retry_overflow
        for name, full in (
            ("cx", breaker.connections >= breaker.connections_max),
            ("rq", breaker.requests >= breaker.requests_max),
            ("rq_pending", breaker.pending >= breaker.pending_max),
        ):
            yield f"envoy_cluster_circuit_breakers_default_{name}_open", labels, float(full)
        if self._detector is None:
            return
        records = [(endpoint.host, endpoint.record) for endpoint in self.endpoints if endpoint.record is not None]
        ejected = sum(record.ejected for _, record in records)
        yield "envoy_cluster_outlier_detection_ejections_active", labels, ejected
        for host, record in records:
            if record.ejections:
                of_endpoint = {**labels, "envoy_endpoint_address": host}
                yield "mesh_endpoint_ejections_total", of_endpoint, record.ejections
                yield "mesh_endpoint_ejected", of_endpoint, float(record.ejected)
