"""Leaves on disk: `<data_dir>/leaves/`, directory mode 0700, files mode 0600.

Why at all: an agent that restarts keeps the leaves it has. Its sidecars' contexts stay as they are, a rolling restart
of a thousand agents does not send the leader a thousand requests at once, and identities are there while every server
is away. Keys lie in clear inside the data directory and nowhere else.
"""

import hashlib
import logging
import os
from pathlib import Path
from typing import TypeVar

import msgspec

from mesh.errors import ProtocolError
from mesh.model.ca import CaRoots, IssuedLeaf
from mesh.wire import Codec

_LOG = logging.getLogger("mesh.leaves")

FILE_BYTES_MAX = 256 * 1024  # a leaf, its chain and a key are a few KiB
FILES_MAX = 8192  # looked at when old ones are cleared away


class StoredLeaf(msgspec.Struct, frozen=True):
    """One file's content. `service` is repeated in it because the file's name is only a digest."""

    service: str
    private_key_pem: str
    issued: IssuedLeaf

    def __repr__(self) -> str:
        """Without the key."""
        return f"StoredLeaf({self.service!r}, serial {self.issued.serial_number})"


T = TypeVar("T")

_LEAVES: Codec[StoredLeaf] = Codec(StoredLeaf)
_ROOTS: Codec[CaRoots] = Codec(CaRoots)


class LeafFiles:
    """The directory. Every method blocks and is for a worker thread; none raises for a bad disk or file: what cannot be
    kept is made again, with a line in the log.
    """

    def __init__(self, data_dir: Path) -> None:
        self._directory = data_dir / "leaves"

    def _path(self, service: str) -> Path:
        return self._directory / f"{hashlib.sha256(service.encode()).hexdigest()[:32]}.leaf"

    def load(self, service: str) -> StoredLeaf | None:
        """The service's leaf as it was saved, or None."""
        stored = self._read(self._path(service), _LEAVES)
        return stored if stored is not None and stored.service == service else None

    def load_roots(self) -> CaRoots | None:
        """The trust roots as they were saved, or None."""
        return self._read(self._directory / "roots", _ROOTS)

    def save(self, leaf: StoredLeaf) -> None:
        """Replaces the service's file in one step."""
        self._write(self._path(leaf.service), _LEAVES.encode(leaf))

    def save_roots(self, roots: CaRoots) -> None:
        """Replaces the roots' file in one step."""
        self._write(self._directory / "roots", _ROOTS.encode(roots))

    def remove(self, service: str) -> None:
        """Forgets the service's leaf."""
        self._unlink(self._path(service))

    def clear_expired(self, now_s: float) -> None:
        """Removes the files of leaves that expired before `now_s` (Unix seconds), and half-written ones."""
        try:
            paths = sorted(self._directory.iterdir())[:FILES_MAX]
        except OSError:
            return
        for path in paths:
            if path.suffix == ".tmp":
                self._unlink(path)
            elif path.suffix == ".leaf":
                stored = self._read(path, _LEAVES)
                if stored is not None and stored.issued.valid_before_s < now_s:
                    self._unlink(path)

    @staticmethod
    def _read(path: Path, codec: Codec[T]) -> T | None:
        try:
            with path.open("rb") as file:
                return codec.decode(file.read(FILE_BYTES_MAX + 1), bytes_max=FILE_BYTES_MAX)
        except FileNotFoundError:
            return None
        except (OSError, ProtocolError) as error:
            _LOG.warning("%s is not usable and will be replaced: %s", path, error)
            return None

    def _write(self, path: Path, data: bytes) -> None:
        temporary = path.with_suffix(".tmp")
        try:
            self._directory.mkdir(mode=0o700, parents=True, exist_ok=True)
            self._unlink(temporary)
            # O_EXCL: mode 0600 holds from the first byte, and a planted link is not followed.
            descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
            with open(descriptor, "wb") as file:
                file.write(data)
                file.flush()
                os.fsync(descriptor)
            os.replace(temporary, path)
        except OSError as error:
            _LOG.warning("could not save %s: %s; a restarted agent will ask for a new one", path, error)

    @staticmethod
    def _unlink(path: Path) -> None:
        try:
            path.unlink(missing_ok=True)
        except OSError as error:
            _LOG.warning("could not remove %s: %s", path, error)
