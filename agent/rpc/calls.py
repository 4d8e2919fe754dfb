"""What one agent asks of a server, and how the answers travel: the payloads that `agent.rpc` carries."""

from typing import cast

import msgspec

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


ServerCall = ApplyCall | ReadCall | SignLeafCall | StatusCall | BootstrapCall


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


CALLS: Codec[ServerCall] = Codec(ServerCall)
READ_ANSWERS: Codec[ReadAnswer] = Codec(ReadAnswer)
STATUS_ANSWERS: Codec[StatusAnswer] = Codec(StatusAnswer)
BOOTSTRAP_ANSWERS: Codec[BootstrapAnswer] = Codec(BootstrapAnswer)
LEAF_ANSWERS: Codec[IssuedLeaf] = Codec(IssuedLeaf)


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
