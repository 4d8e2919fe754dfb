"""The root, the leaves under it, and every request that must not be signed."""

import random

import pytest
from certificates import CLUSTER_ID, KEY, NOW_S, OTHER_KEY, TRUST_DOMAIN, WEB, issue, new_root
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import dsa, ec, ed25519, rsa
from cryptography.x509.oid import ExtendedKeyUsageOID
from hypothesis import given, settings
from hypothesis import strategies as st

from mesh.ca import authority
from mesh.ca.leaf import check_issued, create_csr, pem_to_der, renewal_at_s
from mesh.ca.svid import verify_chain
from mesh.errors import InvalidIdentity, Refused
from mesh.model.ca import CaRoot
from mesh.names import agent_spiffe_id, server_spiffe_id, service_spiffe_id

ROOT = new_root(key=ec.generate_private_key(ec.SECP256R1()))
SIGNING_KEY = authority.load_signing_key(ROOT)
WEB_ID = service_spiffe_id(TRUST_DOMAIN, "dc1", "web")


def csr(*names, key=KEY, extra=(), hash_algorithm=hashes.SHA256()):  # noqa: B008 - immutable
    builder = x509.CertificateSigningRequestBuilder().subject_name(x509.Name([]))
    if names:
        builder = builder.add_extension(x509.SubjectAlternativeName(names), critical=True)
    for extension in extra:
        builder = builder.add_extension(extension, critical=True)
    return builder.sign(key, hash_algorithm).public_bytes(serialization.Encoding.DER)


def uri(text=WEB):
    return x509.UniformResourceIdentifier(text)


def usage(**bits):
    names = ("digital_signature", "content_commitment", "key_encipherment", "data_encipherment", "key_agreement",
             "key_cert_sign", "crl_sign", "encipher_only", "decipher_only")  # fmt: skip
    return x509.KeyUsage(**{name: bits.get(name, False) for name in names})


def sign(csr_der, **changes):
    arguments = {"datacenter": "dc1", "serial_number": 0x0102, "not_before_s": NOW_S - 60, "not_after_s": NOW_S + 3600}
    return authority.sign_csr(ROOT, SIGNING_KEY, csr_der, **{**arguments, **changes})


def test_root_is_a_ca_for_one_trust_domain_that_cannot_authenticate():
    certificate = x509.load_pem_x509_certificate(ROOT.root_cert_pem.encode())
    certificate.verify_directly_issued_by(certificate)
    assert certificate.extensions.get_extension_for_class(x509.BasicConstraints).value.ca
    use = certificate.extensions.get_extension_for_class(x509.KeyUsage)
    assert use.critical
    assert use.value.key_cert_sign
    assert not use.value.digital_signature
    names = certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    assert list(names) == [uri(f"spiffe://{TRUST_DOMAIN}")]
    assert certificate.not_valid_after_utc.timestamp() == NOW_S + authority.ROOT_LIFETIME_S
    assert ROOT.root_id == certificate.fingerprint(hashes.SHA1()).hex(":")
    assert ROOT.active
    assert ROOT.external_trust_domain == CLUSTER_ID
    assert ROOT.serial_number == certificate.serial_number


def test_leaf_carries_what_a_leaf_needs_and_nothing_else():
    issued = sign(csr(uri()))
    leaf = x509.load_pem_x509_certificate(issued.certificate_pem.encode())
    names = leaf.extensions.get_extension_for_class(x509.SubjectAlternativeName)
    assert list(names.value) == [uri()]
    assert names.critical
    assert list(leaf.extensions.get_extension_for_class(x509.ExtendedKeyUsage).value) == [
        ExtendedKeyUsageOID.CLIENT_AUTH,
        ExtendedKeyUsageOID.SERVER_AUTH,
    ]
    root_key = x509.SubjectKeyIdentifier.from_public_key(SIGNING_KEY.public_key()).digest
    assert leaf.extensions.get_extension_for_class(x509.AuthorityKeyIdentifier).value.key_identifier == root_key
    assert leaf.extensions.get_extension_for_class(x509.SubjectKeyIdentifier)
    assert not leaf.subject.rdns
    assert (issued.serial_number, issued.spiffe_id, issued.root_id) == ("01:02", WEB, ROOT.root_id)
    assert leaf.not_valid_before_utc.timestamp() == issued.valid_after_s == NOW_S - 60
    assert leaf.not_valid_after_utc.timestamp() == issued.valid_before_s == NOW_S + 3600
    check_issued(issued, KEY, identity=WEB_ID, roots_pem=[ROOT.root_cert_pem], now_s=NOW_S)


