"""Two directions of opaque bytes: TCP services, and HTTP connections after an upgrade. Half-close passes through."""

from typing import Protocol


class Pipe(Protocol):
    """One side of a relay."""

    write_blocked: bool

    def write(self, data: bytes) -> None: ...
    def pause_reading(self) -> None: ...
    def resume_reading(self) -> None: ...
    def shutdown_write(self) -> None: ...
    def close(self, *, linger: bool = False) -> None: ...
    def abort(self) -> None: ...


class Near(Pipe, Protocol):
    """The side that connected to us: it watches over idleness."""

    def progress(self) -> None:
        """Bytes went either way."""


class Relay:
    """Joins two pipes; each tells it what happened on its side. Buffers nothing itself: a blocked side stops the
    other's reading.
    """

    __slots__ = ("_ended", "bytes_in", "bytes_out", "near", "far")  # noqa: RUF023 - in the order of the traffic

    def __init__(self, near: Near, far: Pipe) -> None:
        self.near = near  # the side that connected to us
        self.far = far
        self.bytes_in = 0  # from near
        self.bytes_out = 0  # to near
        self._ended: list[Pipe] = []

    def received(self, pipe: Pipe, data: bytes) -> None:
        """Bytes arrived on a side."""
        self.near.progress()
        if pipe is self.near:
            self.bytes_in += len(data)
            other = self.far
        else:
            self.bytes_out += len(data)
            other = self.near
        other.write(data)
        if other.write_blocked:
            pipe.pause_reading()

    def ended(self, pipe: Pipe) -> None:
        """A side will send no more."""
        other = self.far if pipe is self.near else self.near
        self._ended.append(pipe)
        if len(self._ended) == 2:
            # The far side first: when the near side has closed, its owner resets a far side that is not closing yet.
            self.far.close()
            self.near.close()
        else:
            other.shutdown_write()

    def drained(self, pipe: Pipe) -> None:
        """A side takes bytes again."""
        (self.far if pipe is self.near else self.near).resume_reading()

    def broke(self, pipe: Pipe) -> None:
        """A side is gone: the other must not take what it has for complete."""
        (self.far if pipe is self.near else self.near).abort()
