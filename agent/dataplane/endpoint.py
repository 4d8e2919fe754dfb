"""One address of a target: its connections, who waits for one, how busy it is, and whether it is fit for more."""

import logging
from typing import TYPE_CHECKING

from agent.dataplane.channel import HttpDialed
from agent.dataplane.dialed import dial_socket
from mesh.proxy.balancing import PeakEwma
from mesh.proxy.outlier import OutlierRecord
from mesh.proxy.parties import Attempt
from mesh.proxy.pool import ConnectionPool
from mesh.proxy.probation import ProbationGate
from mesh.proxy.retry import FailureKind
from mesh.proxy.sidecar_config import EndpointConfig

if TYPE_CHECKING:
    from agent.dataplane.target import Target

_LOG = logging.getLogger("mesh.dataplane")


class Endpoint:
    """A balancer's candidate. `record`, `gate` and `ewma` are there when the target asks for them."""

    __slots__ = (
        "_failing", "active", "address", "ewma", "gate", "healthy", "host", "hosts", "id", "joined_at", "locality",
        "pool", "port", "priority", "record", "removed", "target", "weight",
    )  # fmt: skip

    def __init__(self, target: "Target", config: EndpointConfig) -> None:
        self.target = target
        self.id = config.id
        self.address = config.address
        self.port = config.port
        self.host = f"[{self.address}]:{self.port}" if ":" in self.address else f"{self.address}:{self.port}"
        self.hosts = (self.host,)
        self.active = 0  # requests or relays
        self.removed = False
        self.healthy = config.healthy
        self.weight = config.weight
        self.priority = config.priority
        self.locality = config.locality
        self.joined_at = target.reactor.now
        self.record: OutlierRecord | None = None
        self.gate: ProbationGate | None = None
        self.ewma: PeakEwma | None = None
        self._failing = False
        self.pool: ConnectionPool[HttpDialed, Attempt] = ConnectionPool()

    def update(self, config: EndpointConfig) -> bool:
        """New values of the same endpoint; whether its checks have recovered."""
        recovered = config.healthy and not self.healthy
        if recovered:
            self.joined_at = self.target.reactor.now
        self.healthy = config.healthy
        self.weight = config.weight
        self.priority = config.priority
        self.locality = config.locality
        return recovered

    @property
    def usable(self) -> bool:
        """Checks pass, it is not ejected, its gate is open."""
        return (
            self.healthy
            and (self.record is None or not self.record.ejected)
            and (self.gate is None or self.gate.usable)
        )

    def ip_address(self) -> str:
        """Where to connect to. Raises OSError while a host name has no known address."""
        return self.target.names.address_of(self.address)

    def carry(self, attempt: Attempt) -> bool:
        """Finds or opens a channel for the attempt, or lets it wait. False: the limits do not allow it."""
        pool = self.pool
        # Whoever closed the connection of the first attempt may have closed the idle ones with it, and this one attempt
        # is all that is left: a new connection tells, if the limit leaves room.
        if not attempt.resets or not pool.idle or not self._may_open():
            channel = pool.take_idle()
            if channel is not None:
                self._occupy(attempt)
                if self.record is not None:
                    self.record.connected()
                channel.use(attempt)
                return True
            if not self._may_open():
                if not self.target.breaker.take_pending():
                    return False
                self._occupy(attempt)
                pool.wait(attempt)
                return True
        self._occupy(attempt)
        self._open(attempt)
        return True

    def _may_open(self) -> bool:
        """Whether the breaker admits another connection, which counts then."""
        if self.target.breaker.take_connection(self.pool.opened):
            self.pool.opened += 1
            return True
        return False

    def _occupy(self, attempt: Attempt) -> None:
        attempt.endpoint = self
        attempt.endpoint_host = self.host
        self.active += 1
        self.target.breaker.requests += 1
        gate = self.gate
        if gate is not None and gate.began():
            attempt.probe = True
            self.target.health_changed()

    def vacate(self, attempt: Attempt) -> None:
        """The attempt no longer counts here."""
        if attempt.endpoint is self:
            attempt.endpoint = None
            self.active -= 1
            self.target.breaker.requests -= 1
            if attempt.probe:
                attempt.probe = False
                if self.gate is not None and self.gate.withdrawn():
                    self.target.health_changed()

    def _open(self, attempt: Attempt | None) -> None:
        target = self.target
        try:
            sock = dial_socket(self.ip_address(), target.pool_policy.keepalive_s)
        except OSError as error:  # no descriptor left, or a name without an address
            reason = error.strerror or str(error)
            self.pool.opened -= 1
            target.breaker.connections -= 1
            self.connect_failed(reason)
            target.reactor.call_soon(lambda: self.channel_failed(attempt, "connect", reason))
            return
        target.metrics.connections += 1
        target.metrics.connections_active += 1
        HttpDialed(target.reactor, sock, self, attempt).begin()

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
        attempt = channel.attempt
        if attempt is not None and attempt.endpoint is self and not attempt.done:
            if self.record is not None:
                self.record.connected()
            channel.use(attempt)
        else:
            self.channel_free(channel, reusable=True)

    def channel_failed(self, attempt: Attempt | None, kind: FailureKind, reason: str) -> None:
        """A connection attempt is over; its request tries elsewhere or fails."""
        if attempt is not None and attempt.endpoint is self and not attempt.done:
            attempt.connect_failed(kind, reason)
        self._serve_waiting()

    def _serve_waiting(self) -> None:
        """A connection fewer: one of those who wait may open its own."""
        if self.pool.waiting and self._may_open():
            self.target.breaker.pending -= 1
            self._open(self.pool.next_waiting())

    def channel_free(self, channel: HttpDialed, *, reusable: bool) -> None:
        """A connection is done with its request: the next one waiting takes it, or it rests, or it closes."""
        channel.attempt = None
        if channel.closed:
            return
        if not reusable or not channel.codec.idle or channel.saw_eof or self.removed:
            channel.close()
            return
        target = self.target
        if channel.transport is not target.transport:
            channel.close()  # the leaf or the expected peers have changed since it was verified
            return
        pool = self.pool
        if pool.waiting and not pool.worn(channel.age_s, channel.requests, target.pool_policy):
            waiter = pool.next_waiting()
            assert waiter is not None
            target.breaker.pending -= 1
            if self.record is not None:
                self.record.connected()
            channel.use(waiter)
        elif pool.put_idle(channel, channel.age_s, channel.requests, target.pool_policy):
            channel.rest()
        else:
            channel.close()

    def forget(self, attempt: Attempt) -> None:
        """A request that waited has given up."""
        if self.pool.forget(attempt):
            self.target.breaker.pending -= 1
        self.vacate(attempt)

    def channel_closed(self, channel: HttpDialed) -> None:
        """The socket is gone."""
        self.target.metrics.connections_active -= 1
        self.target.breaker.connections -= 1
        self.pool.remove(channel)
        self._serve_waiting()

    def close_outdated(self) -> None:
        """Closes idle connections that were verified under an earlier transport."""
        for channel in self.pool.idle_ones:
            if channel.transport is not self.target.transport:
                channel.close()

    def close_idle(self) -> None:
        """Closes what nobody uses."""
        for channel in self.pool.idle_ones:
            channel.close()
