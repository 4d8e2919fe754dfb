"""Access log lines to a file, without ever waiting for it on the request path."""

import logging
import os
from pathlib import Path

from mesh.errors import ConfigError
from mesh.proxy.access_log import LogRecord, format_line

_LOG = logging.getLogger("mesh.dataplane")

BUFFER_LINES_MAX = 4096  # when the disk cannot keep up, lines are dropped and counted


class AccessLog:
    """Collects records; `flush` formats and writes them, from a task of the worker's."""

    def __init__(self, path: str) -> None:
        self.path = path
        self.dropped = 0
        self._records: list[LogRecord] = []
        try:
            flags = os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC
            self._descriptor = os.open("/dev/stdout" if path == "/dev/stdout" else Path(path), flags, 0o640)
        except OSError as error:
            raise ConfigError(f"the access log {path} cannot be opened: {error.strerror}") from error

    def add(self, record: LogRecord) -> None:
        """One request."""
        if len(self._records) < BUFFER_LINES_MAX:
            self._records.append(record)
        else:
            self.dropped += 1

    def flush(self) -> None:
        """Writes what has been collected."""
        if not self._records:
            return
        records, self._records = self._records, []
        try:
            os.write(self._descriptor, "".join(map(format_line, records)).encode())
        except OSError as error:
            self.dropped += len(records)
            _LOG.warning("the access log %s cannot be written: %s", self.path, error.strerror)

    def close(self) -> None:
        """Writes the rest and closes the file."""
        self.flush()
        os.close(self._descriptor)
