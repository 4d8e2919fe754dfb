"""Runs a gossip node on real sockets: UDP for probes and rumours, TCP for push-pulls, both on one port."""

import ipaddress
import logging
import os
import random
import socket
import time
from collections import Counter
from collections.abc import Awaitable, Callable, Mapping, Sequence
from functools import partial

import trio

from agent.addresses import join_address
from agent.gossip_sockets import bind_sockets, resolve
from agent.gossip_streams import GossipStreams
from agent.repeats import RepeatedLog
from mesh.errors import ConfigError, ProtocolError, Unreachable
from mesh.gossip.config import GossipConfig
from mesh.gossip.events import (
    GossipEvent,
    MemberFailed,
    MemberJoined,
    MemberLeft,
    MemberReaped,
    MemberUpdated,
    NameConflicted,
)
from mesh.gossip.keyring import NONCE_BYTES, Keyring
from mesh.gossip.members import Member
from mesh.gossip.messages import Ack
from mesh.gossip.node import GossipNode
from mesh.gossip.outputs import (
    BroadcastFinished,
    ConnectAndPing,
    ConnectAndPushPull,
    LeaveCompleted,
    Notice,
    SendDatagram,
)
from mesh.gossip.packet import DATAGRAM_BYTES_MAX
from mesh.gossip.stream import PushPull, StreamError
from mesh.gossip.wire_error import WireError

logger = logging.getLogger("mesh.gossip")

# Streams open at once, in each direction: memberlist's own cap on concurrent push-pulls.
INBOUND_STREAMS_MAX = 128
INBOUND_STREAMS_PER_HOST_MAX = 32  # or one host that stalls them all would keep everybody else out
OUTBOUND_STREAMS_MAX = 32
# Packets read before other tasks get a turn.
_DATAGRAM_BATCH = 64
_ACCEPT_RETRY_S = 0.1
_JOIN_CONCURRENCY = 8
_QUIET_REASONS = frozenset({"refuted", "probe-failed", "stall"})


