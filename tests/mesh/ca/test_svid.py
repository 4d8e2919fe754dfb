"""Every row of the certificate table: what a leaf must be, and what a chain must be."""

import ipaddress
import random

import pytest
from certificates import CA, CA_USAGE, KEY, LEAF, NOW_S, OTHER_KEY, TRUST_DOMAIN, WEB, Recipe, der, issue, new_root
from cryptography import x509
from cryptography.hazmat.primitives.asymmetric import dsa, ec, ed25519, rsa
from cryptography.x509.oid import ExtendedKeyUsageOID, ObjectIdentifier
from hypothesis import given, settings
from hypothesis import strategies as st

from mesh.ca.leaf import pem_to_der
from mesh.ca.svid import (
    CHAIN_BYTES_MAX,
    check_chain_size,
    key_weakness,
    load_certificate,
    read_svid,
    verify_chain,
    verify_svid,
)
from mesh.errors import InvalidIdentity

ROOT = CA.build()
UNKNOWN = x509.UnrecognizedExtension(ObjectIdentifier("1.3.6.1.4.1.99999.1"), b"\x05\x00")


def uri(text):
    return x509.UniformResourceIdentifier(text)


def leaf(recipe: Recipe = LEAF) -> bytes:
    return der(recipe.build(ROOT, KEY))


def verify(leaf_der: bytes, *, now_s: float = NOW_S, role="client"):
    return verify_svid(leaf_der, trust_domain=TRUST_DOMAIN, role=role, now_s=now_s)


@pytest.mark.parametrize("role", ["client", "server"])
def test_sound_leaf_proves_its_spiffe_id(role):
    assert str(verify(leaf(), role=role)) == WEB


def test_leaf_of_our_own_authority_is_a_valid_identity_under_its_root():
    root = new_root()
    chain = pem_to_der(issue(root, OTHER_KEY).certificate_pem)
    assert verify(chain[0]).service == "web"
    verify_chain(chain, pem_to_der(root.root_cert_pem), now_s=NOW_S)


@pytest.mark.parametrize(
    ("recipe", "reason"),
    [
        pytest.param(LEAF.change(names=()), "no SPIFFE ID", id="3 no subject alternative name"),
        pytest.param(LEAF.change(names=(x509.DNSName("web"),)), "0 URI names", id="3 no URI name"),
        pytest.param(LEAF.change(names=(uri(WEB), uri(WEB))), "2 URI names", id="4 the same URI name twice"),
        pytest.param(LEAF.change(names=(uri(WEB), uri("https://x.example"))), "2 URI names", id="4 two URI names"),
        pytest.param(LEAF.change(names=(uri("spiffe://b.consul/ns/default/dc/dc1/svc/web"),)), "another trust domain",
                     id="5 foreign trust domain"),
        pytest.param(LEAF.change(constraints=(True, None)), "CA:TRUE", id="7 CA:TRUE"),
        pytest.param(LEAF.change(usage=("digital_signature", "key_cert_sign")), "signing", id="7 keyCertSign"),
        pytest.param(LEAF.change(usage=("digital_signature", "crl_sign")), "signing", id="7 cRLSign"),
        pytest.param(CA.change(usage=("digital_signature", *CA_USAGE)), "CA:TRUE", id="8 a CA that may also sign data"),
        pytest.param(LEAF.change(usage=None), "no key usage", id="9 no key usage"),
        pytest.param(LEAF.change(usage_critical=False), "not critical", id="9 key usage not critical"),
        pytest.param(LEAF.change(usage=("key_agreement",)), "digitalSignature", id="9 no digitalSignature"),
        pytest.param(LEAF.change(constraints=None), "no basic constraints", id="9 no basic constraints"),
        pytest.param(LEAF.change(purposes=(ExtendedKeyUsageOID.SERVER_AUTH,)), "extended key usage",
                     id="10 only serverAuth"),
        pytest.param(LEAF.change(purposes=(ExtendedKeyUsageOID.CLIENT_AUTH,)), "extended key usage",
                     id="10 only clientAuth"),
        pytest.param(LEAF.change(purposes=(ExtendedKeyUsageOID.CODE_SIGNING,)), "extended key usage",
                     id="10 codeSigning"),
        pytest.param(LEAF.change(purposes=(ExtendedKeyUsageOID.ANY_EXTENDED_KEY_USAGE,)), "extended key usage",
                     id="10 anyExtendedKeyUsage"),
        pytest.param(LEAF.change(extra=((UNKNOWN, True),)), "unknown critical", id="13 unknown critical extension"),
        pytest.param(LEAF.change(extra=((x509.NameConstraints([x509.DNSName("x")], None), True),)), "unknown critical",
                     id="13 name constraints on a leaf"),
        pytest.param(LEAF.change(names_critical=False), "must be critical", id="empty subject, names not critical"),
    ],
)  # fmt: skip
def test_unsound_leaf_is_refused(recipe, reason):
    with pytest.raises(InvalidIdentity, match=reason):
        verify(leaf(recipe))


