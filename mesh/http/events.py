"""What a received stream of bytes turns into, beside heads and pieces of body."""

from typing import Final

from mesh.http.head import RequestHead, ResponseHead


class EndOfMessage:
    """The message that began with the last head is complete."""

    __slots__ = ()

    def __repr__(self) -> str:
        return "EndOfMessage()"


END: Final = EndOfMessage()


class Rejected:
    """The peer broke the protocol: `status` is what a server answers, `reason` is for the answer and the log."""

    __slots__ = ("reason", "status")

    def __init__(self, status: int, reason: str) -> None:
        self.status = status
        self.reason = reason

    def __repr__(self) -> str:
        return f"Rejected({self.status}, {self.reason!r})"


RequestEvent = RequestHead | bytes | EndOfMessage | Rejected
ResponseEvent = ResponseHead | bytes | EndOfMessage | Rejected
