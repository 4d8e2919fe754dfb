"""The arithmetic of majorities: pure functions of the voters and what is known about each."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Literal, TypeVar

Number = TypeVar("Number", int, float)


def majority(voters: int) -> int:
    """How many of that many voters decide; every two majorities share a voter."""
    return voters // 2 + 1


def quorum_value(values: Sequence[Number]) -> Number:
    """The largest value that a majority of voters has reached; `values` holds one for every voter and is not empty.

    With match indexes it is what is committed (paper, figure 2), with times it is when a quorum was last heard from.
    """
    return sorted(values, reverse=True)[majority(len(values)) - 1]


def vote_outcome(voters: Sequence[str], votes: Mapping[str, bool]) -> Literal["won", "lost", "pending"]:
    """What the answers so far decide; answers of servers that do not vote are not counted."""
    granted = sum(1 for voter in voters if votes.get(voter) is True)
    refused = sum(1 for voter in voters if votes.get(voter) is False)
    needed = majority(len(voters))
    if granted >= needed:
        return "won"
    return "lost" if len(voters) - refused < needed else "pending"
