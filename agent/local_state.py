"""What this agent says about its own host: services, checks, and their latest results.

Everything registered through the API is on disk (0600, fsynced) before the caller hears of it, and back after a
restart; what configuration files define is not kept, as it comes back by itself. All reads are of memory and never
wait. IDs are folded as in the catalog: `Web` and `web` are one service.
"""

import logging
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Literal

import msgspec
import trio
from msgspec.structs import replace

from agent.definitions import SIDECAR_SUFFIX, ServiceDefinition, check_row, with_sidecar_port
from agent.local_files import FileChange, LocalFiles, StoredCheck, StoredResult, StoredService
from agent.runtime import Runtime
from mesh.errors import InvalidRequest, LimitExceeded, NotFound
from mesh.model.catalog import Service
from mesh.model.check import Check, CheckDefinition, CheckStatus
from mesh.names import fold

Source = Literal["api", "config"]

SERVICES_MAX = 16384  # of one host; each costs memory on every server
CHECKS_MAX = 4 * SERVICES_MAX


_log = logging.getLogger("mesh.local_state")


class _ServiceEntry(msgspec.Struct, frozen=True):
    stored: StoredService
    source: Source


class _CheckEntry(msgspec.Struct, frozen=True):
    definition: CheckDefinition
    row: Check
    source: Source
    with_service: bool  # its definition is kept in its service's file


