"""SWIM's view of the pool: who is alive, suspect, dead or left, decided by incarnation numbers.

Rules are memberlist's, with its known holes closed: a stored incarnation never falls, evidence about a dead node raises
it, a node that comes back with too low a one is told what is held against it so that it can climb above, and a third
party cannot revive anybody below the tombstone.
"""

import random
from collections.abc import Callable, Sequence
from functools import partial
from typing import Protocol

from mesh.gossip.config import GossipConfig
from mesh.gossip.fields import host_of
from mesh.gossip.members import NodeRecord
from mesh.gossip.messages import (
    ACCUSED_INCARNATION_MAX,
    ALIVE_INCARNATION_MAX,
    Alive,
    Dead,
    Message,
    NodeState,
    NodeStateEntry,
    Suspect,
)
from mesh.gossip.stream import NODES_MAX
from mesh.gossip.suspicion import Suspicion, suspicion_min_s
from mesh.gossip.timers import Timers

# How often one conflicting or stale claimant is answered or reported.
_TELL_AGAIN_S = 1.0


class MembershipObserver(Protocol):
    """Who is told what changed; all calls happen inside the call that caused them."""

    def node_joined(self, record: NodeRecord, now: float) -> None: ...
    def node_updated(self, record: NodeRecord) -> None: ...
    def node_departed(self, record: NodeRecord, now: float) -> None: ...
    def broadcast(self, name: str, message: Message, *, token: int | None = None) -> None: ...
    def tell(self, endpoint: tuple[str, int], message: Message) -> None: ...
    def refuted(self, accuser: str) -> None: ...
    def name_conflicted(self, record: NodeRecord, host: str, port: int) -> None: ...


