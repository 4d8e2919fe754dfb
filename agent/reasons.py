"""Why the system refused: one short text, fit for a log line or a check's output."""

import os
import socket
import ssl


def reason_of(error: BaseException) -> str:
    """What the system said, without a library's wrapping of several attempts."""
    if isinstance(error, OSError) and isinstance(error.__cause__, BaseExceptionGroup):
        return "; ".join(dict.fromkeys(reason_of(inner) for inner in error.__cause__.exceptions))
    if isinstance(error, OSError) and isinstance(error.__cause__, OSError):
        return reason_of(error.__cause__)
    if isinstance(error, socket.gaierror | ssl.SSLError):
        return error.strerror or str(error)
    if isinstance(error, OSError) and error.errno:
        return os.strerror(error.errno)
    return str(error) or type(error).__name__
