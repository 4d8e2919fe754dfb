"""Consistent hashing: tables from a request's hash to an endpoint, which move few requests when the set changes.

`ring` is ketama (Last.fm 2007) as Envoy builds it, `maglev` the table of Eisenbud et al., "Maglev" (NSDI 2016, 3.4),
with Envoy's weights. Both are functions of hosts and weights only: sidecars on different machines agree on every
request, and an unusable endpoint does not change the table, its requests go to the next one along it until it is back.
"""

import random
from array import array
from bisect import bisect_left
from collections.abc import Callable, Collection, Sequence
from functools import lru_cache
from itertools import chain
from math import ceil
from typing import Generic

from mesh.proxy.balancing.candidate import E
from mesh.proxy.hashing import xxh64
from mesh.traffic.policy import LoadBalancing

Hosts = tuple[tuple[str, float], ...]  # (address:port, share of the whole), sorted

# Built in 0.4 s at worst: very unequal weights would ask for millions, and the lightest endpoint then has to do without
# its exact share.
RING_ENTRIES_MAX = 131072
TABLES_KEPT = 32  # of sets and sizes: an update that leaves a set as it was finds its table again


class Table:
    """`owners` in order, each an index into the sorted hosts; `hashes` where they begin, or None when evenly spread."""

    __slots__ = ("_hashes", "owners")

    def __init__(self, owners: "array[int]", hashes: "array[int] | None" = None) -> None:
        self.owners = owners
        self._hashes = hashes

    def position(self, request_hash: int) -> int:
        """Where in `owners` a request begins."""
        if self._hashes is None:
            return request_hash % len(self.owners)
        at = bisect_left(self._hashes, request_hash)
        return at if at < len(self._hashes) else 0


@lru_cache(maxsize=TABLES_KEPT)
def ring(hosts: Hosts, size_min: int, size_max: int) -> Table:
    """As many entries as give the lightest host a whole number of them, at least `size_min` where that is possible."""
    lightest = min(share for _, share in hosts)
    scale = min(ceil(lightest * size_min) / lightest, size_max, RING_ENTRIES_MAX)
    entries: list[int] = []
    target = 0.0
    for index, (host, share) in enumerate(hosts):
        target += scale * share
        prefix = host.encode() + b"_"
        for copy in range(ceil(target) - len(entries)):
            entries.append((xxh64(prefix + b"%d" % copy) << 32) | index)
    entries.sort()
    hashes = array("Q", [entry >> 32 for entry in entries])
    return Table(array("I", [entry & 0xFFFF_FFFF for entry in entries]), hashes)


@lru_cache(maxsize=TABLES_KEPT)
def maglev(hosts: Hosts, size: int) -> Table:
    """`size` (a prime) slots: the hosts take turns, each its next free slot in its own permutation of them."""
    count = len(hosts)
    keys = [host.encode() for host, _ in hosts]
    nexts = [xxh64(key) % size for key in keys]
    skips = [xxh64(key, 1) % (size - 1) + 1 for key in keys]
    shares = [share for _, share in hosts]
    heaviest = max(shares)
    equal = min(shares) == heaviest
    due = [0.0] * count
    owners = array("I", bytes(4 * size))
    taken = bytearray(size)
    left = size
    turn = 0
    while True:
        turn += 1
        for index in range(count):
            if not equal:  # lighter hosts sit out some of the turns
                if turn * shares[index] < due[index]:
                    continue
                due[index] += heaviest
            slot, skip = nexts[index], skips[index]
            while taken[slot]:
                slot += skip
                if slot >= size:
                    slot -= size
            taken[slot] = 1
            owners[slot] = index
            left -= 1
            if not left:
                return Table(owners)
            nexts[index] = slot


class LazyTable(Generic[E]):
    """The table of one priority level's endpoints, built when the first request asks: an unused one costs nothing."""

    __slots__ = ("_build", "_endpoints", "_shares", "_table")

    def __init__(self, endpoints: Sequence[E], policy: LoadBalancing, shares: Sequence[float]) -> None:
        self._endpoints = endpoints
        self._shares = shares
        self._build: Callable[[Hosts], Table]
        if policy.kind == "maglev":
            self._build = lambda hosts: maglev(hosts, policy.maglev_table_size)
        else:
            self._build = lambda hosts: ring(hosts, policy.ring_size_min, policy.ring_size_max)
        self._table: Table | None = None

    def get(self) -> tuple[Table, Sequence[E]]:
        """The table, and the endpoints that its owners point to."""
        if self._table is None:
            total = sum(self._shares)
            # Those whose locality has no weight come last: the table does not reach them.
            rows = [
                (share == 0.0, endpoint.host, order, share / total)
                for order, (endpoint, share) in enumerate(zip(self._endpoints, self._shares, strict=True))
            ]
            rows.sort()
            self._endpoints = tuple(self._endpoints[order] for _, _, order, _ in rows)
            self._table = self._build(tuple((host, share) for out, host, _, share in rows if not out))
        return self._table, self._endpoints


class Hashed(Generic[E]):
    """Picks by the request's hash among `allowed` ones of a table's endpoints; a request without one goes anywhere."""

    __slots__ = ("_allowed", "_bits", "_endpoints", "_lazy", "_table")

    def __init__(self, lazy: LazyTable[E], allowed: Collection[E], rng: random.Random) -> None:
        self._lazy = lazy
        self._allowed = allowed
        self._bits = rng.getrandbits
        self._table: Table | None = None
        self._endpoints: list[E | None] = []  # in the table's order, None: not allowed

    def pick(self, _now: float, request_hash: int | None = None) -> E:
        """The owner of the hash's place, or the first allowed one after it."""
        table = self._table
        if table is None:
            table, endpoints = self._lazy.get()
            allowed = {id(endpoint) for endpoint in self._allowed}
            self._endpoints = [endpoint if id(endpoint) in allowed else None for endpoint in endpoints]
            self._table = table
        start = table.position(self._bits(64) if request_hash is None else request_hash)
        owners = table.owners
        endpoint = self._endpoints[owners[start]]
        if endpoint is not None:
            return endpoint
        for at in chain(range(start + 1, len(owners)), range(start)):
            endpoint = self._endpoints[owners[at]]
            if endpoint is not None:
                return endpoint
        # Only such are left as have no place in the table: no locality weight, or too light for a ring at its limit.
        return next(each for each in self._endpoints if each is not None)
