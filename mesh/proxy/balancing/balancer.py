"""The balancer of one target: levels, then localities, then the policy's choice, composed once per change of health."""

import itertools
import random
from bisect import bisect_right
from collections.abc import Callable, Sequence
from functools import lru_cache
from typing import Generic

from mesh.errors import ConfigError
from mesh.proxy.balancing.candidate import E
from mesh.proxy.balancing.choices import Draw, LeastLoaded, LessLoaded, Quicker
from mesh.proxy.balancing.levels import divide, into_levels, locality_groups, locality_shares
from mesh.proxy.balancing.schedule import Schedule, Turns, by_load, by_weight
from mesh.proxy.balancing.slow_start import ramped, ramps_until
from mesh.proxy.balancing.tables import Hashed, LazyTable
from mesh.traffic.policy import LoadBalancing

Pick = Callable[[float, int | None], E | None]

RESELECTIONS = 3  # draws that may land on endpoints already tried, before those not tried are looked for
MAGLEV_SIZE_MAX = 5000011  # Envoy's

_HASHING = ("ring_hash", "maglev")


def make_balancer(
    endpoints: Sequence[E], policy: LoadBalancing, rng: random.Random, *, now: float, locality: str = ""
) -> "Balancer[E]":
    """A balancer for a fixed set; `locality` is the sidecar's own. Raises ConfigError as `check_policy`."""
    check_policy(policy)
    return Balancer(endpoints, policy, rng, now=now, locality=locality)


@lru_cache(maxsize=64)
def check_policy(policy: LoadBalancing) -> None:
    """Raises ConfigError, naming the field, when no balancer can work like this."""
    size = policy.maglev_table_size
    slow_start = policy.slow_start
    rules = (
        (policy.choice_count >= 2, "choice_count is below 2"),
        (policy.active_request_bias >= 0.0, "active_request_bias is negative"),
        (1 <= policy.ring_size_min <= policy.ring_size_max, "ring_size_min is not between 1 and ring_size_max"),
        (2 <= size <= MAGLEV_SIZE_MAX and _prime(size), f"maglev_table_size {size} is no prime up to 5000011"),
        (0.0 <= policy.panic_threshold <= 100.0, "panic_threshold is outside 0 to 100"),
        (policy.overprovisioning >= 1.0, "overprovisioning is below 1"),
        (policy.ewma_decay_s > 0.0 and policy.ewma_initial_s > 0.0, "ewma_decay_s or ewma_initial_s is not positive"),
        (all(weight >= 0 for _, weight in policy.locality_weights), "locality_weights has a negative weight"),
        (slow_start is None or slow_start.window_s > 0.0, "slow start: window_s is not positive"),
        (slow_start is None or slow_start.aggression > 0.0, "slow start: aggression is not positive"),
        (slow_start is None or 0.0 <= slow_start.min_percent <= 100.0, "slow start: min_percent is outside 0 to 100"),
    )
    for holds, complaint in rules:
        if not holds:
            raise ConfigError(f"load balancing: {complaint}")


def _prime(number: int) -> bool:
    return number > 1 and all(number % divisor for divisor in range(2, int(number**0.5) + 1))


def _nobody(_now: float, _request_hash: int | None) -> None:
    """Nobody is usable, and there is no panic."""


