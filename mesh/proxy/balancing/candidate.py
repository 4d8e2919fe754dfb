"""What a balancer asks of an endpoint."""

from typing import Protocol, TypeVar

from mesh.proxy.balancing.ewma import PeakEwma


class Candidate(Protocol):
    """One endpoint. `host` (address:port) places it in hash tables; `usable`: healthy, not ejected, its gate open.

    `joined_at` is when it appeared or last recovered, in seconds of the caller's clock: slow start counts from there,
    and because it belongs to the endpoint its age outlives the balancer.
    """

    active: int

    @property
    def host(self) -> str: ...
    @property
    def weight(self) -> int: ...
    @property
    def priority(self) -> int: ...
    @property
    def locality(self) -> str: ...
    @property
    def usable(self) -> bool: ...
    @property
    def joined_at(self) -> float: ...
    @property
    def ewma(self) -> PeakEwma | None: ...


E = TypeVar("E", bound=Candidate)
