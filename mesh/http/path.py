"""The one canonical form of a request path: what is matched, authorised and forwarded (RFC 3986 section 6.2.2).

Policy that looks at one spelling while the application acts on another is the largest class of mesh bypasses, so this
runs once, at the head, and everyone after it sees its result.
"""

import re

from mesh.errors import ProtocolError

# Whatever can change under normalisation contains one of these; most paths contain none and cost one search.
_SUSPECT = re.compile(rb"/\.|//|[%\\]")
_BROKEN_ESCAPE = re.compile(rb"%(?![0-9A-Fa-f]{2})")
_ESCAPE = re.compile(rb"%([0-9A-Fa-f]{2})")
_UNRESERVED = frozenset(b"ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789-._~")


def _normalize_escape(match: re.Match[bytes]) -> bytes:
    value = int(match[1], 16)
    if value == 0:
        raise ProtocolError("the path contains an escaped NUL")
    return bytes((value,)) if value in _UNRESERVED else match[0].upper()


def _remove_dot_segments(path: bytes) -> bytes:
    kept: list[bytes] = []
    segments = path.split(b"/")[1:]
    for position, segment in enumerate(segments):
        if segment in (b".", b".."):
            if segment == b"..":
                if not kept:
                    raise ProtocolError("the path leaves the root")
                kept.pop()
            if position == len(segments) - 1:
                kept.append(b"")  # `/a/.` and `/a/b/..` name the directory: `/a/`
        else:
            kept.append(segment)
    return b"/" + b"/".join(kept)


def normalize_path(path: bytes, *, merge_slashes: bool = False) -> bytes:
    """The canonical path: unreserved escapes decoded, other escapes in upper case, backslashes as slashes, dot segments
    removed (RFC 3986 section 5.2.4), repeated slashes merged when asked. `%2F` stays as it is. Idempotent.

    The path has no query and begins with `/`. Raises ProtocolError when it climbs above the root, escapes a NUL, or has
    a percent sign with no escape after it.
    """
    if _SUSPECT.search(path) is None:
        return path
    if _BROKEN_ESCAPE.search(path) is not None:
        # `%%32e` would become `%2e`: what is decoded once must not decode again (RFC 3986 section 2.4).
        raise ProtocolError("the path contains a percent sign that begins no escape")
    path = _ESCAPE.sub(_normalize_escape, path).replace(b"\\", b"/")
    if merge_slashes:
        path = re.sub(rb"/{2,}", b"/", path)
    if b"/." in path:
        path = _remove_dot_segments(path)
    return path