class Balancer(Generic[E]):
    """Chooses among a fixed set; a new set is a new balancer, so that a choice never sees half of a change.

    Who is usable is read when it is made and in `health_changed`, not at each choice.
    """

    __slots__ = ("_hosts", "_levels", "_panics", "_pick", "_policy", "_rng", "_tables", "_usable", "endpoints")

    def __init__(
        self, endpoints: Sequence[E], policy: LoadBalancing, rng: random.Random, *, now: float, locality: str
    ) -> None:
        self.endpoints = tuple(endpoints)
        self._policy = policy
        self._rng = rng
        self._levels = into_levels(self.endpoints, policy, locality)
        self._tables: dict[int, LazyTable[E]] = {}  # by level; what is usable does not change them
        self._usable: list[bool] = []
        self._hosts: list[tuple[E, ...]] = []  # by level: who may be chosen now
        self._panics: list[bool] = []
        self._pick: Pick[E] = _nobody
        self._compose([endpoint.usable for endpoint in self.endpoints], now)

    def choose(self, now: float, request_hash: int | None = None, tried: Sequence[E] = ()) -> E | None:
        """An endpoint that is not among `tried`, or None when there is none left.

        Whoever would rather repeat itself than give up (a retry after an answer) asks again without `tried`.
        """
        if tried:
            return self._choose_untried(now, request_hash, tried)
        return self._pick(now, request_hash)

    def health_changed(self, now: float) -> None:
        """Some endpoint's `usable` may have changed."""
        usable = [endpoint.usable for endpoint in self.endpoints]
        if usable != self._usable:
            self._compose(usable, now)

    def _compose(self, usable: list[bool], now: float) -> None:
        self._usable = usable
        self._hosts = []
        self._panics = []
        self._pick = _nobody
        if not self.endpoints:
            return
        if len(self._levels) == 1 and all(usable):  # as most are
            self._hosts = [self.endpoints]
            self._panics = [False]
            self._pick = self._picker(0, self.endpoints, now)
            return
        allowed = [tuple(endpoint for endpoint in level if endpoint.usable) for level in self._levels]
        shares = divide(
            [(len(some), len(level)) for some, level in zip(allowed, self._levels, strict=True)],
            overprovisioning=self._policy.overprovisioning,
            panic_threshold=self._policy.panic_threshold,
        )
        parts: list[tuple[float, Pick[E]]] = []
        for at, share in enumerate(shares):
            self._panics.append(share.panic)
            self._hosts.append(self._levels[at] if share.panic else allowed[at])
            if share.load:
                parts.append((share.load, self._picker(at, self._hosts[at], now)))
        self._pick = self._among(parts, by_hash=self._policy.kind in _HASHING)

    def _among(self, parts: Sequence[tuple[float, Pick[E]]], *, by_hash: bool = False) -> Pick[E]:
        """A choice among choices, by weight; with `by_hash` (weights in percent) the same for the same request."""
        if len(parts) == 1:
            return parts[0][1]
        picks = [pick for _, pick in parts]
        cumulative = list(itertools.accumulate(weight for weight, _ in parts))
        last = len(parts) - 1
        total = cumulative[-1]
        draw = self._rng.random

        def pick_part(now: float, request_hash: int | None) -> E | None:
            at = request_hash % 100 if by_hash and request_hash is not None else draw() * total
            return picks[bisect_right(cumulative, at, 0, last)](now, request_hash)

        return pick_part

    def _picker(self, level: int, hosts: tuple[E, ...], now: float) -> Pick[E]:
        """The policy's choice among `hosts`, which are some of a level's."""
        policy = self._policy
        if len(hosts) < 2:
            return (lambda _now, _request_hash: hosts[0]) if hosts else _nobody
        weighted = policy.locality == "weighted" and not self._panics[level]
        if policy.kind in _HASHING:
            table = self._tables.get(level)
            if table is None:
                members = self._levels[level]
                own = [float(endpoint.weight) for endpoint in members]
                shares = locality_shares(members, policy) if policy.locality == "weighted" else own
                table = self._tables[level] = LazyTable(members, policy, shares)
            return Hashed(table, hosts, self._rng).pick
        if weighted:
            groups = locality_groups(self._levels[level], hosts, policy)
            if groups:
                return self._among([(weight, self._ramping(members, now)) for weight, members in groups])
        return self._ramping(hosts, now)

    def _ramping(self, hosts: tuple[E, ...], now: float) -> Pick[E]:
        """With slow start: weights grow until all have their own, then it is the plain choice."""
        policy = self._policy
        plain = self._plain(hosts, now)
        if policy.slow_start is None or policy.kind not in ("round_robin", "least_request"):
            return plain
        until = ramps_until(hosts, policy.slow_start)
        if now >= until:
            return plain
        weigh = by_weight if policy.kind == "round_robin" else by_load(policy.active_request_bias)
        ramp = Schedule(hosts, ramped(weigh, policy.slow_start), self._rng, now).pick
        return lambda now, request_hash: ramp(now) if now < until else plain(now, request_hash)

    def _plain(self, hosts: tuple[E, ...], now: float) -> Pick[E]:
        policy, rng = self._policy, self._rng
        if len(hosts) < 2:
            return lambda _now, _request_hash: hosts[0]
        weight = hosts[0].weight
        equal = all(endpoint.weight == weight for endpoint in hosts)
        match policy.kind:
            case "random":
                return Draw(hosts, rng).pick
            case "peak_ewma":
                return Quicker(hosts, policy.ewma_initial_s, rng).pick
            case "round_robin":
                return Turns(hosts, rng).pick if equal else Schedule(hosts, by_weight, rng, now).pick
        if not equal:
            return Schedule(hosts, by_load(policy.active_request_bias), rng, now).pick
        if policy.choice_count == 2:
            return LessLoaded(hosts, rng).pick
        return LeastLoaded(hosts, policy.choice_count, rng).pick

    def _choose_untried(self, now: float, request_hash: int | None, tried: Sequence[E]) -> E | None:
        endpoint = self._pick(now, request_hash)
        if self._policy.kind not in _HASHING:  # the same hash leads to the same one
            for _ in range(RESELECTIONS):
                if endpoint is None or not _has(tried, endpoint):
                    return endpoint
                endpoint = self._pick(now, request_hash)
        if endpoint is None or not _has(tried, endpoint):
            return endpoint
        # Not tried ones of the same level first, then the other levels in order.
        home = next(level for level, hosts in enumerate(self._hosts) if _has(hosts, endpoint))
        for level in sorted(range(len(self._hosts)), key=lambda level: level != home):
            rest = tuple(each for each in self._hosts[level] if not _has(tried, each))
            if rest:
                return self._picker(level, rest, now)(now, request_hash)
        return None


def _has(endpoints: Sequence[E], wanted: E) -> bool:
    return any(endpoint is wanted for endpoint in endpoints)
