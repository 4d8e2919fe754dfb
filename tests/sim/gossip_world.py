"""A seeded world of gossip nodes: one heap of events, a network that loses, delays, doubles and cuts, and no real time.

Safety is checked on the way (packet size, incarnations that never fall and that only their owner raises); tests ask for
the rest. The seed fixes everything: a failure is replayed by its seed.
"""

import heapq
import itertools
import random
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

from mesh.gossip.config import LAN, GossipConfig
from mesh.gossip.events import MemberFailed, MemberJoined, MemberLeft, MemberReaped, MemberUpdated, NameConflicted
from mesh.gossip.keyring import Keyring
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
from mesh.gossip.stream import PushPull

PORT = 7946
_CHECK_EVERY = 64


@dataclass
class Host:
    """One simulated process and its address."""

    name: str
    address: str
    node: GossipNode
    up: bool = True
    paused_until: float = 0.0
    waiting: list[Callable[[], None]] = field(default_factory=list)
    wake_at: float = float("inf")
    events: list[tuple[float, object]] = field(default_factory=list)
    notices: list[Notice] = field(default_factory=list)
    left: bool = False
    held: dict[str, int] = field(default_factory=dict)


class GossipWorld:
    def __init__(
        self,
        *,
        seed: int,
        config: GossipConfig = LAN,
        loss: float = 0.0,
        duplication: float = 0.0,
        delay_s: tuple[float, float] = (0.0002, 0.002),
        keys: tuple[bytes, ...] = (),
    ) -> None:
        self.seed = seed
        self.now = 0.0
        self.config = config
        self.loss = loss
        self.duplication = duplication
        self.delay_s = delay_s
        self.hosts: dict[str, Host] = {}
        self.datagrams = 0
        self.datagram_bytes = 0
        self.udp_cut: set[tuple[str, str]] = set()
        self.tcp_cut: set[tuple[str, str]] = set()
        self._keys = keys
        self._rng = random.Random(seed)
        self._heap: list[tuple[float, int, Callable[[], None]]] = []
        self._tick = itertools.count()
        self._by_address: dict[str, str] = {}
        self._highest_own: dict[str, int] = {}

    # Hosts.

    def start(self, name: str, *, incarnation: int = 1, address: str | None = None, tags: dict | None = None) -> Host:
        """Starts (or restarts, as a new process) the node of that name."""
        old = self.hosts.get(name)
        if address is None:
            address = old.address if old is not None else f"10.0.{len(self.hosts) // 250}.{len(self.hosts) % 250 + 1}"
        rng = random.Random(f"{self.seed}/{name}/{self.now}")
        keyring = Keyring(self._keys, lambda: rng.randbytes(12)) if self._keys else None
        node = GossipNode(
            name=name,
            address=address,
            port=PORT,
            tags=tags or {"role": name},
            config=self.config,
            keyring=keyring,
            rng=rng,
            incarnation=incarnation,
        )
        host = Host(name, address, node)
        self.hosts[name] = host
        self._by_address[address] = name
        node.start(self.now)
        self._drain(host)
        return host

    def start_pool(self, count: int, *, within_s: float = 1.0) -> list[Host]:
        """`count` nodes n0, n1 ... of which all but the first join the first at a random time within `within_s`."""
        hosts = [self.start(f"n{number}") for number in range(count)]
        for host in hosts[1:]:
            self.at(self.now + self._rng.random() * within_s, lambda host=host: self.join(host.name, "n0"))
        return hosts

    def join(self, name: str, seed_name: str) -> None:
        host = self.hosts[name]

        def joined() -> None:
            host.node.announce_join(self.now)

        self._push_pull(host, self.hosts[seed_name].address, join=True, then=joined)

    def crash(self, name: str) -> None:
        self.hosts[name].up = False

    def pause(self, name: str, seconds: float) -> None:
        """The process stands still; packets wait in its socket."""
        host = self.hosts[name]
        host.paused_until = self.now + seconds
        self.at(host.paused_until, lambda: self._resume(host))

    def leave(self, name: str) -> None:
        host = self.hosts[name]
        host.node.leave(self.now)
        self._drain(host)

    # The network.

    def cut(self, sources: Iterable[str], targets: Iterable[str], *, tcp: bool = True) -> None:
        """Cuts the one-way links from each source to each target."""
        for pair in itertools.product(sources, targets):
            self.udp_cut.add(pair)
            if tcp:
                self.tcp_cut.add(pair)

    def partition(self, left: list[str], right: list[str]) -> None:
        self.cut(left, right)
        self.cut(right, left)

    def heal(self) -> None:
        self.udp_cut.clear()
        self.tcp_cut.clear()

    # Time.

    def at(self, time: float, action: Callable[[], None]) -> None:
        heapq.heappush(self._heap, (time, next(self._tick), action))

    def run_until(self, end: float) -> None:
        steps = 0
        while self._heap and self._heap[0][0] <= end:
            self.now, _, action = heapq.heappop(self._heap)
            action()
            steps += 1
            if steps % _CHECK_EVERY == 0:
                self._check()
        self.now = end
        self._check()

    def run_for(self, seconds: float) -> None:
        self.run_until(self.now + seconds)

    def run_till(self, condition: Callable[[], bool], *, limit_s: float) -> float:
        """Runs until the condition holds, looking every 50 ms; the seconds it took. Fails after `limit_s`."""
        started = self.now
        while not condition():
            assert self.now - started < limit_s, f"seed {self.seed}: not reached within {limit_s} s"
            self.run_for(0.05)
        return self.now - started

    # Questions.

    def statuses(self, name: str) -> dict[str, str]:
        return {member.name: member.status for member in self.hosts[name].node.members()}

    def all_see(self, names: Iterable[str], status: str, *, observers: Iterable[str]) -> bool:
        wanted = list(names)
        for observer in observers:
            seen = self.statuses(observer)
            if any(seen.get(name) != status for name in wanted):
                return False
        return True

    def deaths(self) -> list[tuple[float, str, str]]:
        """(when, at whom, of whom) each MemberFailed was seen."""
        return sorted(
            (at, host.name, event.member.name)
            for host in self.hosts.values()
            for at, event in host.events
            if isinstance(event, MemberFailed)
        )

    # Inside.

    def _check(self) -> None:
        for host in self.hosts.values():
            records = host.node._membership.records
            own = records[host.name].incarnation
            self._highest_own[host.name] = max(self._highest_own.get(host.name, 0), own)
        for host in self.hosts.values():
            for name, record in host.node._membership.records.items():
                held = record.incarnation
                assert held >= host.held.get(name, -1), f"seed {self.seed}: {host.name}'s {name} fell to {held}"
                host.held[name] = held
                assert held <= self._highest_own[name], f"seed {self.seed}: {host.name} raised {name} to {held}"

    def _on(self, host: Host, action: Callable[[], None]) -> None:
        """Runs an input of the host now, or when its pause is over, or never when it crashed."""
        if not host.up or self.hosts.get(host.name) is not host:
            return
        if self.now < host.paused_until:
            host.waiting.append(action)
            return
        action()
        self._drain(host)

    def _resume(self, host: Host) -> None:
        waiting, host.waiting = host.waiting, []
        # Which of timer and sockets a real process serves first after a stall is chance.
        if self._rng.random() < 0.5:
            self._wake(host)
        for action in waiting:
            self._on(host, action)
        self._wake(host)

    def _wake(self, host: Host) -> None:
        if not host.up or host.left or self.hosts.get(host.name) is not host or self.now < host.paused_until:
            return
        if host.node.next_deadline() <= self.now:
            host.node.handle_timer(self.now)
        host.wake_at = float("inf")
        self._drain(host)

    def _drain(self, host: Host) -> None:
        for output in host.node.take_outputs():
            match output:
                case SendDatagram():
                    self._send(host, output)
                case ConnectAndPushPull():
                    self._push_pull(host, output.endpoint[0], join=output.join)
                case ConnectAndPing():
                    self._stream_ping(host, output)
                case LeaveCompleted():
                    host.left = True
                case Notice():
                    host.notices.append(output)
                case BroadcastFinished():
                    pass
                case (
                    MemberJoined() | MemberUpdated() | MemberFailed() | MemberLeft() | MemberReaped() | NameConflicted()
                ):
                    host.events.append((self.now, output))
        deadline = host.node.next_deadline()
        if deadline < host.wake_at:
            host.wake_at = deadline
            self.at(deadline, lambda: self._wake(host))

    def _delay(self) -> float:
        return self._rng.uniform(*self.delay_s)

    def _send(self, host: Host, output: SendDatagram) -> None:
        self.datagrams += 1
        self.datagram_bytes += len(output.data)
        assert len(output.data) <= self.config.packet_bytes_max, f"seed {self.seed}: {len(output.data)} byte packet"
        target_name = self._by_address.get(output.endpoint[0])
        if target_name is None or (host.name, target_name) in self.udp_cut:
            return
        source = (host.address, PORT)
        for _ in range(2 if self._rng.random() < self.duplication else 1):
            if self._rng.random() < self.loss:
                continue
            self.at(self.now + self._delay(), lambda: self._deliver(target_name, output.data, source))

    def _deliver(self, name: str, data: bytes, source: tuple[str, int]) -> None:
        host = self.hosts[name]
        if not host.left:
            self._on(host, lambda: host.node.receive_datagram(data, source, self.now))

    def _stream(self, host: Host, address: str, request: bytes, limit_s: float, then: Callable[[object], None]) -> None:
        """One request and answer over TCP: whole or not at all, within the time limit."""
        name = self._by_address.get(address)
        if name is None or (host.name, name) in self.tcp_cut or (name, host.name) in self.tcp_cut:
            return
        deadline = self.now + limit_s

        def serve() -> None:
            peer = self.hosts[name]
            if self.now > deadline or peer.left:
                return
            message = peer.node.stream_decoder().feed(request)
            assert message is not None
            reply = peer.node.receive_stream(message, host.address, self.now)
            if reply is not None:
                self.at(self.now + self._delay(), lambda: answer(reply))

        def answer(reply: bytes) -> None:
            message = host.node.stream_decoder().feed(reply)
            if self.now <= deadline and not host.left:
                self._on(host, lambda: then(message))

        self.at(self.now + self._delay(), lambda: self._on(self.hosts[name], serve))

    def _push_pull(self, host: Host, address: str, *, join: bool, then: Callable[[], None] | None = None) -> None:
        def merge(message: object) -> None:
            assert isinstance(message, PushPull)
            host.node.receive_push_pull_reply(message, address, self.now)
            if then is not None:
                then()

        request = host.node.push_pull_request(join=join)
        self._stream(host, address, request, self.config.stream_timeout_s, merge)

    def _stream_ping(self, host: Host, output: ConnectAndPing) -> None:
        def acked(message: object) -> None:
            if isinstance(message, Ack) and message.sequence == output.sequence:
                host.node.receive_stream_ack(output.sequence, self.now)

        self._stream(host, output.endpoint[0], output.data, output.deadline - self.now, acked)