def test_asked_extensions_that_are_harmless_are_not_copied():
    issued = sign(csr(uri(), extra=[x509.ExtendedKeyUsage([ExtendedKeyUsageOID.CODE_SIGNING])]))
    leaf = x509.load_pem_x509_certificate(issued.certificate_pem.encode())
    assert ExtendedKeyUsageOID.CODE_SIGNING not in leaf.extensions.get_extension_for_class(x509.ExtendedKeyUsage).value


def test_leaf_never_outlives_its_root():
    issued = sign(csr(uri()), not_after_s=NOW_S + 2 * authority.ROOT_LIFETIME_S)
    assert issued.valid_before_s == ROOT.not_after_s
    with pytest.raises(Refused, match="expired"):
        sign(csr(uri()), not_before_s=ROOT.not_after_s + 1, not_after_s=ROOT.not_after_s + 60)


def test_agent_identity_is_signed_and_server_identity_only_where_asked():
    assert sign(create_csr(KEY, agent_spiffe_id(TRUST_DOMAIN, "dc1", "node-1"))).spiffe_id.endswith("/id/node-1")
    server = create_csr(KEY, server_spiffe_id(TRUST_DOMAIN, "dc1"))
    with pytest.raises(Refused, match="not an identity"):
        sign(server)
    assert sign(server, kinds=("server",)).spiffe_id == str(server_spiffe_id(TRUST_DOMAIN, "dc1"))


def spoil(data):
    """The request with its last byte, part of the signature, changed."""
    return data[:-1] + bytes([data[-1] ^ 1])


def swap_key(data):
    """The request with another key in it, so that its signature is somebody else's."""
    old = KEY.public_key().public_bytes(serialization.Encoding.X962, serialization.PublicFormat.UncompressedPoint)
    new = OTHER_KEY.public_key().public_bytes(serialization.Encoding.X962, serialization.PublicFormat.UncompressedPoint)
    return data.replace(old, new)


MUTANTS = {
    "no bytes": b"",
    "no request": b"certificate, please",
    "oversized": csr(uri()) + b"\0" * authority.CSR_BYTES_MAX,
    "trailing bytes": csr(uri()) + b"\0",
    "no name": csr(),
    "two URIs": csr(uri(), uri(WEB.replace("/web", "/admin"))),
    "one URI twice": csr(uri(), uri()),
    "a DNS name too": csr(uri(), x509.DNSName("localhost")),
    "only a DNS name": csr(x509.DNSName(WEB)),
    "https URI": csr(uri("https://example.com/ns/default/dc/dc1/svc/web")),
    "upper-case host": csr(uri(WEB.replace(".consul", ".CONSUL"))),
    "other trust domain": csr(uri("spiffe://b.consul/ns/default/dc/dc1/svc/web")),
    "trust domain itself": csr(uri(f"spiffe://{TRUST_DOMAIN}")),
    "other datacenter": csr(uri(WEB.replace("/dc1/", "/dc2/"))),
    "other namespace": csr(uri(WEB.replace("/default/", "/other/"))),
    "partition prefix": csr(uri(WEB.replace("/ns/", "/ap/x/ns/"))),
    "gateway": csr(uri(f"spiffe://{TRUST_DOMAIN}/gateway/mesh/dc/dc1")),
    "server": csr(uri(f"spiffe://{TRUST_DOMAIN}/agent/server/dc/dc1")),
    "path escape": csr(uri(WEB + "/../admin")),
    "NUL": csr(uri(WEB + "\0")),
    "CA:TRUE": csr(uri(), extra=[x509.BasicConstraints(ca=True, path_length=None)]),
    "keyCertSign": csr(uri(), extra=[usage(key_cert_sign=True)]),
    "cRLSign": csr(uri(), extra=[usage(digital_signature=True, crl_sign=True)]),
    "RSA-1024": csr(uri(), key=rsa.generate_private_key(65537, 1024)),
    "P-192": csr(uri(), key=ec.generate_private_key(ec.SECP192R1())),
    "P-224": csr(uri(), key=ec.generate_private_key(ec.SECP224R1())),
    "DSA": csr(uri(), key=dsa.generate_private_key(1024)),
    "bad signature": spoil(csr(uri())),
    "somebody else's key": swap_key(csr(uri())),
}


@pytest.mark.parametrize("name", MUTANTS)
def test_row_21_request_mutant_is_not_signed(name):
    with pytest.raises(Refused):
        sign(MUTANTS[name])


