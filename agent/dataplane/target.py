"""Where requests go: the endpoints of one target, their connections, and the way from an exchange to a channel."""

import logging
import random
import socket
import ssl
from collections.abc import Callable, Sequence
from typing import Protocol

from agent.dataplane.connection import Connection
from agent.dataplane.metrics import TargetMetrics
from agent.dataplane.names import Names
from agent.dataplane.reactor import Reactor
from mesh.errors import InvalidIdentity
from mesh.http.h1 import END, ClientConnection, Rejected, ResponseEvent
from mesh.http.head import ResponseHead
from mesh.proxy.balancer import Balancer
from mesh.proxy.exchange import CONNECT_FAILED, NO_HEALTHY_UPSTREAM, OVERFLOW, Channel, Exchange
from mesh.proxy.pool import IDLE_TIMEOUT_S, ConnectionPool
from mesh.proxy.relay import Relay
from mesh.proxy.retry import may_retry
from mesh.proxy.sidecar_config import EndpointConfig, LimitsConfig

_LOG = logging.getLogger("mesh.dataplane")


class Transport(Protocol):
    """How to reach and recognise the endpoints of a target: replaced as a whole when a leaf or its peers change."""

    @property
    def context(self) -> ssl.SSLContext | None: ...
    @property
    def server_name(self) -> str | None: ...
    def verify(self, tls: ssl.SSLObject) -> None:
        """Raises InvalidIdentity unless the peer is one of the expected."""


def dial_socket(ip_address: str) -> socket.socket:
    """A non-blocking TCP socket of the address's family, without delay. Raises OSError when there are no more."""
    family = socket.AF_INET6 if ":" in ip_address else socket.AF_INET
    sock = socket.socket(family, socket.SOCK_STREAM)
    sock.settimeout(0)
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    return sock


class Dialed(Connection):
    """A connection that we opened to an endpoint. Subclasses say what happens on `ready_to_use` and `failed`."""

    __slots__ = ("endpoint", "established", "transport")

    def __init__(self, reactor: Reactor, sock: socket.socket, endpoint: "Endpoint") -> None:
        super().__init__(reactor, sock)
        self.endpoint = endpoint
        self.transport = endpoint.target.transport
        self.established = False

    def begin(self) -> None:
        """Connects, shakes hands, verifies; then `ready_to_use`, or `failed`, never before this returns."""
        self.set_deadline(self.reactor.now + self.endpoint.target.connect_timeout_s)
        self.connect((self.endpoint.ip_address(), self.endpoint.port))

    def connected(self) -> None:
        """Connection callback."""
        context = self.transport.context
        if context is None:
            self._establish()
        else:
            self.start_tls(context, server_side=False, server_name=self.transport.server_name)

    def opened(self) -> None:
        """Connection callback: nothing the peer sent has been used yet."""
        assert self.tls is not None
        try:
            self.transport.verify(self.tls)
        except InvalidIdentity as error:
            self.endpoint.target.metrics.identity_failures += 1
            self._lose(f"the server's identity was refused: {error}")
            return
        self._establish()

    def _establish(self) -> None:
        self.established = True
        self.endpoint.connect_succeeded()
        self.deadline = float("inf")
        self.ready_to_use()

    def deadline_passed(self) -> None:
        """Connection callback: only connecting has a deadline here."""
        self._lose("connection timeout")

    def lost(self, reason: str) -> None:
        """Connection callback."""
        if self.established:
            self.broken(reason)
        else:
            self.endpoint.connect_failed(reason)
            self.failed()

    def ready_to_use(self) -> None:
        """Connected and verified."""

    def failed(self) -> None:
        """It could not be connected or verified."""

    def broken(self, reason: str) -> None:
        """It was in use, or idle, and is gone."""


