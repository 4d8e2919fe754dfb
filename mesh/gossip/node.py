"""One node of a gossip pool, without I/O: bytes and times go in, outputs come out.

The driver calls `start` once, then `receive_*` and, at `next_deadline()`, `handle_timer`; after each call it carries
out `take_outputs()`. Calls never wait, and `now` (monotonic seconds) never falls.
"""

import math
import random
from collections import Counter
from collections.abc import Callable, Hashable, Mapping
from typing import Literal

from mesh.errors import LimitExceeded
from mesh.gossip.awareness import Awareness
from mesh.gossip.config import GossipConfig
from mesh.gossip.dissemination import Dissemination
from mesh.gossip.events import GossipEvent, NameConflicted
from mesh.gossip.fields import address_of, host_of
from mesh.gossip.keyring import Keyring
from mesh.gossip.members import Member, NodeRecord
from mesh.gossip.membership import Membership
from mesh.gossip.messages import (
    VERSIONS,
    Ack,
    Alive,
    Dead,
    IndirectPing,
    Message,
    Nack,
    NodeState,
    Ping,
    Suspect,
    User,
    encode,
)
from mesh.gossip.outputs import (
    BroadcastFinished,
    ConnectAndPing,
    ConnectAndPushPull,
    LeaveCompleted,
    Notice,
    Output,
    SendDatagram,
)
from mesh.gossip.packet import PacketCodec, compound
from mesh.gossip.probe import Prober
from mesh.gossip.serf import SerfLayer
from mesh.gossip.serf_messages import (
    Ignored,
    JoinIntent,
    LeaveIntent,
    Query,
    Relay,
    UserEvent,
    decode_serf,
    decode_serf_push_pull,
    encode_intent,
    encode_serf_push_pull,
    encode_tags,
)
from mesh.gossip.stream import PushPull, StreamDecoder, StreamError, StreamMessage, StreamUser, encode_stream
from mesh.gossip.timers import Timers
from mesh.gossip.wire_error import WireError

# Above this many members the full-state exchange becomes rarer, one interval more for each doubling.
_PUSH_PULL_SCALE_FROM = 32
# A newcomer exchanges state again after so many probe intervals: while many join at once, rumours about some die out
# before all have heard them, and the next regular exchange may be minutes away (memberlist needs 95 s for 2,000 nodes).
_SETTLE_INTERVALS = (2.0, 5.0, 10.0)


