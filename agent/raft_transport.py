"""Raft messages to the other servers: one-way frames, one connection per peer, never a wait for the Raft loop."""

import logging
import random
import ssl
from collections import Counter, deque
from collections.abc import Callable

import trio

from agent.addresses import Address
from agent.backoff import backoff_s
from agent.rpc.connection import RECONNECT_S_MAX, RECONNECT_S_MIN, open_connection
from agent.rpc.frames import Hello, Purpose, close_quietly, frame, message_frame, send_all
from mesh.errors import Unreachable

_LOG = logging.getLogger("mesh.raft")

# Raft repeats what is lost, so a full queue drops; these hold a full window of appends and a snapshot chunk.
QUEUED_MESSAGES_MAX = 512
QUEUED_BYTES_MAX = 32 * 1024 * 1024

Resolve = Callable[[str], Address | None]


class RaftTransport:
    """Sends to peers by node ID; `resolve` gives the current address of one."""

    def __init__(
        self,
        node_id: str,
        resolve: Resolve,
        rng: random.Random,
        *,
        context: ssl.SSLContext | None = None,
        server_name: str | None = None,
    ) -> None:
        self._node_id = node_id
        self._resolve = resolve
        self._rng = rng
        self._context = context
        self._server_name = server_name
        self._nursery: trio.Nursery | None = None
        self._links: dict[str, _Link] = {}
        self.counters: Counter[str] = Counter()

    async def run(self, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Keeps the connections until cancelled."""
        async with trio.open_nursery() as nursery:
            self._nursery = nursery
            task_status.started()
            try:
                await trio.sleep_forever()
            finally:
                self._nursery = None

    def send(self, peer_id: str, data: bytes) -> None:
        """Queues a message; drops it when the queue is full, the peer has no address, or nothing runs."""
        if self._nursery is None:
            return
        link = self._links.get(peer_id)
        if link is None:
            link = self._links[peer_id] = _Link()
            self._nursery.start_soon(self._run_link, peer_id, link)
        if link.put(data):
            self.counters["raft_messages_sent"] += 1
        else:
            self.counters["raft_messages_dropped"] += 1

    async def _run_link(self, peer_id: str, link: "_Link") -> None:
        failures = 0
        while True:
            await link.wait()
            address = self._resolve(peer_id)
            if address is not None:
                try:
                    await self._send_until_broken(address, link)
                    failures = 0
                except* Unreachable as group:
                    _LOG.debug("raft messages to %s: %s", peer_id, group.exceptions[0])
                except* Exception:
                    _LOG.exception("sending raft messages to %s failed; connecting again", peer_id)
            link.clear()  # old by now, and Raft repeats what still matters
            failures += 1
            await trio.sleep(backoff_s(failures, rng=self._rng, first_s=RECONNECT_S_MIN, last_s=RECONNECT_S_MAX))

    async def _send_until_broken(self, address: Address, link: "_Link") -> None:
        stream = await open_connection(address, Purpose.RAFT, self._context, self._server_name)
        try:
            await send_all(stream, message_frame(Hello(self._node_id)))
            async with trio.open_nursery() as nursery:
                nursery.start_soon(_notice_end, stream, nursery.cancel_scope)
                while True:
                    await link.wait()
                    await send_all(stream, link.take())
        finally:
            await close_quietly(stream)


async def _notice_end(stream: trio.abc.Stream, scope: trio.CancelScope) -> None:
    """Nothing ever comes back on this connection; its end does."""
    try:
        while await stream.receive_some(4096):
            pass
    except (trio.BrokenResourceError, trio.ClosedResourceError):
        pass
    scope.cancel()


class _Link:
    """The queue of one peer."""

    def __init__(self) -> None:
        self._queue: deque[bytes] = deque()
        self._bytes = 0
        self._wake = trio.Event()

    def put(self, data: bytes) -> bool:
        if len(self._queue) >= QUEUED_MESSAGES_MAX or self._bytes + len(data) > QUEUED_BYTES_MAX:
            return False
        self._queue.append(data)
        self._bytes += len(data)
        self._wake.set()
        return True

    async def wait(self) -> None:
        while not self._queue:
            self._wake = trio.Event()
            await self._wake.wait()

    def take(self) -> bytes:
        data = b"".join(map(frame, self._queue))
        self.clear()
        return data

    def clear(self) -> None:
        self._queue.clear()
        self._bytes = 0
