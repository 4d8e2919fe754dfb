"""What one agent asks of a server, and how the answers travel: the payloads that `agent.rpc` carries."""

from typing import cast

import msgspec

from mesh.authz.observed import ObservedListener
from mesh.model.ca import IssuedLeaf
from mesh.model.command import Command
from mesh.model.query import Answer, AnswerT, Asks, Query, ReadMeta, ReadOptions, answer_codec
from mesh.wire import Codec


class ApplyCall(msgspec.Struct, frozen=True, tag="apply"):
    """Commit this. `forwarded`: a server sent it to whom it takes for the leader; it goes no further."""

    command: Command
    forwarded: bool = False


class ReadCall(msgspec.Struct, frozen=True, tag="read"):
    """Run this query, blocking if the options say so."""

    query: Query
    options: ReadOptions
    forwarded: bool = False


class SignLeafCall(msgspec.Struct, frozen=True, tag="sign_leaf"):
    """Sign this certificate request."""

    csr_der: bytes
    forwarded: bool = False


class StatusCall(msgspec.Struct, frozen=True, tag="status"):
    """Who leads, and who votes?"""


class BootstrapCall(msgspec.Struct, frozen=True, tag="bootstrap"):
    """Are you part of a cluster, and with whom would you start one?"""


class EdgesPollCall(msgspec.Struct, frozen=True, tag="edges_poll"):
    """This agent waits for the next question about its traffic. `answers`: the number of the last one, to which
    `listeners` are the answer; 0: none. See `agent.edges`.
    """

    node: str
    answers: int = 0
    listeners: tuple[ObservedListener, ...] = ()
    forwarded: bool = False


class EdgesGatherCall(msgspec.Struct, frozen=True, tag="edges_gather"):
    """Ask every agent who called whom in the last `since_s` seconds."""

    since_s: float
    forwarded: bool = False


ServerCall = ApplyCall | ReadCall | SignLeafCall | StatusCall | BootstrapCall | EdgesPollCall | EdgesGatherCall


class ReadAnswer(msgspec.Struct, frozen=True):
    """`value` is encoded with the query's own answer codec."""

    value: bytes
    meta: ReadMeta


class StatusAnswer(msgspec.Struct, frozen=True):
    """Addresses as `host:port`; an empty leader means that none is known."""

    leader: str
    peers: tuple[str, ...]


class BootstrapAnswer(msgspec.Struct, frozen=True):
    """`candidates`: node IDs, sorted; empty while the expected servers are not all here."""

    has_state: bool
    candidates: tuple[str, ...] = ()


class EdgesAsked(msgspec.Struct, frozen=True):
    """A question: what did you see in the last `since_s` seconds? Number 0: none yet, wait again."""

    question: int
    since_s: float


class EdgesGathered(msgspec.Struct, frozen=True):
    """What the agents that answered saw, by service, and the names of those that did not answer in time."""

    listeners: tuple[ObservedListener, ...]
    answered: tuple[str, ...]
    missing: tuple[str, ...]


CALLS: Codec[ServerCall] = Codec(ServerCall)
READ_ANSWERS: Codec[ReadAnswer] = Codec(ReadAnswer)
STATUS_ANSWERS: Codec[StatusAnswer] = Codec(StatusAnswer)
BOOTSTRAP_ANSWERS: Codec[BootstrapAnswer] = Codec(BootstrapAnswer)
LEAF_ANSWERS: Codec[IssuedLeaf] = Codec(IssuedLeaf)
EDGES_ASKED: Codec[EdgesAsked] = Codec(EdgesAsked)
EDGES_GATHERED: Codec[EdgesGathered] = Codec(EdgesGathered)


def encode_read(query: Asks[AnswerT], options: ReadOptions, *, forwarded: bool) -> bytes:
    """The call's bytes. Every `Asks` is one of the kinds of `Query`."""
    return CALLS.encode(ReadCall(cast(Query, query), options, forwarded))


def encode_answer(query: Asks[AnswerT], answer: Answer[AnswerT]) -> bytes:
    """The bytes of a read's answer. Raises LimitExceeded when it is larger than the wire limit."""
    return READ_ANSWERS.encode(ReadAnswer(answer_codec(query).encode(answer.value), answer.meta))


def decode_answer(query: Asks[AnswerT], data: bytes) -> Answer[AnswerT]:
    """The answer to the query. Raises ProtocolError."""
    outer = READ_ANSWERS.decode(data)
    return Answer(answer_codec(query).decode(outer.value), outer.meta)