class GossipDriver:
    """One agent's place in one gossip pool.

    `bind` and `advertise` are IP addresses with a port; port 0 takes a free one (then `advertise`'s port follows it).
    `on_event` is called for each change, in order, from inside the driver's tasks; it must not wait or raise. `keys`
    are AES keys of 16, 24 or 32 bytes, the first encrypts; without any the pool is in plain text.
    Raises ConfigError for keys or addresses that are none, LimitExceeded for tags above 512 encoded bytes.
    """

    def __init__(
        self,
        *,
        name: str,
        bind: tuple[str, int],
        advertise: tuple[str, int],
        tags: Mapping[str, str],
        config: GossipConfig,
        keys: Sequence[bytes] = (),
        rng: random.Random,
        on_event: Callable[[GossipEvent], None],
    ) -> None:
        for label, host in (("bind", bind[0]), ("advertise", advertise[0])):
            try:
                ipaddress.ip_address(host)
            except ValueError as error:
                raise ConfigError(f"gossip {label} address {host!r} is not an IP address") from error
        self._name = name
        self._bind = bind
        self._advertise = advertise
        self._tags = dict(tags)
        self._config = config
        self._keyring = Keyring(keys, partial(os.urandom, NONCE_BYTES)) if keys else None
        self._rng = rng
        self._on_event = on_event
        self._node = self._make_node(advertise[1] or bind[1] or 1)
        self._udp: socket.socket | None = None
        self._nursery: trio.Nursery | None = None
        self._pump_scope = trio.CancelScope()
        self._left = trio.Event()
        self._told: dict[int, trio.Event] = {}
        self._inbound = 0
        self._inbound_from: Counter[str] = Counter()
        self._outbound = 0
        self._streams = GossipStreams(lambda: self._node.stream_decoder())
        self._repeats = RepeatedLog(logger)

    @property
    def counters(self) -> Mapping[str, int]:
        """Packets and streams dropped, and other notable things, by reason, since the start."""
        return self._node.counters

    @property
    def address(self) -> tuple[str, int]:
        """Where the driver listens; the real port once `run` has started."""
        return self._bind

    async def run(self, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Binds, then serves until cancelled. Raises ConfigError naming the address when it cannot be bound."""
        udp, tcp = self._open_sockets()
        with udp, tcp:
            self._udp = udp
            try:
                async with trio.open_nursery() as nursery:
                    self._nursery = nursery
                    self._node.start(trio.current_time())
                    self._flush()
                    nursery.start_soon(self._feed_datagrams, udp)
                    nursery.start_soon(self._accept_streams, trio.socket.from_stdlib_socket(tcp))
                    nursery.start_soon(self._pump)
                    task_status.started()
            finally:
                self._nursery = None
                self._udp = None

    async def join(self, addresses: Sequence[str]) -> int:
        """Push-pulls with each address (`host`, `host:port`, `[v6]:port`); how many were reached.

        Requires `run` to have started. Raises Unreachable naming each address and its failure when none was reached.
        """
        failures: dict[str, str] = {}
        reached = 0
        limiter = trio.CapacityLimiter(_JOIN_CONCURRENCY)

        async def join_one(label: str, endpoint: tuple[str, int]) -> None:
            nonlocal reached
            async with limiter:
                failure = await self._push_pull(endpoint, join=True)
            if failure is None:
                reached += 1
            else:
                failures[label] = failure

        async with trio.open_nursery() as nursery:
            for address in addresses:
                try:
                    endpoints = await resolve(
                        address, default_port=self._bind[1], timeout_s=self._config.stream_timeout_s
                    )
                except Unreachable as error:
                    failures[address] = str(error)
                    continue
                for endpoint in endpoints:
                    nursery.start_soon(join_one, join_address(endpoint), endpoint)
        if not reached:
            reasons = "; ".join(f"{address}: {reason}" for address, reason in sorted(failures.items()))
            raise Unreachable(f"no gossip member could be joined: {reasons or 'no address was given'}")
        self._node.announce_join(trio.current_time())
        self._flush()
        return reached

    async def leave(self) -> None:
        """Leaves gracefully; returns when the pool knows or the configured times are over. Then cancel `run`."""
        self._node.leave(trio.current_time())
        self._flush()
        limit_s = 2 * self._config.broadcast_timeout_s + self._config.leave_propagate_s + 1
        with trio.move_on_after(limit_s):
            await self._left.wait()

    async def force_leave(self, name: str, *, prune: bool = False) -> bool:
        """Declares a failed member left (and forgets it with `prune`); False when there is no such member."""
        token = self._node.force_leave(name, prune=prune, now=trio.current_time())
        if token:
            self._told[token] = trio.Event()
        self._flush()
        if token:
            with trio.move_on_after(self._config.broadcast_timeout_s):
                await self._told[token].wait()
            self._told.pop(token, None)
        return token is not None

    def members(self) -> tuple[Member, ...]:
        """All members by name, the local one included."""
        return self._node.members()

    def local_member(self) -> Member:
        return self._node.local_member()

    def set_tags(self, tags: Mapping[str, str]) -> None:
        """Replaces the local member's tags. Raises LimitExceeded above 512 encoded bytes."""
        self._node.set_tags(tags, trio.current_time())
        self._tags = dict(tags)
        self._flush()

    def statistics(self) -> dict[str, str]:
        """Figures under the keys of `serf info`."""
        return self._node.statistics()

    def _make_node(self, port: int) -> GossipNode:
        return GossipNode(
            name=self._name,
            address=self._advertise[0],
            port=port,
            tags=self._tags,
            config=self._config,
            keyring=self._keyring,
            rng=self._rng,
            # Wall-clock seconds rise over a restart, so the pool takes the new run at once; where the clock went back,
            # the accusation that the pool answers with lifts us above it.
            incarnation=max(1, min(int(time.time()), 2**32 - 2**16)),
        )

    def _open_sockets(self) -> tuple[socket.socket, socket.socket]:
        """UDP and TCP sockets on one port; from then on the port is known. Raises ConfigError."""
        host = self._bind[0]
        udp, tcp = bind_sockets(*self._bind, backlog=INBOUND_STREAMS_MAX)
        port = int(tcp.getsockname()[1])
        self._bind = (host, port)
        if not self._advertise[1]:
            self._advertise = (self._advertise[0], port)
        if self._advertise[1] != self._node.local_member().port:
            self._node = self._make_node(self._advertise[1])
        return udp, tcp

    # UDP.

    async def _feed_datagrams(self, udp: socket.socket) -> None:
        while True:
            await trio.lowlevel.wait_readable(udp)
            now = trio.current_time()
            for _ in range(_DATAGRAM_BATCH):
                try:
                    data, source = udp.recvfrom(DATAGRAM_BYTES_MAX + 1)
                except (BlockingIOError, InterruptedError):
                    break
                except OSError as error:
                    # Linux reports here that an earlier packet of ours met a closed port; the probe will tell.
                    self._node.note("receive-failed", f"reading gossip packets: {error}")
                    break
                self._node.receive_datagram(data, (source[0], source[1]), now)
            self._flush()

    def _send_datagram(self, output: SendDatagram) -> None:
        if self._udp is None:
            return
        try:
            self._udp.sendto(output.data, output.endpoint)
        except OSError as error:
            # UDP promises nothing: a full buffer or an unreachable net is one more lost packet.
            self._node.counters["send-failed"] += 1
            self._log("send-failed", f"sending to {join_address(output.endpoint)}: {error}")

    # The core's timer and its outputs.

    async def _pump(self) -> None:
        while True:
            deadline = self._node.next_deadline()
            if deadline > trio.current_time():
                # `_flush` moves this deadline when a packet brings an earlier one.
                with trio.CancelScope(deadline=deadline) as self._pump_scope:
                    await trio.sleep_forever()
            else:
                await trio.lowlevel.checkpoint()
            now = trio.current_time()
            if self._node.next_deadline() <= now:
                self._node.handle_timer(now)
            self._flush()

    def _flush(self) -> None:
        for output in self._node.take_outputs():
            match output:
                case SendDatagram():
                    self._send_datagram(output)
                case ConnectAndPushPull():
                    self._start_outbound(partial(self._push_pull_quietly, output))
                case ConnectAndPing():
                    self._start_outbound(partial(self._ping, output))
                case BroadcastFinished():
                    event = self._told.get(output.token)
                    if event is not None:
                        event.set()
                case LeaveCompleted():
                    self._left.set()
                case Notice():
                    self._log(output.reason, output.text)
                case (
                    MemberJoined() | MemberUpdated() | MemberFailed() | MemberLeft() | MemberReaped() | NameConflicted()
                ):
                    self._report(output)
        deadline = self._node.next_deadline()
        if deadline < self._pump_scope.deadline:
            self._pump_scope.deadline = deadline

    def _report(self, event: GossipEvent) -> None:
        if isinstance(event, NameConflicted):
            self._node.counters["name-conflict"] += 1
            self._log(
                "name-conflict",
                f"another node at {event.address}:{event.port} claims the name of {event.member.name} "
                f"({event.member.address}:{event.member.port}); it is refused: give each node its own name",
            )
        else:
            member = event.member
            logger.info("%s: %s %s:%d", type(event).__name__, member.name, member.address, member.port)
        self._on_event(event)

    def _log(self, reason: str, text: str) -> None:
        """One line per reason and interval; the next one says how many were held back."""
        self._repeats.log(reason, logging.INFO if reason in _QUIET_REASONS else logging.WARNING, "%s", text)

    # TCP, outbound.

    def _start_outbound(self, action: Callable[[], Awaitable[None]]) -> None:
        if self._nursery is None:
            return
        if self._outbound >= OUTBOUND_STREAMS_MAX:
            self._node.counters["outbound-limit"] += 1
            return
        self._outbound += 1
        self._nursery.start_soon(self._run_outbound, action)

    async def _run_outbound(self, action: Callable[[], Awaitable[None]]) -> None:
        try:
            await action()
        finally:
            self._outbound -= 1

    async def _push_pull_quietly(self, output: ConnectAndPushPull) -> None:
        failure = await self._push_pull(output.endpoint, join=output.join)
        if failure is not None:
            self._node.counters["push-pull-failed"] += 1
            where = join_address(output.endpoint)
            self._log("push-pull-failed", f"exchanging state with {where} failed: {failure}")

    async def _push_pull(self, endpoint: tuple[str, int], *, join: bool) -> str | None:
        """Why it failed, or None."""
        try:
            reply = await self._streams.exchange(
                endpoint, self._node.push_pull_request(join=join), self._config.stream_timeout_s
            )
        except (Unreachable, ProtocolError) as error:
            return str(error)
        if isinstance(reply, StreamError):
            return f"the peer refused: {reply.text}"
        if not isinstance(reply, PushPull):
            return "the peer answered with something else than its state"
        self._node.receive_push_pull_reply(reply, endpoint[0], trio.current_time())
        self._flush()
        return None

    async def _ping(self, output: ConnectAndPing) -> None:
        timeout_s = output.deadline - trio.current_time()
        if timeout_s <= 0:
            return
        try:
            reply = await self._streams.exchange(output.endpoint, output.data, timeout_s)
        except (Unreachable, ProtocolError):
            # Silence is the expected answer of a dead member; the probe draws the conclusion.
            return
        if isinstance(reply, Ack) and reply.sequence == output.sequence:
            self._node.receive_stream_ack(output.sequence, trio.current_time())
            self._flush()

    # TCP, inbound.

    async def _accept_streams(self, listener: trio.socket.SocketType) -> None:
        listener_nursery = self._nursery
        assert listener_nursery is not None
        while True:
            try:
                connection, source = await listener.accept()
            except OSError as error:
                # Out of descriptors (EMFILE, ENFILE) or a connection that died in the queue: the listener lives on.
                self._node.counters["accept-failed"] += 1
                self._log("accept-failed", f"accepting a gossip stream: {error}; retrying")
                await trio.sleep(_ACCEPT_RETRY_S)
                continue
            host = source[0]
            if self._inbound >= INBOUND_STREAMS_MAX or self._inbound_from[host] >= INBOUND_STREAMS_PER_HOST_MAX:
                self._node.counters["stream-limit"] += 1
                self._log(
                    "stream-limit",
                    f"a gossip stream from {host} closed: {self._inbound_from[host]} are open from there, "
                    f"{self._inbound} in all",
                )
                connection.close()
                continue
            self._inbound += 1
            self._inbound_from[host] += 1
            listener_nursery.start_soon(self._serve_stream, connection, host)

    async def _serve_stream(self, connection: trio.socket.SocketType, host: str) -> None:
        try:
            with connection, trio.move_on_after(self._config.stream_timeout_s) as scope:
                await self._answer(trio.SocketStream(connection), host)
            if scope.cancelled_caught:
                self._node.counters["stream-timeout"] += 1
                self._log("stream-timeout", f"a gossip stream from {host} stalled and was closed")
        except (trio.BrokenResourceError, OSError) as error:
            self._node.counters["stream-broken"] += 1
            logger.debug("gossip stream from %s broke: %s", host, error)
        finally:
            self._inbound -= 1
            self._inbound_from[host] -= 1
            if not self._inbound_from[host]:
                del self._inbound_from[host]

    async def _answer(self, stream: trio.SocketStream, host: str) -> None:
        try:
            message = await self._streams.read_message(stream)
        except Unreachable:
            # The peer closed before it said anything whole: a port scan or a health check.
            self._node.counters["stream-cut"] += 1
            return
        except WireError as error:
            self._node.refuse(error, host)
            self._flush()
            await stream.send_all(self._node.refusal(str(error)))
            return
        reply = self._node.receive_stream(message, host, trio.current_time())
        self._flush()
        if reply is not None:
            await stream.send_all(reply)
