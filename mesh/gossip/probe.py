"""Failure detection: one member a round is pinged directly, then through relays and over TCP, then suspected (SWIM §3).

With Lifeguard's additions: relays say when they got no answer either (nack), and our own health scales the round.
"""

import random
from dataclasses import dataclass
from functools import partial
from typing import Protocol

from mesh.gossip.awareness import Awareness
from mesh.gossip.config import GossipConfig
from mesh.gossip.fields import host_of
from mesh.gossip.members import NodeRecord
from mesh.gossip.membership import Membership
from mesh.gossip.messages import Ack, IndirectPing, Message, Nack, NodeState, Ping, Suspect
from mesh.gossip.timers import Timers

# Relayed pings under way: in total, and for one asker (an asker that follows the protocol has one round at a time).
RELAYS_MAX = 512
RELAYS_PER_SOURCE_MAX = 16
_SEQUENCES = 2**32


class ProbePort(Protocol):
    """How probes reach the network."""

    def send(self, endpoint: tuple[str, int], message: Message) -> None: ...
    def send_together(self, endpoint: tuple[str, int], messages: tuple[Message, ...]) -> None: ...
    def ping_over_stream(self, record: NodeRecord, ping: Ping, deadline: float) -> None: ...
    def note(self, reason: str, text: str) -> None: ...


@dataclass(slots=True, eq=False)
class _Probe:
    sequence: int
    record: NodeRecord
    incarnation: int
    deadline: float
    nacks_expected: int = 0
    nack_count: int = 0
    acked_over_stream: bool = False


@dataclass(slots=True, eq=False)
class _Relay:
    asker: tuple[str, int]
    asker_sequence: int
    nack: bool


