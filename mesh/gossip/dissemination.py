"""How news travels: queues of rumours, what rides along in which packet, and the gossip round (SWIM §4.1).

System news (who is alive, suspect, dead) and Serf's messages wait in queues of their own; rumours ride on probes and
acks, and a round of their own tells them to a few random members while there are any.
"""

import math
from collections.abc import Callable, Hashable

from mesh.gossip.broadcast import BroadcastQueue, retransmit_limit
from mesh.gossip.config import GossipConfig
from mesh.gossip.members import NodeRecord
from mesh.gossip.membership import Membership
from mesh.gossip.messages import NodeState
from mesh.gossip.packet import (
    COMPOUND_HEADER_BYTES,
    COMPOUND_PART_BYTES,
    COMPOUND_PARTS_MAX,
    PacketCodec,
    compound,
)
from mesh.gossip.timers import Timers

# Part of each packet kept for the layer above when it has something to say, or churn would starve it (memberlist #299).
_USER_SHARE = 0.2


class Dissemination:
    """Queues rumours and packs datagrams. `emit` takes each packet ready to send."""

    def __init__(
        self,
        membership: Membership,
        *,
        codec: PacketCodec,
        config: GossipConfig,
        timers: Timers,
        emit: Callable[[tuple[str, int], bytes], None],
    ) -> None:
        self._membership = membership
        self._codec = codec
        self._config = config
        self._timers = timers
        self._emit = emit
        # What one message may have in a packet that it shares with others.
        self.message_bytes_max = (
            config.packet_bytes_max - codec.overhead_bytes - COMPOUND_HEADER_BYTES - COMPOUND_PART_BYTES
        )
        self._system = BroadcastQueue(bytes_max=self.message_bytes_max)
        self._user = BroadcastQueue(bytes_max=self.message_bytes_max)
        self._tokens = 0
        self._told: dict[int, Callable[[float], None]] = {}
        self._scheduled = False
        self._gossiped_at = -math.inf

    @property
    def user_queue_length(self) -> int:
        return len(self._user)

    def queue_system(self, key: Hashable, message: bytes, now: float, *, token: int | None = None) -> None:
        """Queues news about a member. Raises LimitExceeded when no packet could carry it."""
        self._queue(self._system, key, message, now, token)

    def queue_user(self, key: Hashable, message: bytes, now: float, *, token: int | None = None) -> None:
        """Queues a message of the layer above. Raises LimitExceeded when no packet could carry it."""
        self._queue(self._user, key, message, now, token)

    def new_token(self, told: Callable[[float], None]) -> int:
        """A token for one rumour; `told(now)` runs once, when it has been told often enough, replaced or dropped."""
        self._tokens += 1
        self._told[self._tokens] = told
        return self._tokens

    def finish(self, token: int, now: float) -> None:
        """Ends the wait for that rumour, if anybody still waits."""
        told = self._told.pop(token, None)
        if told is not None:
            told(now)

    def send(self, endpoint: tuple[str, int], message: bytes) -> None:
        """Sends the message alone."""
        record = self._membership.at(endpoint)
        checksum = record is not None and record.versions[1] >= 5
        self._emit(endpoint, self._codec.seal(message, checksum=checksum))

    def send_with_rumours(self, endpoint: tuple[str, int], message: bytes, now: float) -> None:
        """Sends the message and as many rumours as fit, to members only.

        A stranger's ping must not draw a larger answer than itself.
        """
        known = self._membership.at(endpoint) is not None
        rumours = self._take(self.message_bytes_max - len(message), now) if known else []
        self.send(endpoint, compound([message, *rumours]) if rumours else message)

    def resume(self, now: float) -> None:
        """Schedules the gossip round if there is news; call when somebody to tell it to has come."""
        if not self._scheduled and (self._system or self._user):
            self._scheduled = True
            due = max(now, self._gossiped_at + self._config.gossip_interval_s)
            self._timers.schedule(due, self._round)

    def prune(self, now: float) -> int:
        """Drops what is above the queues' limit; how many rumours that were."""
        retained_max = max(self._config.queue_depth_min, 2 * len(self._membership.records))
        total = 0
        for queue in (self._system, self._user):
            dropped, tokens = queue.prune(retained_max)
            total += dropped
            for token in tokens:
                self.finish(token, now)
        return total

    def _queue(self, queue: BroadcastQueue, key: Hashable, message: bytes, now: float, token: int | None) -> None:
        replaced = queue.enqueue(key, message, token=token)
        if replaced is not None:
            self.finish(replaced, now)
        self.resume(now)

    def _take(self, bytes_free: int, now: float) -> list[bytes]:
        if not self._system and not self._user:
            return []
        limit = retransmit_limit(multiplier=self._config.retransmit_multiplier, members=self._membership.live_count)
        reserved = int(bytes_free * _USER_SHARE) if self._user else 0
        system, finished = self._system.take(
            bytes_free=bytes_free - reserved,
            part_bytes=COMPOUND_PART_BYTES,
            parts_max=COMPOUND_PARTS_MAX - 1,
            limit=limit,
        )
        left = bytes_free - sum(len(message) + COMPOUND_PART_BYTES for message in system)
        user, finished_user = self._user.take(
            bytes_free=left,
            part_bytes=COMPOUND_PART_BYTES,
            parts_max=COMPOUND_PARTS_MAX - 1 - len(system),
            limit=limit,
        )
        for token in finished + finished_user:
            self.finish(token, now)
        return system + user

    def _round(self, now: float) -> None:
        self._scheduled = False
        self._gossiped_at = now
        targets = self._membership.random_nodes(self._config.gossip_nodes, lambda record: self._hears(record, now))
        for record in targets:
            rumours = self._take(self.message_bytes_max + COMPOUND_PART_BYTES, now)
            if not rumours:
                break
            self.send(record.endpoint, compound(rumours) if len(rumours) > 1 else rumours[0])
        # Alone there is nobody to tell; the next newcomer starts it again.
        if targets:
            self.resume(now)

    def _hears(self, record: NodeRecord, now: float) -> bool:
        """Alive and suspect nodes, and for a while the dead, who may want to know that they are."""
        if record.state == NodeState.DEAD:
            return now - record.changed_at <= self._config.gossip_to_the_dead_s
        return record.is_live
