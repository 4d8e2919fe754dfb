"""Every failure that some caller handles differently.

Local misuse (our user's or our own code's) and remote misbehaviour (a peer's bytes) never share a class.
OS, ssl and trio errors are translated into these once, in the driver that met them.
"""


class MeshError(Exception):
    """Base of all errors here; its text says what happened, to what, and what to do next."""


class ConfigError(MeshError):
    """The agent cannot start as configured; the text names the key, flag or path. Exit status 1."""


class InvalidRequest(MeshError):
    """An API caller sent something malformed; the text is the HTTP 400 body."""


class NotFound(MeshError):
    """The named thing does not exist; the text is the HTTP 404 body."""


class Refused(MeshError):
    """Well-formed, but policy or state forbids it (a CSR for another service, a command that fails validation)."""


class LimitExceeded(MeshError):
    """A named limit was reached; the caller may try again later or send less."""


class ProtocolError(MeshError):
    """A peer's bytes broke the protocol; its connection or packet is dropped and counted."""


class InvalidIdentity(MeshError):
    """A certificate or SPIFFE ID is no valid identity for this use; the connection closes before any byte is used."""


class Unreachable(MeshError):
    """A peer could not be reached, or the connection to it broke before it answered."""


class NoLeader(MeshError):
    """No leader is known; retry once an election has ended."""


class NotLeader(MeshError):
    """This server cannot commit. `leader_id` is its best guess at who can (None while an election runs)."""

    def __init__(self, leader_id: str | None = None) -> None:
        super().__init__("not the leader" if leader_id is None else f"not the leader; {leader_id} is")
        self.leader_id = leader_id


class OutcomeUnknown(MeshError):
    """A write was handed over and its fate is not known (leadership lost, connection broken): it may yet commit."""


class StorageFailed(MeshError):
    """A write or fsync failed, or stored data is damaged; the server must stop. The text names file and offset."""
