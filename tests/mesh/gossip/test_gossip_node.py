"""The node's rules, one conversation at a time: a message in, what comes out and what is believed afterwards."""

import random
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mesh.errors import ConfigError, LimitExceeded
from mesh.gossip.broadcast import BroadcastQueue, retransmit_limit
from mesh.gossip.config import DEV, LAN, TEST, WAN, GossipConfig
from mesh.gossip.events import MemberFailed, MemberJoined, MemberLeft, NameConflicted
from mesh.gossip.fields import address_of, pack
from mesh.gossip.messages import (
    ACCUSED_INCARNATION_MAX,
    ALIVE_INCARNATION_MAX,
    VERSIONS,
    Ack,
    Alive,
    Dead,
    IndirectPing,
    Message,
    Nack,
    NodeState,
    NodeStateEntry,
    Ping,
    Suspect,
    User,
    encode,
)
from mesh.gossip.node import GossipNode
from mesh.gossip.outputs import ConnectAndPing, ConnectAndPushPull, SendDatagram
from mesh.gossip.packet import PacketCodec
from mesh.gossip.probe import RELAYS_PER_SOURCE_MAX
from mesh.gossip.serf_messages import (
    JoinIntent,
    LeaveIntent,
    SerfPushPull,
    decode_serf,
    encode_intent,
    encode_serf_push_pull,
    encode_tags,
)
from mesh.gossip.stream import PushPull
from mesh.gossip.suspicion import suspicion_min_s, suspicion_timeout_s

CODEC = PacketCodec(keyring=None, label="")


def alive(name: str, incarnation: int = 1, *, host: str = "", port: int = 7946, meta: bytes = b"") -> Alive:
    return Alive(incarnation, name, address_of(host or f"10.0.0.{ord(name[0])}"), port, meta, VERSIONS)


class Conversation:
    """A node called "me" at 10.0.0.1 and the peers b, c, d ... at 10.0.0.<code of their letter>."""

    def __init__(self, *peers: str, config: GossipConfig = LAN) -> None:
        self.now = 100.0
        self.node = GossipNode(
            name="me", address="10.0.0.1", port=7946, tags={}, config=config, keyring=None, rng=random.Random(1)
        )
        self.node.start(self.now)
        for peer in peers:
            self.hear(alive(peer))
        self.outputs()

    def hear(self, *messages: Message, source: tuple[str, int] = ("10.0.0.98", 7946)) -> None:
        for message in messages:
            self.node.receive_datagram(encode(message), source, self.now)

    def serf(self, intent: JoinIntent | LeaveIntent) -> None:
        self.hear(User(encode_intent(intent)))

    def outputs(self) -> list[object]:
        return self.node.take_outputs()

    def sent(self) -> list[tuple[tuple[str, int], Message]]:
        """Every message sent since the last look, with its receiver."""
        return [
            (output.endpoint, message)
            for output in self.outputs()
            if isinstance(output, SendDatagram)
            for message in CODEC.open(output.data).messages
        ]

    def wait(self, seconds: float) -> list[object]:
        """Lets time pass, timer by timer; what came out."""
        end = self.now + seconds
        outputs = self.outputs()
        while self.node.next_deadline() <= end:
            self.now = self.node.next_deadline()
            self.node.handle_timer(self.now)
            outputs += self.outputs()
        self.now = end
        return outputs

    def status(self, name: str) -> str | None:
        return {member.name: member.status for member in self.node.members()}.get(name)

    def record(self, name: str):
        return self.node._membership.records[name]

    def gossiped(self, outputs: list[object]) -> list[Message]:
        return [
            message
            for output in outputs
            if isinstance(output, SendDatagram)
            for message in CODEC.open(output.data).messages
        ]


# Pings and relays.


def test_ping_is_acked_where_it_asks_for_it():
    talk = Conversation()
    talk.hear(Ping(9, "me", address_of("10.0.0.50"), 777, "x"))
    talk.hear(Ping(10, "me"), source=("10.0.0.60", 888))
    assert talk.sent() == [(("10.0.0.50", 777), Ack(9)), (("10.0.0.60", 888), Ack(10))]


