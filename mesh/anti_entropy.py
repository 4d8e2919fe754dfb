"""What an agent must write for the catalog to show its services and checks: the agent is right about its own node.

Pure comparison: when to sync, how often to retry, and how long changes of output alone may wait is the caller's.
"""

from collections.abc import Collection, Iterable

from msgspec.structs import replace

from mesh.model.catalog import Node, Service
from mesh.model.check import SERF_HEALTH_ID, Check
from mesh.model.command import Command, Deregister, Register
from mesh.model.equality import same
from mesh.names import fold

CONSUL_SERVICE_ID = "consul"  # kept by the leader on every server, as serfHealth is on every node


def same_node(one: Node, other: Node) -> bool:
    """Whether both rows say the same, indexes and the case of the name aside."""
    return same(
        replace(one, node=fold(one.node), create_index=0, modify_index=0),
        replace(other, node=fold(other.node), create_index=0, modify_index=0),
    )


def same_service(one: Service, other: Service) -> bool:
    """Whether both rows say the same, indexes aside."""
    return same(replace(one, create_index=0, modify_index=0), replace(other, create_index=0, modify_index=0))


def same_check(one: Check, other: Check, *, ignore_output: bool = False) -> bool:
    """Whether both rows say the same, aside from indexes and from what the catalog derives from the service."""
    return same(_told(one, ignore_output=ignore_output), _told(other, ignore_output=ignore_output))


def plan(
    services: Iterable[Service],
    checks: Iterable[Check],
    catalog_services: Iterable[Service],
    catalog_checks: Iterable[Check],
    node: Node,
    *,
    catalog_node: Node | None,
    deferred_checks: Collection[str] = (),
) -> tuple[Command, ...]:
    """The commands that bring the catalog's rows of this node (`catalog_*`, None when it has no such node) up to date.

    In an order in which each is valid: the node, then services with their changed checks, then other checks. What the
    catalog has and the agent does not is deregistered, except the service `consul` and the check serfHealth. A
    service with `enable_tag_override` keeps the tags that the catalog has. Of the checks in `deferred_checks` (IDs) a
    change of output alone is no change. Nothing to do gives an empty tuple.
    """
    commands: list[Command] = []
    if catalog_node is None or not same_node(node, catalog_node):
        commands.append(Register(node))
    wanted_services = {fold(one.service_id): one for one in services}
    known_services = {fold(one.service_id): one for one in catalog_services}
    wanted_checks = {fold(one.check_id): one for one in checks}
    known_checks = {fold(one.check_id): one for one in catalog_checks}
    deferred = {fold(check_id) for check_id in deferred_checks}

    unknown_services = known_services.keys() - wanted_services.keys() - {CONSUL_SERVICE_ID}
    for service_id in sorted(unknown_services):
        commands.append(Deregister(node.node, service_id=known_services[service_id].service_id))

    changed_checks = {
        check_id: check
        for check_id, check in sorted(wanted_checks.items())
        if check_id not in known_checks
        or not same_check(check, known_checks[check_id], ignore_output=check_id in deferred)
        or fold(known_checks[check_id].service_id) in unknown_services  # goes with the service: say it again
    }
    for service_id, service in sorted(wanted_services.items()):
        known = known_services.get(service_id)
        if known is not None and service.enable_tag_override:
            service = replace(service, tags=known.tags)
        if known is None or not same_service(service, known):
            its_ids = [one for one, check in changed_checks.items() if fold(check.service_id) == service_id]
            its_rows = tuple(changed_checks.pop(one) for one in its_ids)
            commands.append(Register(node, service, its_rows, skip_node_update=True))

    for check_id, known_check in sorted(known_checks.items()):
        if check_id in wanted_checks or check_id == fold(SERF_HEALTH_ID):
            continue
        owner = fold(known_check.service_id)
        if owner in unknown_services or (owner == CONSUL_SERVICE_ID and owner not in wanted_services):
            continue
        commands.append(Deregister(node.node, check_id=known_check.check_id))
    for check in changed_checks.values():
        commands.append(Register(node, None, (check,), skip_node_update=True))
    return tuple(commands)


def _told(check: Check, *, ignore_output: bool) -> Check:
    return replace(
        check,
        node=fold(check.node),
        service_id=fold(check.service_id),
        output="" if ignore_output else check.output,
        service_name="",
        service_tags=(),
        create_index=0,
        modify_index=0,
    )
