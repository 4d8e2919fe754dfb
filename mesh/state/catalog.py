"""The catalog's tables: nodes, services and checks, with the index of everything that can be read from them.

A *group* is what a discovery read asks for: the instances of a service (`service_key`), or those that speak mTLS on
its behalf (`connect_key`). Each has an index of its own, so that a change to one service neither wakes nor moves the
index of readers of another.
"""

from collections.abc import Iterator

from msgspec.structs import replace

from mesh.errors import ProtocolError, Refused
from mesh.model.catalog import Node, Service
from mesh.model.check import SERF_HEALTH_ID, Check, ServiceHealth
from mesh.model.command import Deregister, Register
from mesh.model.equality import same
from mesh.names import fold
from mesh.state.validation import require_printable, require_service
from mesh.state.watch import CHECKS, NODES, SERVICES, WatchKey, connect_key, node_checks_key, node_key, service_key

RowKey = tuple[str, str]  # folded node name, folded service or check ID


def groups_of(service: Service) -> tuple[WatchKey, ...]:
    """The groups that the instance belongs to."""
    groups = [service_key(service.service)]
    if service.kind == "connect-proxy" and service.proxy is not None:
        groups.append(connect_key(service.proxy.destination_service_name))
    elif service.connect_native:
        groups.append(connect_key(service.service))
    return tuple(groups)


class CatalogIndexes:
    """The indexes of reads. Those of single nodes and groups exist exactly while the node or group does."""

    def __init__(self) -> None:
        self.nodes = 0
        self.services = 0
        self.checks = 0
        self.extinction = 0  # when a group last lost its last instance
        self.of_group: dict[WatchKey, int] = {}
        self.of_node: dict[str, int] = {}
        self.of_node_checks: dict[str, int] = {}

    def group(self, key: WatchKey) -> int:
        """The index of a read of a group, there or not."""
        return self.of_group.get(key) or self.extinction or max(self.nodes, self.services, self.checks)

    def node(self, key: str) -> int:
        """The index of a read of a node and its services."""
        return self.of_node.get(key) or max(self.nodes, self.services)

    def node_checks(self, key: str) -> int:
        """The index of a read of a node's checks."""
        return self.of_node_checks.get(key) or max(self.nodes, self.checks)


