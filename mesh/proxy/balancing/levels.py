"""Who takes load at all: priorities with over-provisioning, panic, and nearness as Envoy reckons them."""

from collections.abc import Sequence
from typing import NamedTuple

from mesh.proxy.balancing.candidate import Candidate, E
from mesh.traffic.policy import LoadBalancing


class Share(NamedTuple):
    """One level's part: `load` in percent of the target's requests. In `panic` its health is ignored."""

    load: int
    panic: bool


def health(usable: int, total: int, overprovisioning: float) -> int:
    """How much of its load a level can take, in percent: usable endpoints can do a little more than their own part."""
    return min(100, round(overprovisioning * 100) * usable // total)


def divide(counts: Sequence[tuple[int, int]], *, overprovisioning: float, panic_threshold: float) -> tuple[Share, ...]:
    """Shares of levels, highest priority first, from their (usable, total) endpoints; totals are above 0.

    Each level takes what its health allows of what is left. While all together are healthy enough nobody panics;
    below that a level panics when less than the threshold of it is usable, and when all do the load goes by size.
    """
    healths = [health(usable, total, overprovisioning) for usable, total in counts]
    together = min(100, sum(healths))
    panics = [together < 100 and 100.0 * usable / total < panic_threshold for usable, total in counts]
    if all(panics):
        everyone = sum(total for _, total in counts)
        loads = [100 * total // everyone for _, total in counts]
        loads[0] += 100 - sum(loads)
    elif together == 0:
        loads = [100] + [0] * (len(counts) - 1)  # the threshold is 0: there is nobody to use, and no panic
    else:
        loads = []
        for each in healths:
            loads.append(min(100 - sum(loads), each * 100 // together))
        loads[next(at for at, each in enumerate(healths) if each)] += 100 - sum(loads)
    return tuple(map(Share, loads, panics))


def into_levels(endpoints: Sequence[E], policy: LoadBalancing, locality: str) -> tuple[tuple[E, ...], ...]:
    """Endpoints by priority; with the policy `prefer` each priority again by distance from `locality`."""
    near = policy.locality == "prefer" and locality != ""
    levels: dict[tuple[int, int], list[E]] = {}
    for endpoint in endpoints:
        rank = (endpoint.priority, distance(locality, endpoint.locality) if near else 0)
        levels.setdefault(rank, []).append(endpoint)
    return tuple(tuple(levels[rank]) for rank in sorted(levels))


def distance(own: str, other: str) -> int:
    """0: the same zone (or region, when `own` says no more), 1: the same region, 2: elsewhere."""
    mine = own.split("/")[:2]
    theirs = other.split("/")[:2]
    if mine == theirs[: len(mine)]:
        return 0
    return len(mine) - (1 if mine[0] == theirs[0] else 0)


def locality_weight(locality: str, weights: Sequence[tuple[str, int]]) -> int:
    """The weight of the longest listed locality that is `locality` or a prefix of it by segments; 0 when none is."""
    parts = locality.split("/")
    best = (0, 0)
    for listed, weight in weights:
        wanted = listed.split("/") if listed else []
        if parts[: len(wanted)] == wanted:
            best = max(best, (len(wanted) + 1, weight))
    return best[1]


def locality_groups(level: Sequence[E], hosts: Sequence[E], policy: LoadBalancing) -> list[tuple[float, tuple[E, ...]]]:
    """(weight, endpoints) of each locality among `hosts`, the usable ones of a level. A locality that is not healthy
    enough for its whole weight takes less, as a priority level would. Empty when none of them has a weight.
    """
    totals: dict[str, int] = {}
    for endpoint in level:
        totals[endpoint.locality] = totals.get(endpoint.locality, 0) + 1
    usable: dict[str, list[E]] = {}
    for endpoint in hosts:
        usable.setdefault(endpoint.locality, []).append(endpoint)
    groups: list[tuple[float, tuple[E, ...]]] = []
    for locality in sorted(usable):
        members = usable[locality]
        weight = locality_weight(locality, policy.locality_weights)
        weight *= health(len(members), totals[locality], policy.overprovisioning)
        if weight:
            groups.append((float(weight), tuple(members)))
    return groups


def locality_shares(level: Sequence[Candidate], policy: LoadBalancing) -> list[float]:
    """Each endpoint's weight in a hash table that keeps to locality weights; its own weight when none apply."""
    own: dict[str, int] = {}
    for endpoint in level:
        own[endpoint.locality] = own.get(endpoint.locality, 0) + endpoint.weight
    factors = {locality: locality_weight(locality, policy.locality_weights) / own[locality] for locality in own}
    if not any(factors.values()):
        return [float(endpoint.weight) for endpoint in level]
    return [factors[endpoint.locality] * endpoint.weight for endpoint in level]
