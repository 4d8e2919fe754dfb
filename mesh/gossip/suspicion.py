"""How long a suspect may still refute (Lifeguard, arXiv:1707.00788, LHA-Suspicion)."""

import math


def suspicion_min_s(*, multiplier: int, members: int, probe_interval_s: float) -> float:
    """Seconds of the shortest suspicion in a pool of `members`: multiplier x max(1, log10 N) x interval."""
    return multiplier * max(1.0, math.log10(max(1, members))) * probe_interval_s


def suspicion_timeout_s(*, confirmations: int, expected: int, min_s: float, max_s: float) -> float:
    """Seconds a suspect may still refute; falls from max_s to min_s as peers confirm.

    With `expected` 0 nobody can confirm and the minimum holds at once.
    """
    assert confirmations >= 0
    assert expected >= 0
    if expected < 1:
        return min_s
    fraction = math.log(confirmations + 1) / math.log(expected + 1)
    return max(min_s, max_s - (max_s - min_s) * fraction)


class Suspicion:
    """One suspected member: who accused it, since when, and by when it is declared dead."""

    def __init__(self, *, accuser: str, expected: int, min_s: float, max_s: float, now: float) -> None:
        # The accuser never counts as a confirmation of itself.
        self._accusers = {accuser}
        self._expected = expected
        self._min_s = min_s
        self._max_s = max_s
        self._started_at = now
        self._not_before = -math.inf

    @property
    def confirmations(self) -> int:
        return len(self._accusers) - 1

    @property
    def deadline(self) -> float:
        """When the suspect is declared dead if it has not refuted by then."""
        timeout_s = suspicion_timeout_s(
            confirmations=min(self.confirmations, self._expected),
            expected=self._expected,
            min_s=self._min_s,
            max_s=self._max_s,
        )
        return max(self._started_at + timeout_s, self._not_before)

    def confirm(self, accuser: str) -> bool:
        """Whether `accuser` is a new, still wanted witness (then the news is worth gossiping on)."""
        if self.confirmations >= self._expected or accuser in self._accusers:
            return False
        self._accusers.add(accuser)
        return True

    def postpone(self, until: float) -> None:
        """Gives the suspect until at least `until`: we were stalled; its refutation may wait in our socket."""
        self._not_before = max(self._not_before, until)