class Membership:
    """Records of all known nodes and the rules by which messages change them."""

    def __init__(
        self,
        local: NodeRecord,
        *,
        config: GossipConfig,
        rng: random.Random,
        timers: Timers,
        observer: MembershipObserver,
    ) -> None:
        self.local = local
        self.records: dict[str, NodeRecord] = {local.name: local}
        self.live_count = 1
        self.leaving = False
        self._config = config
        self._rng = rng
        self._timers = timers
        self._observer = observer
        self._order: list[str] = [local.name]
        self._probe_index = 0
        self._endpoints: dict[tuple[str, int], str] = {local.endpoint: local.name}

    def at(self, endpoint: tuple[str, int]) -> NodeRecord | None:
        """The record of the node at that address, if any is known there."""
        name = self._endpoints.get(endpoint)
        return self.records.get(name) if name is not None else None

    def next_probe_target(self) -> NodeRecord | None:
        """Round robin over a shuffled list, so that every node is probed within 2N - 1 rounds (SWIM §4.3)."""
        for _ in range(len(self._order) + 1):
            if self._probe_index >= len(self._order):
                self._order = [name for name in self._order if name in self.records]
                self._rng.shuffle(self._order)
                self._probe_index = 0
            record = self.records.get(self._order[self._probe_index])
            self._probe_index += 1
            if record is not None and record is not self.local and record.is_live:
                return record
        return None

    def random_nodes(self, count: int, suits: Callable[[NodeRecord], bool]) -> list[NodeRecord]:
        """Up to `count` different nodes that suit; never the local one."""
        if len(self._order) <= 3 * count + 1:
            names = self._rng.sample(self._order, len(self._order))
        else:
            names = [self._order[self._rng.randrange(len(self._order))] for _ in range(6 * count)]
        chosen: dict[str, NodeRecord] = {}
        for name in names:
            record = self.records.get(name)
            if record is not None and record is not self.local and name not in chosen and suits(record):
                chosen[name] = record
                if len(chosen) == count:
                    break
        return list(chosen.values())

    def apply_alive(self, alive: Alive, now: float, *, source_host: str) -> None:
        """A node is said to be alive; `source_host` is who says so."""
        if alive.node == self.local.name:
            self._alive_about_us(alive, now)
            return
        host = host_of(alive.address)
        record = self.records.get(alive.node)
        if record is None:
            if len(self.records) >= NODES_MAX:
                return
            record = self._add(alive, host, now)
        elif not self._accepts(record, alive, host, now, first_party=source_host == host):
            return
        held = record.incarnation
        was_live, old_meta = record.is_live, record.meta
        self._clear_suspicion(record)
        self._move(record, alive, host)
        record.meta = alive.meta
        record.versions = alive.versions
        record.incarnation = max(held, alive.incarnation)
        if record.state != NodeState.ALIVE:
            record.state = NodeState.ALIVE
            record.changed_at = now
        self._observer.broadcast(record.name, alive)
        if alive.incarnation <= held:
            # It came back elsewhere without rising above its old incarnation, which others still hold against it.
            self._tell_accusation(record, Dead(held, record.name, self.local.name), now)
        if not was_live:
            self.live_count += 1
            self._observer.node_joined(record, now)
        elif record.meta != old_meta:
            self._observer.node_updated(record)

    def apply_suspect(self, suspect: Suspect, now: float) -> None:
        """Somebody (perhaps we) got no answer from a node."""
        record = self.records.get(suspect.node)
        if record is None or suspect.incarnation < record.incarnation:
            return
        if record is self.local:
            self._refute(suspect.incarnation, suspect.accuser)
            return
        if not record.is_live:
            self._tell_accuser(record, suspect, now)
        record.incarnation = suspect.incarnation
        if record.suspicion is not None:
            if record.suspicion.confirm(suspect.accuser):
                self._observer.broadcast(record.name, suspect)
                self._watch(record, record.suspicion)
            return
        if record.state != NodeState.ALIVE:
            return
        record.state = NodeState.SUSPECT
        record.changed_at = now
        wanted = self._config.suspicion_multiplier - 2
        min_s = suspicion_min_s(
            multiplier=self._config.suspicion_multiplier,
            members=self.live_count,
            probe_interval_s=self._config.probe_interval_s,
        )
        record.suspicion = Suspicion(
            accuser=suspect.accuser,
            # The two who cannot confirm are the suspect and ourselves.
            expected=wanted if self.live_count - 2 >= wanted else 0,
            min_s=min_s,
            max_s=min_s * self._config.suspicion_max_multiplier,
            now=now,
        )
        self._watch(record, record.suspicion)
        self._observer.broadcast(record.name, suspect)

    def apply_dead(self, dead: Dead, now: float) -> None:
        """A node was declared dead, or said itself that it leaves."""
        record = self.records.get(dead.node)
        if record is None or dead.incarnation < record.incarnation:
            return
        if record is self.local:
            self._refute(dead.incarnation, dead.accuser)
            return
        record.incarnation = dead.incarnation
        if not record.is_live:
            return
        self._depart(record, dead, now)
        self._observer.broadcast(record.name, dead)

    def merge(self, entries: Sequence[NodeStateEntry], now: float, *, source_host: str) -> None:
        """Takes over what a push-pull brought. A peer's "dead" is only a suspicion of ours: it may be an old story."""
        for entry in entries:
            if entry.state == NodeState.ALIVE:
                alive = Alive(entry.incarnation, entry.name, entry.address, entry.port, entry.meta, entry.versions)
                self.apply_alive(alive, now, source_host=source_host)
            elif entry.incarnation > ACCUSED_INCARNATION_MAX:
                continue
            elif entry.state == NodeState.LEFT:
                self.apply_dead(Dead(entry.incarnation, entry.name, entry.name), now)
            else:
                self.apply_suspect(Suspect(entry.incarnation, entry.name, self.local.name), now)

    def set_local_meta(self, meta: bytes) -> None:
        """Announces the local node with other meta bytes under a new incarnation."""
        self.local.meta = meta
        self.local.incarnation = min(self.local.incarnation + 1, ALIVE_INCARNATION_MAX)
        self._observer.broadcast(self.local.name, self._local_alive())
        self._observer.node_updated(self.local)

    def declare_left(self, now: float, *, token: int) -> None:
        """Says that the local node leaves: a death that the node itself reports. Requires `leaving`."""
        assert self.leaving
        if self.local.is_live:
            dead = Dead(self.local.incarnation, self.local.name, self.local.name)
            self._depart(self.local, dead, now)
            self._observer.broadcast(self.local.name, dead, token=token)

    def forget(self, name: str) -> None:
        """Drops the record of a node that is no longer alive; its incarnation is no longer remembered."""
        record = self.records[name]
        assert not record.is_live
        del self.records[name]
        if self._endpoints.get(record.endpoint) == name:
            del self._endpoints[record.endpoint]

    def postpone_deaths(self, until: float) -> None:
        """After a stall of ours: nobody is declared dead before `until`, their refutations may be waiting unread."""
        for record in self.records.values():
            if record.suspicion is not None:
                record.suspicion.postpone(until)

    def _accepts(self, record: NodeRecord, alive: Alive, host: str, now: float, *, first_party: bool) -> bool:
        if record.endpoint != (host, alive.port):
            waited = now - record.changed_at > self._config.dead_reclaim_s
            if record.state != NodeState.LEFT and not (record.state == NodeState.DEAD and waited):
                self._conflict(record, host, alive.port, now)
                return False
            # Only the node itself may take its name elsewhere below the incarnation it had.
            return alive.incarnation > record.incarnation or first_party
        if alive.incarnation > record.incarnation:
            return True
        if record.state != NodeState.ALIVE:
            accuser = record.name if record.state == NodeState.LEFT else self.local.name
            self._tell_accusation(record, Dead(record.incarnation, record.name, accuser), now)
        return False

    def _alive_about_us(self, alive: Alive, now: float) -> None:
        local = self.local
        if self.leaving:
            return
        host = host_of(alive.address)
        if (host, alive.port) != local.endpoint:
            self._conflict(local, host, alive.port, now)
            return
        same = alive.meta == local.meta and alive.versions == local.versions
        if alive.incarnation > local.incarnation or (alive.incarnation == local.incarnation and not same):
            # Ours, from a run of this node before the restart: we must be told apart from it.
            self._refute(alive.incarnation, local.name)

    def _refute(self, accused: int, accuser: str) -> None:
        if self.leaving:
            return
        self.local.incarnation = min(max(self.local.incarnation, accused) + 1, ALIVE_INCARNATION_MAX)
        self._observer.refuted(accuser)
        self._observer.broadcast(self.local.name, self._local_alive())

    def _local_alive(self) -> Alive:
        local = self.local
        return Alive(local.incarnation, local.name, local.address, local.port, local.meta, local.versions)

    def _add(self, alive: Alive, host: str, now: float) -> NodeRecord:
        record = NodeRecord(
            alive.node, alive.address, host, alive.port, alive.meta, alive.versions, -1, NodeState.DEAD, now
        )
        self.records[record.name] = record
        self._endpoints[record.endpoint] = record.name
        # A newcomer goes to a random place, or all would probe it in the same round and late (SWIM §4.3).
        self._order.insert(self._rng.randint(0, len(self._order)), record.name)
        return record

    def _move(self, record: NodeRecord, alive: Alive, host: str) -> None:
        if self._endpoints.get(record.endpoint) == record.name:
            del self._endpoints[record.endpoint]
        record.address, record.host, record.port = alive.address, host, alive.port
        self._endpoints[record.endpoint] = record.name

    def _depart(self, record: NodeRecord, dead: Dead, now: float) -> None:
        self._clear_suspicion(record)
        record.state = NodeState.LEFT if dead.accuser == dead.node else NodeState.DEAD
        record.changed_at = now
        self.live_count -= 1
        self._observer.node_departed(record, now)

    def _watch(self, record: NodeRecord, suspicion: Suspicion) -> None:
        if record.timer is not None:
            record.timer.cancel()
        record.timer = self._timers.schedule(suspicion.deadline, partial(self._suspicion_ended, record, suspicion))

    def _suspicion_ended(self, record: NodeRecord, suspicion: Suspicion, now: float) -> None:
        if record.suspicion is not suspicion:
            return
        if now < suspicion.deadline:
            self._watch(record, suspicion)
            return
        self.apply_dead(Dead(record.incarnation, record.name, self.local.name), now)

    def _clear_suspicion(self, record: NodeRecord) -> None:
        record.suspicion = None
        if record.timer is not None:
            record.timer.cancel()
            record.timer = None

    def _tell_accusation(self, record: NodeRecord, dead: Dead, now: float) -> None:
        if dead.incarnation <= ACCUSED_INCARNATION_MAX and now - record.told_at >= _TELL_AGAIN_S:
            record.told_at = now
            self._observer.tell(record.endpoint, dead)

    def _tell_accuser(self, record: NodeRecord, suspect: Suspect, now: float) -> None:
        """Somebody asks after a node that is gone: it missed the news, and would report a leave as a failure."""
        accuser = self.records.get(suspect.accuser)
        if accuser is None or accuser is self.local or not accuser.is_live or now - record.told_at < _TELL_AGAIN_S:
            return
        record.told_at = now
        teller = record.name if record.state == NodeState.LEFT else self.local.name
        self._observer.tell(accuser.endpoint, Dead(suspect.incarnation, record.name, teller))

    def _conflict(self, record: NodeRecord, host: str, port: int, now: float) -> None:
        if now - record.told_at >= _TELL_AGAIN_S:
            record.told_at = now
            self._observer.name_conflicted(record, host, port)
