"""Answers every query from the tables: the value, its index, and the keys whose change can change the answer."""

from collections.abc import Callable
from typing import Generic, TypeVar, cast

import msgspec

from mesh.model.catalog import Node, NodeServices, ServiceNode
from mesh.model.check import Check, ServiceHealth
from mesh.model.config_entry import SERVICE_INTENTIONS
from mesh.model.intention import WILDCARD
from mesh.model.query import (
    AnswerT,
    Asks,
    GetCaRoots,
    GetConfigEntry,
    GetIntention,
    GetKv,
    GetNodeServices,
    ListChecksInState,
    ListConfigEntries,
    ListIntentions,
    ListKv,
    ListKvKeys,
    ListNodeChecks,
    ListNodes,
    ListServiceChecks,
    ListServiceHealth,
    ListServiceNodes,
    ListServices,
    MatchIntentions,
    tag_filter,
)
from mesh.names import fold
from mesh.state.store import Store
from mesh.state.watch import (
    CHECKS,
    INTENTIONS,
    NODES,
    ROOTS,
    SERVICES,
    WatchKey,
    config_key,
    config_kind_key,
    connect_key,
    intention_destination_key,
    intention_key,
    intention_source_key,
    kv_key,
    kv_prefix_key,
    node_checks_key,
    node_key,
    service_key,
)

ValueT = TypeVar("ValueT")


class Reading(msgspec.Struct, Generic[ValueT], frozen=True):
    """An answer. `index` is at least 1; a later answer differs only after a change of one of `watch_keys`."""

    value: ValueT
    index: int
    watch_keys: tuple[WatchKey, ...]


def run(store: Store, query: Asks[AnswerT]) -> Reading[AnswerT]:
    """Answers any query of `mesh.model.query`, in the order that it documents."""
    reading = _ANSWERERS[type(query)](store, query)
    return cast(Reading[AnswerT], reading)


def _reading(value: ValueT, index: int, *watch_keys: WatchKey) -> Reading[ValueT]:
    return Reading(value, max(index, 1), watch_keys)


def _has_meta(node: Node, wanted: dict[str, str]) -> bool:
    return all(node.meta.get(key) == value for key, value in wanted.items())


def _nodes(store: Store, query: ListNodes) -> Reading[tuple[Node, ...]]:
    catalog = store.catalog
    rows = tuple(row for _, row in sorted(catalog.nodes.items()) if _has_meta(row, query.meta))
    return _reading(rows, catalog.indexes.nodes, NODES)


def _services(store: Store, query: ListServices) -> Reading[dict[str, tuple[str, ...]]]:
    catalog = store.catalog
    if not query.node_meta:
        return _reading(catalog.tags_by_service(), catalog.indexes.services, SERVICES)
    tags: dict[str, set[str]] = {}
    for (node, _), service in catalog.services.items():
        if _has_meta(catalog.nodes[node], query.node_meta):
            tags.setdefault(service.service, set()).update(service.tags)
    value = {name: tuple(sorted(tags[name])) for name in sorted(tags)}
    return _reading(value, max(catalog.indexes.nodes, catalog.indexes.services), NODES, SERVICES)


def _group(query: ListServiceNodes | ListServiceHealth) -> WatchKey:
    return connect_key(query.service) if query.connect else service_key(query.service)


def _service_nodes(store: Store, query: ListServiceNodes) -> Reading[tuple[ServiceNode, ...]]:
    catalog, group = store.catalog, _group(query)
    rows = (ServiceNode(catalog.nodes[key[0]], catalog.services[key]) for key in catalog.instances(group))
    value = tuple(
        row for row in rows if tag_filter(row.service.tags, query.tags) and _has_meta(row.node, query.node_meta)
    )
    return _reading(value, catalog.indexes.group(group), group)


def _service_health(store: Store, query: ListServiceHealth) -> Reading[tuple[ServiceHealth, ...]]:
    group = _group(query)
    rows = store.catalog.health(group, passing_only=query.passing_only)
    if query.tags or query.node_meta:
        rows = tuple(
            row for row in rows if tag_filter(row.service.tags, query.tags) and _has_meta(row.node, query.node_meta)
        )
    return _reading(rows, store.catalog.indexes.group(group), group)


def _node_services(store: Store, query: GetNodeServices) -> Reading[NodeServices | None]:
    catalog, key = store.catalog, fold(query.node)
    node = catalog.nodes.get(key)
    value = None
    if node is not None:
        value = NodeServices(node, tuple(catalog.services[key, one] for one in catalog.service_keys_on(key)))
    return _reading(value, catalog.indexes.node(key), node_key(key))


def _node_checks(store: Store, query: ListNodeChecks) -> Reading[tuple[Check, ...]]:
    key = fold(query.node)
    checks = tuple(store.catalog.checks_on(key))
    return _reading(checks, store.catalog.indexes.node_checks(key), node_checks_key(key))


