"""Starting worker processes, and finding those that an earlier agent left running.

Each worker has a control socket of its own in `<data_dir>/workers/`, so that a new one can be up before the old one has
drained.
"""

import hashlib
import logging
import os
import stat
import subprocess
import sys
import tempfile
from pathlib import Path

import trio

from agent.dataplane.control_client import ControlClient, connect
from mesh.errors import ConfigError, Unreachable

_LOG = logging.getLogger("mesh.supervisor")

START_TIMEOUT_S = 15.0  # interpreter and imports take 0.3 s; a machine that boots is slower
CONNECT_INTERVAL_S = 0.02
LOG_BYTES_MAX = 10 * 1024 * 1024  # looked at when a worker starts; one older file is kept
SOCKETS_MAX = 64
WORKERS_MAX = 8  # by default: each takes some 40 MiB, and 8 carry 100,000 requests/s
_SOCKET_PATH_BYTES_MAX = 100  # sun_path holds 108


def default_workers() -> int:
    """How many workers a host has unless its configuration says: one for each core that this process may use."""
    try:
        cores = len(os.sched_getaffinity(0))
    except AttributeError:  # not on macOS
        cores = os.cpu_count() or 1
    return min(cores, WORKERS_MAX)


class WorkerDirectory:
    """Where an agent's workers have their sockets and their log."""

    def __init__(self, data_dir: Path | None) -> None:
        """`data_dir` None (dev mode): a temporary directory that `remove` takes away. Raises ConfigError."""
        self._temporary: tempfile.TemporaryDirectory[str] | None = None
        self._last = 0
        try:
            if data_dir is None:
                self._temporary = tempfile.TemporaryDirectory(prefix="mesh-worker-")
                self.path = Path(self._temporary.name)
            else:
                self.path = self._own_directory(data_dir)
        except OSError as error:
            raise ConfigError(f"data_dir: no directory for the workers' sockets: {error}") from error
        self.log_path = None if data_dir is None else data_dir / "worker.log"

    @staticmethod
    def _own_directory(data_dir: Path) -> Path:
        path = (data_dir / "workers").absolute()
        if len(os.fsencode(path)) + len("/99999999.sock") > _SOCKET_PATH_BYTES_MAX:
            # The kernel bounds a unix socket's path; the digest finds the same directory after a restart.
            digest = hashlib.sha256(os.fsencode(path)).hexdigest()[:16]
            path = Path(tempfile.gettempdir()) / f"mesh-{os.getuid()}-{digest}"
        path.mkdir(mode=0o700, parents=True, exist_ok=True)
        status = path.lstat()
        if not stat.S_ISDIR(status.st_mode) or status.st_uid != os.getuid() or status.st_mode & 0o077:
            raise ConfigError(f"{path} must be a directory of this user with mode 0700; remove it and start again")
        return path

    def sockets(self) -> tuple[Path, ...]:
        """The control sockets there, newest worker first."""
        numbered = [(int(path.stem), path) for path in self.path.glob("*.sock") if path.stem.isdigit()]
        return tuple(path for _, path in sorted(numbered, reverse=True)[:SOCKETS_MAX])

    def next_socket(self) -> Path:
        """A path for a new worker's socket, newer than all there are and all that were given out."""
        newest = self.sockets()
        self._last = max(self._last, int(newest[0].stem) if newest else 0) + 1
        return self.path / f"{self._last}.sock"

    def forget(self, path: Path) -> None:
        """Removes the socket of a worker that is gone."""
        path.unlink(missing_ok=True)

    def remove(self) -> None:
        """Removes the temporary directory of dev mode; does nothing otherwise."""
        if self._temporary is not None:
            self._temporary.cleanup()

    def open_log(self) -> int | None:
        """A descriptor that the worker writes its log to, or None to share the agent's standard error."""
        if self.log_path is None:
            return None
        try:
            if self.log_path.exists() and self.log_path.stat().st_size > LOG_BYTES_MAX:
                self.log_path.replace(self.log_path.with_suffix(".log.1"))
            return os.open(self.log_path, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o600)
        except OSError as error:
            _LOG.warning("the worker's log %s cannot be written: %s; it goes to standard error", self.log_path, error)
            return None


async def start_worker(
    directory: WorkerDirectory, nursery: trio.Nursery, *, exit_with_agent: bool
) -> tuple[Path, ControlClient]:
    """A new worker, answering on its socket. It is in a session of its own: what ends the agent does not end it.

    Its exit status is collected, and logged when it is not 0, by a task in `nursery`. Raises Unreachable when it does
    not come up.
    """
    path = directory.next_socket()
    command = [sys.executable, "-m", "agent.dataplane.worker", "--control", str(path)]
    if exit_with_agent:
        command.append("--exit-with-agent")
    log = directory.open_log()
    try:
        process = await trio.lowlevel.open_process(
            command, stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True
        )
    except OSError as error:
        raise Unreachable(f"the worker process cannot be started: {error}") from error
    finally:
        if log is not None:
            os.close(log)
    nursery.start_soon(_reap, process)
    try:
        with trio.fail_after(START_TIMEOUT_S):
            while True:
                try:
                    return path, await connect(path)
                except Unreachable:
                    if process.poll() is not None:
                        where = f"; see {directory.log_path}" if directory.log_path is not None else ""
                        raise Unreachable(
                            f"the worker ended with status {process.returncode} as it started{where}"
                        ) from None
                await trio.sleep(CONNECT_INTERVAL_S)
    except BaseException as error:
        if process.returncode is None:
            process.kill()
        if isinstance(error, trio.TooSlowError):
            raise Unreachable(f"the worker was not ready within {START_TIMEOUT_S:g} s") from error
        raise


async def _reap(process: trio.Process) -> None:
    status = await process.wait()
    if status != 0:
        _LOG.warning("worker %d ended with status %d", process.pid, status)
