"""Subsets: the endpoints of a target whose metadata has what a route or resolver asks for."""

from collections.abc import Iterable
from typing import Protocol, TypeVar


class Described(Protocol):
    """Something with metadata."""

    @property
    def metadata(self) -> tuple[tuple[str, str], ...]: ...


D = TypeVar("D", bound=Described)


def select(endpoints: Iterable[D], subset: tuple[tuple[str, str], ...]) -> tuple[D, ...]:
    """Those that have every pair of `subset`, in the order given; an empty subset is everyone."""
    wanted = set(subset)
    return tuple(endpoint for endpoint in endpoints if wanted.issubset(endpoint.metadata))
