"""Regular expressions from users: RE2, which matches in linear time whatever the pattern.

The standard library's `re` backtracks, so that a short pattern from a request can occupy a server for hours.
"""

import re2

from mesh.errors import InvalidRequest

PATTERN_CHARS_MAX = 1024
PROGRAM_BYTES_MAX = 1024 * 1024  # of the compiled pattern and its automaton

_OPTIONS = re2.Options()
_OPTIONS.log_errors = False
_OPTIONS.max_mem = PROGRAM_BYTES_MAX


class Pattern:
    """A compiled pattern. Raises InvalidRequest for one that RE2 refuses or that is too large."""

    def __init__(self, text: str) -> None:
        if len(text) > PATTERN_CHARS_MAX:
            raise InvalidRequest(f"error parsing regexp: longer than {PATTERN_CHARS_MAX} characters")
        try:
            self._compiled = re2.compile(text, _OPTIONS)
        except (re2.error, UnicodeEncodeError) as error:
            reason = error.args[0] if isinstance(error, re2.error) else "not valid UTF-8"
            shown = reason.decode(errors="replace") if isinstance(reason, bytes) else str(reason)
            raise InvalidRequest(f"error parsing regexp: {shown}") from error

    def search(self, subject: str) -> bool:
        """Whether the pattern matches anywhere in the subject, as Go's MatchString."""
        return self._compiled.search(subject) is not None
