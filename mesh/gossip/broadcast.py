"""Rumours on their way out: each is sent a bounded number of times, the least told first (SWIM §4.1)."""

import math
from collections.abc import Hashable, Iterator

import msgspec

from mesh.errors import LimitExceeded

# Rumours too large for what is left of a packet are passed over; this many per tier, then the tier is given up.
_MISFITS_MAX = 32


def retransmit_limit(*, multiplier: int, members: int) -> int:
    """How often one rumour is sent in a pool of `members`: multiplier x ceil(log10(N + 1))."""
    return multiplier * math.ceil(math.log10(members + 1))


class Rumour(msgspec.Struct, eq=False):
    """One queued message. `token` names it to whoever waits until it has been told."""

    key: Hashable
    message: bytes
    token: int | None
    transmits: int = 0


class BroadcastQueue:
    """Rumours by key: a newer one about the same thing replaces the older."""

    def __init__(self, *, bytes_max: int) -> None:
        self._bytes_max = bytes_max
        self._tiers: dict[int, dict[Hashable, Rumour]] = {}
        self._by_key: dict[Hashable, Rumour] = {}

    def __len__(self) -> int:
        return len(self._by_key)

    def enqueue(self, key: Hashable, message: bytes, *, token: int | None = None) -> int | None:
        """Queues `message`; returns the token of the rumour it replaces, if that had one.

        Raises LimitExceeded for a message that no packet could ever carry (memberlist keeps such for ever, unsent).
        """
        if len(message) > self._bytes_max:
            raise LimitExceeded(f"a gossip message of {len(message)} bytes; a packet carries {self._bytes_max}")
        replaced = self._by_key.get(key)
        if replaced is not None:
            self._remove(replaced)
        rumour = Rumour(key, message, token)
        self._by_key[key] = rumour
        self._tiers.setdefault(0, {})[key] = rumour
        return replaced.token if replaced is not None else None

    def take(self, *, bytes_free: int, part_bytes: int, parts_max: int, limit: int) -> tuple[list[bytes], list[int]]:
        """Messages for one packet, and the tokens of those now told `limit` times (they leave the queue)."""
        chosen: list[Rumour] = []
        for tier in sorted(self._tiers):
            misfits = 0
            for rumour in self._newest_first(tier):
                if len(chosen) >= parts_max or bytes_free <= part_bytes or misfits >= _MISFITS_MAX:
                    break
                if len(rumour.message) + part_bytes > bytes_free:
                    misfits += 1
                    continue
                bytes_free -= len(rumour.message) + part_bytes
                chosen.append(rumour)
        finished: list[int] = []
        for rumour in chosen:
            self._remove(rumour)
            rumour.transmits += 1
            if rumour.transmits < limit:
                self._by_key[rumour.key] = rumour
                self._tiers.setdefault(rumour.transmits, {})[rumour.key] = rumour
            elif rumour.token is not None:
                finished.append(rumour.token)
        return [rumour.message for rumour in chosen], finished

    def prune(self, retained_max: int) -> tuple[int, list[int]]:
        """Drops the most told, oldest rumours above `retained_max`: how many, and their tokens."""
        dropped, tokens = 0, []
        while len(self._by_key) > retained_max:
            tier = self._tiers[max(self._tiers)]
            rumour = next(iter(tier.values()))
            self._remove(rumour)
            dropped += 1
            if rumour.token is not None:
                tokens.append(rumour.token)
        return dropped, tokens

    def _newest_first(self, tier: int) -> Iterator[Rumour]:
        return reversed(self._tiers[tier].values())

    def _remove(self, rumour: Rumour) -> None:
        del self._by_key[rumour.key]
        tier = self._tiers[rumour.transmits]
        del tier[rumour.key]
        if not tier:
            del self._tiers[rumour.transmits]
