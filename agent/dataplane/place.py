"""One of an agent's workers, as the agent knows it: its process, what it holds, whom it follows."""

import logging
import os
import socket
from dataclasses import dataclass, field
from pathlib import Path

from agent.dataplane.control import (
    PROTOCOL,
    Ack,
    Adopt,
    Configure,
    Drain,
    Handover,
    HandoverReply,
    Nack,
    Ping,
    Pong,
    Stats,
    StatsReply,
)
from agent.dataplane.control_client import ControlClient
from agent.dataplane.descriptors import SOCKETS_PER_FRAME_MAX
from agent.dataplane.sockets import SocketTable
from agent.version import VERSION
from mesh.errors import Unreachable
from mesh.proxy.resources import ListenerKey, listeners
from mesh.proxy.sidecar_config import WorkerConfig

_LOG = logging.getLogger("mesh.supervisor")

CALL_TIMEOUT_S = 5.0
CONFIGURE_TIMEOUT_S = 15.0  # thousands of contexts may have to be made


@dataclass(eq=False)
class Worker:
    """A process that answers, and the listeners that it has sockets for."""

    client: ControlClient
    path: Path
    held: frozenset[ListenerKey] = frozenset()
    serving: bool = False  # it has a configuration
    protocol: int = PROTOCOL
    last_statistics: str = ""

    @property
    def pid(self) -> int:
        """Its process ID."""
        return self.client.pid

    async def configure(self, config: WorkerConfig, sockets: SocketTable, place: int) -> str:
        """Gives it the sockets that it lacks, and the configuration. Returns the reason when it keeps the one before,
        empty when it has this one in force. Raises Unreachable: nobody knows then what it serves.
        """
        keys = frozenset(served.key for served in listeners(config))
        missing = sorted(keys - self.held)
        own = sockets.of(place)
        for start in range(0, len(missing), SOCKETS_PER_FRAME_MAX):
            batch = tuple(missing[start : start + SOCKETS_PER_FRAME_MAX])
            given = [own[key] for key in batch]
            if not isinstance(await self.client.call(Adopt(batch), timeout_s=CALL_TIMEOUT_S, sockets=given), Ack):
                raise Unreachable(f"worker {self.pid} did not take over its listening sockets")
        reply = await self.client.call(Configure(config), timeout_s=CONFIGURE_TIMEOUT_S)
        match reply:
            case Ack():
                self.held, self.serving = keys, True
                return ""
            case Nack(error=reason):
                return reason or "no reason given"
        raise Unreachable(f"worker {self.pid} answered {type(reply).__name__} to Configure")

    async def drain(self, request: Drain) -> None:
        """Returns when it has given up its listeners, then it is on its own; so it is when it does not answer."""
        try:
            self.last_statistics = await self.statistics() or self.last_statistics
            await self.client.call(request, timeout_s=CALL_TIMEOUT_S)
            # It answers in order: by the next reply it has closed its listeners.
            await self.client.call(Ping(), timeout_s=CALL_TIMEOUT_S)
        except Unreachable as error:
            _LOG.info("worker %d ended before it was drained: %s", self.pid, error)
        self.client.close()

    async def statistics(self) -> str:
        """Its counters as Prometheus text. Raises Unreachable."""
        reply = await self.client.call(Stats(), timeout_s=CALL_TIMEOUT_S)
        if isinstance(reply, StatsReply):
            self.last_statistics = reply.prometheus
        return self.last_statistics


@dataclass(eq=False)
class Place:
    """Where one worker belongs: whoever is there has this place's sockets."""

    number: int
    worker: Worker | None = None
    predecessor: Worker | None = None  # serves until `worker` does: of another version, or draining
    path: Path | None = None  # of the worker that was here last
    last_statistics: str = ""  # what it had counted

    @property
    def serves(self) -> bool:
        """Whether traffic is carried here."""
        predecessor = self.predecessor
        if predecessor is not None and not predecessor.client.over.is_set():
            return True
        return self.worker is not None and self.worker.serving


@dataclass(eq=False)
class Found:
    """A worker of an earlier agent."""

    worker: Worker
    pong: Pong
    sockets: dict[ListenerKey, socket.socket] = field(default_factory=dict)

    @property
    def is_ours(self) -> bool:
        """Whether it can be configured by this agent: same version, same protocol, not about to end."""
        return self.pong.package_version == VERSION and self.pong.protocol == PROTOCOL and not self.pong.draining

    def identities(self) -> set[int]:
        """What tells its sockets from others: copies of one socket have the same inode."""
        return {os.fstat(sock.fileno()).st_ino for sock in self.sockets.values()}

    def close(self) -> None:
        """Lets go of the worker and of the copies."""
        self.close_sockets()
        self.worker.client.close()

    def close_sockets(self) -> None:
        """Lets go of the copies."""
        for sock in self.sockets.values():
            sock.close()
        self.sockets.clear()


async def question(path: Path, client: ControlClient) -> Found | None:
    """What a worker says about itself, and copies of its sockets; a hung one is killed, and None."""
    worker = Worker(client, path)
    try:
        pong = await client.call(Ping(), timeout_s=CALL_TIMEOUT_S)
        if not isinstance(pong, Pong):
            client.close()
            return None
        found = Found(worker, pong)
        while pong.protocol >= 2:
            reply, sockets = await client.call_for_sockets(Handover(len(found.sockets)), timeout_s=CALL_TIMEOUT_S)
            if not isinstance(reply, HandoverReply):
                break
            found.sockets.update(zip(reply.keys, sockets, strict=True))
            if not reply.remaining or not reply.keys:
                break
    except Unreachable as error:
        _LOG.warning("worker %d at %s: %s; it is replaced", worker.pid, path, error)
        client.kill()
        return None
    worker.held = frozenset(found.sockets)
    worker.serving = pong.config_version >= 0
    worker.protocol = pong.protocol
    return found
