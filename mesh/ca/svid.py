"""What a valid X.509-SVID is, decided on the DER.

The ssl module verifies signatures and dates, and nothing of what follows: it accepts leaves with no URI name, with two,
of a foreign trust domain, and leaves that are CAs. So after each handshake, and before a byte of it is used, the peer's
certificate passes through here. Rules: SPIFFE X.509-SVID sections 2 to 5, RFC 5280.

A leaf's verdict depends on the time only through its dates: `read_svid` gives the part that a caller may cache by the
bytes of the certificate, `Svid.check_time` the part that it must repeat.
"""

import itertools
from collections.abc import Sequence
from typing import Literal

import msgspec
from cryptography import x509
from cryptography.hazmat.primitives.asymmetric import ec, ed25519, rsa
from cryptography.x509.oid import ExtendedKeyUsageOID, ExtensionOID, SignatureAlgorithmOID

from mesh.ca.parsing import parsing
from mesh.errors import InvalidIdentity
from mesh.names import SpiffeId, parse_spiffe_id

Role = Literal["client", "server"]

# A leaf, two intermediates and a root is the longest honest chain; longer or larger ones only cost time to verify.
CHAIN_DEPTH_MAX = 4
CHAIN_BYTES_MAX = 64 * 1024

RSA_BITS_MIN = 2048
RSA_BITS_MAX = 8192  # verifying against a larger key is a way to make us work
_CURVES = (ec.SECP256R1, ec.SECP384R1, ec.SECP521R1)

_SIGNATURE_ALGORITHMS = frozenset(
    (
        SignatureAlgorithmOID.ECDSA_WITH_SHA256,
        SignatureAlgorithmOID.ECDSA_WITH_SHA384,
        SignatureAlgorithmOID.ECDSA_WITH_SHA512,
        SignatureAlgorithmOID.RSA_WITH_SHA256,
        SignatureAlgorithmOID.RSA_WITH_SHA384,
        SignatureAlgorithmOID.RSA_WITH_SHA512,
        SignatureAlgorithmOID.RSASSA_PSS,
        SignatureAlgorithmOID.ED25519,
    )
)
# Critical extensions that this module understands and checks.
_LEAF_EXTENSIONS = frozenset(
    (
        ExtensionOID.BASIC_CONSTRAINTS,
        ExtensionOID.KEY_USAGE,
        ExtensionOID.EXTENDED_KEY_USAGE,
        ExtensionOID.SUBJECT_ALTERNATIVE_NAME,
    )
)


class Svid(msgspec.Struct, frozen=True):
    """A leaf that is a valid identity between its dates (Unix seconds, both inclusive)."""

    spiffe_id: SpiffeId
    not_before_s: float
    not_after_s: float

    def check_time(self, now_s: float) -> None:
        """Raises InvalidIdentity when `now_s` (Unix seconds) is outside the certificate's validity."""
        if now_s < self.not_before_s:
            raise InvalidIdentity(
                f"the certificate of {self.spiffe_id} is not valid before {self.not_before_s - now_s:.0f} s from now"
            )
        if now_s > self.not_after_s:
            raise InvalidIdentity(f"the certificate of {self.spiffe_id} expired {now_s - self.not_after_s:.0f} s ago")


def key_weakness(public_key: object) -> str | None:
    """Why the key may not carry an identity; None for EC P-256 to P-521, RSA of 2048 to 8192 bits, and Ed25519."""
    match public_key:
        case ec.EllipticCurvePublicKey(curve=curve):
            if not isinstance(curve, _CURVES):
                return f"curve {curve.name} is not among P-256, P-384 and P-521"
            return None
        case rsa.RSAPublicKey(key_size=bits):
            if not RSA_BITS_MIN <= bits <= RSA_BITS_MAX:
                return f"an RSA key of {bits} bits is outside {RSA_BITS_MIN} to {RSA_BITS_MAX}"
            return None
        case ed25519.Ed25519PublicKey():
            return None
    return f"keys of type {type(public_key).__name__} are not accepted"


def load_certificate(der: bytes) -> x509.Certificate:
    """The parsed certificate. Raises InvalidIdentity when the bytes are not exactly one X.509 certificate."""
    if len(der) > CHAIN_BYTES_MAX:
        raise InvalidIdentity(f"a certificate of {len(der)} bytes is larger than {CHAIN_BYTES_MAX}")
    with parsing("not an X.509 certificate", InvalidIdentity):
        return x509.load_der_x509_certificate(der)


