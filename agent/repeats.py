"""Log lines that strangers can cause: one per kind and interval, so that a flood of them fills no disk."""

import logging
import math

import trio

AGAIN_S = 10.0
KINDS_MAX = 64  # kinds are ours, never a peer's words; this guards against a mistake


class RepeatedLog:
    """A logger that says each kind of thing at most once in `again_s`, and then how often it happened meanwhile."""

    def __init__(self, logger: logging.Logger, *, again_s: float = AGAIN_S) -> None:
        self._logger = logger
        self._again_s = again_s
        self._logged_at: dict[str, float] = {}
        self._held_back: dict[str, int] = {}

    def log(self, kind: str, level: int, text: str, *values: object) -> None:
        """Logs the text with its values, as `logging` does, unless its kind was logged a moment ago."""
        if not self._logger.isEnabledFor(level):
            return
        if kind not in self._logged_at and len(self._logged_at) >= KINDS_MAX:
            kind = ""
        now = trio.current_time()
        if now - self._logged_at.get(kind, -math.inf) < self._again_s:
            self._held_back[kind] = self._held_back.get(kind, 0) + 1
            return
        self._logged_at[kind] = now
        more = self._held_back.pop(kind, 0)
        suffix = f" (and {more} more like it)" if more else ""
        self._logger.log(level, text + "%s", *values, suffix)

    def warning(self, kind: str, text: str, *values: object) -> None:
        """`log` at level WARNING."""
        self.log(kind, logging.WARNING, text, *values)
