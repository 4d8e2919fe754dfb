"""Endpoints as a balancer sees them."""

from dataclasses import dataclass

from mesh.proxy.balancing import PeakEwma


@dataclass(eq=False)
class Backend:
    id: str
    host: str
    weight: int = 1
    active: int = 0
    priority: int = 0
    locality: str = ""
    usable: bool = True
    joined_at: float = -1e9
    ewma: PeakEwma | None = None

    def __repr__(self) -> str:
        return self.id


def backend(number: int, **fields: object) -> Backend:
    return Backend(f"e{number}", f"10.1.{number >> 8}.{number & 255}:20000", **fields)


def backends(count: int, **fields: object) -> list[Backend]:
    return [backend(number, **fields) for number in range(count)]