@pytest.mark.parametrize(
    "text",
    [
        "https://" + WEB.removeprefix("spiffe://"),
        "SPIFFE://" + WEB.removeprefix("spiffe://"),
        WEB.replace(".consul", ".Consul"),
        WEB.replace(".consul", ".consul:8443"),
        WEB.replace("spiffe://", "spiffe://admin@"),
        WEB + "?a=b",
        WEB + "#a",
        WEB.replace("/svc/web", "/svc/w%65b"),
        WEB.replace("/svc/web", "/svc/../web"),
        WEB.replace("/svc/web", "/svc/./web"),
        WEB.replace("/svc/web", "//svc/web"),
        WEB + "/",
        f"spiffe://{TRUST_DOMAIN}",
        f"spiffe://{TRUST_DOMAIN}/",
        "spiffe:///ns/default/dc/dc1/svc/web",
        WEB + "a" * (2049 - len(WEB)),
        WEB + "\0",  # row 19: a C string comparison would stop here
        WEB.replace("/svc/web", "/svc/web\0.evil"),
        WEB + " ",
        "",
    ],
)
def test_row_6_uri_that_is_no_spiffe_id_is_refused(text):
    with pytest.raises(InvalidIdentity):
        verify(leaf(LEAF.change(names=(uri(text),))))


@pytest.mark.parametrize("seconds", [1.0, 3600.0])
def test_rows_1_and_2_leaf_is_refused_outside_its_dates(seconds):
    data = leaf()
    with pytest.raises(InvalidIdentity, match="expired"):
        verify(data, now_s=LEAF.not_after_s + seconds)
    with pytest.raises(InvalidIdentity, match="not valid before"):
        verify(data, now_s=LEAF.not_before_s - seconds)
    verify(data, now_s=LEAF.not_after_s)
    verify(data, now_s=LEAF.not_before_s)


def test_cached_verdict_still_expires():
    svid = read_svid(leaf(), trust_domain=TRUST_DOMAIN, role="client")
    svid.check_time(NOW_S)
    with pytest.raises(InvalidIdentity, match="expired"):
        svid.check_time(LEAF.not_after_s + 1)


def test_row_10_leaf_without_extended_key_usage_is_accepted():
    assert str(verify(leaf(LEAF.change(purposes=None)))) == WEB


def test_row_13_unknown_extension_that_is_not_critical_is_ignored():
    verify(leaf(LEAF.change(extra=((UNKNOWN, False),))))


@pytest.mark.parametrize("key", [rsa.generate_private_key(65537, 1024), ec.generate_private_key(ec.SECP224R1())])
def test_row_14_weak_key_is_refused(key):
    with pytest.raises(InvalidIdentity, match="too weak"):
        verify(der(LEAF.change(key=key).build(ROOT, KEY)))


def test_row_14_key_types_and_sizes():
    assert "secp192r1" in key_weakness(ec.generate_private_key(ec.SECP192R1()).public_key())
    assert "DSA" in key_weakness(dsa.generate_private_key(2048).public_key())
    assert key_weakness(ec.generate_private_key(ec.SECP384R1()).public_key()) is None
    assert key_weakness(ed25519.Ed25519PrivateKey.generate().public_key()) is None
    assert key_weakness(rsa.generate_private_key(65537, 2048).public_key()) is None


@pytest.mark.parametrize(("algorithm", "arc"), [("md5", 4), ("sha1", 5), ("sha224", 14)])
def test_row_14_signature_over_weak_hash_is_refused(algorithm, arc):
    # The signing library refuses to make these; sha256WithRSAEncryption (arc 11) differs from each in one byte.
    sound = der(LEAF.change(key=rsa.generate_private_key(65537, 2048)).build())
    prefix = bytes.fromhex("06092a864886f70d0101")
    assert sound.count(prefix + b"\x0b") == 2
    verify(sound)
    with pytest.raises(InvalidIdentity, match="which is not accepted"):
        verify(sound.replace(prefix + b"\x0b", prefix + bytes([arc])))


def test_row_19_only_a_uri_name_speaks_for_the_id():
    for name in (x509.DNSName(WEB), x509.RFC822Name(WEB), x509.IPAddress(ipaddress.ip_address("127.0.0.1"))):
        with pytest.raises(InvalidIdentity, match="0 URI names"):
            verify(leaf(LEAF.change(names=(name,))))
    verify(leaf(LEAF.change(names=(uri(WEB), x509.DNSName("*.*.example")))))


def test_row_37_common_name_is_never_an_identity():
    assert str(verify(leaf(LEAF.change(subject="spiffe://evil/ns/default/dc/dc1/svc/admin")))) == WEB


# --- chains -----------------------------------------------------------------------------------------------------------


