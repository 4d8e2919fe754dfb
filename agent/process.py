"""This process among others: the data directory's lock, systemd's notifications, signals."""

import fcntl
import logging
import os
import resource
import signal
import socket
from collections.abc import AsyncIterator, Iterator
from contextlib import contextmanager
from pathlib import Path

import trio

from mesh.errors import ConfigError

_LOG = logging.getLogger("mesh.agent")

LOCK_FILE = "agent.lock"
DESCRIPTORS_MAX = 65_536


@contextmanager
def locked_data_dir(data_dir: str) -> Iterator[None]:
    """Holds the data directory for this process alone; an empty name holds nothing.

    Raises ConfigError when another agent has it, or the lock file cannot be opened. The kernel lets go of the lock when
    the process dies, however it dies.
    """
    if not data_dir:
        yield
        return
    path = Path(data_dir) / LOCK_FILE
    try:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    except OSError as error:
        raise ConfigError(f"data_dir {data_dir}: cannot open {path}: {error.strerror}") from error
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            holder = os.pread(descriptor, 32, 0).decode("ascii", "replace").strip() or "unknown"
            raise ConfigError(
                f"data_dir {data_dir}: another agent (process {holder}) is running with it; stop that one first or "
                "give this one a data_dir of its own"
            ) from None
        os.ftruncate(descriptor, 0)
        os.pwrite(descriptor, f"{os.getpid()}\n".encode(), 0)
        yield
    finally:
        os.close(descriptor)


def raise_descriptor_limit() -> None:
    """Raises the soft limit of open files to the hard one, as far as DESCRIPTORS_MAX; never fails.

    The soft limit of 1024 that most systems start with is for programs that use select(2); this one does not.
    """
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = DESCRIPTORS_MAX if hard == resource.RLIM_INFINITY else min(hard, DESCRIPTORS_MAX)
    if soft != resource.RLIM_INFINITY and soft < wanted:
        try:
            resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))
        except (OSError, ValueError) as error:
            _LOG.warning("cannot raise the limit of open files from %d to %d: %s", soft, wanted, error)


def notify_systemd(state: str) -> None:
    """Sends a line such as `READY=1` to the service manager, if one listens (sd_notify(3)); never fails."""
    address = os.environ.get("NOTIFY_SOCKET", "")
    if not address.startswith(("/", "@")):
        return
    if address.startswith("@"):
        address = "\0" + address[1:]
    try:
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC) as stream:
            stream.settimeout(1.0)
            stream.sendto(state.encode(), address)
    except OSError as error:
        _LOG.warning("cannot notify systemd: %s", error)


@contextmanager
def stop_signals() -> Iterator[AsyncIterator[signal.Signals]]:
    """The SIGTERM and SIGINT that arrive, in order; SIGHUP does nothing while this is open."""
    with trio.open_signal_receiver(signal.SIGTERM, signal.SIGINT, signal.SIGHUP) as received:
        yield _stops(received)


async def _stops(received: AsyncIterator[int]) -> AsyncIterator[signal.Signals]:
    async for number in received:
        if number == signal.SIGHUP:
            _LOG.warning("reloading the configuration is not supported yet: restart the agent to change it")
        else:
            yield signal.Signals(number)
