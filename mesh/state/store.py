"""The replicated state of one server: its tables, and the one way to change them."""

from typing import assert_never

from mesh.errors import Refused
from mesh.model.ca import CaRoot
from mesh.model.command import (
    CaRootsSet,
    Command,
    ConfigEntryDelete,
    ConfigEntrySet,
    Deregister,
    IntentionDelete,
    IntentionUpsert,
    KvDelete,
    KvSet,
    Register,
    TombstonesReap,
)
from mesh.model.config_entry import SERVICE_INTENTIONS
from mesh.state.catalog import Catalog
from mesh.state.config import ConfigTable
from mesh.state.intentions import IntentionTable
from mesh.state.kv import KvTable
from mesh.state.roots import RootsTable
from mesh.state.watch import WatchKey


class Store:
    """In memory only. Rows are frozen values: what a read returned never changes under its reader."""

    def __init__(self) -> None:
        self.catalog = Catalog()
        self.kv = KvTable()
        self.config = ConfigTable()
        self.intentions = IntentionTable()
        self.roots = RootsTable()

    @property
    def cluster_id(self) -> str:
        """The UUID that the trust domain is made of; empty until the CA exists."""
        return self.roots.cluster_id

    def signing_root(self) -> CaRoot | None:
        """The active CA root with its private key, for the leader's CA alone; None until the CA exists."""
        return self.roots.active() if self.roots.rows else None

    @property
    def roots_index(self) -> int:
        """What `CaRootsSet.cas_index` is compared with: 0 until the CA exists."""
        return self.roots.index

    def apply(self, index: int, command: Command, changed: set[WatchKey]) -> bool:
        """Applies a command and adds what it changed to `changed`; answers the command's bool (True if it has none).

        Raises Refused, having changed nothing, when the command is not valid in this state.
        """
        match command:
            case Register():
                self.catalog.register(command, index, changed)
            case Deregister():
                self.catalog.deregister(command, index, changed)
            case KvSet():
                return self.kv.put(command, index, changed)
            case KvDelete():
                return self.kv.delete(command, index, changed)
            case ConfigEntrySet():
                return self._set_config_entry(command, index, changed)
            case ConfigEntryDelete():
                return self._delete_config_entry(command, index, changed)
            case IntentionUpsert():
                self.intentions.upsert(command.intention, index, changed)
            case IntentionDelete():
                self.intentions.delete(command.source, command.destination, index, changed)
            case CaRootsSet():
                return self.roots.put(command, index, changed)
            case TombstonesReap():
                self.kv.reap(command.index)
            case _:
                assert_never(command)
        return True

    def replace(self, other: "Store") -> None:
        """Takes over another store's tables, which it must not use again: how a snapshot is installed."""
        self.catalog = other.catalog
        self.kv = other.kv
        self.config = other.config
        self.intentions = other.intentions
        self.roots = other.roots

    def _set_config_entry(self, command: ConfigEntrySet, index: int, changed: set[WatchKey]) -> bool:
        entry = command.entry
        if entry.kind != SERVICE_INTENTIONS:
            return self.config.put(entry, command.cas_index, index, changed)
        if not entry.name:
            raise Refused("Name is required")
        return self.intentions.set_entry(entry, command.cas_index, command.at_s, index, changed)

    def _delete_config_entry(self, command: ConfigEntryDelete, index: int, changed: set[WatchKey]) -> bool:
        if command.kind == SERVICE_INTENTIONS:
            return self.intentions.delete_entry(command.name, command.cas_index, index, changed)
        return self.config.delete(command.kind, command.name, command.cas_index, index, changed)