def test_ping_for_another_name_is_not_acked():
    talk = Conversation()
    talk.hear(Ping(9, "somebody-else"))
    assert talk.sent() == []
    assert talk.node.counters["misdirected"] == 1


def test_strangers_get_no_rumours_with_their_ack():
    talk = Conversation("b")
    talk.hear(alive("c"))
    talk.hear(Ping(9, "me"), source=("198.51.100.1", 1))
    ((_, packet),) = [(o.endpoint, o.data) for o in talk.outputs() if isinstance(o, SendDatagram)]
    assert len(packet) <= len(encode(Ping(9, "me")))


def test_members_get_rumours_with_their_ack():
    talk = Conversation("b")
    talk.hear(alive("c"))
    talk.hear(Ping(9, "me"), source=("10.0.0.98", 7946))
    messages = [message for endpoint, message in talk.sent() if endpoint == ("10.0.0.98", 7946)]
    assert messages[0] == Ack(9)
    assert alive("c") in messages


def test_relay_pings_the_target_and_passes_the_ack_on():
    talk = Conversation("b", "c")
    talk.hear(IndirectPing(5, address_of("10.0.0.99"), 7946, "c", True, address_of("10.0.0.98"), 7946, "b"))
    ((endpoint, ping),) = [item for item in talk.sent() if isinstance(item[1], Ping)]
    assert endpoint == ("10.0.0.99", 7946)
    assert ping.node == "c"
    talk.hear(Ack(ping.sequence), source=endpoint)
    assert (("10.0.0.98", 7946), Ack(5)) in talk.sent()
    assert not any(isinstance(message, Nack) for message in talk.gossiped(talk.wait(1)))


def test_relay_says_nack_before_the_asker_gives_up():
    talk = Conversation("b", "c")
    started = talk.now
    talk.hear(IndirectPing(5, address_of("10.0.0.99"), 7946, "c", True, address_of("10.0.0.98"), 7946, "b"))
    talk.sent()
    while not (said := [item for item in talk.gossiped(talk.wait(0.01)) if isinstance(item, Nack)]):
        assert talk.now - started < LAN.probe_timeout_s
    assert said == [Nack(5)]


def test_relaying_is_capped_per_asker():
    talk = Conversation("b", "c")
    request = IndirectPing(5, address_of("10.0.0.99"), 7946, "c", True)
    talk.hear(*[request] * 1000)
    assert len([m for _, m in talk.sent() if isinstance(m, Ping)]) == RELAYS_PER_SOURCE_MAX
    assert talk.node.counters["relay-limit"] == 1000 - RELAYS_PER_SOURCE_MAX
    talk.wait(1)
    talk.hear(request)
    assert len([m for _, m in talk.sent() if isinstance(m, Ping)]) == 1


# The failure detector.


def probe_of(talk: Conversation, name: str) -> Ping:
    """Waits for the next direct probe of that member; the others answer theirs."""
    for _ in range(2000):
        for message in talk.gossiped(talk.wait(0.01)):
            if isinstance(message, Ping) and message.node == name:
                return message
            if isinstance(message, Ping):
                talk.hear(Ack(message.sequence))
    raise AssertionError(f"{name} is never probed")


def test_silent_member_is_asked_through_relays_and_over_tcp_then_suspected_then_dead():
    talk = Conversation("b", "c", "d", "e", "f")
    ping = probe_of(talk, "b")
    outputs = talk.wait(LAN.probe_timeout_s)
    asked = [message for message in talk.gossiped(outputs) if isinstance(message, IndirectPing)]
    assert len(asked) == LAN.indirect_probes
    assert {(message.node, message.sequence) for message in asked} == {("b", ping.sequence)}
    assert [output.sequence for output in outputs if isinstance(output, ConnectAndPing)] == [ping.sequence]
    outputs = talk.wait(0.6)
    assert Suspect(1, "b", "me") in talk.gossiped(outputs)
    assert talk.record("b").state == NodeState.SUSPECT
    assert talk.status("b") == "alive"


