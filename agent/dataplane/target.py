"""Where requests go: the endpoints of one target, and the way from an exchange to one of them."""

import random

from agent.dataplane.channel import HttpDialed
from agent.dataplane.endpoint import Endpoint
from agent.dataplane.metrics import TargetMetrics
from agent.dataplane.names import Names
from agent.dataplane.reactor import Reactor
from agent.dataplane.transport import Transport
from mesh.proxy.balancer import Balancer
from mesh.proxy.exchange import CONNECT_FAILED, NO_HEALTHY_UPSTREAM, OVERFLOW, Channel, Exchange
from mesh.proxy.pool import IDLE_TIMEOUT_S
from mesh.proxy.retry import may_retry
from mesh.proxy.sidecar_config import EndpointConfig, LimitsConfig


class Target:
    """The endpoints behind one listener. `update` swaps them; what is in flight keeps what it has."""

    def __init__(self, reactor: Reactor, rng: random.Random, metrics: TargetMetrics, names: Names) -> None:
        self.names = names
        self.name = metrics.labels["envoy_cluster_name"]
        self.reactor = reactor
        self.metrics = metrics
        self.transport: Transport
        self.limits = LimitsConfig()
        self.connect_timeout_s = 0.0
        self.idle_timeout_s = IDLE_TIMEOUT_S
        self._rng = rng
        self._endpoints: dict[tuple[str, str, int], Endpoint] = {}
        self.balancer: Balancer[Endpoint] = Balancer((), rng)

    def update(
        self,
        endpoints: tuple[EndpointConfig, ...],
        *,
        connect_timeout_s: float,
        limits: LimitsConfig,
    ) -> None:
        """New tables. Idle connections of endpoints that went, or of an old transport, close."""
        self.connect_timeout_s = connect_timeout_s
        self.limits = limits
        before = self._endpoints
        self._endpoints = {}
        for config in endpoints:
            key = (config.id, config.address, config.port)
            endpoint = before.pop(key, None)
            if endpoint is None:
                endpoint = Endpoint(self, config)
            endpoint.weight = config.weight
            endpoint.pool.set_limits(connections_max=limits.connections_max, pending_max=limits.pending_requests_max)
            self._endpoints[key] = endpoint
            endpoint.close_outdated()
        for endpoint in before.values():
            endpoint.removed = True
            endpoint.close_idle()
        self.metrics.healthy = len(self._endpoints)
        self.balancer = Balancer(tuple(self._endpoints.values()), self._rng)

    def close(self) -> None:
        """No further requests come: idle connections close, busy ones when they are done."""
        for endpoint in self._endpoints.values():
            endpoint.removed = True
            endpoint.close_idle()

    # ---- exchanges

    def acquire(self, exchange: Exchange) -> None:
        """Gets the exchange a channel, or an answer that there is none."""
        if self.metrics.active >= self.limits.requests_max:
            self.metrics.overflow += 1
            exchange.fail(OVERFLOW)
            return
        endpoint = self.balancer.choose(exchange.tried)  # type: ignore[arg-type]  # only this target adds to it
        if endpoint is None:
            exchange.fail(NO_HEALTHY_UPSTREAM)
        elif not endpoint.carry(exchange):
            self.metrics.overflow += 1
            exchange.fail(OVERFLOW)

    def retry_connect(self, exchange: Exchange) -> None:
        """Another endpoint, or the caller hears of the failure."""
        another = may_retry(
            "connect",
            method=exchange.request.method,
            attempts=exchange.attempts,
            reused=False,
            resets=exchange.resets,
            replayable=True,
        )
        if another and self.balancer.choose(exchange.tried) is not None:  # type: ignore[arg-type]
            self.metrics.retries += 1
            self.acquire(exchange)
        else:
            exchange.fail(CONNECT_FAILED)

    def release(self, exchange: Exchange, channel: Channel, *, reusable: bool) -> None:
        """The exchange no longer uses the channel."""
        assert isinstance(channel, HttpDialed)
        endpoint = channel.endpoint
        endpoint.vacate(exchange)
        channel.exchange = None
        if reusable:
            endpoint.channel_free(channel, reusable=True)
        elif not channel.closed and not channel.closing:
            channel.abort()

    def give_up(self, exchange: Exchange) -> None:
        """The exchange no longer waits for a channel."""
        endpoint = exchange.endpoint
        if isinstance(endpoint, Endpoint):
            before = endpoint.pool.waiting
            endpoint.pool.forget(exchange)
            self.metrics.pending -= before - endpoint.pool.waiting
            endpoint.vacate(exchange)
