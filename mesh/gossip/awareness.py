"""Local health: how much we trust our own timing (Lifeguard, arXiv:1707.00788, LHA-Probe)."""


class Awareness:
    """A score of 0 (healthy) to `score_max`; probe interval and timeout are multiplied by score + 1."""

    def __init__(self, score_max: int) -> None:
        self._score_max = score_max
        self._score = 0

    @property
    def score(self) -> int:
        return self._score

    def apply(self, delta: int) -> None:
        """Moves the score by `delta`, within its bounds."""
        self._score = min(max(self._score + delta, 0), self._score_max)

    def scaled(self, seconds: float) -> float:
        """`seconds` as long as our present health makes them."""
        return seconds * (self._score + 1)
