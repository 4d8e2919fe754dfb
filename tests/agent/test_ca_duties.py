"""The leader's part in the CA, over the real replicated state."""

import pytest
import trio
from certificates import CLUSTER_ID, KEY, NOW_S, TRUST_DOMAIN

from agent.ca_duties import CertificateAuthority
from agent.runtime import Runtime
from mesh.ca import authority
from mesh.ca.leaf import check_issued, create_csr
from mesh.errors import LimitExceeded, NoLeader, OutcomeUnknown, Refused
from mesh.model.command import COMMAND_CODEC, Rejected
from mesh.model.query import GetCaRoots, answer_codec
from mesh.names import agent_spiffe_id, server_spiffe_id, service_spiffe_id
from mesh.state import queries
from mesh.state.fsm import Fsm
from mesh.state.store import Store


class WallClock(Runtime):
    """A wall clock that goes with Trio's."""

    def unix_time_s(self) -> float:
        return NOW_S + trio.current_time()


class Server:
    """A state with a log of its own, and the CA that works on it."""

    def __init__(self, **options) -> None:
        self.fsm = Fsm(Store())
        self.log: list[bytes] = []
        self.authority = self.new_authority(**options)

    def new_authority(self, **options) -> CertificateAuthority:
        return CertificateAuthority(
            state=self.fsm.store, apply=self.apply, runtime=WallClock(), datacenter="dc1", **options
        )

    async def apply(self, command):
        await trio.lowlevel.checkpoint()
        self.log.append(COMMAND_CODEC.encode(command))
        return self.fsm.apply(len(self.log), self.log[-1])

    def roots(self):
        return queries.run(self.fsm.store, GetCaRoots()).value


def web_csr(server):
    return create_csr(KEY, service_spiffe_id(server.roots().trust_domain, "dc1", "web"))


async def test_first_leader_makes_the_root_and_the_next_one_keeps_it():
    server = Server()
    await server.authority.ensure_root()
    first = server.roots()
    assert first.roots[0].active
    assert first.trust_domain == f"{first.roots[0].external_trust_domain}.consul"
    await server.authority.ensure_root()
    await server.new_authority().ensure_root()
    assert server.roots() == first
    assert len(server.log) == 1


async def test_two_leaders_at_once_agree_on_one_root():
    server = Server()
    async with trio.open_nursery() as nursery:
        for _ in range(2):
            nursery.start_soon(server.new_authority().ensure_root)
    assert len(server.log) == 2
    assert len(server.roots().roots) == 1
    await server.authority.sign(web_csr(server))


async def test_preset_cluster_id_names_the_trust_domain():
    server = Server(cluster_id=CLUSTER_ID)
    await server.authority.ensure_root()
    assert server.roots().trust_domain == TRUST_DOMAIN


async def test_failure_to_write_the_root_reaches_the_caller(autojump_clock):
    async def lose(command):
        raise OutcomeUnknown("leadership lost")

    async def reject(command):
        return Rejected(7, "no")

    for apply, error in ((lose, OutcomeUnknown), (reject, Refused)):
        lost = CertificateAuthority(state=Store(), apply=apply, runtime=WallClock(), datacenter="dc1")
        with pytest.raises(error):
            await lost.ensure_root()
        with pytest.raises(NoLeader):
            await lost.sign(b"")


async def test_signed_leaf_is_good_for_72_hours_under_the_root(autojump_clock):
    server = Server()
    await server.authority.ensure_root()
    issued = await server.authority.sign(web_csr(server))
    identity = service_spiffe_id(server.roots().trust_domain, "dc1", "web")
    pem = server.roots().roots[0].root_cert_pem
    check_issued(issued, KEY, identity=identity, roots_pem=[pem], now_s=NOW_S)
    assert issued.valid_before_s - issued.valid_after_s == authority.LEAF_LIFETIME_S + authority.BACKDATE_S
    serials = {(await server.authority.sign(web_csr(server))).serial_number for _ in range(5)}
    assert len(serials) == 5


async def test_identity_of_other_datacenter_server_or_garbage_is_refused(autojump_clock):
    server = Server()
    await server.authority.ensure_root()
    domain = server.roots().trust_domain
    await server.authority.sign(create_csr(KEY, agent_spiffe_id(domain, "dc1", "node")))
    for identity in (
        service_spiffe_id(domain, "dc2", "web"),
        service_spiffe_id("other.consul", "dc1", "web"),
        server_spiffe_id(domain, "dc1"),
    ):
        with pytest.raises(Refused):
            await server.authority.sign(create_csr(KEY, identity))
    with pytest.raises(Refused):
        await server.authority.sign(b"\x30\x03abc")


async def test_requests_are_signed_at_50_a_second_and_the_rest_turned_away(autojump_clock):
    server = Server()
    await server.authority.ensure_root()
    request = web_csr(server)
    signed_at, turned_away = [], []

    async def ask():
        try:
            await server.authority.sign(request)
            signed_at.append(trio.current_time())
        except LimitExceeded:
            turned_away.append(trio.current_time())

    started = trio.current_time()
    async with trio.open_nursery() as nursery:
        for _ in range(200):
            nursery.start_soon(ask)
    assert len(signed_at) + len(turned_away) == 200
    assert len(signed_at) in (25, 26)  # one at once, then one each 20 ms for half a second
    assert max(signed_at) - started <= 0.5 + 1e-6
    await server.authority.sign(request)


async def test_row_14_private_key_never_leaves_through_a_read():
    server = Server()
    await server.authority.ensure_root()
    key = server.fsm.store.signing_root().private_key_pem
    secret = key.splitlines()[1].encode()
    answer = answer_codec(GetCaRoots()).encode(server.roots())
    assert secret not in answer
    assert b"PRIVATE" not in answer
    assert secret.decode() not in repr(COMMAND_CODEC.decode(server.log[0]))
    assert secret.decode() not in repr(server.fsm.store.signing_root())
