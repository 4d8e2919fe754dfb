"""The intentions table, seen two ways: rule by rule, and as config entries of kind service-intentions."""

from collections.abc import Iterable
from datetime import UTC, datetime

import msgspec
from msgspec.structs import replace

from mesh.model.config_entry import SERVICE_INTENTIONS, ConfigEntry
from mesh.model.equality import same
from mesh.model.intention import WILDCARD, Intention, is_audit
from mesh.state.validation import intentions_of, require_intention
from mesh.state.watch import (
    INTENTIONS,
    WatchKey,
    config_key,
    config_kind_key,
    intention_destination_key,
    intention_key,
    intention_source_key,
)

PairKey = tuple[str, str]  # destination, source


class IntentionEntry(msgspec.Struct, frozen=True):
    """What a service-intentions entry holds besides its rules; it exists while its destination has a rule."""

    create_index: int
    modify_index: int
    meta: dict[str, str] = {}


def by_precedence(rules: Iterable[Intention]) -> tuple[Intention, ...]:
    """Highest precedence first, then by destination and source."""
    return tuple(sorted(rules, key=lambda rule: (-rule.precedence, rule.destination, rule.source)))


class IntentionTable:
    """Rules by destination and source, compared exactly, as identities are."""

    def __init__(self) -> None:
        self.rows: dict[PairKey, Intention] = {}
        self.entries: dict[str, IntentionEntry] = {}
        self.index = 0
        self._sources_of: dict[str, dict[str, None]] = {}
        self._destinations_of: dict[str, dict[str, None]] = {}

    @classmethod
    def restored(
        cls, rows: dict[PairKey, Intention], entries: dict[str, IntentionEntry], index: int
    ) -> "IntentionTable":
        """A table of exactly these rows; it takes the dicts over."""
        table = cls()
        table.rows, table.entries, table.index = rows, entries, index
        for destination, source in rows:
            table._link(destination, source)
        return table

    # Reads

    def all(self) -> tuple[Intention, ...]:
        """Every rule."""
        return by_precedence(self.rows.values())

    def match_destination(self, name: str) -> tuple[Intention, ...]:
        """The rules that bear on calls to a service."""
        names = (name,) if name == WILDCARD else (name, WILDCARD)
        return by_precedence(self.rows[at, source] for at in names for source in self._sources_of.get(at, ()))

    def match_source(self, name: str) -> tuple[Intention, ...]:
        """The rules that bear on calls by a service."""
        names = (name,) if name == WILDCARD else (name, WILDCARD)
        return by_precedence(self.rows[at, source] for source in names for at in self._destinations_of.get(source, ()))

    def config_entry(self, destination: str) -> ConfigEntry | None:
        """The rules of a destination as one config entry, or None when it has none."""
        entry = self.entries.get(destination)
        if entry is None:
            return None
        rules = by_precedence(self.rows[destination, source] for source in self._sources_of[destination])
        return ConfigEntry(
            kind=SERVICE_INTENTIONS,
            name=destination,
            body={"Sources": [_source_of(rule) for rule in rules]},
            meta=entry.meta,
            create_index=entry.create_index,
            modify_index=entry.modify_index,
        )

    # Writes

    def upsert(self, intention: Intention, index: int, changed: set[WatchKey]) -> None:
        """Creates or replaces one rule. Raises Refused when it is not valid."""
        require_intention(intention)
        entry = self.entries.get(intention.destination)
        if self._put(intention, entry.meta if entry is not None else {}, index, changed):
            self._touch_entry(intention.destination, index, changed)

    def delete(self, source: str, destination: str, index: int, changed: set[WatchKey]) -> None:
        """Removes one rule, if it is there."""
        if (destination, source) in self.rows:
            self._remove(destination, source, index, changed)
            self._touch_entry(destination, index, changed)

    def set_entry(
        self, entry: ConfigEntry, cas_index: int | None, at_s: float, index: int, changed: set[WatchKey]
    ) -> bool:
        """Makes the entry's rules all the rules of its destination. False when `cas_index` did not match."""
        rules = intentions_of(entry)
        old_entry = self.entries.get(entry.name)
        if cas_index is not None and cas_index != (old_entry.modify_index if old_entry else 0):
            return False
        changes = old_entry is None or old_entry.meta != entry.meta
        kept = {rule.source for rule in rules}
        for source in [source for source in self._sources_of.get(entry.name, ()) if source not in kept]:
            self._remove(entry.name, source, index, changed)
            changes = True
        for rule in rules:
            old = self.rows.get((entry.name, rule.source))
            if old is not None:
                rule = replace(rule, intention_id=old.intention_id, meta=old.meta)
            changes |= self._put(replace(rule, created_at_s=at_s, updated_at_s=at_s), entry.meta, index, changed)
        if changes:
            self._touch_entry(entry.name, index, changed, meta=entry.meta)
        return True

    def delete_entry(self, name: str, cas_index: int | None, index: int, changed: set[WatchKey]) -> bool:
        """Removes every rule of a destination. False when `cas_index` did not match."""
        entry = self.entries.get(name)
        if entry is None:
            return True
        if cas_index is not None and cas_index != entry.modify_index:
            return False
        for source in list(self._sources_of[name]):
            self._remove(name, source, index, changed)
        self._touch_entry(name, index, changed)
        return True

    def _put(self, rule: Intention, entry_meta: dict[str, str], index: int, changed: set[WatchKey]) -> bool:
        """Whether the rule says anything new; when it was written last is nothing new."""
        key = (rule.destination, rule.source)
        rule = replace(rule, audit=is_audit(rule.meta) or is_audit(entry_meta, rule.source))
        old = self.rows.get(key)
        if old is None:
            self.rows[key] = replace(rule, create_index=index, modify_index=index)
            self._link(*key)
        else:
            rule = replace(
                rule,
                intention_id=rule.intention_id or old.intention_id,  # who rewrites a rule by its pair names no ID
                created_at_s=old.created_at_s,
                create_index=old.create_index,
                modify_index=old.modify_index,
            )
            if same(replace(rule, updated_at_s=old.updated_at_s), old):
                return False
            self.rows[key] = replace(rule, modify_index=index)
        self._touch(rule.destination, rule.source, index, changed)
        return True

    def _remove(self, destination: str, source: str, index: int, changed: set[WatchKey]) -> None:
        del self.rows[destination, source]
        for links, one, other in (
            (self._sources_of, destination, source),
            (self._destinations_of, source, destination),
        ):
            del links[one][other]
            if not links[one]:
                del links[one]
        self._touch(destination, source, index, changed)

    def _link(self, destination: str, source: str) -> None:
        self._sources_of.setdefault(destination, {})[source] = None
        self._destinations_of.setdefault(source, {})[destination] = None

    def _touch(self, destination: str, source: str, index: int, changed: set[WatchKey]) -> None:
        self.index = index
        changed.update(
            (
                INTENTIONS,
                intention_key(source, destination),
                intention_source_key(source),
                intention_destination_key(destination),
            )
        )

    def _touch_entry(
        self, destination: str, index: int, changed: set[WatchKey], *, meta: dict[str, str] | None = None
    ) -> None:
        old = self.entries.get(destination)
        if destination not in self._sources_of:
            self.entries.pop(destination, None)
        elif old is None:
            self.entries[destination] = IntentionEntry(index, index, meta or {})
        else:
            self.entries[destination] = replace(old, modify_index=index, meta=old.meta if meta is None else meta)
        self.index = index
        changed.update((config_key(SERVICE_INTENTIONS, destination), config_kind_key(SERVICE_INTENTIONS)))


def _source_of(rule: Intention) -> dict[str, object]:
    source: dict[str, object] = {"Name": rule.source}
    if rule.permissions:
        source["Permissions"] = list(rule.permissions)
    else:
        source["Action"] = rule.action
    source["Precedence"] = rule.precedence
    source["Type"] = "consul"
    if rule.description:
        source["Description"] = rule.description
    if rule.intention_id:
        source["LegacyID"] = rule.intention_id
    if rule.meta:
        source["LegacyMeta"] = dict(rule.meta)
    if rule.created_at_s:
        source["LegacyCreateTime"] = _rfc3339(rule.created_at_s)
        source["LegacyUpdateTime"] = _rfc3339(rule.updated_at_s)
    return source


def _rfc3339(at_s: float) -> str:
    """A Unix time as RFC 3339 text, to the second; times that no calendar has are its first."""
    try:
        return datetime.fromtimestamp(int(at_s), UTC).strftime("%Y-%m-%dT%H:%M:%SZ")
    except (ValueError, OverflowError, OSError):
        return "0001-01-01T00:00:00Z"