def test_nacks_spare_our_own_health():
    scores = {}
    for nacks in (0, 3):
        talk = Conversation("b", "c", "d", "e", "f")
        ping = probe_of(talk, "b")
        talk.wait(LAN.probe_timeout_s)
        talk.hear(*[Nack(ping.sequence)] * nacks)
        talk.wait(0.6)
        scores[nacks] = talk.node._awareness.score
    assert scores == {0: 3, 3: 0}


def test_ack_over_tcp_alone_keeps_the_member_and_is_noticed():
    talk = Conversation("b")
    ping = probe_of(talk, "b")
    talk.wait(LAN.probe_timeout_s)
    talk.node.receive_stream_ack(ping.sequence, talk.now)
    talk.wait(0.6)
    assert talk.record("b").state == NodeState.ALIVE
    assert talk.node.counters["udp-blocked"] == 1


def test_stale_acks_do_not_save_a_silent_member():
    talk = Conversation("b")
    ping = probe_of(talk, "b")
    talk.hear(Ack((ping.sequence + 1) % 2**32), Ack(ping.sequence - 1 if ping.sequence else 5))
    talk.wait(1.2)
    assert talk.record("b").state == NodeState.SUSPECT


@pytest.mark.parametrize(("accusers", "seconds"), [(1, 24.0), (2, 11.4), (3, 4.0)])
def test_suspicion_shortens_as_others_confirm(accusers, seconds):
    # Six live members: minimum 4 s, maximum 24 s; multiples 6, 2.85 and 1 for none, one and two confirmations.
    talk = Conversation("b", "c", "d", "e", "f")
    talk.hear(*[Suspect(1, "b", accuser) for accuser in ("c", "d", "e")[:accusers]])
    deadline = talk.record("b").suspicion.deadline
    assert deadline - talk.now == pytest.approx(seconds, abs=0.05)


def test_the_same_accuser_confirms_nothing():
    talk = Conversation("b", "c", "d", "e", "f")
    talk.hear(Suspect(1, "b", "c"), Suspect(1, "b", "c"), Suspect(1, "b", "c"))
    assert talk.record("b").suspicion.confirmations == 0
    assert not talk.record("b").suspicion.confirm("c")
    assert talk.record("b").suspicion.confirm("d")


def test_suspicion_formula_is_lifeguards():
    assert suspicion_min_s(multiplier=4, members=1000, probe_interval_s=1.0) == pytest.approx(12.0)
    assert suspicion_timeout_s(confirmations=0, expected=0, min_s=4, max_s=24) == 4
    values = [suspicion_timeout_s(confirmations=n, expected=2, min_s=4, max_s=24) for n in range(3)]
    assert values == pytest.approx([24, 11.38, 4], abs=0.01)


def test_refutation_clears_the_suspicion():
    talk = Conversation("b", "c", "d", "e", "f")
    talk.hear(Suspect(1, "b", "c"), alive("b", 2))
    assert talk.record("b").state == NodeState.ALIVE
    talk.wait(1)
    assert talk.record("b").suspicion is None


def test_member_refutes_a_suspicion_and_a_death_of_its_own():
    for accusation in (Suspect(3, "me", "b"), Dead(3, "me", "b")):
        talk = Conversation("b", "c")
        talk.hear(accusation)
        refutations = [m for m in talk.gossiped(talk.wait(1)) if isinstance(m, Alive) and m.node == "me"]
        assert {message.incarnation for message in refutations} == {4}
        assert talk.status("me") == "alive"


def test_forged_death_at_the_highest_incarnation_is_refuted_without_wrapping():
    talk = Conversation("b", "c")
    for _ in range(3):
        talk.hear(Dead(ACCUSED_INCARNATION_MAX, "me", "b"))
    assert talk.record("me").incarnation == ALIVE_INCARNATION_MAX
    talk.node.receive_datagram(
        b"\x05" + pack({"Incarnation": 2**32 - 1, "Node": "me", "From": "b"}), ("10.0.0.98", 7946), talk.now
    )
    assert talk.record("me").incarnation == ALIVE_INCARNATION_MAX
    assert talk.node.counters["field"] == 1


