"""Lines to a file, a pipe or an inherited stream, by a thread: a slow disk or a reader that stalls delays no request.

A file is opened anew when it was renamed or removed (looked at once a second, while there is something to write) and
when `reopen` is called (SIGUSR1), so that log rotation needs nothing else.
"""

import contextlib
import logging
import os
import queue
import select
import stat
import threading
import time

from mesh.errors import ConfigError

_LOG = logging.getLogger("mesh.dataplane")

QUEUED_BYTES_MAX = 16 * 1024 * 1024  # not yet written; beyond it lines are dropped and counted
RENAMED_CHECK_S = 1.0
FAILURE_LOG_INTERVAL_S = 60.0
BLOCKED_WAIT_S = 1.0  # for an inherited non-blocking stream, between two looks whether we end

_STREAMS = {"/dev/stdout": 1, "/dev/stderr": 2}  # by number: a socket, as systemd gives, cannot be opened by its path
_FLAGS = os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC | os.O_NOCTTY | os.O_NONBLOCK


class LineFile:
    """One destination of lines. `write` never waits."""

    def __init__(self, path: str) -> None:
        """Raises ConfigError when it cannot be opened."""
        self.path = path
        self._descriptor = self._open()
        self._queue: queue.SimpleQueue[bytes | None] = queue.SimpleQueue()
        self._queued_bytes = 0  # ever, by the caller's thread
        self._done_bytes = 0  # of these, written or lost: by the writer's
        self._overflowed = 0
        self._failed = 0
        self._reopen_asked = False
        self._ending = False
        self._checked_at = time.monotonic()
        self._failure_logged_at = float("-inf")
        self._thread: threading.Thread | None = None

    def _open(self) -> int:
        try:
            if self.path in _STREAMS:
                return os.dup(_STREAMS[self.path])
            descriptor = os.open(self.path, _FLAGS, 0o640)
        except OSError as error:
            raise ConfigError(f"the access log {self.path} cannot be opened: {error.strerror}") from error
        return descriptor

    @property
    def dropped(self) -> int:
        """Lines that are lost: the queue was full, or the write failed."""
        return self._overflowed + self._failed

    def write(self, lines: list[bytes]) -> None:
        """Hands over whole lines."""
        data = b"".join(lines)
        # A request that outlives the configuration it began under may end when its log is closed.
        if self._ending or self._queued_bytes - self._done_bytes + len(data) > QUEUED_BYTES_MAX:
            self._overflowed += len(lines)
            return
        self._queued_bytes += len(data)
        self._queue.put(data)
        if self._thread is None:
            self._thread = threading.Thread(target=self._run, name="access-log", daemon=True)
            self._thread.start()

    def reopen(self) -> None:
        """Before the next line, whatever has become of the file."""
        self._reopen_asked = True

    def close(self, *, wait_s: float) -> None:
        """Writes the rest, for `wait_s` at most, and closes. Called once."""
        self._ending = True
        if self._thread is None:
            os.close(self._descriptor)
            return
        self._queue.put(None)  # the thread closes
        self._thread.join(wait_s)

    # ---- the writer's thread

    def _run(self) -> None:
        while (data := self._queue.get()) is not None:
            self._reopen_when_due()
            try:
                self._write_all(data)
            except OSError as error:
                self._failed += data.count(b"\n")
                self._complain(f"cannot be written: {error.strerror}")
            self._done_bytes += len(data)
        os.close(self._descriptor)

    def _write_all(self, data: bytes) -> None:
        rest = memoryview(data)
        while rest:
            try:
                rest = rest[os.write(self._descriptor, rest) :]
            except BlockingIOError:
                if self._ending:
                    raise
                select.select((), (self._descriptor,), (), BLOCKED_WAIT_S)

    def _reopen_when_due(self) -> None:
        asked, self._reopen_asked = self._reopen_asked, False
        now = time.monotonic()
        if self.path in _STREAMS or not (asked or now - self._checked_at >= RENAMED_CHECK_S):
            return
        self._checked_at = now
        if not asked and not self._is_moved():
            return
        try:
            descriptor = self._open()
        except ConfigError as error:
            self._complain(f"{error}; lines go where they went before")
            return
        os.close(self._descriptor)
        self._descriptor = descriptor

    def _is_moved(self) -> bool:
        with contextlib.suppress(OSError):
            current = os.fstat(self._descriptor)
            if not stat.S_ISREG(current.st_mode):
                return False
            try:
                found = os.stat(self.path)
            except FileNotFoundError:
                return True
            return (found.st_dev, found.st_ino) != (current.st_dev, current.st_ino)
        return False

    def _complain(self, what: str) -> None:
        now = time.monotonic()
        if now - self._failure_logged_at >= FAILURE_LOG_INTERVAL_S:
            self._failure_logged_at = now
            _LOG.warning("the access log %s %s", self.path, what)
