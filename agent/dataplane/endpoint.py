"""One address of a target: its connections, who waits for one, and how busy it is."""

import logging
from typing import TYPE_CHECKING

from agent.dataplane.channel import HttpDialed
from agent.dataplane.dialed import dial_socket
from mesh.proxy.exchange import Exchange
from mesh.proxy.pool import ConnectionPool
from mesh.proxy.sidecar_config import EndpointConfig

if TYPE_CHECKING:
    from agent.dataplane.target import Target

_LOG = logging.getLogger("mesh.dataplane")


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