def test_after_a_stall_of_ours_nobody_is_declared_dead_at_once():
    talk = Conversation("b", "c", "d")
    talk.hear(Suspect(1, "b", "c"))
    talk.wait(1)
    # The whole process stood still for a minute; b's refutation lies unread in the socket.
    talk.now += 60
    talk.node.handle_timer(talk.now)
    assert talk.status("b") == "alive"
    assert talk.node._awareness.score >= 1
    talk.hear(alive("b", 2))
    talk.wait(5)
    assert talk.status("b") == "alive"


# Incarnations.


def test_old_news_changes_nothing():
    talk = Conversation("b")
    talk.hear(alive("b", 5), Suspect(6, "b", "c"), alive("b", 7))
    before = talk.record("b").incarnation, talk.record("b").state
    talk.outputs()
    talk.now += 3600
    talk.hear(alive("b", 5), Suspect(6, "b", "c"), Dead(6, "b", "c"), alive("b", 7))
    assert (talk.record("b").incarnation, talk.record("b").state) == before


def test_evidence_about_the_dead_raises_their_incarnation():
    talk = Conversation("b")
    talk.hear(Dead(1, "b", "c"), Dead(9, "b", "c"), alive("b", 5))
    assert talk.status("b") == "failed"
    assert talk.record("b").incarnation == 9
    talk.hear(alive("b", 10))
    assert talk.status("b") == "alive"


def test_third_party_cannot_revive_below_the_tombstone_even_hours_later():
    talk = Conversation("b", "c")
    talk.hear(Dead(4, "b", "c"))
    talk.now += 6 * 3600
    stale = NodeStateEntry("b", address_of("10.0.0.98"), 7946, b"", 4, NodeState.ALIVE, VERSIONS)
    talk.node.receive_stream(PushPull(False, (stale,), b""), "10.0.0.99", talk.now)
    assert talk.status("b") == "failed"


def test_stale_alive_is_answered_with_the_accusation_held():
    talk = Conversation("b", "c")
    talk.hear(Dead(7, "b", "c"))
    talk.wait(3)
    talk.hear(alive("b", 1))
    assert (("10.0.0.98", 7946), Dead(7, "b", "me")) in talk.sent()
    # Once a second at most, whatever arrives.
    talk.hear(*[alive("b", 1)] * 50)
    assert not [item for item in talk.sent() if isinstance(item[1], Dead)]


def test_accuser_who_missed_a_leave_is_told_of_it():
    talk = Conversation("b", "c", "d")
    talk.hear(Dead(1, "b", "b"))
    talk.wait(5)
    talk.hear(Suspect(1, "b", "c"))
    assert talk.sent() == [(("10.0.0.99", 7946), Dead(1, "b", "b"))]
    talk.hear(*[Suspect(1, "b", "d")] * 20)
    assert talk.sent() == []
    late = Conversation("b", "c", "d")
    late.hear(Suspect(1, "b", "c"), Dead(1, "b", "b"))
    assert late.status("b") == "left"


def test_accusations_about_unknown_nodes_are_dropped():
    talk = Conversation("b")
    talk.hear(Suspect(1, "ghost", "b"), Dead(1, "ghost", "b"))
    assert talk.status("ghost") is None
    assert talk.outputs() == []


def test_push_pull_death_is_only_a_suspicion_but_left_is_left():
    talk = Conversation("b", "c", "d")
    entries = tuple(
        NodeStateEntry(name, address_of(f"10.0.0.{ord(name)}"), 7946, b"", 1, state, VERSIONS)
        for name, state in (("b", NodeState.DEAD), ("c", NodeState.LEFT))
    )
    talk.node.receive_stream(PushPull(False, entries, b""), "10.0.0.100", talk.now)
    assert talk.record("b").state == NodeState.SUSPECT
    assert talk.record("c").state == NodeState.LEFT


