"""What the pool tells the agent: past tense, one per change of a member's status."""

import msgspec

from mesh.gossip.members import Member


class MemberJoined(msgspec.Struct, frozen=True):
    """A member is alive that was not known, had failed or had left. The local member's own start is one too."""

    member: Member


class MemberUpdated(msgspec.Struct, frozen=True):
    """A living member changed its tags."""

    member: Member


class MemberFailed(msgspec.Struct, frozen=True):
    """A member was declared dead without having said that it leaves."""

    member: Member


class MemberLeft(msgspec.Struct, frozen=True):
    """A member left gracefully, or a failed one was forced to leave."""

    member: Member


class MemberReaped(msgspec.Struct, frozen=True):
    """A failed or left member was forgotten."""

    member: Member


class NameConflicted(msgspec.Struct, frozen=True):
    """Another node at `address`:`port` claims the name of `member`; its claim was refused."""

    member: Member
    address: str
    port: int


GossipEvent = MemberJoined | MemberUpdated | MemberFailed | MemberLeft | MemberReaped | NameConflicted