class HttpDialed(Dialed):
    """A channel: carries one exchange at a time, or is idle in its endpoint's pool."""

    __slots__ = ("_opened_at", "_relay", "codec", "exchange", "requests", "reused")

    def __init__(self, reactor: Reactor, sock: socket.socket, endpoint: "Endpoint", exchange: Exchange | None) -> None:
        super().__init__(reactor, sock, endpoint)
        self.codec = ClientConnection()
        self.exchange = exchange
        self.reused = False
        self.requests = 0
        self._opened_at = reactor.now
        self._relay: Relay | None = None

    @property
    def age_s(self) -> float:
        """Seconds since it began to connect."""
        return self.reactor.now - self._opened_at

    def use(self, exchange: Exchange) -> None:
        """Carries an exchange from now on."""
        self.exchange = exchange
        self.reused = self.requests > 0
        self.requests += 1
        self.deadline = float("inf")
        exchange.channel_ready(self)

    def rest(self) -> None:
        """Idle: it may stay so for a while."""
        self.exchange = None
        if self._paused:
            self.resume_reading()
        self.set_deadline(self.reactor.now + self.endpoint.target.idle_timeout_s)

    def relay_begins(self, relay: Relay) -> None:
        """From now on bytes go to the relay."""
        self._relay = relay

    def ready_to_use(self) -> None:
        """Dialed callback."""
        self.endpoint.channel_established(self)

    def failed(self) -> None:
        """Dialed callback."""
        exchange, self.exchange = self.exchange, None
        self.endpoint.channel_failed(exchange)

    def data_received(self, data: bytes) -> None:
        """Connection callback."""
        if self._relay is not None:
            self._relay.received(self, data)
            return
        events = self.codec.receive_data(data)
        exchange = self.exchange
        if exchange is None:
            self.abort()  # bytes with no request in flight: this connection is out of step
            return
        if len(events) == 3 and events[2] is END and type(events[0]) is ResponseHead and type(events[1]) is bytes:
            exchange.response(events[0], events[1], ended=True)  # a whole response in one read, as most are
        else:
            self._deliver(exchange, events)

    def _deliver(self, exchange: Exchange, events: Sequence[ResponseEvent]) -> None:
        head: ResponseHead | None = None
        pieces: list[bytes] = []
        ended = malformed = False
        for event in events:
            if type(event) is bytes:
                pieces.append(event)
            elif type(event) is ResponseHead:
                if event.informational:
                    exchange.informational(event)
                else:
                    head = event
            elif event is END:
                ended = True
            elif type(event) is Rejected:
                malformed = True
        if head is not None or pieces or ended:
            body = pieces[0] if len(pieces) == 1 else b"".join(pieces)
            exchange.response(head, body, ended=ended)
        if malformed and self.exchange is exchange and not exchange.done:
            exchange.channel_lost(malformed=True)

    def eof_received(self) -> None:
        """Connection callback."""
        if self._relay is not None:
            self._relay.ended(self)
            return
        exchange = self.exchange
        if exchange is None:
            self.close()
            return
        events = self.codec.receive_eof()
        if events and events[0] is END:
            exchange.response(None, b"", ended=True)
        else:
            exchange.channel_lost()
        if not self.closed:
            self.close()

    def write_drained(self) -> None:
        """Connection callback."""
        if self._relay is not None:
            self._relay.drained(self)
        elif self.exchange is not None:
            self.exchange.channel_drained()

    def deadline_passed(self) -> None:
        """Connection callback: connecting took too long, or it has been idle for long enough."""
        if not self.established:
            super().deadline_passed()
        elif self.exchange is None:
            self.close()

    def broken(self, reason: str) -> None:
        """Dialed callback."""
        if self._relay is not None:
            self._relay.broke(self)
        elif self.exchange is not None:
            self.endpoint.target.metrics.resets += 1
            self.exchange.channel_lost()

    def finished(self) -> None:
        """Connection callback."""
        self.endpoint.channel_closed(self)

    def released(self) -> None:
        """Connection callback."""
        self._relay = self.exchange = None