def test_name_conflict_is_refused_and_reported_once_a_second():
    talk = Conversation("b")
    talk.hear(*[alive("b", 99, host="10.7.7.7")] * 20)
    conflicts = [output for output in talk.outputs() if isinstance(output, NameConflicted)]
    assert [(c.member.name, c.address, c.port) for c in conflicts] == [("b", "10.7.7.7", 7946)]
    assert talk.record("b").host == "10.0.0.98"


def test_claim_of_a_pruned_name_is_refused_quietly():
    talk = Conversation("b", "c")
    talk.hear(Dead(1, "b", "c"))
    talk.node.force_leave("b", prune=True, now=talk.now)
    talk.outputs()
    talk.hear(alive("b", 2, host="10.7.7.7"))
    assert not any(isinstance(output, NameConflicted) for output in talk.outputs())
    assert talk.status("b") is None


def test_returning_elsewhere_keeps_the_incarnation_and_is_told_to_rise_above_it():
    talk = Conversation("b", "c")
    talk.hear(Dead(9, "b", "c"))
    talk.now += LAN.dead_reclaim_s + 1
    # Said by somebody else it may be an old story; said from that address it is the node itself.
    talk.hear(alive("b", 2, host="10.7.7.7"), source=("10.0.0.99", 7946))
    assert talk.status("b") == "failed"
    talk.hear(alive("b", 2, host="10.7.7.7"), source=("10.7.7.7", 7946))
    assert talk.status("b") == "alive"
    assert talk.record("b").incarnation == 9
    assert (("10.7.7.7", 7946), Dead(9, "b", "me")) in talk.sent()


def test_nobody_is_expected_to_confirm_in_a_pool_of_three():
    talk = Conversation("b", "c")
    talk.hear(Suspect(1, "b", "c"))
    assert talk.record("b").suspicion.deadline - talk.now == pytest.approx(4.0)


def test_suspect_is_probed_with_the_accusation_beside_the_ping():
    talk = Conversation("b", "c", "d", "e", "f")
    talk.hear(Suspect(1, "b", "c"))
    for _ in range(2000):
        for output in talk.wait(0.01):
            if isinstance(output, SendDatagram) and output.endpoint == ("10.0.0.98", 7946):
                messages = CODEC.open(output.data).messages
                if isinstance(messages[0], Ping):
                    assert messages[1:] == (Suspect(1, "b", "me"),)
                    return
    raise AssertionError("the suspect is never probed")


def test_our_own_name_elsewhere_is_reported_not_adopted():
    talk = Conversation("b")
    talk.hear(alive("me", 99, host="10.7.7.7"))
    assert [type(o) for o in talk.outputs()] == [NameConflicted]
    assert talk.node.local_member().address == "10.0.0.1"
    assert talk.record("me").incarnation == 1


def test_dead_name_is_reclaimed_after_its_time_and_a_left_one_at_once():
    talk = Conversation("b", "c")
    talk.hear(Dead(1, "b", "c"), Dead(1, "c", "c"))
    talk.hear(alive("b", 2, host="10.7.7.7"), alive("c", 2, host="10.7.7.8"))
    assert talk.record("b").host == "10.0.0.98"
    assert talk.record("c").host == "10.7.7.8"
    talk.now += LAN.dead_reclaim_s + 1
    talk.hear(alive("b", 2, host="10.7.7.7"))
    assert talk.record("b").host == "10.7.7.7"


def test_an_address_in_sixteen_bytes_is_the_same_and_is_passed_on_as_it_came():
    talk = Conversation("b")
    mapped = Alive(2, "b", bytes(10) + b"\xff\xff" + address_of("10.0.0.98"), 7946, b"", VERSIONS)
    talk.hear(mapped)
    assert talk.record("b").incarnation == 2
    assert talk.node.members()[0].address == "10.0.0.98"
    # Go compares the bytes: four where it sent sixteen would be a conflict to it.
    assert mapped in talk.gossiped(talk.wait(1))


# Serf's layer.


def test_leave_intent_makes_the_silent_member_left():
    talk = Conversation("b")
    talk.serf(LeaveIntent(5, "b"))
    assert talk.status("b") == "leaving"
    talk.hear(Dead(1, "b", "b"))
    assert talk.status("b") == "left"
    assert [type(o) for o in talk.outputs() if isinstance(o, MemberLeft | MemberFailed)] == [MemberLeft]