def chain_of(count: int, *, path_length=None, intermediate: Recipe = CA):
    """A root and, leaf first, `count` intermediates below it with a leaf at the end."""
    root = CA.change(constraints=(True, path_length)).build()
    issuer, issuer_key, certificates = root, KEY, []
    for index in range(count):
        key = OTHER_KEY if index % 2 == 0 else KEY
        issuer_next = intermediate.change(subject=f"intermediate {index}", key=key).build(issuer, issuer_key)
        certificates.insert(0, der(issuer_next))
        issuer, issuer_key = issuer_next, key
    certificates.insert(0, der(LEAF.change(key=OTHER_KEY).build(issuer, issuer_key)))
    return certificates, [der(root)]


@pytest.mark.parametrize("count", [0, 1, 2, 3])
def test_chain_up_to_the_depth_limit_is_accepted(count):
    chain, roots = chain_of(count)
    verify_chain(chain, roots, now_s=NOW_S)


def test_row_11_self_signed_and_unknown_root_are_refused():
    chain, _ = chain_of(0)
    stranger = CA.change(key=OTHER_KEY).build()
    with pytest.raises(InvalidIdentity, match="no trusted root"):
        verify_chain(chain, [der(stranger)], now_s=NOW_S)
    with pytest.raises(InvalidIdentity, match="no trusted root"):
        verify_chain([der(LEAF.change(subject="me").build())], [der(ROOT)], now_s=NOW_S)


def test_row_12_broken_chains_are_refused():
    chain, roots = chain_of(1)
    with pytest.raises(InvalidIdentity, match="no trusted root"):
        verify_chain(chain[:1], roots, now_s=NOW_S)  # the intermediate is missing
    chain, roots = chain_of(1, path_length=0)
    with pytest.raises(InvalidIdentity, match="path length"):
        verify_chain(chain, roots, now_s=NOW_S)
    signer = LEAF.change(subject="a leaf").build(ROOT, KEY)
    with pytest.raises(InvalidIdentity, match="without being a CA"):
        verify_chain([der(LEAF.build(signer, KEY)), der(signer)], [der(ROOT)], now_s=NOW_S)
    chain, roots = chain_of(1, intermediate=CA.change(usage=("digital_signature",)))
    with pytest.raises(InvalidIdentity, match="keyCertSign"):
        verify_chain(chain, roots, now_s=NOW_S)
    chain, roots = chain_of(1, intermediate=CA.change(extra=((UNKNOWN, True),)))
    with pytest.raises(InvalidIdentity, match="unknown critical"):
        verify_chain(chain, roots, now_s=NOW_S)
    chain, roots = chain_of(2)
    with pytest.raises(InvalidIdentity, match="chain is broken"):
        verify_chain([chain[0], chain[2], chain[1]], roots, now_s=NOW_S)


def test_row_16_expired_root_is_no_anchor():
    root = CA.change(not_after_s=NOW_S - 1).build()
    with pytest.raises(InvalidIdentity, match="expired"):
        verify_chain([der(LEAF.build(root, KEY))], [der(root)], now_s=NOW_S)


def test_row_20_long_and_large_chains_are_refused_before_they_are_parsed():
    with pytest.raises(InvalidIdentity, match="longer than 4"):
        verify_chain([b"never parsed"] * 50, [], now_s=NOW_S)
    with pytest.raises(InvalidIdentity, match="larger than"):
        check_chain_size([b"x" * (CHAIN_BYTES_MAX // 2), b"x" * (CHAIN_BYTES_MAX // 2 + 1)])
    with pytest.raises(InvalidIdentity, match="no certificate"):
        check_chain_size([])
    with pytest.raises(InvalidIdentity, match="larger than"):
        load_certificate(b"\0" * (CHAIN_BYTES_MAX + 1))


def test_row_20_certificates_that_sign_each_other_end_at_no_root():
    a = CA.change(subject="a", key=KEY).build()
    b = CA.change(subject="b", key=OTHER_KEY).build(a, KEY)
    a_by_b = CA.change(subject="a", key=KEY).build(b, OTHER_KEY)
    chain = [der(LEAF.build(a_by_b, KEY)), der(a_by_b), der(b), der(a_by_b)]
    with pytest.raises(InvalidIdentity, match="no trusted root"):
        verify_chain(chain, [der(CA.change(subject="c", key=OTHER_KEY).build())], now_s=NOW_S)


# --- bytes ------------------------------------------------------------------------------------------------------------

SOUND = leaf()


@given(st.binary(max_size=600))
def test_random_bytes_are_no_identity(data):
    with pytest.raises(InvalidIdentity):
        verify(data)


@settings(max_examples=300)
@given(st.integers(0, len(SOUND) - 1))
def test_truncated_certificate_is_no_identity(length):
    with pytest.raises(InvalidIdentity):
        verify(SOUND[:length])


@settings(max_examples=500)
@given(st.integers(0, 2**32))
def test_mutated_certificate_is_refused_or_still_says_a_whole_truth(seed):
    rng = random.Random(seed)
    data = bytearray(SOUND)
    for _ in range(rng.randint(1, 3)):
        data[rng.randrange(len(data))] = rng.randrange(256)
    try:
        identity = verify(bytes(data))
    except InvalidIdentity:
        return
    assert identity.trust_domain == TRUST_DOMAIN
    assert identity.path
