"""The one failure of the gossip wire."""

from mesh.errors import ProtocolError


class WireError(ProtocolError):
    """A packet or stream that breaks the wire format; `reason` is the short word it is counted under."""

    def __init__(self, reason: str, text: str) -> None:
        super().__init__(text)
        self.reason = reason
