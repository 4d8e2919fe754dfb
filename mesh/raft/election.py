"""Election bookkeeping: the timer, the votes of the campaign under way, and whom a leader shields from."""

from __future__ import annotations

import math
from collections.abc import Sequence
from random import Random
from typing import Literal

from mesh.raft.config import RaftConfig
from mesh.raft.quorum import vote_outcome


class Election:
    """Timer and votes of one server. Times are monotonic seconds."""

    def __init__(self, config: RaftConfig, rng: Random, now: float) -> None:
        self._config = config
        self._rng = rng
        self._votes: dict[str, bool] = {}
        self.contact_s = -math.inf
        """When a leader of the current term was last heard."""
        self.deadline = now
        self.rearm(now)

    def rearm(self, now: float) -> None:
        """Wait anew, between one and two election timeouts."""
        self.deadline = now + self._config.election_timeout_s * (1 + self._rng.random())

    def heard_leader(self, now: float) -> None:
        """A message of the current leader arrived."""
        self.contact_s = now
        self.rearm(now)

    def shields(self, now: float) -> bool:
        """Whether a leader was heard so recently that no other candidate gets an answer (dissertation 4.2.3, 6.4.1).

        Leases rest on this: a leader that a quorum answered cannot be replaced within one election timeout.
        """
        return now - self.contact_s < self._config.election_timeout_s

    def start(self, now: float) -> None:
        """A new campaign: nobody has answered yet."""
        self._votes = {}
        self.rearm(now)

    def record(self, voter: str, *, granted: bool) -> None:
        """One answer; the first of each voter counts."""
        self._votes.setdefault(voter, granted)

    def outcome(self, voters: Sequence[str]) -> Literal["won", "lost", "pending"]:
        """What the answers so far decide."""
        return vote_outcome(voters, self._votes)
