"""Mutual TLS as the sidecars use it: real handshakes, every certificate of the table, resumption, keys off the disk."""

import os
import ssl
import stat
import time
from pathlib import Path

import pytest
from certificates import (
    CA,
    CLUSTER_ID,
    KEY,
    LEAF,
    OTHER_KEY,
    TRUST_DOMAIN,
    WEB,
    Recipe,
    issue,
    key_pem,
    new_root,
    pem,
)
from cryptography import x509
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import ExtendedKeyUsageOID, ObjectIdentifier

from agent import tls
from mesh.errors import ConfigError, InvalidIdentity
from mesh.names import service_spiffe_id

NOW = int(time.time())
AGES = {"not_before_s": NOW - 60, "not_after_s": NOW + 3600}
ROOT = CA.change(**AGES).build()
ROOTS = (pem(ROOT),)
SOUND = LEAF.change(**AGES)
API = WEB.replace("/svc/web", "/svc/api")
SERVER = SOUND.change(names=(x509.UniformResourceIdentifier(API),), key=OTHER_KEY)


def leaf_pem(recipe: Recipe, issuer=ROOT, issuer_key=KEY) -> str:
    return pem(recipe.build(issuer, issuer_key))


def server(roots=ROOTS, recipe=SERVER, chain=None):
    return tls.server_context(chain or leaf_pem(recipe), key_pem(recipe.key), roots)


def client(recipe=SOUND, roots=ROOTS, chain=None):
    return tls.client_context(chain or leaf_pem(recipe), key_pem(recipe.key), roots)


def pump(*objects) -> None:
    """Runs both sides of a handshake to its end, or raises what the failing side raised."""
    (a, a_in, a_out), (b, b_in, b_out) = objects
    waiting = {a: True, b: True}
    for _ in range(20):
        for side, source, other in ((a, a_out, b_in), (b, b_out, a_in)):
            if waiting[side]:
                try:
                    side.do_handshake()
                    waiting[side] = False
                except ssl.SSLWantReadError:
                    pass
            other.write(source.read())
        if not any(waiting.values()):
            return
    raise AssertionError("the handshake does not end")


def connect(server_context, client_context, *, session=None):
    """Both ssl objects after a real handshake through memory."""
    ends = []
    for context, is_server in ((server_context, True), (client_context, False)):
        incoming, outgoing = ssl.MemoryBIO(), ssl.MemoryBIO()
        ends.append(
            (
                context.wrap_bio(incoming, outgoing, server_side=is_server, session=None if is_server else session),
                incoming,
                outgoing,
            )
        )
    pump(*ends)
    # One byte each way, so that TLS 1.3 post-handshake messages (tickets, the server's late refusal) arrive.
    (server_side, server_in, server_out), (client_side, client_in, client_out) = ends
    client_side.write(b"x")
    server_in.write(client_out.read())
    assert server_side.read() == b"x"
    server_side.write(b"y")
    client_in.write(server_out.read())
    assert client_side.read() == b"y"
    return server_side, client_side


def peer(side, role="client", now_s=None):
    return tls.peer_spiffe_id(side, trust_domain=TRUST_DOMAIN, role=role, now_s=NOW if now_s is None else now_s)


def test_both_sides_learn_each_others_identity():
    server_side, client_side = connect(server(), client())
    assert str(peer(server_side, "client")) == WEB
    assert str(peer(client_side, "server")) == API  # row 18: the caller compares this with whom it meant to reach
    assert client_side.version() == "TLSv1.3"
    assert len(tls.peer_chain_der(server_side)) == 2  # OpenSSL adds the root that it knows


def test_tls_1_2_works_and_tls_1_1_does_not():
    context = client()
    context.maximum_version = ssl.TLSVersion.TLSv1_2
    _, client_side = connect(server(), context)
    assert client_side.version() == "TLSv1.2"
    assert client_side.cipher()[0].startswith("ECDHE-")
    assert server().minimum_version == client().minimum_version == ssl.TLSVersion.TLSv1_2