def test_self_declared_death_is_left_even_if_its_intent_was_lost():
    talk = Conversation("b")
    talk.hear(Dead(1, "b", "b"))
    assert talk.status("b") == "left"


def test_intent_heard_before_its_member_counts_when_it_comes():
    talk = Conversation()
    talk.serf(LeaveIntent(5, "b"))
    talk.hear(alive("b"))
    assert talk.status("b") == "leaving"
    talk.serf(JoinIntent(6, "b"))
    assert talk.status("b") == "alive"


def test_older_intents_are_ignored_and_not_passed_on():
    talk = Conversation("b")
    talk.serf(JoinIntent(9, "b"))
    talk.wait(5)
    talk.serf(LeaveIntent(8, "b"))
    talk.serf(LeaveIntent(9, "b"))
    assert talk.status("b") == "alive"
    assert not any(isinstance(message, User) for message in talk.gossiped(talk.wait(1)))


def test_two_leaves_for_one_member_do_not_chase_each_other():
    talk = Conversation("b")
    talk.serf(LeaveIntent(5, "b"))
    talk.serf(LeaveIntent(7, "b"))
    talk.wait(10)
    talk.serf(LeaveIntent(5, "b"))
    talk.serf(LeaveIntent(7, "b"))
    assert talk.node.statistics()["intent_queue"] == "0"


def test_late_copy_of_an_older_intent_does_not_displace_the_prune_that_followed_it():
    talk = Conversation("b", "c")
    talk.hear(Dead(1, "b", "c"))
    talk.serf(LeaveIntent(5, "b"))
    talk.node.force_leave("b", prune=True, now=talk.now)
    talk.serf(LeaveIntent(5, "b"))
    said = [decode_serf(m.payload) for m in talk.gossiped(talk.wait(2)) if isinstance(m, User)]
    assert set(said) == {LeaveIntent(6, "b", prune=True)}


def test_member_refutes_a_leave_it_did_not_mean():
    talk = Conversation("b")
    talk.serf(LeaveIntent(50, "me"))
    said = [decode_serf(m.payload) for m in talk.gossiped(talk.wait(1)) if isinstance(m, User)]
    assert JoinIntent(51, "me") in said
    assert talk.status("me") == "alive"


def test_push_pull_between_agreeing_peers_does_not_inflate_their_clocks():
    talk = Conversation("b")
    talk.serf(LeaveIntent(5, "b"))
    talk.hear(Dead(1, "b", "b"))
    for _ in range(20):
        state = encode_serf_push_pull(SerfPushPull(6, {"b": 5}, ("b",), 1, 1))
        talk.node.receive_stream(PushPull(False, (), state), "10.0.0.99", talk.now)
    assert talk.node._serf.state().status_times["b"] == 5


@pytest.mark.parametrize("kind", [5, 6, 7, 8])
def test_serf_messages_of_later_features_are_passed_over(kind):
    talk = Conversation("b")
    talk.hear(User(bytes((kind,)) + pack({"LTime": 1, "ID": 1})))
    assert talk.outputs() == []
    assert talk.node.counters == {"ignored": 1}


def test_user_events_and_queries_are_passed_on_once():
    talk = Conversation("b", "c")
    event = User(b"\x03" + pack({"LTime": 4, "Name": "deploy", "Payload": b"1", "CC": True}))
    query = User(b"\x04" + pack({"LTime": 4, "ID": 7, "Flags": 0, "Name": "load", "Payload": b""}))
    silent = User(b"\x04" + pack({"LTime": 4, "ID": 8, "Flags": 2, "Name": "load", "Payload": b""}))
    talk.hear(event, event, query, query, silent)
    said = [m for m in talk.gossiped(talk.wait(5)) if isinstance(m, User)]
    limit = retransmit_limit(multiplier=4, members=3)
    assert said.count(event) == said.count(query) == limit
    assert silent not in said
    talk.hear(event, query)
    assert not [m for m in talk.gossiped(talk.wait(5)) if isinstance(m, User)]
    assert talk.node.statistics()["event_time"] == talk.node.statistics()["query_time"] == "5"