class Catalog:
    """Nodes, services and checks. Every public method either takes effect as a whole or raises Refused."""

    def __init__(self) -> None:
        self.nodes: dict[str, Node] = {}  # by folded name
        self.services: dict[RowKey, Service] = {}
        self.checks: dict[RowKey, Check] = {}
        self.indexes = CatalogIndexes()
        self._node_by_id: dict[str, str] = {}
        self._services_on: dict[str, dict[str, None]] = {}  # node -> service IDs; dicts serve as ordered sets
        self._checks_of: dict[RowKey, dict[str, None]] = {}  # (node, service ID or "") -> check IDs
        self._instances: dict[WatchKey, dict[RowKey, None]] = {}
        # The last answers, with the index they are of: thousands of sidecars wait for the same service and ask for it
        # again at the same moment. Any change of an answer moves its index.
        self._health: dict[tuple[WatchKey, bool], tuple[int, tuple[ServiceHealth, ...]]] = {}
        self._tags: tuple[int, dict[str, tuple[str, ...]]] = (0, {})

    # Reads

    def tags_by_service(self) -> dict[str, tuple[str, ...]]:
        """Service names, ascending, with the tags of all instances. The caller must not change it."""
        index, tags = self._tags
        if index != self.indexes.services:
            found: dict[str, set[str]] = {}
            for service in self.services.values():
                found.setdefault(service.service, set()).update(service.tags)
            tags = {name: tuple(sorted(found[name])) for name in sorted(found)}
            self._tags = (self.indexes.services, tags)
        return tags

    def health(self, group: WatchKey, *, passing_only: bool) -> tuple[ServiceHealth, ...]:
        """Every instance of a group (or those with no check that is not passing), by node, then service ID."""
        index = self.indexes.of_group.get(group)
        if index is None:
            return ()
        known_index, known = self._health.get((group, passing_only), (0, ()))
        if known_index == index:
            return known
        rows = tuple(
            ServiceHealth(self.nodes[key[0]], self.services[key], self.checks_bearing_on(key))
            for key in self.instances(group)
        )
        if passing_only:
            rows = tuple(row for row in rows if all(check.status == "passing" for check in row.checks))
        self._health[group, passing_only] = (index, rows)
        return rows

    def checks_bearing_on(self, key: RowKey) -> tuple[Check, ...]:
        """The checks of the instance's node, then its own, each by check ID."""
        return (*self.checks_of(key[0], ""), *self.checks_of(*key))

    def service_keys_on(self, node: str) -> list[str]:
        """The folded IDs of the services on a node (folded name), ascending."""
        return sorted(self._services_on.get(node, ()))

    def instances(self, group: WatchKey) -> list[RowKey]:
        """The keys of a group's instances, by node, then service ID."""
        return sorted(self._instances.get(group, ()))

    def checks_of(self, node: str, service_id: str) -> Iterator[Check]:
        """The checks of a service on a node (all folded), or the node's own for an empty ID; by check ID."""
        for check_id in sorted(self._checks_of.get((node, service_id), ())):
            yield self.checks[node, check_id]

    def checks_on(self, node: str) -> list[Check]:
        """Every check on a node (folded name), by check ID."""
        keys = [
            key
            for service_id in ("", *self._services_on.get(node, ()))
            for key in self._checks_of.get((node, service_id), ())
        ]
        return [self.checks[node, key] for key in sorted(keys)]

    # Writes

    def register(self, command: Register, index: int, changed: set[WatchKey]) -> None:
        """Upserts the node, its service and its checks. Raises Refused and changes nothing when any is not valid."""
        node = command.node
        key = fold(node.node)
        old = self.nodes.get(key)
        node_changes = old is None or (not command.skip_node_update and not _same_node(node, old))
        self._require_valid(command, key, node_changes=node_changes)
        if node_changes:
            self._put_node(key, node, index, changed)
        if command.service is not None:
            self._put_service(key, command.service, index, changed)
        for check in command.checks:
            self._put_check(key, check, index, changed)

    def deregister(self, command: Deregister, index: int, changed: set[WatchKey]) -> None:
        """Removes what the command names; what is not there is gone already."""
        key = fold(command.node)
        if command.service_id:
            self._remove_service((key, fold(command.service_id)), index, changed)
        elif command.check_id:
            self._remove_check((key, fold(command.check_id)), index, changed)
        else:
            self._remove_node(key, index, changed)

    def restore_row(self, node: str, row: Node | Service | Check) -> None:
        """Adds a row of a snapshot: nodes first, then services, then checks. Raises Refused when it does not fit."""
        if isinstance(row, Node):
            if node in self.nodes:
                raise Refused(f"node {row.node!r} is there twice")
            if row.node_id and fold(row.node_id) in self._node_by_id:
                raise Refused(f"node ID {row.node_id} is there twice")
            self.nodes[node] = row
            if row.node_id:
                self._node_by_id[fold(row.node_id)] = node
            return
        if node not in self.nodes:
            raise Refused(f"a row belongs to node {node!r}, which is not there")
        if isinstance(row, Service):
            key = (node, fold(row.service_id))
            if key in self.services:
                raise Refused(f"service {row.service_id!r} on node {node!r} is there twice")
            self.services[key] = row
            self._services_on.setdefault(node, {})[key[1]] = None
            for group in groups_of(row):
                self._instances.setdefault(group, {})[key] = None
            return
        if row.service_id and (node, fold(row.service_id)) not in self.services:
            raise Refused(f"check {row.check_id!r} belongs to service {row.service_id!r}, which is not there")
        key = (node, fold(row.check_id))
        if key in self.checks:
            raise Refused(f"check {row.check_id!r} on node {node!r} is there twice")
        self.checks[key] = row
        self._checks_of.setdefault((node, fold(row.service_id)), {})[key[1]] = None

    def require_complete(self) -> None:
        """Raises ProtocolError unless every node and group that restored rows made has its index, and no other has."""
        indexes = self.indexes
        complete = (
            indexes.of_node.keys() == self.nodes.keys() == indexes.of_node_checks.keys()
            and indexes.of_group.keys() == self._instances.keys()
        )
        if not complete:
            raise ProtocolError("the snapshot contradicts itself: the catalog's rows and their indexes differ")

    # Validation

    def _require_valid(self, command: Register, key: str, *, node_changes: bool) -> None:
        node, service = command.node, command.service
        if not node.node:
            raise Refused("Must provide node")
        require_printable("node name", node.node)
        require_printable("node ID", node.node_id)
        require_printable("node address", node.address)
        if node_changes:
            if not node.address and not command.skip_node_update:
                raise Refused("Must provide address if SkipNodeUpdate is not set")
            self._require_free_name(key, node)
        if service is not None:
            require_service(service)
        for check in command.checks:
            if not check.check_id:
                raise Refused(f"check {check.name!r} on node {node.node!r} has no ID")
            require_printable("check ID", check.check_id)
            if fold(check.node) != key:
                raise Refused(f'check node "{check.node}" does not match node "{node.node}"')
            service_id = fold(check.service_id)
            registers_it = service is not None and fold(service.service_id) == service_id
            if service_id and not registers_it and (key, service_id) not in self.services:
                raise Refused("Missing service registration")

    def _require_free_name(self, key: str, node: Node) -> None:
        """A node with an ID may take the name of another only if that one has failed, or never had an ID."""
        if not node.node_id:
            return
        holder = self.nodes.get(key)
        if holder is None or fold(holder.node_id) == fold(node.node_id):
            return
        renames = self._node_by_id.get(fold(node.node_id)) is not None
        if not holder.node_id and not renames:
            return
        serf_health = self.checks.get((key, fold(SERF_HEALTH_ID)))
        if serf_health is not None and serf_health.status != "critical":
            raise Refused(
                f'Error while renaming Node ID: "{node.node_id}": Node name {node.node} is reserved by node '
                f"{holder.node_id} with name {holder.node} ({holder.address})"
            )

    # Nodes

    def _put_node(self, key: str, node: Node, index: int, changed: set[WatchKey]) -> None:
        former_key = self._node_by_id.get(fold(node.node_id)) if node.node_id else None
        if former_key is not None and former_key != key:
            self._remove_node(former_key, index, changed)  # the host goes by another name now
        old = self.nodes.get(key)
        if old is not None and old.node_id:
            del self._node_by_id[fold(old.node_id)]
        if node.node_id:
            self._node_by_id[fold(node.node_id)] = key
        created = old.create_index if old is not None else index
        self.nodes[key] = replace(node, create_index=created, modify_index=index)
        if old is None:
            self.indexes.of_node_checks[key] = index
            changed.add(node_checks_key(key))
        self.indexes.nodes = self.indexes.of_node[key] = index
        changed.update((NODES, node_key(key)))
        for service_id in self._services_on.get(key, ()):
            self._touch_groups(self.services[key, service_id], index, changed)

    def _remove_node(self, key: str, index: int, changed: set[WatchKey]) -> None:
        old = self.nodes.get(key)
        if old is None:
            return
        for service_id in self.service_keys_on(key):
            self._remove_service((key, service_id), index, changed)
        for check in list(self.checks_of(key, "")):
            self._remove_check((key, fold(check.check_id)), index, changed)
        del self.nodes[key], self.indexes.of_node[key], self.indexes.of_node_checks[key]
        if old.node_id:
            del self._node_by_id[fold(old.node_id)]
        self.indexes.nodes = index
        changed.update((NODES, node_key(key), node_checks_key(key)))

    # Services

    def _put_service(self, node: str, service: Service, index: int, changed: set[WatchKey]) -> None:
        key = (node, fold(service.service_id))
        old = self.services.get(key)
        if old is not None and same(
            replace(service, create_index=old.create_index, modify_index=old.modify_index), old
        ):
            return
        created = old.create_index if old is not None else index
        row = replace(service, create_index=created, modify_index=index)
        self.services[key] = row
        self._services_on.setdefault(node, {})[key[1]] = None
        groups = groups_of(row)
        for group in groups:
            self._instances.setdefault(group, {})[key] = None
        if old is not None:
            self._touch_groups(old, index, changed)
            for group in groups_of(old):
                if group not in groups:
                    self._leave_group(group, key, index)
        self._touch_groups(row, index, changed)
        self._touch_services(node, index, changed)
        if old is not None and (old.service, old.service_id, old.tags) != (row.service, row.service_id, row.tags):
            for check in list(self.checks_of(*key)):
                self._put_check(node, check, index, changed)

    def _remove_service(self, key: RowKey, index: int, changed: set[WatchKey]) -> None:
        old = self.services.get(key)
        if old is None:
            return
        for check in list(self.checks_of(*key)):
            self._remove_check((key[0], fold(check.check_id)), index, changed)
        del self.services[key]
        del self._services_on[key[0]][key[1]]
        if not self._services_on[key[0]]:
            del self._services_on[key[0]]
        self._touch_groups(old, index, changed)
        for group in groups_of(old):
            self._leave_group(group, key, index)
        self._touch_services(key[0], index, changed)

    def _leave_group(self, group: WatchKey, key: RowKey, index: int) -> None:
        instances = self._instances[group]
        del instances[key]
        if not instances:
            del self._instances[group], self.indexes.of_group[group]
            for passing_only in (False, True):
                self._health.pop((group, passing_only), None)
            self.indexes.extinction = index

    def _touch_groups(self, service: Service, index: int, changed: set[WatchKey]) -> None:
        for group in groups_of(service):
            self.indexes.of_group[group] = index
            changed.add(group)

    def _touch_services(self, node: str, index: int, changed: set[WatchKey]) -> None:
        self.indexes.services = self.indexes.of_node[node] = index
        changed.update((SERVICES, node_key(node)))

    # Checks

    def _put_check(self, node: str, check: Check, index: int, changed: set[WatchKey]) -> None:
        key = (node, fold(check.check_id))
        row = replace(check, node=self.nodes[node].node)
        if check.service_id:
            service = self.services[node, fold(check.service_id)]
            row = replace(row, service_id=service.service_id, service_name=service.service, service_tags=service.tags)
        else:
            row = replace(row, service_name="", service_tags=())
        old = self.checks.get(key)
        if old is not None:
            row = replace(row, create_index=old.create_index, modify_index=old.modify_index)
            if same(row, old):
                return
            self._unlink_check(key, old, index, changed)
        created = old.create_index if old is not None else index
        self.checks[key] = replace(row, create_index=created, modify_index=index)
        self._checks_of.setdefault((node, fold(row.service_id)), {})[key[1]] = None
        self._touch_checks(node, row, index, changed)

    def _remove_check(self, key: RowKey, index: int, changed: set[WatchKey]) -> None:
        old = self.checks.get(key)
        if old is None:
            return
        self._unlink_check(key, old, index, changed)
        del self.checks[key]

    def _unlink_check(self, key: RowKey, old: Check, index: int, changed: set[WatchKey]) -> None:
        owner = (key[0], fold(old.service_id))
        del self._checks_of[owner][key[1]]
        if not self._checks_of[owner]:
            del self._checks_of[owner]
        self._touch_checks(key[0], old, index, changed)

    def _touch_checks(self, node: str, check: Check, index: int, changed: set[WatchKey]) -> None:
        """A check bears on its service's readers, a node's own on those of every service there."""
        bears_on = (fold(check.service_id),) if check.service_id else tuple(self._services_on.get(node, ()))
        for service_id in bears_on:
            self._touch_groups(self.services[node, service_id], index, changed)
        self.indexes.checks = self.indexes.of_node_checks[node] = index
        changed.update((CHECKS, node_checks_key(node)))


def _same_node(new: Node, old: Node) -> bool:
    """Whether a registration says nothing new of the node; the case of its name is nothing new."""
    return same(replace(new, node=old.node, create_index=old.create_index, modify_index=old.modify_index), old)
