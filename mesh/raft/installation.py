"""A leader's snapshot on its way in: which one it is, how far it has come, and the chunks that are not on disk yet."""

from __future__ import annotations

from mesh.raft.messages import SnapshotChunk


class Installation:
    """At most one snapshot arrives at a time; a chunk of another one begins anew."""

    def __init__(self) -> None:
        self._key: tuple[int, int, int] | None = None
        self._offset = 0
        self._is_complete = False
        self._chunks: list[SnapshotChunk] = []

    @property
    def is_complete(self) -> bool:
        """All of it is here, and it is being made durable and restored; until `end` nothing else may change the log."""
        return self._is_complete

    @property
    def has_chunks(self) -> bool:
        """Whether chunks wait for a write."""
        return bool(self._chunks)

    def take(self, chunk: SnapshotChunk) -> int | None:
        """Takes the chunk in if it is the next one; the offset to ask for next, None when it was the last."""
        key = (chunk.term, chunk.index, chunk.snapshot_term)
        if key != self._key:
            self._key, self._offset, self._chunks = key, 0, []
        if chunk.offset == self._offset and (chunk.data or chunk.is_last):
            self._offset += len(chunk.data)
            self._is_complete = chunk.is_last
            self._chunks.append(chunk)
            if chunk.is_last:
                return None  # answered once it is installed
        return self._offset

    def begin_write(self) -> tuple[SnapshotChunk, ...]:
        """The chunks for the next write."""
        chunks, self._chunks = tuple(self._chunks), []
        return chunks

    def end(self) -> None:
        """It is installed, or was damaged on the way."""
        self._key, self._offset, self._is_complete = None, 0, False
