"""Applies the log to the state: total and deterministic. An entry that cannot be applied is answered, never raised."""

import hashlib
from collections.abc import Callable, Iterable

from mesh.errors import ProtocolError, Refused
from mesh.model.command import COMMAND_CODEC, Applied, CommandResult, Rejected
from mesh.state import snapshot
from mesh.state.store import Store
from mesh.state.watch import EVERYTHING, WatchKey


class Fsm:
    """The state machine behind one Raft log. `apply`, `snapshot` and `restore` must not run at the same time."""

    def __init__(self, store: Store) -> None:
        self.store = store
        self._applied_index = 0
        self._changed: set[WatchKey] = set()

    @property
    def applied_index(self) -> int:
        """The index of the last entry applied or snapshot restored; 0 at first."""
        return self._applied_index

    def apply(self, index: int, data: bytes) -> CommandResult:
        """The result of one entry, the same on every server. `index` must be above that of every entry before.

        An entry that cannot be decoded, of an unknown kind, or that the state forbids gives Rejected and changes
        nothing.
        """
        assert index > self._applied_index, f"entry {index} was applied already; the state is at {self._applied_index}"
        self._applied_index = index
        changed: set[WatchKey] = set()
        try:
            ok = self.store.apply(index, COMMAND_CODEC.decode(data), changed)
        except (Refused, ProtocolError) as error:
            return Rejected(index, str(error))
        except MemoryError:
            raise  # this server's trouble, not the entry's: others apply it, so this one must stop
        except Exception as error:
            # A defect of ours. Every server meets it in the same state and does the same, so they stay equal; stopping
            # would stop all of them, and again after each restart, for as long as the entry is in the log.
            return Rejected(index, f"entry {index} cannot be applied: {type(error).__name__} (a defect; report it)")
        finally:
            self._changed |= changed
        return Applied(index, ok)

    def take_changes(self) -> tuple[WatchKey, ...]:
        """What changed since the last call, for `WatchRegistry.notify`; in order of their names."""
        changed, self._changed = self._changed, set()
        return tuple(sorted(changed))

    def snapshot(self) -> Callable[[], Iterable[bytes]]:
        """A function that streams the state as it is now in chunks, on any thread, while entries are applied."""
        return snapshot.capture(self.store)

    def restore(self, index: int, chunks: Iterable[bytes]) -> None:
        """Replaces the state by a snapshot taken at `index`, and names everything as changed.

        Raises ProtocolError when the snapshot is damaged or of another format; the state is then as it was.
        """
        self.store.replace(snapshot.restored(chunks))
        self._applied_index = index
        self._changed = {EVERYTHING}

    def state_hash(self) -> str:
        """Hex digest of the whole state: equal on servers that applied the same entries."""
        digest = hashlib.blake2b(digest_size=16)
        for chunk in self.snapshot()():
            digest.update(chunk)
        return digest.hexdigest()
