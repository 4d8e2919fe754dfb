"""Members: what the rest of the agent sees of one, and the record that the protocol keeps of it."""

from dataclasses import dataclass
from typing import Literal

import msgspec

from mesh.gossip.messages import NodeState, NodeStateEntry
from mesh.gossip.suspicion import Suspicion
from mesh.gossip.timers import Timer

Status = Literal["alive", "leaving", "left", "failed"]


class Member(msgspec.Struct, frozen=True):
    """One member of the pool as Serf shows it: a suspect is still alive, a dead one has failed or left."""

    name: str
    address: str
    port: int
    tags: dict[str, str]
    status: Status
    protocol_min: int
    protocol_max: int
    protocol_current: int
    delegate_min: int
    delegate_max: int
    delegate_current: int


@dataclass(slots=True, eq=False)
class NodeRecord:
    """What SWIM knows of one node. `address` keeps the sender's byte form (Go compares bytes), `host` its text."""

    name: str
    address: bytes
    host: str
    port: int
    meta: bytes
    versions: tuple[int, ...]
    incarnation: int
    state: NodeState
    changed_at: float
    suspicion: Suspicion | None = None
    timer: Timer | None = None
    # When we last told this node of an accusation it seems not to have heard, or of a conflict over its name.
    told_at: float = float("-inf")

    @property
    def endpoint(self) -> tuple[str, int]:
        return self.host, self.port

    @property
    def is_live(self) -> bool:
        return self.state in (NodeState.ALIVE, NodeState.SUSPECT)

    def entry(self) -> NodeStateEntry:
        """This record in a push-pull."""
        return NodeStateEntry(
            self.name, self.address, self.port, self.meta, self.incarnation, self.state, self.versions
        )
