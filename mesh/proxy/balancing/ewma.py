"""Peak EWMA: how slow an endpoint is, quick to believe bad news (Finagle; Linkerd's figures)."""

from math import exp


class PeakEwma:
    """A decaying average of round trips, in seconds. `observe` takes samples, `read` decays without changing anything.

    A sample above the decayed value replaces it at once, a lower one is blended in by how long ago the last one was.
    With no news the value falls towards zero, so that an endpoint that was slow is tried again.
    """

    __slots__ = ("_at", "_rate", "_value")

    def __init__(self, decay_s: float, initial_s: float, now: float) -> None:
        self._rate = -1.0 / decay_s
        self._value = initial_s
        self._at = now

    def observe(self, rtt_s: float, now: float) -> None:
        """One answer took `rtt_s`, up to its first body byte; one that was given up on counts with its waiting time."""
        kept = exp((now - self._at) * self._rate)
        decayed = self._value * kept
        self._value = rtt_s if rtt_s > decayed else decayed + rtt_s * (1.0 - kept)
        self._at = now

    def read(self, now: float) -> float:
        """The estimate at `now`."""
        return self._value * exp((now - self._at) * self._rate)