class Prober:
    """Probes members in rounds, answers pings, and relays pings for others."""

    def __init__(
        self,
        membership: Membership,
        *,
        awareness: Awareness,
        config: GossipConfig,
        rng: random.Random,
        timers: Timers,
        port: ProbePort,
    ) -> None:
        self._membership = membership
        self._awareness = awareness
        self._config = config
        self._timers = timers
        self._port = port
        self._rng = rng
        # Starting anywhere makes an ack to a ping of an earlier run miss.
        self._sequence = rng.randrange(_SEQUENCES)
        self._probes: dict[int, _Probe] = {}
        self._relays: dict[int, _Relay] = {}
        self._relays_of: dict[tuple[str, int], int] = {}

    def start(self, now: float) -> None:
        """Begins with the first round at a random point of one interval, so that a pool started at once spreads out."""
        self._timers.schedule(now + self._rng.random() * self._config.probe_interval_s, self._round)

    def abandon(self) -> None:
        """Forgets the rounds under way without a verdict: after a stall of ours their silence proves nothing."""
        self._probes.clear()

    def receive_ping(self, ping: Ping, source: tuple[str, int]) -> None:
        """Answers a ping that is for us, where it asks for the answer."""
        local = self._membership.local
        if ping.node and ping.node != local.name:
            self._port.note("misdirected", f"a ping from {source[0]}:{source[1]} is for {ping.node}, not for us")
            return
        self._port.send(_reply_endpoint(ping, source), Ack(ping.sequence))

    def receive_indirect_ping(self, request: IndirectPing, source: tuple[str, int], now: float) -> None:
        """Pings the target on behalf of the asker, within the limits."""
        asker = _reply_endpoint(request, source)
        if len(self._relays) >= RELAYS_MAX or self._relays_of.get(source, 0) >= RELAYS_PER_SOURCE_MAX:
            self._port.note("relay-limit", f"too many indirect pings asked for by {source[0]}:{source[1]}")
            return
        sequence = self._next_sequence()
        self._relays[sequence] = _Relay(asker, request.sequence, request.nack)
        self._relays_of[source] = self._relays_of.get(source, 0) + 1
        self._port.send((host_of(request.target), request.port), self._ping(sequence, request.node))
        timeout_s = self._config.probe_timeout_s
        self._timers.schedule(now + self._config.nack_fraction * timeout_s, partial(self._relay_late, sequence))
        self._timers.schedule(now + timeout_s, partial(self._relay_over, sequence, source))

    def receive_ack(self, ack: Ack) -> None:
        """Ends the probe or the relay of that sequence; an ack nobody waits for is ignored."""
        probe = self._probes.pop(ack.sequence, None)
        if probe is not None:
            self._awareness.apply(-1)
            return
        relay = self._relays.pop(ack.sequence, None)
        if relay is not None:
            self._port.send(relay.asker, Ack(relay.asker_sequence))

    def receive_nack(self, nack: Nack) -> None:
        """A relay of ours works, its target is silent."""
        probe = self._probes.get(nack.sequence)
        if probe is not None:
            probe.nack_count += 1

    def receive_stream_ack(self, sequence: int) -> None:
        """The fallback ping over TCP was answered."""
        probe = self._probes.get(sequence)
        if probe is not None:
            probe.acked_over_stream = True

    def _round(self, now: float) -> None:
        interval_s = self._awareness.scaled(self._config.probe_interval_s)
        self._timers.schedule(now + interval_s, self._round)
        record = self._membership.next_probe_target()
        if record is None or self._membership.leaving:
            return
        probe = _Probe(self._next_sequence(), record, record.incarnation, now + interval_s)
        self._probes[probe.sequence] = probe
        ping = self._ping(probe.sequence, record.name)
        if record.state == NodeState.SUSPECT:
            # Lifeguard's buddy system: the suspect is the first who must hear of it.
            suspect = Suspect(record.incarnation, record.name, self._membership.local.name)
            self._port.send_together(record.endpoint, (ping, suspect))
        else:
            self._port.send(record.endpoint, ping)
        timeout_s = self._awareness.scaled(self._config.probe_timeout_s)
        self._timers.schedule(now + timeout_s, partial(self._direct_timed_out, probe))
        self._timers.schedule(probe.deadline, partial(self._round_over, probe))

    def _direct_timed_out(self, probe: _Probe, now: float) -> None:
        if probe.sequence not in self._probes:
            return
        record, local = probe.record, self._membership.local
        relays = self._membership.random_nodes(
            self._config.indirect_probes, lambda peer: peer is not record and peer.state == NodeState.ALIVE
        )
        for relay in relays:
            # Nacks exist since protocol 4.
            nack = relay.versions[1] >= 4
            probe.nacks_expected += nack
            request = IndirectPing(
                sequence=probe.sequence,
                target=record.address,
                port=record.port,
                node=record.name,
                nack=nack,
                source_address=local.address,
                source_port=local.port,
                source_node=local.name,
            )
            self._port.send(relay.endpoint, request)
        if self._config.tcp_probe and record.versions[1] >= 3:
            self._port.ping_over_stream(record, self._ping(probe.sequence, record.name), probe.deadline)

    def _round_over(self, probe: _Probe, now: float) -> None:
        if self._probes.pop(probe.sequence, None) is None:
            return
        record = probe.record
        if probe.acked_over_stream:
            self._awareness.apply(-1)
            self._port.note(
                "udp-blocked",
                f"{record.name} at {record.host}:{record.port} answers over TCP but not over UDP: "
                "check that UDP is let through in both directions",
            )
            return
        # Relays that do not even say "no answer" point at us; without relays any failure counts a little.
        missing = probe.nacks_expected - probe.nack_count if probe.nacks_expected else 1
        self._awareness.apply(max(missing, 0))
        self._port.note("probe-failed", f"{record.name} at {record.host}:{record.port} answers no probe: suspected")
        suspect = Suspect(probe.incarnation, record.name, self._membership.local.name)
        self._membership.apply_suspect(suspect, now)

    def _relay_late(self, sequence: int, now: float) -> None:
        relay = self._relays.get(sequence)
        if relay is not None and relay.nack:
            self._port.send(relay.asker, Nack(relay.asker_sequence))

    def _relay_over(self, sequence: int, source: tuple[str, int], now: float) -> None:
        self._relays.pop(sequence, None)
        left = self._relays_of[source] - 1
        if left:
            self._relays_of[source] = left
        else:
            del self._relays_of[source]

    def _ping(self, sequence: int, node: str) -> Ping:
        local = self._membership.local
        return Ping(sequence, node, local.address, local.port, local.name)

    def _next_sequence(self) -> int:
        self._sequence = (self._sequence + 1) % _SEQUENCES
        return self._sequence


def _reply_endpoint(message: Ping | IndirectPing, source: tuple[str, int]) -> tuple[str, int]:
    if message.source_address and message.source_port:
        return host_of(message.source_address), message.source_port
    return source
