"""Every write the replicated log may carry, and what applying one answers.

A command is complete in itself: whatever needs a clock or randomness (timestamps, UUIDs, keys) was decided by the
server that proposed it, so that every server applies it to the same effect.
"""

import msgspec

from mesh.model.ca import CaRoot
from mesh.model.catalog import Node, Service
from mesh.model.check import Check
from mesh.model.config_entry import ConfigEntry
from mesh.model.intention import Intention
from mesh.wire import Codec


class Register(msgspec.Struct, frozen=True, tag=True):
    """Upserts a node and, with it, a service and checks. `skip_node_update`: keep its row if there is one."""

    node: Node
    service: Service | None = None
    checks: tuple[Check, ...] = ()
    skip_node_update: bool = False


class Deregister(msgspec.Struct, frozen=True, tag=True):
    """Removes a service (with its checks), else a check, else the whole node."""

    node: str
    service_id: str = ""
    check_id: str = ""


class KvSet(msgspec.Struct, frozen=True, tag=True):
    """Answers bool. With `cas_index`: only if the key's modify index equals it (0: only if absent)."""

    key: str
    value: bytes = b""
    flags: int = 0
    cas_index: int | None = None


class KvDelete(msgspec.Struct, frozen=True, tag=True):
    """Answers bool. `recurse` deletes every key with the prefix; `cas_index` as in KvSet, not with `recurse`."""

    key: str
    recurse: bool = False
    cas_index: int | None = None


class ConfigEntrySet(msgspec.Struct, frozen=True, tag=True):
    """Answers bool; `cas_index` as in KvSet. `at_s` (Unix seconds) stamps intentions of kind service-intentions."""

    entry: ConfigEntry
    cas_index: int | None = None
    at_s: float = 0.0


class ConfigEntryDelete(msgspec.Struct, frozen=True, tag=True):
    """Answers bool: whether it is gone; False only when `cas_index` did not match."""

    kind: str
    name: str
    cas_index: int | None = None


class IntentionUpsert(msgspec.Struct, frozen=True, tag=True):
    """Creates or replaces the rule of one source and destination. Answers True."""

    intention: Intention


class IntentionDelete(msgspec.Struct, frozen=True, tag=True):
    """Answers True, whether or not the rule existed."""

    source: str
    destination: str


class CaRootsSet(msgspec.Struct, frozen=True, tag=True):
    """Replaces the roots, exactly one active, if their modify index equals `cas_index` (0: none yet). Answers bool."""

    cluster_id: str
    roots: tuple[CaRoot, ...]
    cas_index: int


class TombstonesReap(msgspec.Struct, frozen=True, tag=True):
    """Forgets KV tombstones at or below the index."""

    index: int


Command = (
    Register
    | Deregister
    | KvSet
    | KvDelete
    | ConfigEntrySet
    | ConfigEntryDelete
    | IntentionUpsert
    | IntentionDelete
    | CaRootsSet
    | TombstonesReap
)


class Applied(msgspec.Struct, frozen=True, tag=True):
    """The command took effect (or its compare-and-set did not: `ok` False) at `index`."""

    index: int
    ok: bool = True


class Rejected(msgspec.Struct, frozen=True, tag=True):
    """The command was refused, identically on every server; `reason` is for the caller."""

    index: int
    reason: str


CommandResult = Applied | Rejected

COMMAND_CODEC: Codec[Command] = Codec(Command)
RESULT_CODEC: Codec[CommandResult] = Codec(CommandResult)
