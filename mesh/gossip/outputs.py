"""What a gossip node wants done: imperative values that the driver (or the simulator) carries out in order."""

import msgspec

from mesh.gossip.events import GossipEvent


class SendDatagram(msgspec.Struct, frozen=True):
    """Send these bytes over UDP. They may get lost."""

    endpoint: tuple[str, int]
    data: bytes


class ConnectAndPushPull(msgspec.Struct, frozen=True):
    """Connect over TCP, write `push_pull_request`, hand the answer to `receive_push_pull_reply`. It may fail."""

    endpoint: tuple[str, int]
    join: bool


class ConnectAndPing(msgspec.Struct, frozen=True):
    """Connect over TCP, write `data`; if an ack of `sequence` comes by `deadline`, call `receive_stream_ack`."""

    endpoint: tuple[str, int]
    sequence: int
    data: bytes
    deadline: float


class BroadcastFinished(msgspec.Struct, frozen=True):
    """The rumour of that token has been told often enough."""

    token: int


class LeaveCompleted(msgspec.Struct, frozen=True):
    """The pool knows that we leave; the sockets may close."""


class Notice(msgspec.Struct, frozen=True):
    """Something an operator may want to read; counted under `reason`."""

    reason: str
    text: str


Output = SendDatagram | ConnectAndPushPull | ConnectAndPing | BroadcastFinished | LeaveCompleted | Notice | GossipEvent
