"""From a path on the wire to a handler."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from urllib.parse import unquote_to_bytes

from agent.http.request import Handler, Method, Route
from mesh.errors import InvalidRequest


@dataclass(frozen=True)
class Match:
    """The handlers of the one pattern that fits, by method, and what its captures stand for, percent-decoded."""

    handlers: Mapping[Method, Handler]
    captures: Mapping[str, str]

    @property
    def allow(self) -> str:
        """The value of an Allow header: OPTIONS, then what is routed; HEAD wherever GET is."""
        methods = sorted(self.handlers)
        return ",".join(("OPTIONS", *methods, *(("HEAD",) if "GET" in methods else ())))


@dataclass(frozen=True)
class _Pattern:
    segments: tuple[str, ...]
    handlers: Mapping[Method, Handler]

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
        by_pattern: dict[str, dict[Method, Handler]] = {}
        for route in routes:
            handlers = by_pattern.setdefault(route.pattern, {})
            assert route.method not in handlers, f"{route.method} {route.pattern} is routed twice"
            handlers[route.method] = route.handler
        patterns = (_Pattern(tuple(pattern.split("/")), handlers) for pattern, handlers in by_pattern.items())
        self._patterns = sorted(patterns, key=lambda pattern: pattern.rank, reverse=True)

    def match(self, path: str) -> Match | None:
        """The match of a raw path without its query. Raises InvalidRequest for a capture that does not decode."""
        segments = path.split("/")
        for pattern in self._patterns:
            captures = pattern.match(segments)
            if captures is not None:
                return Match(pattern.handlers, {name: _decoded(text) for name, text in captures.items()})
        return None


def _decoded(text: str) -> str:
    """Percent-decoded once. A control character is refused: it has no place in a name, a log line or a header."""
    try:
        decoded = unquote_to_bytes(text).decode("utf-8")
    except UnicodeDecodeError as error:
        raise InvalidRequest("Request path is not UTF-8") from error
    if any(character < " " or character == "\x7f" for character in decoded):
        raise InvalidRequest("Request path contains non-printable characters")
    return decoded
