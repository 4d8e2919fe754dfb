"""When a failed request is tried again: never when a server may have acted on it, unless that is harmless."""

from typing import Literal

from mesh.http.head import IDEMPOTENT_METHODS

CONNECT_ATTEMPTS_MAX = 3  # endpoints tried for one request before the caller hears of it
REPLAY_BYTES_MAX = 64 * 1024  # of a request's body kept for another attempt (Linkerd's figure)

Failure = Literal["connect", "reset"]


def may_retry(failure: Failure, *, method: bytes, attempts: int, reused: bool, resets: int, replayable: bool) -> bool:
    """Whether a request whose attempt failed before any response byte is tried again.

    `connect`: nothing was sent, so another endpoint may be tried, up to CONNECT_ATTEMPTS_MAX attempts in all. `reset`:
    the connection ended after the request was sent. On a reused one the server has most likely closed it for idleness
    before it saw the request (RFC 9112 section 9.3.1), so an idempotent request whose body is still at hand is sent
    once more.
    """
    if failure == "connect":
        return attempts < CONNECT_ATTEMPTS_MAX
    return reused and resets == 0 and replayable and method in IDEMPOTENT_METHODS
