"""Circuit breakers: how much may be under way to a target at once. What is over that fails at once instead of queueing.

A `Breaker` holds counts and limits as in Envoy: something is admitted while its count is below its limit.
Each `take_*` that returned True is paired with one decrement of its count; the owner does that itself, on the plain
attributes, as it may inline `take_request` on its hot path.
"""

from collections.abc import Callable

from mesh.proxy.retry_budget import Budget, FixedBudget, TokenBudget
from mesh.proxy.sidecar_config import LimitsConfig


class Breaker:
    """One per target. `*_overflow` count refusals; `remaining_*` are what is left, never below 0.

    A limit that shrinks under what is under way refuses until enough of it is over. `deposit` is to be called with the
    time for each original request (not for retries), and None with a budget that does not count them.
    """

    __slots__ = (
        "budget", "connection_overflow", "connections", "connections_max", "deposit", "pending", "pending_max",
        "pending_overflow", "requests", "requests_max", "retries", "retry_overflow",
    )  # fmt: skip

    def __init__(self, limits: LimitsConfig, budget: Budget | None = None) -> None:
        self.connections = 0
        self.pending = 0
        self.requests = 0
        self.retries = 0
        self.connection_overflow = 0
        self.pending_overflow = 0  # requests that could not start or wait, as in Envoy's upstream_rq_pending_overflow
        self.retry_overflow = 0
        self.set_limits(limits, budget)

    def set_limits(self, limits: LimitsConfig, budget: Budget | None = None) -> None:
        """New limits; what is under way stays. Without a `budget`, `limits.retries_max` bounds retries."""
        self.connections_max = limits.connections_max
        self.pending_max = limits.pending_requests_max
        self.requests_max = limits.requests_max
        self.budget = FixedBudget(limits.retries_max) if budget is None else budget
        self.deposit: Callable[[float], None] | None = budget.request_began if isinstance(budget, TokenBudget) else None

    def take_request(self) -> bool:
        """Whether a request may be sent now: it counts in `requests` until it is over."""
        if self.requests >= self.requests_max:
            self.pending_overflow += 1
            return False
        self.requests += 1
        return True

    def take_pending(self) -> bool:
        """Whether a request may wait for a connection: it counts in `pending` until it has one, or gives up."""
        if self.pending >= self.pending_max:
            self.pending_overflow += 1
            return False
        self.pending += 1
        return True

    def take_connection(self, endpoint_connections: int) -> bool:
        """Whether a connection may be opened to an endpoint that has so many: it counts until it is closed.

        An endpoint may always have one, or requests for it would wait for ever: that one is over the limit and counted
        as an overflow all the same.
        """
        if self.connections >= self.connections_max:
            self.connection_overflow += 1
            if endpoint_connections:
                return False
        self.connections += 1
        return True

    def take_retry(self, now: float) -> bool:
        """Whether the budget admits one more retry: it counts in `retries` until `retry_ended`."""
        if not self.budget.may_retry(now, self.requests, self.pending, self.retries):
            self.retry_overflow += 1
            return False
        self.retries += 1
        return True

    def retry_ended(self, now: float) -> None:
        """A retry that was taken is over: its response began, its try failed, or its request went away."""
        self.retries -= 1
        self.budget.retry_ended(now)

    @property
    def remaining_connections(self) -> int:
        """How many more may be opened."""
        return max(self.connections_max - self.connections, 0)

    @property
    def remaining_pending(self) -> int:
        """How many more requests may wait."""
        return max(self.pending_max - self.pending, 0)

    @property
    def remaining_requests(self) -> int:
        """How many more may be sent."""
        return max(self.requests_max - self.requests, 0)
