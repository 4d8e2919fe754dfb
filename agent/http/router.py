"""From a path on the wire to a handler."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from urllib.parse import unquote_to_bytes

import msgspec

from agent.http.request import Route
from mesh.errors import InvalidRequest

_CONTROL = re.compile("[\\x00-\\x1f\\x7f]")
_START_SEGMENTS = 3  # "", "v1" and the family: what patterns are looked up by


class Match(msgspec.Struct, frozen=True):
    """The routes of the one pattern that fits, by method, and what its captures stand for, percent-decoded."""

    routes: Mapping[str, Route]
    captures: Mapping[str, str]

    def route(self, method: str) -> Route | None:
        """The route of a method, None when the path does not have it."""
        return self.routes.get(method)

    @property
    def allow(self) -> str:
        """The value of an Allow header."""
        return ",".join(("OPTIONS", *sorted(self.routes)))


@dataclass(frozen=True)
class _Pattern:
    segments: tuple[str, ...]
    routes: Mapping[str, Route]

    @property
    def start(self) -> tuple[str, ...]:
        """What a path that matches begins with: `/v1/<family>`, or nothing when the pattern is shorter than that."""
        start = self.segments[:_START_SEGMENTS]
        literal = len(start) == _START_SEGMENTS and not any(segment.startswith(":") for segment in start)
        return start if literal else ()

    @property
    def rank(self) -> tuple[int, int]:
        """Higher is tried first: a longer literal start, then more segments."""
        literal = 0
        for segment in self.segments:
            if segment.startswith(":"):
                break
            literal += 1
        return literal, len(self.segments)

    def match(self, segments: Sequence[str]) -> dict[str, str] | None:
        """Captures still percent-encoded, or None."""
        last = len(self.segments) - 1
        if len(segments) <= last:
            return None
        captures: dict[str, str] = {}
        for position, segment in enumerate(self.segments):
            if not segment.startswith(":"):
                if segment != segments[position]:
                    return None
            elif position == last:
                captures[segment[1:]] = "/".join(segments[position:])
                return captures
            else:
                captures[segment[1:]] = segments[position]
        return captures if len(segments) == len(self.segments) else None


class Router:
    """Finds the handler. Matching is on the raw path, so that an encoded slash or `..` never changes the route."""

    def __init__(self, routes: Sequence[Route]) -> None:
        """Two routes of one method and pattern are a programming error."""
        by_pattern: dict[str, dict[str, Route]] = {}
        for route in routes:
            same = by_pattern.setdefault(route.pattern, {})
            assert route.method not in same, f"{route.method} {route.pattern} is routed twice"
            same[route.method] = route
        patterns = [_Pattern(tuple(pattern.split("/")), same) for pattern, same in by_pattern.items()]
        patterns.sort(key=lambda pattern: pattern.rank, reverse=True)
        self._by_start: dict[tuple[str, ...], list[_Pattern]] = {}
        for pattern in patterns:
            self._by_start.setdefault(pattern.start, []).append(pattern)

    def match(self, path: str) -> Match | None:
        """The match of a raw path without its query. Raises InvalidRequest for a capture that does not decode."""
        segments = path.split("/")
        for start in (tuple(segments[:_START_SEGMENTS]), ()):
            for pattern in self._by_start.get(start, ()):
                captures = pattern.match(segments)
                if captures is not None:
                    return Match(pattern.routes, {name: _decoded(text) for name, text in captures.items()})
        return None


def _decoded(text: str) -> str:
    """Percent-decoded once. A control character is refused: it has no place in a name, a log line or a header."""
    decoded = text
    if "%" in text:
        try:
            decoded = unquote_to_bytes(text).decode("utf-8")
        except UnicodeDecodeError as error:
            raise InvalidRequest("Request path is not UTF-8") from error
    if _CONTROL.search(decoded):
        raise InvalidRequest("Request path contains non-printable characters")
    return decoded
