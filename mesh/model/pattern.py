"""Regular expressions from users: RE2, which matches in linear time whatever the pattern.

The standard library's `re` backtracks, so that a short pattern from a request can occupy a server for hours.
"""

from collections.abc import Sequence

import re2

from mesh.errors import InvalidRequest

PATTERN_CHARS_MAX = 1024
PROGRAM_BYTES_MAX = 1024 * 1024  # of the compiled pattern and its automaton
SET_PROGRAM_BYTES_MAX = 16 * 1024 * 1024  # of many patterns that are tried at once

_OPTIONS = re2.Options()
_OPTIONS.log_errors = False
_OPTIONS.max_mem = PROGRAM_BYTES_MAX

_SET_OPTIONS = re2.Options()
_SET_OPTIONS.log_errors = False
_SET_OPTIONS.max_mem = SET_PROGRAM_BYTES_MAX


class Pattern:
    """A compiled pattern. Raises InvalidRequest for one that RE2 refuses or that is too large."""

    __slots__ = ("_compiled",)

    def __init__(self, text: str) -> None:
        if len(text) > PATTERN_CHARS_MAX:
            raise InvalidRequest(f"error parsing regexp: longer than {PATTERN_CHARS_MAX} characters")
        try:
            self._compiled = re2.compile(text, _OPTIONS)
        except (re2.error, UnicodeEncodeError) as error:
            reason = error.args[0] if isinstance(error, re2.error) else "not valid UTF-8"
            shown = reason.decode(errors="replace") if isinstance(reason, bytes) else str(reason)
            raise InvalidRequest(f"error parsing regexp: {shown}") from error

    @property
    def groups(self) -> int:
        """How many groups it captures."""
        return int(self._compiled.groups)

    def search(self, subject: str) -> bool:
        """Whether the pattern matches anywhere in the subject, as Go's MatchString."""
        return self._compiled.search(subject) is not None

    def fullmatch(self, subject: bytes) -> bool:
        """Whether the pattern matches all of the subject. A byte that is not UTF-8 matches nothing, as in Envoy."""
        return self._compiled.fullmatch(subject) is not None

    def replace(self, subject: bytes, pieces: Sequence[bytes | int]) -> bytes:
        """The subject with every match replaced by the pieces: text, or a group's number (0: the whole match).

        As RE2's GlobalReplace: an empty match directly behind another match is not one.
        """
        parts: list[bytes] = []
        end = -1
        for match in self._compiled.finditer(subject):
            begin, match_end = match.span()
            if begin == match_end == end:
                continue
            parts.append(subject[max(end, 0) : begin])
            parts.extend(piece if isinstance(piece, bytes) else match.group(piece) or b"" for piece in pieces)
            end = match_end
        parts.append(subject[max(end, 0) :])
        return b"".join(parts)


class PatternSet:
    """Many patterns tried against one subject in one pass."""

    __slots__ = ("_any", "_set")

    def __init__(self, texts: Sequence[str]) -> None:
        """The texts must have been accepted by Pattern. Raises InvalidRequest when they are too large together."""
        try:
            self._any = re2.compile("|".join(f"(?:{text})" for text in texts), _SET_OPTIONS)
            self._set = re2.Set.FullMatchSet(_SET_OPTIONS)
            for text in texts:
                self._set.Add(text)
            self._set.Compile()
        except (re2.error, RuntimeError) as error:
            raise InvalidRequest(f"{len(texts)} regular expressions are too large together") from error

    def matches(self, subject: bytes) -> frozenset[int] | None:
        """The positions of the patterns that match all of the subject; None when they must be tried one by one."""
        found = self._set.Match(subject)
        if found:
            return frozenset(found)
        # Out of memory looks the same as no match; a single pattern then falls back to a slower way and is right.
        return frozenset() if self._any.fullmatch(subject) is None else None