def _extensions(certificate: x509.Certificate) -> dict[x509.ObjectIdentifier, x509.Extension[x509.ExtensionType]]:
    if certificate.version is not x509.Version.v3:
        raise InvalidIdentity("the certificate is not X.509 version 3")
    return {extension.oid: extension for extension in certificate.extensions}


def _check_algorithms(certificate: x509.Certificate) -> None:
    algorithm = certificate.signature_algorithm_oid
    if algorithm not in _SIGNATURE_ALGORITHMS:
        raise InvalidIdentity(f"the certificate is signed with {algorithm.dotted_string}, which is not accepted")
    if algorithm == SignatureAlgorithmOID.RSASSA_PSS:
        digest = certificate.signature_hash_algorithm
        if digest is None or digest.digest_size < 32:
            raise InvalidIdentity("the certificate is signed with RSA-PSS over a weak hash")
    weakness = key_weakness(certificate.public_key())
    if weakness is not None:
        raise InvalidIdentity(f"the certificate's key is too weak: {weakness}")


def _check_usage(extensions: dict[x509.ObjectIdentifier, x509.Extension[x509.ExtensionType]], role: Role) -> None:
    constraints = extensions.get(ExtensionOID.BASIC_CONSTRAINTS)
    if constraints is None or not isinstance(constraints.value, x509.BasicConstraints):
        raise InvalidIdentity("the certificate has no basic constraints")
    if constraints.value.ca:
        raise InvalidIdentity("the certificate is a CA (CA:TRUE), not a leaf")
    usage = extensions.get(ExtensionOID.KEY_USAGE)
    if usage is None or not isinstance(usage.value, x509.KeyUsage):
        raise InvalidIdentity("the certificate has no key usage")
    if not usage.critical:
        raise InvalidIdentity("the certificate's key usage is not critical")
    if not usage.value.digital_signature:
        raise InvalidIdentity("the certificate's key usage lacks digitalSignature")
    if usage.value.key_cert_sign or usage.value.crl_sign:
        raise InvalidIdentity("the certificate's key usage allows signing certificates or revocation lists")
    purposes = extensions.get(ExtensionOID.EXTENDED_KEY_USAGE)
    if purposes is None:
        return
    assert isinstance(purposes.value, x509.ExtendedKeyUsage)
    # SPIFFE X.509-SVID 4.4: where the extension is present it names both purposes, whichever role the peer plays now.
    for purpose in (ExtendedKeyUsageOID.CLIENT_AUTH, ExtendedKeyUsageOID.SERVER_AUTH):
        if purpose not in purposes.value:
            raise InvalidIdentity(
                f"the {role}'s certificate has an extended key usage that lacks client or server authentication"
            )


def _spiffe_id(
    certificate: x509.Certificate, extensions: dict[x509.ObjectIdentifier, x509.Extension[x509.ExtensionType]]
) -> SpiffeId:
    names = extensions.get(ExtensionOID.SUBJECT_ALTERNATIVE_NAME)
    if names is None or not isinstance(names.value, x509.SubjectAlternativeName):
        raise InvalidIdentity("the certificate has no subject alternative name, so no SPIFFE ID")
    # Only names of type URI count: a DNS name that spells the same text never speaks for the ID (CVE-2021-32574).
    uris = names.value.get_values_for_type(x509.UniformResourceIdentifier)
    if len(uris) != 1:
        raise InvalidIdentity(f"the certificate has {len(uris)} URI names; a SPIFFE identity has exactly one")
    if not names.critical and not certificate.subject.rdns:
        raise InvalidIdentity("the certificate has no subject, so its subject alternative name must be critical")
    return parse_spiffe_id(uris[0])


def read_svid(leaf_der: bytes, *, trust_domain: str, role: Role) -> Svid:
    """The identity in a leaf, everything checked but its dates and the signatures above it.

    `role` is the part that the peer played in the handshake, for the error's text. Raises InvalidIdentity with the
    reason. The result depends on the arguments only, so a caller may cache it.
    """
    with parsing("the certificate is malformed", InvalidIdentity):
        return _read_svid(load_certificate(leaf_der), trust_domain=trust_domain, role=role)


def _read_svid(certificate: x509.Certificate, *, trust_domain: str, role: Role) -> Svid:
    extensions = _extensions(certificate)
    for oid, extension in extensions.items():
        if extension.critical and oid not in _LEAF_EXTENSIONS:
            raise InvalidIdentity(f"the certificate has the unknown critical extension {oid.dotted_string}")
    _check_algorithms(certificate)
    _check_usage(extensions, role)
    spiffe_id = _spiffe_id(certificate, extensions)
    if spiffe_id.trust_domain != trust_domain:
        raise InvalidIdentity(f"{spiffe_id} belongs to another trust domain than {trust_domain}")
    return Svid(spiffe_id, certificate.not_valid_before_utc.timestamp(), certificate.not_valid_after_utc.timestamp())