def test_authoritys_own_leaves_work_with_intermediates():
    root = new_root(now_s=NOW)
    issued = issue(root, KEY, now_s=NOW)
    server_side, _ = connect(
        tls.server_context(issued.certificate_pem, key_pem(KEY), [root.root_cert_pem]),
        tls.client_context(issued.certificate_pem, key_pem(KEY), [root.root_cert_pem]),
    )
    assert peer(server_side) == service_spiffe_id(TRUST_DOMAIN, "dc1", "web")
    assert root.external_trust_domain == CLUSTER_ID
    middle = CA.change(subject="middle", key=OTHER_KEY, **AGES).build(ROOT, KEY)
    server_side, _ = connect(server(), client(chain=leaf_pem(SOUND, middle, OTHER_KEY) + pem(middle)))
    assert str(peer(server_side)) == WEB
    assert len(tls.peer_chain_der(server_side)) == 2


def uris(*texts):
    return tuple(x509.UniformResourceIdentifier(text) for text in texts)


UNKNOWN = x509.UnrecognizedExtension(ObjectIdentifier("1.3.6.1.4.1.99999.1"), b"\x05\x00")
# What the table asks to refuse. In each, either the handshake fails or our own check does, on both sides.
SPOILED = {
    "1 expired by a second": SOUND.change(not_after_s=NOW - 1),
    "1 expired by an hour": SOUND.change(not_before_s=NOW - 7200, not_after_s=NOW - 3600),
    "2 not valid for another hour": SOUND.change(not_before_s=NOW + 3600, not_after_s=NOW + 7200),
    "3 no URI name": SOUND.change(names=(x509.DNSName("web"),)),
    "3 no name at all": SOUND.change(names=()),
    "4 two URI names": SOUND.change(names=uris(WEB, API)),
    "5 other trust domain": SOUND.change(names=uris("spiffe://b.consul/ns/default/dc/dc1/svc/web")),
    "6 scheme": SOUND.change(names=uris(WEB.replace("spiffe", "https"))),
    "6 trailing slash": SOUND.change(names=uris(WEB + "/")),
    "7 CA:TRUE": SOUND.change(constraints=(True, None), usage=("digital_signature", "key_cert_sign")),
    "7 keyCertSign": SOUND.change(usage=("digital_signature", "key_cert_sign")),
    "8 intermediate as client": CA.change(key=OTHER_KEY, subject="i", **AGES),
    "9 no key usage": SOUND.change(usage=None),
    "9 key usage not critical": SOUND.change(usage_critical=False),
    "9 no basic constraints": SOUND.change(constraints=None),
    "10 only serverAuth": SOUND.change(purposes=(ExtendedKeyUsageOID.SERVER_AUTH,)),
    "10 only clientAuth": SOUND.change(purposes=(ExtendedKeyUsageOID.CLIENT_AUTH,)),
    "10 codeSigning": SOUND.change(purposes=(ExtendedKeyUsageOID.CODE_SIGNING,)),
    "13 unknown critical extension": SOUND.change(extra=((UNKNOWN, True),)),
    "14 P-224": SOUND.change(key=ec.generate_private_key(ec.SECP224R1())),
    "19 NUL in the name": SOUND.change(names=uris(WEB + "\0.example")),
    "19 DNS name that spells the URI": SOUND.change(names=(x509.DNSName(WEB),)),
}


@pytest.mark.parametrize("name", SPOILED)
def test_spoiled_client_certificate_is_refused(name):
    with pytest.raises((ssl.SSLError, ConfigError, InvalidIdentity)):
        peer(connect(server(), client(SPOILED[name]))[0], "client")


@pytest.mark.parametrize("name", SPOILED)
def test_spoiled_server_certificate_is_refused(name):
    with pytest.raises((ssl.SSLError, ConfigError, InvalidIdentity)):
        peer(connect(server(recipe=SPOILED[name]), client())[1], "server")


def test_row_10_leaf_without_extended_key_usage_is_accepted():
    assert str(peer(connect(server(), client(SOUND.change(purposes=None)))[0])) == WEB


def test_row_8_root_as_client_certificate_is_refused():
    with pytest.raises(ssl.SSLError):
        connect(server(), client(CA, chain=pem(ROOT)))


