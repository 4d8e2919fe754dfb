"""What an agent keeps on disk about itself: its data directory and its node ID."""

import os
import uuid
from collections.abc import Callable
from pathlib import Path

from agent.config.values import AgentConfig
from mesh.errors import ConfigError


def prepare_data_dir(config: AgentConfig) -> None:
    """Makes the data directory (0700) if it is missing. Raises ConfigError naming it when it cannot be written."""
    if not config.data_dir:
        return
    path = Path(config.data_dir)
    try:
        path.mkdir(mode=0o700, parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(f"data_dir {path}: cannot create it: {error.strerror}") from error
    if not os.access(path, os.R_OK | os.W_OK | os.X_OK):
        raise ConfigError(f"data_dir {path}: cannot read and write it: Permission denied")


def node_id(config: AgentConfig, new_uuid: Callable[[], str]) -> str:
    """The node's UUID: configured, else the one in `data_dir`/node-id, else a new one, which is kept there.

    Raises ConfigError naming the file when it cannot be read or written, or holds no UUID.
    """
    if config.node_id:
        return str(uuid.UUID(config.node_id))
    if not config.data_dir:
        return new_uuid()
    path = Path(config.data_dir) / "node-id"
    try:
        if path.exists():
            return str(uuid.UUID(path.read_text("ascii").strip()))
        fresh = new_uuid()
        temporary = path.with_name("node-id.tmp")
        with temporary.open("w", encoding="ascii") as file:
            file.write(f"{fresh}\n")
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    except OSError as error:
        raise ConfigError(f"{path}: {error.strerror}") from error
    except ValueError as error:
        raise ConfigError(f"{path}: holds no UUID; remove the file to get a new node ID") from error
    return fresh