@pytest.mark.parametrize("key", [ed25519.Ed25519PrivateKey.generate(), rsa.generate_private_key(65537, 2048)])
def test_other_strong_keys_are_signed(key):
    algorithm = None if isinstance(key, ed25519.Ed25519PrivateKey) else hashes.SHA256()
    assert sign(csr(uri(), key=key, hash_algorithm=algorithm)).spiffe_id == WEB


SOUND = csr(uri())


@settings(max_examples=400)
@given(st.integers(0, 2**32))
def test_mutated_request_is_refused(seed):
    rng = random.Random(seed)
    data = bytearray(SOUND)
    position = rng.randrange(len(data))
    data[position] ^= rng.randint(1, 255)
    if rng.random() < 0.2:
        del data[rng.randrange(len(data)) :]
    with pytest.raises(Refused):  # every byte is under the signature, or is the signature
        sign(bytes(data))


def test_root_without_key_or_with_a_strangers_key_cannot_sign():
    public = CaRoot(**{**{name: getattr(ROOT, name) for name in ROOT.__struct_fields__}, "private_key_pem": ""})
    with pytest.raises(Refused, match="cannot sign"):
        authority.load_signing_key(public)
    other = new_root(key=OTHER_KEY)
    mixed = CaRoot(
        **{**{name: getattr(ROOT, name) for name in ROOT.__struct_fields__}, "private_key_pem": other.private_key_pem}
    )
    with pytest.raises(Refused, match="does not belong"):
        authority.load_signing_key(mixed)


# --- the asking side --------------------------------------------------------------------------------------------------


def test_service_whose_name_fits_no_spiffe_id_gets_no_request():
    with pytest.raises(InvalidIdentity):
        create_csr(KEY, service_spiffe_id(TRUST_DOMAIN, "dc1", "my service"))


def test_renewal_falls_at_a_random_moment_between_60_and_90_percent_of_life():
    issued = issue(ROOT, KEY)
    life_s = issued.valid_before_s - issued.valid_after_s
    shares = [
        (renewal_at_s(issued, now_s=NOW_S, rng=random.Random(seed)) - issued.valid_after_s) / life_s
        for seed in range(500)
    ]
    assert min(shares) >= 0.6
    assert max(shares) <= 0.9
    assert min(shares) < 0.62
    assert max(shares) > 0.88


def test_renewal_of_an_agent_that_slept_falls_in_what_is_left_and_past_90_percent_at_once():
    issued = issue(ROOT, KEY)
    life_s = issued.valid_before_s - issued.valid_after_s
    at_80 = issued.valid_after_s + 0.8 * life_s
    for seed in range(100):
        assert (
            at_80 <= renewal_at_s(issued, now_s=at_80, rng=random.Random(seed)) <= issued.valid_after_s + 0.9 * life_s
        )
    at_91 = issued.valid_after_s + 0.91 * life_s
    assert renewal_at_s(issued, now_s=at_91, rng=random.Random(0)) == at_91


def test_issued_leaf_of_another_key_identity_or_root_is_not_taken():
    issued = issue(ROOT, KEY)
    arguments = {"identity": WEB_ID, "roots_pem": [ROOT.root_cert_pem], "now_s": NOW_S}
    check_issued(issued, KEY, **arguments)
    with pytest.raises(InvalidIdentity, match="another key"):
        check_issued(issued, OTHER_KEY, **arguments)
    with pytest.raises(InvalidIdentity, match="not for"):
        check_issued(issued, KEY, **{**arguments, "identity": service_spiffe_id(TRUST_DOMAIN, "dc1", "api")})
    with pytest.raises(InvalidIdentity, match="no trusted root"):
        check_issued(issued, KEY, **{**arguments, "roots_pem": [new_root(seed=2).root_cert_pem]})
    with pytest.raises(InvalidIdentity, match="expired"):
        check_issued(issued, KEY, **{**arguments, "now_s": issued.valid_before_s + 1})


def test_row_15_rotated_out_root_verifies_no_leaf_and_kept_root_still_does():
    old, new = new_root(seed=1), new_root(seed=2)
    chain = pem_to_der(issue(old, KEY).certificate_pem)
    verify_chain(chain, [*pem_to_der(new.root_cert_pem), *pem_to_der(old.root_cert_pem)], now_s=NOW_S)
    with pytest.raises(InvalidIdentity, match="no trusted root"):
        verify_chain(chain, pem_to_der(new.root_cert_pem), now_s=NOW_S)


def test_pem_without_a_certificate_is_refused():
    for text in ("", "-----BEGIN CERTIFICATE-----\nAAAA\n-----END CERTIFICATE-----\n", KEY.__class__.__name__):
        with pytest.raises(InvalidIdentity, match="not PEM"):
            pem_to_der(text)