class LocalState:
    """The services and checks of one agent. Changes are serialised; each calls every subscriber once it is in force."""

    def __init__(
        self,
        node_name: str,
        runtime: Runtime,
        *,
        data_dir: Path | None = None,
        sidecar_ports: tuple[int, int] = (21000, 21255),
        check_output_bytes_max: int = 4096,
    ) -> None:
        """`data_dir` None keeps nothing. `sidecar_ports`: lowest and highest given to sidecars that name none."""
        self._node_name = node_name
        self._runtime = runtime
        self._files = LocalFiles(data_dir)
        self._sidecar_ports = sidecar_ports
        self._check_output_bytes_max = check_output_bytes_max
        self._services: dict[str, _ServiceEntry] = {}
        self._checks: dict[str, _CheckEntry] = {}
        self._restored_expiries: dict[str, float] = {}
        # Checks that were there before this process and have not run in it yet: what the catalog says of them is a
        # better guess than critical, which would take every service of a restarting agent out of service.
        self._unproven: set[str] = set()
        self._services_view: tuple[Service, ...] | None = None  # made once per change
        self._checks_view: tuple[Check, ...] | None = None
        self.definitions_version = 0  # grows when checks are added, removed or defined otherwise
        self._subscribers: dict[object, Callable[[], None]] = {}
        self._lock = trio.Lock()

    # -- reads

    def services(self) -> tuple[Service, ...]:
        """By ID ascending."""
        if self._services_view is None:
            self._services_view = tuple(self._services[key].stored.service for key in sorted(self._services))
        return self._services_view

    def checks(self) -> tuple[Check, ...]:
        """By ID ascending."""
        if self._checks_view is None:
            self._checks_view = tuple(self._checks[key].row for key in sorted(self._checks))
        return self._checks_view

    def service(self, service_id: str) -> Service | None:
        entry = self._services.get(fold(service_id))
        return entry.stored.service if entry else None

    def check(self, check_id: str) -> Check | None:
        entry = self._checks.get(fold(check_id))
        return entry.row if entry else None

    def definition(self, check_id: str) -> CheckDefinition | None:
        """How the check is run, or None when there is no such check."""
        entry = self._checks.get(fold(check_id))
        return entry.definition if entry else None

    def checks_of(self, service_id: str) -> tuple[Check, ...]:
        """The checks of one service, by ID ascending."""
        key = fold(service_id)
        return tuple(check for check in self.checks() if check.service_id and fold(check.service_id) == key)

    def is_proven(self, check_id: str) -> bool:
        """False for a check from before a restart that has had no result since."""
        return fold(check_id) not in self._unproven

    def restored_expiry_s(self, check_id: str) -> float | None:
        """When (Unix seconds) the TTL result restored from disk lapses; None when none was restored."""
        return self._restored_expiries.get(fold(check_id))

    def subscribe(self, callback: Callable[[], None]) -> Callable[[], None]:
        """Has `callback` called after every change; it must not wait. Returns what ends the subscription."""
        token = object()
        self._subscribers[token] = callback

        def unsubscribe() -> None:
            self._subscribers.pop(token, None)

        return unsubscribe

    def _notify(self, *, redefined: bool = False) -> None:
        self._checks_view = None
        if redefined:
            self._services_view = None
            self.definitions_version += 1
        for callback in tuple(self._subscribers.values()):
            callback()

    # -- services

    async def add_service(
        self, definition: ServiceDefinition, *, source: Source = "api", replace_checks: bool = False
    ) -> None:
        """Registers or re-registers a service, its checks and its sidecar, and keeps them.

        Checks that are there already keep their status. Earlier checks of the service that the definition does not
        name stay, unless `replace_checks`. Raises InvalidRequest, LimitExceeded, StorageFailed; then nothing changed.
        """
        async with self._lock:
            services, checks, gone = self._merged(definition, source, replace_checks=replace_checks)
            changes = [self._service_change(entry) for entry in services.values()]
            moved = [key for key, entry in checks.items() if entry.with_service and self._has_own_file(key)]
            changes += [self._files.check(key, None) for key in moved]
            changes += self._check_removals(sorted(gone))
            await self._files.apply(changes)
            self._services |= services
            for key in gone:
                self._drop_check(key)
            new = checks.keys() - self._checks.keys()
            self._checks |= checks
            if source == "config":
                self._note_unproven(new)
        self._notify(redefined=True)

    def _merged(
        self, definition: ServiceDefinition, source: Source, *, replace_checks: bool
    ) -> tuple[dict[str, _ServiceEntry], dict[str, _CheckEntry], set[str]]:
        """The entries to put and the check keys to drop. Raises InvalidRequest, LimitExceeded."""
        parts = [(definition, "")]
        if definition.sidecar is not None:
            port = definition.sidecar.service.port or self._sidecar_port(definition.sidecar.service)
            placed = with_sidecar_port(definition.sidecar, definition.service, port)
            parts.append((placed, definition.service.service_id))
        services: dict[str, _ServiceEntry] = {}
        checks: dict[str, _CheckEntry] = {}
        gone: set[str] = set()
        for part, sidecar_of in parts:
            key = fold(part.service.service_id)
            rows = {fold(check.check_id): check for check in part.checks}
            earlier = self._checks_with(key)
            if replace_checks:
                gone |= earlier.keys() - rows.keys()
            for check_key, entry in earlier.items():
                if check_key not in rows and check_key not in gone:
                    checks[check_key] = replace(entry, row=_of_service(entry.row, part.service))
            kept = tuple(entry.definition for key, entry in checks.items() if key in earlier and entry.with_service)
            for check_key, check in rows.items():
                self._refuse_foreign(check_key, part.service)
                checks[check_key] = self._check_entry(check, part.service, source, with_service=True)
            stored = StoredService(part.service, (*kept, *part.checks), sidecar_of)
            services[key] = _ServiceEntry(stored, source)
        if len(self._services.keys() | services.keys()) > SERVICES_MAX:
            raise LimitExceeded(f"this agent has {SERVICES_MAX} services, the most it takes; deregister some first")
        if len(self._checks.keys() | checks.keys()) > CHECKS_MAX:
            raise LimitExceeded(f"this agent has {CHECKS_MAX} checks, the most it takes; deregister some first")
        return services, checks, gone

    def _checks_with(self, service_key: str) -> dict[str, _CheckEntry]:
        return {
            key: entry
            for key, entry in sorted(self._checks.items())
            if entry.definition.service_id and fold(entry.definition.service_id) == service_key
        }

    def _refuse_foreign(self, check_key: str, service: Service) -> None:
        entry = self._checks.get(check_key)
        if entry is None or fold(entry.definition.service_id) == fold(service.service_id):
            return
        owner = f"service {entry.definition.service_id!r}" if entry.definition.service_id else "the node"
        raise InvalidRequest(f"Invalid check: the ID {entry.definition.check_id!r} is used by a check of {owner}")

    def _sidecar_port(self, sidecar: Service) -> int:
        """The port it already has, else the lowest that no service of this agent uses. Raises InvalidRequest."""
        known = self.service(sidecar.service_id)
        if known is not None and known.port:
            return known.port
        taken = {entry.stored.service.port for entry in self._services.values()}
        low, high = self._sidecar_ports
        for port in range(low, high + 1):
            if port not in taken:
                return port
        raise InvalidRequest(f"Invalid SidecarService: none of the ports {low} to {high} is left; name one")

    async def remove_service(self, service_id: str) -> None:
        """Forgets a service, its checks, and the sidecar that came with it. Raises NotFound, StorageFailed."""
        async with self._lock:
            key = fold(service_id)
            if key not in self._services:
                raise NotFound(
                    f'Unknown service ID "{service_id}". Ensure that the service ID is passed, not the service name.'
                )
            keys = [key]
            sidecar = self._services.get(fold(service_id + SIDECAR_SUFFIX))
            if sidecar is not None and fold(sidecar.stored.sidecar_of) == key:
                keys.append(fold(sidecar.stored.service.service_id))
            checks = [check_key for each in keys for check_key in self._checks_with(each)]
            changes = [self._files.service(each, None) for each in keys]
            await self._files.apply([*changes, *self._check_removals(checks)])
            for each in keys:
                del self._services[each]
            for check_key in checks:
                self._drop_check(check_key)
        self._notify(redefined=True)

    # -- checks

    async def add_check(self, definition: CheckDefinition, *, source: Source = "api") -> None:
        """Registers or re-registers a check by itself and keeps it; it keeps a status that it has already.

        Raises NotFound for a service ID that is not registered here, InvalidRequest, LimitExceeded, StorageFailed.
        """
        async with self._lock:
            service = self.service(definition.service_id) if definition.service_id else None
            if definition.service_id and service is None:
                raise NotFound(f'ServiceID "{definition.service_id}" does not exist')
            if service is not None:
                definition = replace(definition, service_id=service.service_id)
            key = fold(definition.check_id)
            if len(self._checks.keys() | {key}) > CHECKS_MAX:
                raise LimitExceeded(f"this agent has {CHECKS_MAX} checks, the most it takes; deregister some first")
            earlier = self._checks.get(key)
            entry = self._check_entry(definition, service, source, with_service=False)
            changes = [self._check_change(key, entry)]
            owner = self._without_check(earlier) if earlier else None
            if owner is not None:
                changes.append(self._service_change(owner))
            await self._files.apply(changes)
            if owner is not None:
                self._services[fold(owner.stored.service.service_id)] = owner
            is_new = key not in self._checks
            self._checks[key] = entry
            if is_new and source == "config":
                self._note_unproven([key])
        self._notify(redefined=True)

    async def remove_check(self, check_id: str) -> None:
        """Forgets a check. Raises NotFound, StorageFailed."""
        async with self._lock:
            key = fold(check_id)
            entry = self._checks.get(key)
            if entry is None:
                raise NotFound(
                    f'Unknown check ID "{check_id}". Ensure that the check ID is passed, not the check name.'
                )
            owner = self._without_check(entry)
            changes = self._check_removals([key])
            if owner is not None:
                changes.append(self._service_change(owner))
            await self._files.apply(changes)
            if owner is not None:
                self._services[fold(owner.stored.service.service_id)] = owner
            self._drop_check(key)
        self._notify(redefined=True)

    def update_check(self, check_id: str, *, status: CheckStatus, output: str) -> None:
        """Notes a result; output beyond the check's limit is cut. A check that is gone by now is left alone."""
        key = fold(check_id)
        entry = self._checks.get(key)
        if entry is None:
            return
        was_unproven = key in self._unproven
        self._unproven.discard(key)
        limit = self._check_output_bytes_max
        if entry.definition.output_bytes_max:
            limit = min(limit, entry.definition.output_bytes_max)
        row = replace(entry.row, status=status, output=cut_output(output, limit))
        if row != entry.row or was_unproven:
            self._checks[key] = replace(entry, row=row)
            self._notify()

    def adopt_results(self, rows: Iterable[Check]) -> None:
        """Takes the catalog's word for the checks that have not run since a restart."""
        changed = False
        for row in rows:
            key = fold(row.check_id)
            entry = self._checks.get(key)
            if entry is None or key not in self._unproven:
                continue
            adopted = replace(entry.row, status=row.status, output=row.output)
            changed = changed or adopted != entry.row
            self._checks[key] = replace(entry, row=adopted)
        if changed:
            self._notify()

    async def keep_result(self, check_id: str, *, expires_at_s: float) -> None:
        """Keeps a TTL check's latest result for a restart before `expires_at_s` (Unix seconds).

        Not fsynced: losing it in a crash costs one round of the application's heartbeat. Raises StorageFailed.
        """
        entry = self._checks.get(fold(check_id))
        if entry is None:
            return
        result = StoredResult(entry.row.check_id, entry.row.status, entry.row.output, expires_at_s)
        await self._files.apply([self._files.result(fold(check_id), result)], durable=False)

    def _check_entry(
        self, definition: CheckDefinition, service: Service | None, source: Source, *, with_service: bool
    ) -> _CheckEntry:
        row = check_row(definition, node=self._node_name, service=service, status=definition.status or "critical")
        earlier = self._checks.get(fold(definition.check_id))
        # Registering a service again must not flap its health; a check registered by itself may set its status anew.
        if earlier is not None and (with_service or not definition.status):
            row = replace(row, status=earlier.row.status, output=earlier.row.output)
        return _CheckEntry(definition, row, source, with_service)

    def _without_check(self, entry: _CheckEntry) -> _ServiceEntry | None:
        """The entry of the service whose file holds the check, without it; None when no file does."""
        if not entry.with_service:
            return None
        owner = self._services[fold(entry.definition.service_id)]
        key = fold(entry.definition.check_id)
        checks = tuple(check for check in owner.stored.checks if fold(check.check_id) != key)
        return replace(owner, stored=replace(owner.stored, checks=checks))

    def _note_unproven(self, keys: Iterable[str]) -> None:
        for key in keys:
            definition = self._checks[key].definition
            if definition.type in ("http", "tcp", "alias") and not definition.status:
                self._unproven.add(key)

    def _drop_check(self, key: str) -> None:
        self._unproven.discard(key)
        self._checks.pop(key, None)
        self._restored_expiries.pop(key, None)

    # -- disk

    def _service_change(self, entry: _ServiceEntry) -> FileChange:
        key = fold(entry.stored.service.service_id)
        return self._files.service(key, entry.stored if entry.source == "api" else None)

    def _check_change(self, key: str, entry: _CheckEntry) -> FileChange:
        return self._files.check(key, StoredCheck(entry.definition) if entry.source == "api" else None)

    def _check_removals(self, keys: Iterable[str]) -> list[FileChange]:
        """Of a check and its result, whichever has a file."""
        return [change for key in keys for change in (self._files.check(key, None), self._files.result(key, None))]

    def _has_own_file(self, check_key: str) -> bool:
        entry = self._checks.get(check_key)
        return entry is not None and not entry.with_service and entry.source == "api"

    async def restore(self) -> None:
        """Loads what was kept. A file that cannot be understood is logged and left alone. Raises StorageFailed."""
        services, checks, results = await self._files.read()
        for stored in services:
            service_id = stored.service.service_id
            stored = replace(stored, checks=tuple(replace(check, service_id=service_id) for check in stored.checks))
            self._services[fold(service_id)] = _ServiceEntry(stored, "api")
            for check in stored.checks:
                entry = self._check_entry(check, stored.service, "api", with_service=True)
                self._checks[fold(check.check_id)] = entry
        for stored_check in checks:
            definition = stored_check.definition
            service = self.service(definition.service_id) if definition.service_id else None
            if definition.service_id and service is None:
                _log.warning("check %s: its service %s is gone; dropped", definition.check_id, definition.service_id)
                continue
            entry = self._check_entry(definition, service, "api", with_service=False)
            self._checks[fold(definition.check_id)] = entry
        self._restore_results(results)
        self._note_unproven(self._checks)
        self._notify(redefined=True)

    def _restore_results(self, results: Iterable[StoredResult]) -> None:
        now_s = self._runtime.unix_time_s()
        for result in results:
            key = fold(result.check_id)
            entry = self._checks.get(key)
            # A clock set back must not stretch a result beyond one TTL.
            if entry is None or not now_s < result.expires_at_s <= now_s + entry.definition.ttl_s:
                continue
            row = replace(entry.row, status=result.status, output=result.output)
            self._checks[key] = replace(entry, row=row)
            self._restored_expiries[key] = result.expires_at_s


def _of_service(row: Check, service: Service) -> Check:
    return replace(row, service_name=service.service, service_tags=service.tags)


def cut_output(output: str, bytes_max: int) -> str:
    """The output as it stands, or its first `bytes_max` bytes and a note on how many there were."""
    data = output.encode("utf-8", "replace")
    if len(data) <= bytes_max:
        return output
    return f"{data[:bytes_max].decode('utf-8', 'ignore')} ... (captured {bytes_max} of {len(data)} bytes)"
