"""Certificates for tests: sound ones through the product's own CA, and every kind of unsound one built by hand."""

import datetime
import random
from dataclasses import dataclass, field, replace

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec, ed25519, rsa
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from mesh.ca import authority
from mesh.ca.leaf import create_csr
from mesh.model.ca import CaRoot, IssuedLeaf
from mesh.names import SpiffeId, service_spiffe_id

CLUSTER_ID = "11111111-2222-3333-4444-555555555555"
TRUST_DOMAIN = f"{CLUSTER_ID}.consul"
NOW_S = 1_800_000_000.0
WEB = f"spiffe://{TRUST_DOMAIN}/ns/default/dc/dc1/svc/web"

Key = ec.EllipticCurvePrivateKey | rsa.RSAPrivateKey | ed25519.Ed25519PrivateKey
# Key generation dominates these tests; one key may stand for many certificates.
KEY = ec.generate_private_key(ec.SECP256R1())
OTHER_KEY = ec.generate_private_key(ec.SECP256R1())

LEAF_USAGE = ("digital_signature",)
CA_USAGE = ("key_cert_sign", "crl_sign")
BOTH = (ExtendedKeyUsageOID.CLIENT_AUTH, ExtendedKeyUsageOID.SERVER_AUTH)
_USAGES = (
    "digital_signature", "content_commitment", "key_encipherment", "data_encipherment", "key_agreement",
    "key_cert_sign", "crl_sign", "encipher_only", "decipher_only",
)  # fmt: skip


def key_pem(key: Key) -> str:
    return key.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    ).decode()


def der(certificate: x509.Certificate) -> bytes:
    return certificate.public_bytes(serialization.Encoding.DER)


def pem(certificate: x509.Certificate) -> str:
    return certificate.public_bytes(serialization.Encoding.PEM).decode()


@dataclass(frozen=True)
class Recipe:
    """A certificate to be: by default a sound leaf for `web`. `change(...)` spoils one thing."""

    names: tuple[x509.GeneralName, ...] = field(default_factory=lambda: (x509.UniformResourceIdentifier(WEB),))
    names_critical: bool = True
    subject: str = ""
    usage: tuple[str, ...] | None = LEAF_USAGE
    usage_critical: bool = True
    purposes: tuple[x509.ObjectIdentifier, ...] | None = BOTH
    constraints: tuple[bool, int | None] | None = (False, None)
    extra: tuple[tuple[x509.ExtensionType, bool], ...] = ()
    not_before_s: float = NOW_S - 60
    not_after_s: float = NOW_S + 72 * 3600
    key: Key = KEY
    hash_algorithm: hashes.HashAlgorithm | None = field(default_factory=hashes.SHA256)

    def change(self, **changes: object) -> "Recipe":
        return replace(self, **changes)

    def build(self, issuer: "x509.Certificate | None" = None, issuer_key: Key | None = None) -> x509.Certificate:
        """Self-signed when no issuer is given."""
        subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, self.subject)] if self.subject else [])
        builder = (
            x509.CertificateBuilder()
            .subject_name(subject)
            .issuer_name(issuer.subject if issuer is not None else subject)
            .public_key(self.key.public_key())
            .serial_number(random.Random(repr(self)).getrandbits(100) + 1)
            .not_valid_before(datetime.datetime.fromtimestamp(self.not_before_s, datetime.UTC))
            .not_valid_after(datetime.datetime.fromtimestamp(self.not_after_s, datetime.UTC))
        )
        if self.names:
            builder = builder.add_extension(x509.SubjectAlternativeName(self.names), critical=self.names_critical)
        if self.constraints is not None:
            ca, length = self.constraints
            builder = builder.add_extension(x509.BasicConstraints(ca=ca, path_length=length), critical=True)
        if self.usage is not None:
            bits = {name: name in self.usage for name in _USAGES}
            builder = builder.add_extension(x509.KeyUsage(**bits), critical=self.usage_critical)
        if self.purposes is not None:
            builder = builder.add_extension(x509.ExtendedKeyUsage(self.purposes), critical=False)
        for extension, critical in self.extra:
            builder = builder.add_extension(extension, critical=critical)
        return builder.sign(issuer_key or self.key, self.hash_algorithm)


LEAF = Recipe()
CA = Recipe(
    names=(x509.UniformResourceIdentifier(f"spiffe://{TRUST_DOMAIN}"),),
    names_critical=False,
    subject="test root",
    usage=CA_USAGE,
    purposes=None,
    constraints=(True, None),
    not_after_s=NOW_S + 10 * 365 * 86400,
)


def new_root(*, seed: int = 1, now_s: float = NOW_S, key: ec.EllipticCurvePrivateKey | None = None) -> CaRoot:
    """A root as the leader makes it."""
    return authority.create_root(
        key or ec.generate_private_key(ec.SECP256R1()),
        cluster_id=CLUSTER_ID,
        serial_number=random.Random(seed).getrandbits(62) + 1,
        not_before_s=now_s - 60,
        not_after_s=now_s + authority.ROOT_LIFETIME_S,
    )


def issue(
    root: CaRoot,
    key: ec.EllipticCurvePrivateKey,
    identity: SpiffeId | None = None,
    *,
    now_s: float = NOW_S,
    life_s: float = 72 * 3600,
) -> IssuedLeaf:
    """A leaf as the leader signs it, for `web` unless told."""
    identity = identity or service_spiffe_id(TRUST_DOMAIN, "dc1", "web")
    return authority.sign_csr(
        root,
        authority.load_signing_key(root),
        create_csr(key, identity),
        datacenter="dc1",
        serial_number=7,
        not_before_s=now_s - 60,
        not_after_s=now_s + life_s,
    )
