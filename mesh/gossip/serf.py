"""Serf's layer: member status by Lamport-ordered intents, tags, tombstones, and which failed member to look up again.

SWIM says whether a node answers; an intent says what was meant. A node that goes silent after a leave intent has left,
without one it has failed.
"""

import random
from collections.abc import Callable, Hashable
from dataclasses import dataclass

from mesh.gossip.config import GossipConfig
from mesh.gossip.events import (
    GossipEvent,
    MemberFailed,
    MemberJoined,
    MemberLeft,
    MemberReaped,
    MemberUpdated,
)
from mesh.gossip.members import Member, NodeRecord, Status
from mesh.gossip.messages import NodeState
from mesh.gossip.serf_messages import (
    LAMPORT_MAX,
    JoinIntent,
    LeaveIntent,
    SerfPushPull,
    decode_tags,
)

# Serf's replay window: a message this far behind its clock is old news.
EVENT_WINDOW = 512
# Different events or queries at one Lamport time that are remembered.
_SEEN_PER_TIME_MAX = 64
# Intents about nodes that we have not met yet.
_RECENT_INTENTS_MAX = 4096


class LamportClock:
    """Counts messages so that causes come before effects (Lamport 1978)."""

    def __init__(self) -> None:
        self._time = 1

    @property
    def time(self) -> int:
        return self._time

    def increment(self) -> int:
        self._time = min(self._time + 1, LAMPORT_MAX)
        return self._time

    def witness(self, time: int) -> None:
        """After this the clock is past `time`."""
        self._time = min(max(self._time, time + 1), LAMPORT_MAX)


class SeenWindow:
    """Which events or queries were already seen, by Lamport time, as far back as Serf's window."""

    def __init__(self) -> None:
        self.clock = LamportClock()
        self._seen: dict[int, set[Hashable]] = {}

    def is_new(self, time: int, identity: Hashable) -> bool:
        """Witnesses the time; whether this is its first sight inside the window."""
        self.clock.witness(time)
        if time + EVENT_WINDOW < self.clock.time:
            return False
        if len(self._seen) > 2 * EVENT_WINDOW:
            self._seen = {key: seen for key, seen in self._seen.items() if key + EVENT_WINDOW >= self.clock.time}
        seen = self._seen.setdefault(time, set())
        if identity in seen or len(seen) >= _SEEN_PER_TIME_MAX:
            return False
        seen.add(identity)
        return True


@dataclass(slots=True, eq=False)
class _SerfMember:
    record: NodeRecord
    tags: dict[str, str]
    status: Status
    status_time: int = 0
    departed_at: float = 0.0

    def value(self) -> Member:
        record = self.record
        return Member(record.name, record.host, record.port, self.tags, self.status, *record.versions)


