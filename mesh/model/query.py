"""Every read of the replicated state, as a value: run locally on a server, or sent to one as it stands."""

from collections.abc import Sequence
from typing import Generic, Literal, TypeVar, cast

import msgspec

from mesh.model.ca import CaRoots
from mesh.model.catalog import Node, NodeServices, ServiceNode
from mesh.model.check import Check, CheckStatus, ServiceHealth
from mesh.model.config_entry import ConfigEntry
from mesh.model.intention import Intention
from mesh.model.kv import KvEntry
from mesh.wire import Codec

AnswerT = TypeVar("AnswerT")

Consistency = Literal["default", "consistent", "stale"]


class Asks(msgspec.Struct, Generic[AnswerT], frozen=True):
    """A query that answers an AnswerT."""


class ListNodes(Asks[tuple[Node, ...]], frozen=True, tag=True):
    """-> tuple[Node, ...], by name; only nodes with all of `meta`."""

    meta: dict[str, str] = {}


class ListServices(Asks[dict[str, tuple[str, ...]]], frozen=True, tag=True):
    """-> dict[str, tuple[str, ...]]: service name -> union of its instances' tags, sorted."""

    node_meta: dict[str, str] = {}


class ListServiceNodes(Asks[tuple[ServiceNode, ...]], frozen=True, tag=True):
    """-> tuple[ServiceNode, ...]. `connect`: instances that speak mTLS for the service (sidecars and native ones)."""

    service: str
    tags: tuple[str, ...] = ()
    node_meta: dict[str, str] = {}
    connect: bool = False


class GetNodeServices(Asks[NodeServices | None], frozen=True, tag=True):
    """-> NodeServices | None."""

    node: str


class ListNodeChecks(Asks[tuple[Check, ...]], frozen=True, tag=True):
    """-> tuple[Check, ...]."""

    node: str


class ListServiceChecks(Asks[tuple[Check, ...]], frozen=True, tag=True):
    """-> tuple[Check, ...] of every instance of the service."""

    service: str
    node_meta: dict[str, str] = {}


class ListChecksInState(Asks[tuple[Check, ...]], frozen=True, tag=True):
    """-> tuple[Check, ...]."""

    state: CheckStatus | Literal["any"]
    node_meta: dict[str, str] = {}


class ListServiceHealth(Asks[tuple[ServiceHealth, ...]], frozen=True, tag=True):
    """-> tuple[ServiceHealth, ...], by node, then service ID. `passing_only` drops those with any check not passing."""

    service: str
    tags: tuple[str, ...] = ()
    node_meta: dict[str, str] = {}
    passing_only: bool = False
    connect: bool = False


class GetKv(Asks[KvEntry | None], frozen=True, tag=True):
    """-> KvEntry | None."""

    key: str


class ListKv(Asks[tuple[KvEntry, ...]], frozen=True, tag=True):
    """-> tuple[KvEntry, ...] under the prefix, by key."""

    prefix: str


class ListKvKeys(Asks[tuple[str, ...]], frozen=True, tag=True):
    """-> tuple[str, ...]; with a separator, each key is cut after its first separator past the prefix, once."""

    prefix: str
    separator: str = ""


class ListIntentions(Asks[tuple[Intention, ...]], frozen=True, tag=True):
    """-> tuple[Intention, ...], by precedence descending, then destination, then source."""


class GetIntention(Asks[Intention | None], frozen=True, tag=True):
    """-> Intention | None."""

    source: str
    destination: str


class MatchIntentions(Asks[tuple[Intention, ...]], frozen=True, tag=True):
    """-> tuple[Intention, ...] that bear on `name` as source or destination, wildcards too; highest first."""

    by: Literal["source", "destination"]
    name: str


class GetConfigEntry(Asks[ConfigEntry | None], frozen=True, tag=True):
    """-> ConfigEntry | None."""

    kind: str
    name: str


class ListConfigEntries(Asks[tuple[ConfigEntry, ...]], frozen=True, tag=True):
    """-> tuple[ConfigEntry, ...], by name."""

    kind: str


class GetCaRoots(Asks[CaRoots], frozen=True, tag=True):
    """-> CaRoots, without private keys."""


Query = (
    ListNodes
    | ListServices
    | ListServiceNodes
    | GetNodeServices
    | ListNodeChecks
    | ListServiceChecks
    | ListChecksInState
    | ListServiceHealth
    | GetKv
    | ListKv
    | ListKvKeys
    | ListIntentions
    | GetIntention
    | MatchIntentions
    | GetConfigEntry
    | ListConfigEntries
    | GetCaRoots
)

_ANSWER_CODECS: dict[type[object], Codec[object]] = {
    ListNodes: Codec(tuple[Node, ...]),
    ListServices: Codec(dict[str, tuple[str, ...]]),
    ListServiceNodes: Codec(tuple[ServiceNode, ...]),
    GetNodeServices: Codec(NodeServices | None),
    ListNodeChecks: Codec(tuple[Check, ...]),
    ListServiceChecks: Codec(tuple[Check, ...]),
    ListChecksInState: Codec(tuple[Check, ...]),
    ListServiceHealth: Codec(tuple[ServiceHealth, ...]),
    GetKv: Codec(KvEntry | None),
    ListKv: Codec(tuple[KvEntry, ...]),
    ListKvKeys: Codec(tuple[str, ...]),
    ListIntentions: Codec(tuple[Intention, ...]),
    GetIntention: Codec(Intention | None),
    MatchIntentions: Codec(tuple[Intention, ...]),
    GetConfigEntry: Codec(ConfigEntry | None),
    ListConfigEntries: Codec(tuple[ConfigEntry, ...]),
    GetCaRoots: Codec(CaRoots),
}


def answer_codec(query: Asks[AnswerT]) -> Codec[AnswerT]:
    """The codec of what the query answers: a server encodes with it, the client that asked decodes."""
    return cast(Codec[AnswerT], _ANSWER_CODECS[type(query)])


class ReadOptions(msgspec.Struct, frozen=True):
    """How to read. `min_index` > 0 blocks until the answer's index exceeds it, for `wait_s` plus server jitter."""

    min_index: int = 0
    wait_s: float = 300.0
    consistency: Consistency = "default"
    max_stale_s: float | None = None


class ReadMeta(msgspec.Struct, frozen=True):
    """`index` is at least 1. `last_contact_s` is 0 on the leader."""

    index: int
    known_leader: bool = True
    last_contact_s: float = 0.0


class Answer(msgspec.Struct, Generic[AnswerT], frozen=True):
    """What a read gives: the value, and how fresh it is."""

    value: AnswerT
    meta: ReadMeta


def tag_filter(tags: Sequence[str], wanted: Sequence[str]) -> bool:
    """Whether every wanted tag is among the tags; case does not matter, as in Consul."""
    have = {tag.lower() for tag in tags}
    return all(tag.lower() in have for tag in wanted)