def test_relayed_answers_go_to_members_only():
    talk = Conversation("b")
    for host in ("10.0.0.98", "198.51.100.7"):
        header = pack({"DestAddr": {"IP": address_of(host), "Port": 7946, "Zone": ""}, "DestName": "b"})
        talk.hear(User(b"\x09" + header + b"\x05answer"))
    assert talk.sent() == [(("10.0.0.98", 7946), User(b"\x05answer"))]


# Dissemination.


def test_rumours_are_told_a_bounded_number_of_times():
    talk = Conversation("b", "c", "d")
    talk.wait(10)
    talk.hear(alive("e"))
    told = [message for message in talk.gossiped(talk.wait(10)) if message == alive("e")]
    assert len(told) == retransmit_limit(multiplier=4, members=5)


def test_newer_rumour_replaces_the_older():
    queue = BroadcastQueue(bytes_max=100)
    assert queue.enqueue("b", b"old", token=1) is None
    assert queue.enqueue("b", b"new") == 1
    messages, _ = queue.take(bytes_free=1000, part_bytes=2, parts_max=255, limit=4)
    assert messages == [b"new"]


def test_least_told_rumours_go_first_and_leave_after_the_limit():
    queue = BroadcastQueue(bytes_max=100)
    queue.enqueue("a", b"a" * 50, token=7)
    queue.take(bytes_free=60, part_bytes=2, parts_max=255, limit=2)
    queue.enqueue("b", b"b" * 50)
    assert queue.take(bytes_free=60, part_bytes=2, parts_max=255, limit=2) == ([b"b" * 50], [])
    assert queue.take(bytes_free=200, part_bytes=2, parts_max=255, limit=2)[1] == [7]
    assert len(queue) == 0


def test_oversized_message_is_refused_when_it_is_queued():
    with pytest.raises(LimitExceeded):
        BroadcastQueue(bytes_max=100).enqueue("a", bytes(101))


def test_queue_is_pruned_to_its_limit_most_told_first():
    queue = BroadcastQueue(bytes_max=100)
    queue.enqueue("told", b"x" * 10, token=3)
    queue.take(bytes_free=20, part_bytes=2, parts_max=1, limit=9)
    for number in range(10):
        queue.enqueue(number, b"y")
    assert queue.prune(10) == (1, [3])
    assert len(queue) == 10


@given(st.lists(st.tuples(st.integers(0, 20), st.integers(1, 300)), max_size=60), st.integers(10, 1400))
def test_packets_never_exceed_their_budget(entries, free):
    queue = BroadcastQueue(bytes_max=300)
    for key, size in entries:
        queue.enqueue(key, bytes(size))
    while True:
        messages, _ = queue.take(bytes_free=free, part_bytes=2, parts_max=254, limit=3)
        if not messages:
            break
        assert sum(len(message) + 2 for message in messages) <= free


def test_system_news_leaves_room_for_serf():
    talk = Conversation("b")
    talk.wait(20)
    event = User(b"\x03" + pack({"LTime": 4, "Name": "deploy", "Payload": bytes(200)}))
    # More news about members than several packets hold, and one event that would fit into no gap between them.
    talk.hear(*[alive(f"x{number}", host=f"10.1.0.{number + 1}") for number in range(100)], event)
    packets = [output for output in talk.wait(0.001) if isinstance(output, SendDatagram)]
    assert event in CODEC.open(packets[0].data).messages


# Leaving, tags, configuration.


def test_leaving_node_says_intent_then_death_and_stays_up_to_answer():
    talk = Conversation("b", "c")
    talk.node.leave(talk.now)
    outputs = talk.wait(4)
    said = talk.gossiped(outputs)
    assert any(isinstance(m, User) and isinstance(decode_serf(m.payload), LeaveIntent) for m in said)
    assert Dead(1, "me", "me") in said
    talk.hear(Ping(3, "me"))
    assert Ack(3) in [message for _, message in talk.sent()]
    # What others still believe is not refuted any more.
    talk.hear(Dead(1, "me", "b"), alive("me", 5))
    assert not any(isinstance(m, Alive) and m.node == "me" for m in talk.gossiped(talk.wait(5)))