class SerfLayer:
    """Statuses of all members. `emit` takes events; `refute_leave` is called when others believe that we leave."""

    def __init__(
        self,
        local_name: str,
        *,
        config: GossipConfig,
        rng: random.Random,
        emit: Callable[[GossipEvent], None],
        refute_leave: Callable[[], None],
    ) -> None:
        self.clock = LamportClock()
        self.events = SeenWindow()
        self.queries = SeenWindow()
        self.leaving = False
        self._local_name = local_name
        self._config = config
        self._rng = rng
        self._emit = emit
        self._refute_leave = refute_leave
        self._members: dict[str, _SerfMember] = {}
        self._intents: dict[str, tuple[JoinIntent | LeaveIntent, float]] = {}
        self._prunes: dict[str, float] = {}
        # Status time of each member lately forgotten, and when. Without it an older copy of the same intent, still on
        # its way, would look like news about a stranger, and replace the newer one among our rumours.
        self._forgotten: dict[str, tuple[int, float]] = {}

    def __contains__(self, name: str) -> bool:
        return name in self._members

    def members(self) -> tuple[Member, ...]:
        """All members by name."""
        return tuple(self._members[name].value() for name in sorted(self._members))

    def member(self, name: str) -> Member | None:
        """That member, if it is known and not forgotten."""
        found = self._members.get(name)
        return found.value() if found is not None else None

    def count(self, status: Status) -> int:
        return sum(member.status == status for member in self._members.values())

    def node_joined(self, record: NodeRecord) -> None:
        """SWIM sees the node alive, for the first time or again."""
        member = self._members.get(record.name)
        if member is None:
            forgotten_time, _ = self._forgotten.pop(record.name, (0, 0.0))
            member = _SerfMember(record, {}, "alive", status_time=forgotten_time)
            intent, _ = self._intents.pop(record.name, (None, 0.0))
            if intent is not None:
                member.status_time = intent.time
                member.status = "leaving" if isinstance(intent, LeaveIntent) else "alive"
            self._members[record.name] = member
        else:
            member.status = "alive"
        member.record = record
        member.tags = decode_tags(record.meta)
        self._emit(MemberJoined(member.value()))

    def node_updated(self, record: NodeRecord) -> None:
        """The node's meta bytes changed."""
        member = self._members.get(record.name)
        if member is not None:
            member.tags = decode_tags(record.meta)
            self._emit(MemberUpdated(member.value()))

    def node_departed(self, record: NodeRecord, now: float) -> None:
        """SWIM holds the node dead or left."""
        member = self._members.get(record.name)
        if member is None or member.status in ("failed", "left"):
            return
        member.departed_at = now
        # A self-declared death is a leave even when its intent was lost on the way.
        if member.status == "leaving" or record.state == NodeState.LEFT:
            member.status = "left"
            self._emit(MemberLeft(member.value()))
        else:
            member.status = "failed"
            self._emit(MemberFailed(member.value()))

    def apply_join(self, intent: JoinIntent, now: float) -> bool:
        """Whether the intent is news, to be gossiped on."""
        self.clock.witness(intent.time)
        member = self._members.get(intent.node)
        if member is None:
            return self._remember(intent, now)
        if intent.time <= member.status_time:
            return False
        member.status_time = intent.time
        if member.status == "leaving" and intent.node != self._local_name:
            # The leave was meant for an earlier life of it.
            member.status = "alive"
        return True

    def apply_leave(self, intent: LeaveIntent, now: float) -> bool:
        """Whether the intent is news, to be gossiped on."""
        self.clock.witness(intent.time)
        member = self._members.get(intent.node)
        if member is None:
            return self._remember(intent, now)
        if intent.time <= member.status_time:
            return False
        if intent.node == self._local_name and not self.leaving:
            self._refute_leave()
            return False
        # The newest time is kept even where the status stays, or two leaves for one member chase each other for ever
        # through the pool (Consul #8179).
        member.status_time = intent.time
        if member.status == "alive":
            member.status = "leaving"
        elif member.status == "failed":
            member.status = "left"
            self._emit(MemberLeft(member.value()))
        if intent.prune:
            self._prune(member, now)
        return True

    def reap(self, now: float) -> list[str]:
        """Forgets members whose time is over and old intents; the names of the forgotten."""
        gone: list[str] = []
        for name in sorted(self._members):
            member = self._members[name]
            limits = {"failed": self._config.reconnect_timeout_s, "left": self._config.tombstone_timeout_s}
            limit_s = limits.get(member.status)
            pruned_at = self._prunes.get(name)
            pruned = pruned_at is not None and now >= pruned_at and member.status in ("leaving", "left")
            if name != self._local_name and (pruned or (limit_s is not None and now - member.departed_at > limit_s)):
                gone.append(name)
                self._erase(member, now)
            elif pruned_at is not None and now >= pruned_at:
                del self._prunes[name]
        for name in [key for key, (_, at) in self._intents.items() if now - at > self._config.recent_intent_s]:
            del self._intents[name]
        for name in [key for key, (_, at) in self._forgotten.items() if now - at > self._config.recent_intent_s]:
            del self._forgotten[name]
        return gone

    def reconnect_candidate(self) -> tuple[str, int] | None:
        """The address of a failed member to push-pull with, or None this time.

        With probability failed/alive, so that the pool as a whole tries each failed member about once an interval; it
        is what heals a partition.
        """
        failed = sorted(name for name, member in self._members.items() if member.status == "failed")
        if not failed:
            return None
        alive = len(self._members) - len(failed) - self.count("left")
        if self._rng.random() > len(failed) / max(alive, 1):
            return None
        return self._members[failed[self._rng.randrange(len(failed))]].record.endpoint

    def state(self) -> SerfPushPull:
        """Our side of the user state in a push-pull."""
        return SerfPushPull(
            time=self.clock.time,
            status_times={name: member.status_time for name, member in self._members.items()},
            left=tuple(name for name, member in self._members.items() if member.status == "left"),
            event_time=self.events.clock.time,
            query_time=self.queries.clock.time,
        )

    def merge(self, state: SerfPushPull, now: float) -> None:
        """Takes over a peer's user state; its intents are made up from its status times."""
        # No message with the peer's present time has been sent yet, hence one less.
        self.clock.witness(max(state.time - 1, 0))
        self.events.clock.witness(max(state.event_time - 1, 0))
        self.queries.clock.witness(max(state.query_time - 1, 0))
        left = set(state.left)
        for name in state.left:
            time = state.status_times.get(name, 0)
            member = self._members.get(name)
            if member is not None and member.status == "left":
                # Agreed already: going one past the time again would make two peers count each other up for ever.
                member.status_time = max(member.status_time, time)
            else:
                # The leave's own time is not in the state; it was after the status time.
                self.apply_leave(LeaveIntent(min(time + 1, LAMPORT_MAX), name), now)
        for name, time in state.status_times.items():
            if name not in left:
                self.apply_join(JoinIntent(time, name), now)

    def _remember(self, intent: JoinIntent | LeaveIntent, now: float) -> bool:
        forgotten_time, _ = self._forgotten.get(intent.node, (-1, 0.0))
        if intent.time <= forgotten_time:
            return False
        known, _ = self._intents.get(intent.node, (None, 0.0))
        if known is not None and intent.time <= known.time:
            return False
        if known is None and len(self._intents) >= _RECENT_INTENTS_MAX:
            return False
        self._intents[intent.node] = (intent, now)
        return True

    def _prune(self, member: _SerfMember, now: float) -> None:
        if member.status == "left":
            self._erase(member, now)
        else:
            # It is still leaving, or will refute: look again once its leave has had the time to go round.
            delay_s = self._config.broadcast_timeout_s + self._config.leave_propagate_s
            self._prunes[member.record.name] = now + delay_s

    def _erase(self, member: _SerfMember, now: float) -> None:
        name = member.record.name
        del self._members[name]
        self._forgotten[name] = (member.status_time, now)
        self._prunes.pop(name, None)
        self._emit(MemberReaped(member.value()))
