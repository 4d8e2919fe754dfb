"""The key/value table, with the tombstones that keep the index of a prefix from going back when keys under it go."""

from msgspec.structs import replace

from mesh.errors import Refused
from mesh.model.command import KvDelete, KvSet
from mesh.model.kv import KvEntry
from mesh.state.sorted_keys import SortedKeys
from mesh.state.watch import WatchKey, kv_key

_FLAGS_MAX = 2**64 - 1


class KvTable:
    """Keys are compared exactly. `index` is that of the last change anywhere in the table."""

    def __init__(self) -> None:
        self.rows: dict[str, KvEntry] = {}
        self.tombstones: dict[str, int] = {}
        self.index = 0
        self._keys = SortedKeys()
        self._tombstone_keys = SortedKeys()

    @classmethod
    def restored(cls, rows: dict[str, KvEntry], tombstones: dict[str, int], index: int) -> "KvTable":
        """A table of exactly these rows; it takes the dicts over."""
        table = cls()
        table.rows, table.tombstones, table.index = rows, tombstones, index
        table._keys, table._tombstone_keys = SortedKeys(rows), SortedKeys(tombstones)
        return table

    def put(self, command: KvSet, index: int, changed: set[WatchKey]) -> bool:
        """Whether the compare-and-set matched. Raises Refused for an empty key or flags beyond 64 bits."""
        if not command.key:
            raise Refused("Missing key name")
        if not 0 <= command.flags <= _FLAGS_MAX:
            raise Refused(f"flags of {command.key!r} do not fit 64 unsigned bits")
        old = self.rows.get(command.key)
        if command.cas_index is not None and command.cas_index != (old.modify_index if old else 0):
            return False
        if old is None:
            self.rows[command.key] = KvEntry(
                command.key, command.value, command.flags, create_index=index, modify_index=index
            )
            self._keys.add(command.key)
        elif old.value == command.value and old.flags == command.flags:
            return True
        else:
            self.rows[command.key] = replace(old, value=command.value, flags=command.flags, modify_index=index)
        self.index = index
        changed.add(kv_key(command.key))
        return True

    def delete(self, command: KvDelete, index: int, changed: set[WatchKey]) -> bool:
        """Whether the key (or all keys under the prefix) is gone; False only when `cas_index` did not match."""
        if command.recurse:
            if command.cas_index is not None:
                raise Refused("a recursive delete has no single index to compare with")
            self._delete_under(command.key, index, changed)
            return True
        old = self.rows.get(command.key)
        if old is None:
            return True
        if command.cas_index is not None and command.cas_index != old.modify_index:
            return False
        self._remove(command.key, changed)
        self._bury(command.key, index)
        self.index = index
        return True

    def reap(self, index: int) -> None:
        """Forgets tombstones at or below the index."""
        for key in [key for key, buried_index in self.tombstones.items() if buried_index <= index]:
            del self.tombstones[key]
            self._tombstone_keys.remove(key)

    def keys_under(self, prefix: str) -> list[str]:
        """The keys that start with the prefix, ascending."""
        return list(self._keys.with_prefix(prefix))

    def key_index(self, key: str) -> int:
        """The index of a read of one key."""
        row = self.rows.get(key)
        return row.modify_index if row is not None else self.index

    def prefix_index(self, prefix: str, keys: list[str]) -> int:
        """The index of a read of `keys`, all those under the prefix: the highest of keys and tombstones there."""
        if not prefix:
            return self.index
        highest = max((self.rows[key].modify_index for key in keys), default=0)
        buried = max((self.tombstones[key] for key in self._tombstone_keys.with_prefix(prefix)), default=0)
        return max(highest, buried) or self.index

    def _delete_under(self, prefix: str, index: int, changed: set[WatchKey]) -> None:
        keys = self.keys_under(prefix)
        if not keys:
            return
        for key in keys:
            self._remove(key, changed)
            self._bury(key, index)  # each, not the prefix alone: a read of a longer prefix must not go back either
        self.index = index

    def _remove(self, key: str, changed: set[WatchKey]) -> None:
        del self.rows[key]
        self._keys.remove(key)
        changed.add(kv_key(key))

    def _bury(self, key: str, index: int) -> None:
        if key not in self.tombstones:
            self._tombstone_keys.add(key)
        self.tombstones[key] = index