def test_failed_members_are_looked_up_again():
    talk = Conversation("b")
    talk.hear(Dead(1, "b", "c"))
    tries = [o for o in talk.wait(LAN.reconnect_interval_s + 1) if isinstance(o, ConnectAndPushPull)]
    assert ConnectAndPushPull(("10.0.0.98", 7946), join=True) in tries


def test_tags_above_the_limit_are_refused_and_nothing_changes():
    talk = Conversation()
    with pytest.raises(LimitExceeded, match="512"):
        talk.node.set_tags({"k": "v" * 600}, talk.now)
    assert talk.record("me").incarnation == 1


def test_same_tags_are_no_news():
    talk = Conversation("b")
    talk.wait(5)
    talk.node.set_tags({}, talk.now)
    assert talk.record("me").incarnation == 1


def test_reads_the_old_single_role_and_bad_tags_as_something_harmless():
    talk = Conversation()
    talk.hear(alive("b", meta=b"web"), alive("c", meta=b"\xff\xc1"), alive("d", meta=encode_tags({"a": "1"})))
    assert [member.tags for member in talk.node.members()] == [{"role": "web"}, {}, {"a": "1"}, {}]
    assert [o.member.name for o in talk.outputs() if isinstance(o, MemberJoined)] == ["b", "c", "d"]


def test_contradictory_configuration_is_refused():
    for change in (
        {"probe_timeout_s": 1.0},
        {"gossip_interval_s": 0},
        {"gossip_nodes": 0},
        {"packet_bytes_max": 100},
        {"label": "x" * 254},
    ):
        with pytest.raises(ConfigError):
            replace(LAN, **change)
    assert all(profile.probe_timeout_s < profile.probe_interval_s for profile in (LAN, WAN, DEV, TEST))


# Anything at all.

NAMES = st.sampled_from(["me", "b", "c", "d", "e"])
INCARNATIONS = st.integers(0, 6) | st.sampled_from([ACCUSED_INCARNATION_MAX, ALIVE_INCARNATION_MAX])
ACCUSED = st.integers(0, 6) | st.just(ACCUSED_INCARNATION_MAX)
HOSTS = st.sampled_from([address_of("10.0.0.1"), address_of("10.0.0.98"), address_of("10.0.0.99"), address_of("::1")])
ANYTHING = st.one_of(
    st.builds(Alive, INCARNATIONS, NAMES, HOSTS, st.sampled_from([7946, 1]), st.binary(max_size=4), st.just(VERSIONS)),
    st.builds(Suspect, ACCUSED, NAMES, NAMES),
    st.builds(Dead, ACCUSED, NAMES, NAMES),
    st.builds(Ack, st.integers(0, 5)),
    st.builds(lambda t, n: User(encode_intent(JoinIntent(t, n))), st.integers(0, 9), NAMES),
    st.builds(lambda t, n, p: User(encode_intent(LeaveIntent(t, n, p))), st.integers(0, 9), NAMES, st.booleans()),
    st.builds(User, st.binary(max_size=30)),
    st.builds(lambda h, n: IndirectPing(1, h, 7946, n, True), HOSTS, NAMES),
)


@given(st.lists(ANYTHING | st.floats(0, 40), max_size=60))
@settings(deadline=None)
def test_no_sequence_of_messages_and_waits_breaks_the_node(steps):
    talk = Conversation("b", "c")
    held: dict[str, int] = {}
    for step in steps:
        if isinstance(step, float):
            talk.wait(step)
        else:
            talk.hear(step)
        records = talk.node._membership.records
        assert talk.node._membership.live_count == sum(record.is_live for record in records.values())
        for name, record in records.items():
            assert record.incarnation >= held.get(name, -1)
            assert (record.suspicion is not None) == (record.state == NodeState.SUSPECT)
        held = {name: record.incarnation for name, record in records.items()}
        assert talk.status("me") == "alive"