class GossipNode:
    """The façade: SWIM membership, probing, dissemination and Serf's layer as one state machine.

    `address` is an IP address in text. Raises LimitExceeded for tags above 512 encoded bytes.
    """

    def __init__(
        self,
        *,
        name: str,
        address: str,
        port: int,
        tags: Mapping[str, str],
        config: GossipConfig,
        keyring: Keyring | None,
        rng: random.Random,
        incarnation: int = 1,
    ) -> None:
        self.counters: Counter[str] = Counter()
        self._config = config
        self._keyring = keyring
        self._rng = rng
        self._codec = PacketCodec(keyring=keyring, label=config.label)
        self._timers = Timers()
        self._awareness = Awareness(config.awareness_score_max)
        self._outputs: list[Output] = []
        # The time of the call being served.
        self._now = 0.0
        packed = address_of(address)
        local = NodeRecord(
            name, packed, host_of(packed), port, encode_tags(tags), VERSIONS, incarnation, NodeState.ALIVE, 0.0
        )
        self._membership = Membership(local, config=config, rng=rng, timers=self._timers, observer=self)
        self._prober = Prober(
            self._membership,
            awareness=self._awareness,
            config=config,
            rng=rng,
            timers=self._timers,
            port=self,
        )
        self._serf = SerfLayer(name, config=config, rng=rng, emit=self._emit, refute_leave=self._announce_presence)
        self._rumours = Dissemination(
            self._membership, codec=self._codec, config=config, timers=self._timers, emit=self._emit_packet
        )
        self._stalled_at = -math.inf
        self._life: Literal["running", "leaving", "left"] = "running"
        self._serf.node_joined(local)

    # What the driver calls.

    def start(self, now: float) -> None:
        """Schedules the periodic work; call once."""
        self._now = now
        self._membership.local.changed_at = now
        self._prober.start(now)
        self._timers.schedule(now + self._rng.random() * self._push_pull_interval_s(), self._push_pull_round)
        self._timers.schedule(now + self._config.reap_interval_s, self._reap_round)
        self._timers.schedule(now + self._config.reconnect_interval_s, self._reconnect_round)

    def next_deadline(self) -> float:
        """When `handle_timer` should be called next, at the latest."""
        return self._timers.next_deadline()

    def handle_timer(self, now: float) -> None:
        """Does what is due at `now`."""
        self._now = now
        late_s = now - self._timers.next_deadline()
        if late_s > self._config.stall_s and now - self._stalled_at >= self._config.probe_interval_s:
            self._stalled_at = now
            self._awareness.apply(1)
            self.note("stall", f"the gossip timer ran {late_s:.2f} s late: this host or process is overloaded")
        if late_s > self._config.probe_timeout_s:
            # Answers that came meanwhile lie unread in the socket: our silence, not theirs.
            self._prober.abandon()
            self._membership.postpone_deaths(now + self._config.probe_interval_s)
        self._timers.run_due(now)

    def take_outputs(self) -> list[Output]:
        """What is to be done since the last call, in order."""
        outputs = self._outputs
        self._outputs = []
        return outputs

    def receive_datagram(self, data: bytes, source: tuple[str, int], now: float) -> None:
        """One UDP packet. What cannot be understood is counted and dropped."""
        self._now = now
        try:
            datagram = self._codec.open(data)
        except WireError as error:
            self._refuse(error, source[0])
            return
        for problem in datagram.problems:
            self._refuse(problem, source[0])
        for message in datagram.messages:
            self._receive(message, source, now)

    def stream_decoder(self) -> StreamDecoder:
        """A decoder for one inbound stream message of this pool."""
        return StreamDecoder(keyring=self._keyring, label=self._config.label)

    def receive_stream(self, message: StreamMessage, source_host: str, now: float) -> bytes | None:
        """A message of an accepted connection; the bytes to answer with, if it wants an answer."""
        self._now = now
        match message:
            case PushPull():
                # Our side as it was before theirs: it holds what we have against the peer, which can then refute.
                reply = self.push_pull_request(join=message.join)
                self._merge(message, source_host, now)
                return reply
            case Ping():
                if message.node and message.node != self._membership.local.name:
                    self.note("misdirected", f"a stream ping from {source_host} is for {message.node}, not for us")
                    return None
                return encode_stream(Ack(message.sequence), keyring=self._keyring, label=self._config.label)
            case StreamUser():
                self._receive_user(message.payload, source_host, now)
                return None
            case Ack() | StreamError():
                self._refuse(WireError("type", "a stream begins with an answer"), source_host)
                return None

    def refusal(self, text: str) -> bytes:
        """The bytes that tell a stream's peer why it is refused."""
        return encode_stream(StreamError(text), keyring=self._keyring, label=self._config.label)

    def push_pull_request(self, *, join: bool) -> bytes:
        """Our whole state, to write to a peer."""
        entries = tuple(record.entry() for record in self._membership.records.values())
        message = PushPull(join, entries, encode_serf_push_pull(self._serf.state()))
        return encode_stream(message, keyring=self._keyring, label=self._config.label)

    def receive_push_pull_reply(self, message: PushPull, source_host: str, now: float) -> None:
        """The peer's whole state, in answer to ours."""
        self._now = now
        self._merge(message, source_host, now)

    def receive_stream_ack(self, sequence: int, now: float) -> None:
        """The ack to a ConnectAndPing came in time."""
        self._now = now
        self._prober.receive_stream_ack(sequence)

    def refuse(self, error: WireError, source_host: str) -> None:
        """Counts and reports what a stream's decoder refused."""
        self._refuse(error, source_host)

    # What the agent asks for.

    def announce_join(self, now: float) -> None:
        """Tells the pool that we are in it, after at least one successful join."""
        self._now = now
        if self._life == "running":
            self._announce_presence()
            for intervals in _SETTLE_INTERVALS:
                delay_s = self._config.probe_interval_s * intervals * (0.75 + self._rng.random() / 2)
                self._timers.schedule(now + delay_s, self._push_pull)

    def set_tags(self, tags: Mapping[str, str], now: float) -> None:
        """Replaces the local tags and tells the pool. Raises LimitExceeded above 512 encoded bytes."""
        self._now = now
        meta = encode_tags(tags)
        if meta != self._membership.local.meta and self._life == "running":
            self._membership.set_local_meta(meta)

    def leave(self, now: float) -> None:
        """Starts to leave: intent, then our own death as "left", each told to the pool; ends with LeaveCompleted."""
        self._now = now
        if self._life != "running":
            return
        self._life = "leaving"
        self._serf.leaving = True
        intent = LeaveIntent(self._serf.clock.time, self._membership.local.name)
        self._serf.clock.increment()
        self._serf.apply_leave(intent, now)
        self._when_told(self._declare_left, lambda token: self._queue_intent(intent, token=token))

    def force_leave(self, name: str, *, prune: bool, now: float) -> int | None:
        """Declares that `name`, failed, has left; the token of the broadcast, 0 when nobody is there to be told.

        None when there is no such member. A member that is in truth alive refutes.
        """
        self._now = now
        if name not in self._serf:
            return None
        intent = LeaveIntent(self._serf.clock.time, name, prune)
        self._serf.clock.increment()
        self._serf.apply_leave(intent, now)
        if not self._has_company():
            return 0
        token = self._rumours.new_token(lambda _: self._outputs.append(BroadcastFinished(token)))
        self._queue_intent(intent, token=token)
        return token

    def members(self) -> tuple[Member, ...]:
        """All members by name, the local one included."""
        return self._serf.members()

    def local_member(self) -> Member:
        member = self._serf.member(self._membership.local.name)
        assert member is not None, "the local member is never forgotten"
        return member

    def statistics(self) -> dict[str, str]:
        """Serf's own figures under Serf's keys."""
        return {
            "encrypted": "true" if self._keyring is not None else "false",
            "event_queue": "0",
            "event_time": str(self._serf.events.clock.time),
            "failed": str(self._serf.count("failed")),
            "health_score": str(self._awareness.score),
            "intent_queue": str(self._rumours.user_queue_length),
            "left": str(self._serf.count("left")),
            "member_time": str(self._serf.clock.time),
            "members": str(len(self._serf.members())),
            "query_queue": "0",
            "query_time": str(self._serf.queries.clock.time),
        }

    # What the parts report (MembershipObserver and ProbePort).

    def node_joined(self, record: NodeRecord, now: float) -> None:
        self._serf.node_joined(record)
        self._rumours.resume(now)

    def node_updated(self, record: NodeRecord) -> None:
        self._serf.node_updated(record)

    def node_departed(self, record: NodeRecord, now: float) -> None:
        self._serf.node_departed(record, now)

    def broadcast(self, name: str, message: Message, *, token: int | None = None) -> None:
        try:
            self._rumours.queue_system(name, encode(message), self._now, token=token)
        except LimitExceeded as error:
            # Possible with a small packet size, a long label and full tags together; push-pulls still carry it.
            self.note("oversized", f"news about {name} is not gossiped: {error}")

    def tell(self, endpoint: tuple[str, int], message: Message) -> None:
        self._rumours.send(endpoint, encode(message))

    def refuted(self, accuser: str) -> None:
        self._awareness.apply(1)
        self.note("refuted", f"{accuser or 'a peer'} holds this node for suspect, dead or another run: refuted")

    def name_conflicted(self, record: NodeRecord, host: str, port: int) -> None:
        member = self._serf.member(record.name)
        # Of a pruned member only SWIM's record is left for a while; nobody is surprised that it is gone.
        if member is not None:
            self._emit(NameConflicted(member, host, port))

    def send(self, endpoint: tuple[str, int], message: Message) -> None:
        self._rumours.send_with_rumours(endpoint, encode(message), self._now)

    def send_together(self, endpoint: tuple[str, int], messages: tuple[Message, ...]) -> None:
        self._rumours.send(endpoint, compound([encode(message) for message in messages]))

    def ping_over_stream(self, record: NodeRecord, ping: Ping, deadline: float) -> None:
        data = encode_stream(ping, keyring=self._keyring, label=self._config.label)
        self._outputs.append(ConnectAndPing(record.endpoint, ping.sequence, data, deadline))

    def note(self, reason: str, text: str) -> None:
        self.counters[reason] += 1
        self._outputs.append(Notice(reason, text))

    # Receiving.

    def _receive(self, message: Message, source: tuple[str, int], now: float) -> None:
        match message:
            case Ping():
                self._prober.receive_ping(message, source)
            case Ack():
                self._prober.receive_ack(message)
            case IndirectPing():
                self._prober.receive_indirect_ping(message, source, now)
            case Nack():
                self._prober.receive_nack(message)
            case Alive():
                self._membership.apply_alive(message, now, source_host=source[0])
            case Suspect():
                self._membership.apply_suspect(message, now)
            case Dead():
                self._membership.apply_dead(message, now)
            case User():
                self._receive_user(message.payload, source[0], now)

    def _receive_user(self, payload: bytes, source_host: str, now: float) -> None:
        try:
            message = decode_serf(payload)
        except WireError as error:
            self._refuse(error, source_host)
            return
        match message:
            case JoinIntent():
                if self._serf.apply_join(message, now):
                    self._pass_on(("intent", message.node), payload)
            case LeaveIntent():
                if self._serf.apply_leave(message, now):
                    self._pass_on(("intent", message.node), payload)
            case UserEvent():
                if self._serf.events.is_new(message.time, (message.name, message.payload)):
                    self._pass_on(("event", message.time, message.name, message.payload), payload)
            case Query():
                if self._serf.queries.is_new(message.time, message.identity) and message.broadcast:
                    self._pass_on(("query", message.time, message.identity), payload)
            case Relay():
                endpoint = (host_of(message.address), message.port)
                # Only to members, or anybody could send through us to anybody.
                if self._membership.at(endpoint) is not None and len(message.payload) < self._rumours.message_bytes_max:
                    self._rumours.send(endpoint, encode(User(message.payload)))
            case Ignored():
                self.counters["ignored"] += 1

    def _merge(self, message: PushPull, source_host: str, now: float) -> None:
        for problem in message.problems:
            self._refuse(problem, source_host)
        self._membership.merge(message.nodes, now, source_host=source_host)
        if message.user_state:
            try:
                state = decode_serf_push_pull(message.user_state)
            except WireError as error:
                self._refuse(error, source_host)
                return
            self._serf.merge(state, now)

    def _refuse(self, error: WireError, source_host: str) -> None:
        self.note(error.reason, f"dropped a gossip message from {source_host}: {error}")

    def _emit(self, event: GossipEvent) -> None:
        self._outputs.append(event)

    def _emit_packet(self, endpoint: tuple[str, int], data: bytes) -> None:
        self._outputs.append(SendDatagram(endpoint, data))

    # Sending.

    def _pass_on(self, key: Hashable, payload: bytes) -> None:
        try:
            self._rumours.queue_user(key, encode(User(payload)), self._now)
        except LimitExceeded as error:
            self.note("oversized", f"a Serf message is not passed on: {error}")

    def _queue_intent(self, intent: JoinIntent | LeaveIntent, *, token: int | None = None) -> None:
        self._rumours.queue_user(("intent", intent.node), encode(User(encode_intent(intent))), self._now, token=token)

    # Periodic work.

    def _push_pull_round(self, now: float) -> None:
        self._timers.schedule(now + self._push_pull_interval_s(), self._push_pull_round)
        self._push_pull(now)

    def _push_pull(self, now: float) -> None:
        if self._life != "running":
            return
        for record in self._membership.random_nodes(1, lambda peer: peer.state == NodeState.ALIVE):
            self._outputs.append(ConnectAndPushPull(record.endpoint, join=False))

    def _push_pull_interval_s(self) -> float:
        members = self._membership.live_count
        scale = 1
        if members > _PUSH_PULL_SCALE_FROM:
            scale += math.ceil(math.log2(members) - math.log2(_PUSH_PULL_SCALE_FROM))
        return self._config.push_pull_interval_s * scale

    def _reconnect_round(self, now: float) -> None:
        self._timers.schedule(now + self._config.reconnect_interval_s, self._reconnect_round)
        endpoint = self._serf.reconnect_candidate() if self._life == "running" else None
        if endpoint is not None:
            self._outputs.append(ConnectAndPushPull(endpoint, join=True))

    def _reap_round(self, now: float) -> None:
        self._timers.schedule(now + self._config.reap_interval_s, self._reap_round)
        self._serf.reap(now)
        for name, record in list(self._membership.records.items()):
            over = now - record.changed_at > self._config.gossip_to_the_dead_s
            # Serf's record is the tombstone: while it lasts, the incarnation it died at is remembered.
            if name not in self._serf and not record.is_live and over:
                self._membership.forget(name)
        dropped = self._rumours.prune(now)
        if dropped:
            self.note("queue-overflow", f"{dropped} gossip messages dropped: the pool changes faster than news travels")

    # Joining and leaving.

    def _announce_presence(self) -> None:
        intent = JoinIntent(self._serf.clock.time, self._membership.local.name)
        self._serf.apply_join(intent, self._now)
        self._queue_intent(intent)

    def _has_company(self) -> bool:
        return self._membership.live_count > (1 if self._membership.local.is_live else 0)

    def _when_told(self, action: Callable[[float], None], queue: Callable[[int], None]) -> None:
        """Queues a rumour; runs `action` once: when it is told, at the broadcast timeout, or at once when alone."""

        def told(at: float) -> None:
            timer.cancel()
            action(at)

        token = self._rumours.new_token(told)
        limit_at = self._now + self._config.broadcast_timeout_s
        timer = self._timers.schedule(limit_at, lambda at: self._rumours.finish(token, at))
        queue(token)
        if not self._has_company():
            self._rumours.finish(token, self._now)

    def _declare_left(self, now: float) -> None:
        self._membership.leaving = True
        self._when_told(self._propagate, lambda token: self._membership.declare_left(now, token=token))

    def _propagate(self, now: float) -> None:
        # Stay up to answer the probes of those who have not heard yet, or they would report us failed.
        self._timers.schedule(now + self._config.leave_propagate_s, self._complete_leave)

    def _complete_leave(self, now: float) -> None:
        self._life = "left"
        self._outputs.append(LeaveCompleted())