def _service_checks(store: Store, query: ListServiceChecks) -> Reading[tuple[Check, ...]]:
    catalog, group = store.catalog, service_key(query.service)
    checks = tuple(
        check
        for key in catalog.instances(group)
        if _has_meta(catalog.nodes[key[0]], query.node_meta)
        for check in catalog.checks_of(*key)
    )
    return _reading(checks, catalog.indexes.group(group), group)


def _checks_in_state(store: Store, query: ListChecksInState) -> Reading[tuple[Check, ...]]:
    catalog = store.catalog
    found = sorted(
        (key, check)
        for key, check in catalog.checks.items()
        if query.state in ("any", check.status) and _has_meta(catalog.nodes[key[0]], query.node_meta)
    )
    value = tuple(check for _, check in found)
    if query.node_meta:
        return _reading(value, max(catalog.indexes.nodes, catalog.indexes.checks), NODES, CHECKS)
    return _reading(value, catalog.indexes.checks, CHECKS)


def _kv(store: Store, query: GetKv) -> Reading[object]:
    return _reading(store.kv.rows.get(query.key), store.kv.key_index(query.key), kv_key(query.key))


def _kv_list(store: Store, query: ListKv) -> Reading[object]:
    keys = store.kv.keys_under(query.prefix)
    rows = tuple(store.kv.rows[key] for key in keys)
    return _reading(rows, store.kv.prefix_index(query.prefix, keys), kv_prefix_key(query.prefix))


def _kv_keys(store: Store, query: ListKvKeys) -> Reading[tuple[str, ...]]:
    keys = store.kv.keys_under(query.prefix)
    index = store.kv.prefix_index(query.prefix, keys)
    names = keys
    if query.separator:
        names = list(dict.fromkeys(_cut(key, len(query.prefix), query.separator) for key in keys))
    return _reading(tuple(names), index, kv_prefix_key(query.prefix))


def _cut(key: str, start: int, separator: str) -> str:
    at = key.find(separator, start)
    return key if at < 0 else key[: at + len(separator)]


def _intentions(store: Store, query: ListIntentions) -> Reading[object]:
    return _reading(store.intentions.all(), store.intentions.index, INTENTIONS)


def _intention(store: Store, query: GetIntention) -> Reading[object]:
    row = store.intentions.rows.get((query.destination, query.source))
    index = row.modify_index if row is not None else store.intentions.index
    return _reading(row, index, intention_key(query.source, query.destination))


def _match(store: Store, query: MatchIntentions) -> Reading[object]:
    table = store.intentions
    if query.by == "source":
        watch_keys = (intention_source_key(query.name), intention_source_key(WILDCARD))
        return _reading(table.match_source(query.name), table.index, *watch_keys)
    watch_keys = (intention_destination_key(query.name), intention_destination_key(WILDCARD))
    return _reading(table.match_destination(query.name), table.index, *watch_keys)


def _config_entry(store: Store, query: GetConfigEntry) -> Reading[object]:
    if query.kind == SERVICE_INTENTIONS:
        entry = store.intentions.config_entry(query.name)
        index = entry.modify_index if entry is not None else store.intentions.index
        return _reading(entry, index, config_key(query.kind, query.name))
    index = store.config.entry_index(query.kind, query.name)
    return _reading(store.config.get(query.kind, query.name), index, config_key(query.kind, fold(query.name)))


def _config_entries(store: Store, query: ListConfigEntries) -> Reading[object]:
    key = config_kind_key(query.kind)
    if query.kind == SERVICE_INTENTIONS:
        table = store.intentions
        return _reading(tuple(table.config_entry(name) for name in sorted(table.entries)), table.index, key)
    return _reading(store.config.of_kind(query.kind), store.config.list_index(query.kind), key)


def _ca_roots(store: Store, query: GetCaRoots) -> Reading[object]:
    return _reading(store.roots.public(), store.roots.index, ROOTS)


# The values are functions of (Store, the key's type); a dict cannot say so.
_ANSWERERS = cast(
    dict[type[object], Callable[[Store, object], Reading[object]]],
    {
        ListNodes: _nodes,
        ListServices: _services,
        ListServiceNodes: _service_nodes,
        GetNodeServices: _node_services,
        ListNodeChecks: _node_checks,
        ListServiceChecks: _service_checks,
        ListChecksInState: _checks_in_state,
        ListServiceHealth: _service_health,
        GetKv: _kv,
        ListKv: _kv_list,
        ListKvKeys: _kv_keys,
        ListIntentions: _intentions,
        GetIntention: _intention,
        MatchIntentions: _match,
        GetConfigEntry: _config_entry,
        ListConfigEntries: _config_entries,
        GetCaRoots: _ca_roots,
    },
)