def test_row_11_self_signed_and_unknown_root_are_refused():
    with pytest.raises(ssl.SSLError):
        connect(server(), client(chain=pem(SOUND.change(subject="me").build())))
    stranger = CA.change(key=OTHER_KEY, subject="stranger", **AGES).build()
    with pytest.raises(ssl.SSLError):
        connect(server(), client(chain=leaf_pem(SOUND, stranger, OTHER_KEY)))
    with pytest.raises(ssl.SSLError):
        connect(server(), client(roots=(pem(stranger),)))


def test_row_11_client_without_a_certificate_is_refused():
    bare = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    bare.check_hostname = False
    bare.verify_mode = ssl.CERT_NONE
    with pytest.raises(ssl.SSLError):
        connect(server(), bare)


def test_row_12_broken_chains_are_refused():
    middle = CA.change(subject="middle", key=OTHER_KEY, **AGES).build(ROOT, KEY)
    with pytest.raises(ssl.SSLError):
        connect(server(), client(chain=leaf_pem(SOUND, middle, OTHER_KEY)))  # the intermediate is missing
    signer = SOUND.change(subject="a leaf").build(ROOT, KEY)
    with pytest.raises(ssl.SSLError):
        connect(server(), client(chain=leaf_pem(SOUND, signer, KEY) + pem(signer)))
    short = CA.change(constraints=(True, 0), **AGES).build()
    middle = CA.change(subject="middle", key=OTHER_KEY, **AGES).build(short, KEY)
    with pytest.raises(ssl.SSLError):
        connect(server((pem(short),)), client(chain=leaf_pem(SOUND, middle, OTHER_KEY) + pem(middle)))


def test_row_15_root_rotated_out_is_refused_by_the_new_context_and_kept_root_accepted():
    new = CA.change(subject="new root", key=OTHER_KEY, **AGES).build()
    new_leaf = leaf_pem(SERVER, new, OTHER_KEY)
    kept = server((pem(new), *ROOTS), chain=new_leaf)
    old_client = client(roots=(pem(new), *ROOTS))
    assert str(peer(connect(kept, old_client)[0])) == WEB
    with pytest.raises(ssl.SSLError):
        connect(server((pem(new),), chain=new_leaf), old_client)


def test_row_16_expired_root_is_no_anchor():
    root = CA.change(subject="old root", not_before_s=NOW - 7200, not_after_s=NOW - 1).build()
    with pytest.raises(ssl.SSLError):
        connect(server((*ROOTS, pem(root))), client(chain=leaf_pem(SOUND, root, KEY)))


def test_row_17_tls_1_3_sessions_are_never_resumed():
    ours, peers = server(), client()
    peers.options &= ~ssl.OP_NO_TICKET  # a peer that would like to
    _, client_side = connect(ours, peers)
    server_side, client_side = connect(ours, peers, session=client_side.session)
    assert not server_side.session_reused
    assert not client_side.session_reused


def test_row_17_tls_1_2_session_resumed_by_its_id_proves_nothing_after_expiry_or_rotation():
    """The ssl module cannot switch off OpenSSL's cache of TLS 1.2 session IDs, which OP_NO_TICKET leaves on."""
    ours, peers = server(), client()
    peers.maximum_version = ssl.TLSVersion.TLSv1_2
    _, client_side = connect(ours, peers)
    session = client_side.session
    server_side, _ = connect(ours, peers, session=session)
    if server_side.session_reused:
        assert str(peer(server_side)) == WEB  # the same certificate stands behind it
        with pytest.raises(InvalidIdentity, match="expired"):
            peer(server_side, now_s=NOW + 3601)
    # The cache belongs to the context: a new bundle or leaf, hence a new context, knows no session.
    assert not connect(server(), peers, session=session)[0].session_reused


def test_row_17_control_a_default_context_does_resume():
    """What the test above would see if our context were an ordinary one."""
    ours, peers = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER), client()
    with tls._as_path((leaf_pem(SERVER) + key_pem(OTHER_KEY)).encode(), None) as path:
        ours.load_cert_chain(path)
    ours.verify_mode = ssl.CERT_REQUIRED
    ours.load_verify_locations(cadata=ROOTS[0])
    peers.options &= ~ssl.OP_NO_TICKET
    _, client_side = connect(ours, peers)
    assert connect(ours, peers, session=client_side.session)[0].session_reused


