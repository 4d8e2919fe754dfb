"""The one canonical form of a request path: what is matched, authorised and forwarded (RFC 3986 section 6.2.2).

Policy that looks at one spelling while the application acts on another is the largest class of mesh bypasses, so this
runs once, at the head, and everyone after it sees its result.
"""

import re
from typing import Final, Literal

import msgspec

from mesh.errors import ProtocolError

# Whatever can change under normalisation contains one of these; most paths contain none and cost one search.
_SUSPECT = re.compile(rb"/\.|//|[%\\]")
_BROKEN_ESCAPE = re.compile(rb"%(?![0-9A-Fa-f]{2})")
_ESCAPE = re.compile(rb"%([0-9A-Fa-f]{2})")
_ESCAPED_SLASH = re.compile(rb"%2F|%5C")
_SLASHES = re.compile(rb"/{2,}")
_UNRESERVED = frozenset(b"ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789-._~")

EscapedSlashes = Literal["keep", "reject", "unescape", "redirect"]


class PathPolicy(msgspec.Struct, frozen=True):
    """What a listener does where applications differ in what they take for a separator.

    `escaped_slashes` is for `%2F` and `%5C` (Envoy's path_with_escaped_slashes_action): `keep` forwards them as they
    are, in upper case; `reject` answers 400; `unescape` makes slashes of them before dot segments are removed;
    `redirect` answers 307 with the unescaped path, so that the caller itself asks for what policy then sees. A raw
    backslash, which no target may contain but some applications take for a slash, becomes one or is refused.
    """

    merge_slashes: bool = False
    escaped_slashes: EscapedSlashes = "keep"
    backslashes: Literal["slash", "reject"] = "slash"


DEFAULT_POLICY: Final = PathPolicy()


class PathRedirect(Exception):
    """The policy sends the caller to `path`. Control flow between here and the receiver of requests."""

    def __init__(self, path: bytes) -> None:
        super().__init__("the path has escaped slashes")
        self.path = path


def _normalize_escape(match: re.Match[bytes]) -> bytes:
    value = int(match[1], 16)
    if value == 0:
        raise ProtocolError("the path contains an escaped NUL")
    return bytes((value,)) if value in _UNRESERVED else match[0].upper()


def _unescape_slash(match: re.Match[bytes]) -> bytes:
    return b"/" if match[0] == b"%2F" else b"\\"


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


def normalize_path(path: bytes, policy: PathPolicy = DEFAULT_POLICY) -> bytes:
    """The canonical path: unreserved escapes decoded, other escapes in upper case, then slashes and backslashes as the
    policy says, then dot segments removed (RFC 3986 section 5.2.4). Idempotent.

    The path has no query and begins with `/`. Raises ProtocolError when it climbs above the root, escapes a NUL, has
    a percent sign with no escape after it, or the policy refuses it; PathRedirect when the policy says so.
    """
    if _SUSPECT.search(path) is None:
        return path
    if _BROKEN_ESCAPE.search(path) is not None:
        # `%%32e` would become `%2e`: what is decoded once must not decode again (RFC 3986 section 2.4).
        raise ProtocolError("the path contains a percent sign that begins no escape")
    path = _ESCAPE.sub(_normalize_escape, path)
    redirect = False
    if policy.escaped_slashes != "keep" and _ESCAPED_SLASH.search(path) is not None:
        if policy.escaped_slashes == "reject":
            raise ProtocolError("the path contains an escaped slash")
        redirect = policy.escaped_slashes == "redirect"
        path = _ESCAPED_SLASH.sub(_unescape_slash, path)
    if b"\\" in path:
        if policy.backslashes == "reject":
            raise ProtocolError("the path contains a backslash")
        path = path.replace(b"\\", b"/")
    if policy.merge_slashes:
        path = _SLASHES.sub(b"/", path)
    if b"/." in path:
        path = _remove_dot_segments(path)
    if redirect:
        if path.startswith(b"//"):
            raise ProtocolError("the path, unescaped, would name another host")  # as a Location, `//host/` does
        raise PathRedirect(path)
    return path