class Endpoint:
    """One address of a target, its connections, and how busy it is."""

    __slots__ = ("_failing", "active", "address", "host", "id", "pool", "port", "removed", "target", "weight")

    def __init__(self, target: "Target", config: EndpointConfig) -> None:
        self.target = target
        self.id = config.id
        self.address = config.address
        self.port = config.port
        self.host = f"[{self.address}]:{self.port}" if ":" in self.address else f"{self.address}:{self.port}"
        self.weight = config.weight
        self.active = 0  # requests or relays
        self.removed = False
        self._failing = False
        self.pool: ConnectionPool[HttpDialed, Exchange] = ConnectionPool(
            connections_max=target.limits.connections_max, pending_max=target.limits.pending_requests_max
        )

    def ip_address(self) -> str:
        """Where to connect to. Raises OSError while a host name has no known address."""
        return self.target.names.address_of(self.address)

    def carry(self, exchange: Exchange) -> bool:
        """Finds or opens a channel for the exchange, or lets it wait. False: the limits do not allow it."""
        # Whoever closed the connection of the first attempt may have closed the idle ones with it, and this one attempt
        # is all that is left: a new connection tells, if the limit leaves room.
        if exchange.resets and self.pool.idle and self.pool.admit() == "open":
            self._occupy(exchange)
            self._open(exchange)
            return True
        channel = self.pool.take_idle()
        if channel is not None:
            self._occupy(exchange)
            channel.use(exchange)
            return True
        match self.pool.admit():
            case "open":
                self._occupy(exchange)
                self._open(exchange)
            case "wait":
                self._occupy(exchange)
                self.target.metrics.pending += 1
                self.pool.wait(exchange)
            case "overflow":
                return False
        return True

    def _occupy(self, exchange: Exchange) -> None:
        exchange.endpoint = self
        exchange.endpoint_host = self.host
        self.active += 1

    def vacate(self, exchange: Exchange) -> None:
        """The exchange no longer counts here."""
        if exchange.endpoint is self:
            exchange.endpoint = None
            self.active -= 1

    def _open(self, exchange: Exchange | None) -> None:
        target = self.target
        try:
            sock = dial_socket(self.ip_address())
        except OSError as error:  # no descriptor left, or a name without an address
            self.pool.opened -= 1
            self.connect_failed(error.strerror or str(error))
            target.reactor.call_soon(lambda: self.channel_failed(exchange))
            return
        target.metrics.connections += 1
        target.metrics.connections_active += 1
        HttpDialed(target.reactor, sock, self, exchange).begin()

    def connect_failed(self, reason: str) -> None:
        """Counts, and logs the first of a series: the caller is told no more than Envoy tells."""
        self.target.metrics.connect_failures += 1
        if not self._failing:
            self._failing = True
            _LOG.warning("%s cannot be reached at %s: %s", self.target.name, self.host, reason)

    def connect_succeeded(self) -> None:
        """The next failure is news again."""
        self._failing = False

    def channel_established(self, channel: HttpDialed) -> None:
        """A connection is up; whoever it was opened for may have left meanwhile."""
        exchange = channel.exchange
        if exchange is not None and exchange.endpoint is self and not exchange.done:
            channel.use(exchange)
        else:
            self.channel_free(channel, reusable=True)

    def channel_failed(self, exchange: Exchange | None) -> None:
        """A connection attempt is over; its exchange tries elsewhere or fails."""
        if exchange is not None and exchange.endpoint is self and not exchange.done:
            self.vacate(exchange)
            exchange.attempts += 1
            exchange.tried += (self,)
            self.target.retry_connect(exchange)
        self._serve_waiting()

    def _serve_waiting(self) -> None:
        """A connection fewer: one of those who wait may open its own."""
        if self.pool.waiting and self.pool.admit() == "open":
            self.target.metrics.pending -= 1
            self._open(self.pool.next_waiting())

    def channel_free(self, channel: HttpDialed, *, reusable: bool) -> None:
        """A connection is done with its exchange: the next one waiting takes it, or it rests, or it closes."""
        channel.exchange = None
        if channel.closed:
            return
        if not reusable or not channel.codec.idle or channel.saw_eof or self.removed:
            channel.close()
            return
        if channel.transport is not self.target.transport:
            channel.close()  # the leaf or the expected peers have changed since it was verified
            return
        waiter = self.pool.next_waiting()
        if waiter is not None:
            self.target.metrics.pending -= 1
            channel.use(waiter)
        elif self.pool.put_idle(channel, age_s=channel.age_s, requests=channel.requests):
            channel.rest()
        else:
            channel.close()

    def channel_closed(self, channel: HttpDialed) -> None:
        """The socket is gone."""
        self.target.metrics.connections_active -= 1
        self.pool.remove(channel)
        self._serve_waiting()

    def close_outdated(self) -> None:
        """Closes idle connections that were verified under an earlier transport."""
        for channel in self.pool.idle:
            if channel.transport is not self.target.transport:
                channel.close()

    def close_idle(self) -> None:
        """Closes what nobody uses."""
        for channel in self.pool.idle:
            channel.close()


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


class PlainTransport:
    """To the local application."""

    context: ssl.SSLContext | None = None
    server_name: str | None = None

    def verify(self, tls: ssl.SSLObject) -> None:
        """Nothing to verify: it is never TLS."""


class MutualTls:
    """To other sidecars: one per leaf, bundle and set of expected identities."""

    def __init__(
        self,
        context: ssl.SSLContext,
        *,
        server_name: str,
        expected_spiffe_ids: tuple[str, ...],
        identify: Callable[[ssl.SSLObject], str],
    ) -> None:
        self.context: ssl.SSLContext | None = context
        self.server_name: str | None = server_name or None
        self.expected = frozenset(expected_spiffe_ids)
        self._identify = identify

    def verify(self, tls: ssl.SSLObject) -> None:
        """Raises InvalidIdentity unless the server proves one of the expected SPIFFE IDs."""
        spiffe_id = self._identify(tls)
        if spiffe_id not in self.expected:
            raise InvalidIdentity(f"{spiffe_id} is not among the expected {', '.join(sorted(self.expected))}")