def verify_svid(leaf_der: bytes, *, trust_domain: str, role: Role, now_s: float) -> SpiffeId:
    """The SPIFFE ID that a leaf proves at `now_s` (Unix seconds), given that its chain verified (the ssl module, or
    `verify_chain`). Raises InvalidIdentity with the reason.
    """
    svid = read_svid(leaf_der, trust_domain=trust_domain, role=role)
    svid.check_time(now_s)
    return svid.spiffe_id


def check_chain_size(chain_der: Sequence[bytes]) -> None:
    """Raises InvalidIdentity for an empty chain, and for one over CHAIN_DEPTH_MAX certificates or CHAIN_BYTES_MAX."""
    if not chain_der:
        raise InvalidIdentity("the peer presented no certificate")
    if len(chain_der) > CHAIN_DEPTH_MAX:
        raise InvalidIdentity(f"a chain of {len(chain_der)} certificates is longer than {CHAIN_DEPTH_MAX}")
    size = sum(map(len, chain_der))
    if size > CHAIN_BYTES_MAX:
        raise InvalidIdentity(f"a certificate chain of {size} bytes is larger than {CHAIN_BYTES_MAX}")


def _check_issuer(issuer: x509.Certificate, *, intermediates_below: int, now_s: float) -> None:
    """Whether a certificate may sign others: SPIFFE X.509-SVID 4.2 and 4.3, RFC 5280 4.2.1.9."""
    extensions = _extensions(issuer)
    constraints = extensions.get(ExtensionOID.BASIC_CONSTRAINTS)
    if constraints is None or not isinstance(constraints.value, x509.BasicConstraints) or not constraints.value.ca:
        raise InvalidIdentity("a certificate in the chain signs others without being a CA")
    path_length = constraints.value.path_length
    if path_length is not None and intermediates_below > path_length:
        raise InvalidIdentity("the chain is longer than a CA's path length allows")
    usage = extensions.get(ExtensionOID.KEY_USAGE)
    if usage is None or not isinstance(usage.value, x509.KeyUsage) or not usage.value.key_cert_sign:
        raise InvalidIdentity("a CA in the chain lacks the key usage keyCertSign")
    for oid, extension in extensions.items():
        if extension.critical and oid not in _LEAF_EXTENSIONS:
            raise InvalidIdentity(f"a CA in the chain has the unknown critical extension {oid.dotted_string}")
    _check_algorithms(issuer)
    if not issuer.not_valid_before_utc.timestamp() <= now_s <= issuer.not_valid_after_utc.timestamp():
        raise InvalidIdentity("a CA in the chain has expired or is not valid yet")


def verify_chain(chain_der: Sequence[bytes], roots_der: Sequence[bytes], *, now_s: float) -> None:
    """Checks signatures and dates from the leaf (first) through its intermediates, in order, to one of the roots.

    The leaf's own content is `verify_svid`'s to check. Each certificate must be issued by the next; the last one by a
    root. Raises InvalidIdentity. Without ssl: for certificates that arrive as data, such as a freshly signed leaf.
    """
    check_chain_size(chain_der)
    with parsing("a certificate in the chain is malformed", InvalidIdentity):
        _verify_chain([load_certificate(der) for der in chain_der], [load_certificate(der) for der in roots_der], now_s)


def _verify_chain(chain: Sequence[x509.Certificate], roots: Sequence[x509.Certificate], now_s: float) -> None:
    for below, (certificate, issuer) in enumerate(itertools.pairwise(chain)):
        _check_issuer(issuer, intermediates_below=below, now_s=now_s)
        if not _issued(certificate, issuer):
            raise InvalidIdentity("the chain is broken: a certificate is not signed by the one after it")
    problem = InvalidIdentity("the chain ends at no trusted root")
    for anchor in roots:
        if not _issued(chain[-1], anchor):
            continue
        try:
            _check_issuer(anchor, intermediates_below=len(chain) - 1, now_s=now_s)
            return
        except InvalidIdentity as error:
            problem = error  # another root may hold the same key with a longer life
    raise problem


def _issued(certificate: x509.Certificate, issuer: x509.Certificate) -> bool:
    try:
        with parsing("not issued", InvalidIdentity):
            certificate.verify_directly_issued_by(issuer)
    except InvalidIdentity:
        return False
    return True
