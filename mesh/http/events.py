"""What a received stream of bytes turns into, beside heads and pieces of body."""

from typing import Final

import msgspec

from mesh.http.head import Headers, RequestHead, ResponseHead


class EndOfMessage:
    """The message that began with the last head is complete."""

    __slots__ = ()

    def __repr__(self) -> str:
        return "EndOfMessage()"


END: Final = EndOfMessage()


class Trailers(msgspec.Struct, frozen=True, gc=False):
    """Fields behind a chunked body, never empty, just before its EndOfMessage. Names in lower case, values trimmed;
    what must not come so late (framing, routing, credentials) is already dropped.
    """

    headers: Headers


class Rejected:
    """The message is not served: `status` is what a server answers, `reason` is for the answer and the log. With status
    307, `location` is the spelling of its path that would be (`PathPolicy.escaped_slashes`); else it is empty.
    """

    __slots__ = ("location", "reason", "status")

    def __init__(self, status: int, reason: str, location: bytes = b"") -> None:
        self.status = status
        self.reason = reason
        self.location = location

    def __repr__(self) -> str:
        return f"Rejected({self.status}, {self.reason!r})"


RequestEvent = RequestHead | bytes | Trailers | EndOfMessage | Rejected
ResponseEvent = ResponseHead | bytes | Trailers | EndOfMessage | Rejected
