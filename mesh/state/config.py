"""The config entries table: every kind but service-intentions, which `mesh.state.intentions` takes apart."""

from msgspec.structs import replace

from mesh.errors import Refused
from mesh.model.config_entry import ConfigEntry
from mesh.model.equality import same
from mesh.names import fold
from mesh.state.validation import MTLS_KINDS, require_config_entry
from mesh.state.watch import WatchKey, config_key, config_kind_key

EntryKey = tuple[str, str]  # kind, folded name


class ConfigTable:
    """Entries by kind and name; the case of names does not matter."""

    def __init__(self) -> None:
        self.rows: dict[EntryKey, ConfigEntry] = {}
        self.index = 0
        self.kind_index: dict[str, int] = {}

    def put(self, entry: ConfigEntry, cas_index: int | None, index: int, changed: set[WatchKey]) -> bool:
        """False when `cas_index` did not match. Raises Refused when the entry is not valid."""
        require_config_entry(entry)
        self._require_permissive_allowed(entry)
        key = (entry.kind, fold(entry.name))
        old = self.rows.get(key)
        if cas_index is not None and cas_index != (old.modify_index if old else 0):
            return False
        if old is not None:
            entry = replace(entry, create_index=old.create_index, modify_index=old.modify_index)
            if same(entry, old):
                return True
        created = old.create_index if old is not None else index
        self.rows[key] = replace(entry, create_index=created, modify_index=index)
        self._touch(key, index, changed)
        return True

    def _require_permissive_allowed(self, entry: ConfigEntry) -> None:
        """As in Consul: what already is permissive stays so when `mesh` forbids it later, until it is written again."""
        if entry.kind not in MTLS_KINDS or entry.body.get("MutualTLSMode") != "permissive":
            return
        mesh = self.get("mesh", "mesh")
        if mesh is None or mesh.body.get("AllowEnablingPermissiveMutualTLS") is not True:
            raise Refused(
                "MutualTLSMode=permissive needs AllowEnablingPermissiveMutualTLS=true in the mesh config entry first"
            )

    def delete(self, kind: str, name: str, cas_index: int | None, index: int, changed: set[WatchKey]) -> bool:
        """Whether it is gone; False only when `cas_index` did not match."""
        key = (kind, fold(name))
        old = self.rows.get(key)
        if old is None:
            return True
        if cas_index is not None and cas_index != old.modify_index:
            return False
        del self.rows[key]
        self._touch(key, index, changed)
        return True

    def get(self, kind: str, name: str) -> ConfigEntry | None:
        """The entry, or None."""
        return self.rows.get((kind, fold(name)))

    def of_kind(self, kind: str) -> tuple[ConfigEntry, ...]:
        """Every entry of a kind, by name."""
        return tuple(row for key, row in sorted(self.rows.items(), key=lambda item: item[0]) if key[0] == kind)

    def entry_index(self, kind: str, name: str) -> int:
        """The index of a read of one entry, there or not."""
        row = self.get(kind, name)
        return row.modify_index if row is not None else self.index

    def list_index(self, kind: str) -> int:
        """The index of a read of a kind."""
        return self.kind_index.get(kind) or self.index

    def _touch(self, key: EntryKey, index: int, changed: set[WatchKey]) -> None:
        self.index = self.kind_index[key[0]] = index
        changed.update((config_key(*key), config_kind_key(key[0])))
