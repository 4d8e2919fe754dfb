"""The files that an agent keeps its registrations in: one per service, per check by itself, and per TTL result.

A change is on disk (0600, fsynced) before whoever asked for it hears of it; a crash leaves each file old or new.
"""

import hashlib
import logging
import os
from collections.abc import Sequence
from pathlib import Path
from typing import TypeVar

import msgspec
import trio

from mesh.errors import StorageFailed
from mesh.model.catalog import Service
from mesh.model.check import CheckDefinition, CheckStatus

FILE_BYTES_MAX = 16 * 1024 * 1024

_LOG = logging.getLogger("mesh.local_state")

StoredT = TypeVar("StoredT")


class StoredService(msgspec.Struct, frozen=True):
    """A file of `services/`: a service and the checks that came with it."""

    service: Service
    checks: tuple[CheckDefinition, ...] = ()
    sidecar_of: str = ""  # ID of the service whose registration made this one


class StoredCheck(msgspec.Struct, frozen=True):
    """A file of `checks/`: a check registered by itself."""

    definition: CheckDefinition


class StoredResult(msgspec.Struct, frozen=True):
    """A file of `checks/state/`: what a TTL check was last told, good until `expires_at_s` (Unix seconds)."""

    check_id: str
    status: CheckStatus
    output: str
    expires_at_s: float


class FileChange(msgspec.Struct, frozen=True):
    """A file to replace, or with None to remove."""

    path: Path
    data: bytes | None


class LocalFiles:
    """The folders `services/`, `checks/` and `checks/state/` of a data directory. Without one nothing is kept."""

    def __init__(self, data_dir: Path | None) -> None:
        self._data_dir = data_dir

    def service(self, key: str, stored: StoredService | None) -> FileChange:
        """To keep the service, or with None to forget it; `key` is its folded ID."""
        return self._change("services", key, stored)

    def check(self, key: str, stored: StoredCheck | None) -> FileChange:
        """To keep a check registered by itself, or with None to forget it."""
        return self._change("checks", key, stored)

    def result(self, key: str, stored: StoredResult | None) -> FileChange:
        """To keep a TTL check's result, or with None to forget it."""
        return self._change("checks/state", key, stored)

    def _change(self, folder: str, key: str, stored: msgspec.Struct | None) -> FileChange:
        # IDs hold any characters, slashes too; a hash makes a file name of each.
        path = (self._data_dir or Path()) / folder / f"{hashlib.sha256(key.encode()).hexdigest()}.json"
        return FileChange(path, None if stored is None else msgspec.json.encode(stored))

    async def apply(self, changes: Sequence[FileChange], *, durable: bool = True) -> None:
        """Makes the changes; not fsynced unless `durable`. Raises StorageFailed."""
        if self._data_dir is not None and changes:
            # Not abandoned when the caller is cancelled: disk and memory change together.
            await trio.to_thread.run_sync(_write_all, changes, durable)

    async def read(self) -> tuple[list[StoredService], list[StoredCheck], list[StoredResult]]:
        """All that was kept. A file that cannot be understood is logged and left alone. Raises StorageFailed."""
        return ([], [], []) if self._data_dir is None else await trio.to_thread.run_sync(_read_all, self._data_dir)


def _write_all(changes: Sequence[FileChange], durable: bool) -> None:  # noqa: FBT001  (to_thread passes positionally)
    """Each file is replaced in one step: a crash leaves the old or the new one. Raises StorageFailed."""
    folders: set[Path] = set()
    for change in changes:
        try:
            if change.data is None:
                if not change.path.exists():
                    continue
                change.path.unlink()
            else:
                change.path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
                temporary = change.path.with_suffix(".tmp")
                descriptor = os.open(temporary, os.O_CREAT | os.O_WRONLY | os.O_TRUNC, 0o600)
                with open(descriptor, "wb") as file:
                    file.write(change.data)
                    file.flush()
                    if durable:
                        os.fsync(file.fileno())
                temporary.replace(change.path)
        except OSError as error:
            raise StorageFailed(f"{change.path}: cannot keep the registration: {error.strerror}") from error
        folders.add(change.path.parent)
    if durable:
        for folder in sorted(folders):
            descriptor = os.open(folder, os.O_RDONLY)
            try:
                os.fsync(descriptor)
            finally:
                os.close(descriptor)


def _read_all(
    data_dir: Path,
) -> tuple[list[StoredService], list[StoredCheck], list[StoredResult]]:
    return (
        _read_folder(data_dir / "services", msgspec.json.Decoder(StoredService)),
        _read_folder(data_dir / "checks", msgspec.json.Decoder(StoredCheck)),
        _read_folder(data_dir / "checks" / "state", msgspec.json.Decoder(StoredResult)),
    )


def _read_folder(folder: Path, decoder: "msgspec.json.Decoder[StoredT]") -> list[StoredT]:
    """What the folder's files hold, by file name. Raises StorageFailed when one cannot be read."""
    values: list[StoredT] = []
    try:
        paths = sorted(folder.glob("*.json")) if folder.exists() else []
        for path in paths:
            with path.open("rb") as file:
                data = file.read(FILE_BYTES_MAX)
            try:
                values.append(decoder.decode(data))
            except (msgspec.DecodeError, ValueError, RecursionError) as error:  # ValueError: not UTF-8
                _LOG.error("%s: cannot be understood and was not restored: %s", path, error)
    except OSError as error:
        raise StorageFailed(f"{folder}: cannot read what was registered before: {error.strerror}") from error
    return values