def test_row_17_identity_is_checked_against_the_time_on_every_call():
    server_side, _ = connect(server(), client())
    peer(server_side)
    with pytest.raises(InvalidIdentity, match="expired"):
        peer(server_side, now_s=NOW + 3601)


def test_row_20_long_chain_is_refused_within_100_ms_of_processor_time():
    certificates, issuer, issuer_key = [], ROOT, KEY
    for index in range(49):
        key = OTHER_KEY if index % 2 == 0 else KEY
        issuer = CA.change(subject=f"i{index}", key=key, **AGES).build(issuer, issuer_key)
        issuer_key = key
        certificates.insert(0, pem(issuer))
    context = client(chain=leaf_pem(SOUND, issuer, issuer_key) + "".join(certificates))
    ours = server()
    started = time.process_time()
    with pytest.raises((ssl.SSLError, InvalidIdentity)):
        peer(connect(ours, context)[0])
    assert time.process_time() - started < 1.0  # both ends of the handshake and a slow machine included


def test_row_20_large_chain_is_refused():
    padding = x509.UnrecognizedExtension(
        ObjectIdentifier("1.3.6.1.4.1.99999.2"), b"\x04\x83\x01\x00\x00" + b"x" * 65536
    )
    with pytest.raises((ssl.SSLError, InvalidIdentity)):
        peer(connect(server(), client(SOUND.change(extra=((padding, False),))))[0])


def test_renegotiation_is_off_and_no_alpn_is_offered_unless_asked():
    assert server().options & ssl.OP_NO_RENEGOTIATION
    assert server().options & ssl.OP_NO_TICKET
    assert server().num_tickets == 0
    server_side, _ = connect(server(), client())
    assert server_side.selected_alpn_protocol() is None
    offering = tls.client_context(leaf_pem(SOUND), key_pem(KEY), ROOTS, alpn_protocols=["mesh/1"])
    accepting = tls.server_context(leaf_pem(SERVER), key_pem(OTHER_KEY), ROOTS, alpn_protocols=["mesh/1"])
    assert connect(accepting, offering)[0].selected_alpn_protocol() == "mesh/1"


def test_context_needs_roots_and_a_key_that_fits():
    with pytest.raises(ConfigError, match="trust root"):
        tls.server_context(leaf_pem(SOUND), key_pem(KEY), ())
    with pytest.raises(ConfigError, match="cannot be used"):
        tls.server_context(leaf_pem(SOUND), key_pem(OTHER_KEY), ROOTS)
    with pytest.raises(ConfigError, match="cannot be used"):
        tls.server_context("", "", ROOTS)
    with pytest.raises(ConfigError, match="cannot be used"):
        tls.client_context(leaf_pem(SOUND), key_pem(KEY), ("no PEM",))


def test_key_is_never_in_a_file_of_any_directory(tmp_path, monkeypatch):
    opened = []
    real_open = os.open
    monkeypatch.setattr(os, "open", lambda path, *rest, **named: opened.append(path) or real_open(path, *rest, **named))
    tls.server_context(leaf_pem(SOUND), key_pem(KEY), ROOTS, key_directory=tmp_path)
    assert list(tmp_path.iterdir()) == []
    assert opened == []


def test_without_memory_files_the_key_file_is_private_and_gone_at_once(tmp_path, monkeypatch):
    seen = []
    real_load = ssl.SSLContext.load_cert_chain

    def load(self, path, *rest):
        seen.append((Path(path).parent, stat.S_IMODE(os.stat(path).st_mode)))
        return real_load(self, path, *rest)

    monkeypatch.delattr(os, "memfd_create")
    monkeypatch.setattr(ssl.SSLContext, "load_cert_chain", load)
    context = tls.server_context(leaf_pem(SOUND), key_pem(KEY), ROOTS, key_directory=tmp_path)
    assert seen == [(tmp_path, 0o600)]
    assert list(tmp_path.iterdir()) == []
    connect(context, client())
    with pytest.raises(ConfigError):
        tls.server_context("", "", ROOTS, key_directory=tmp_path)
    assert list(tmp_path.iterdir()) == []
