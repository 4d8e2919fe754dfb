"""Making a trust root, and signing leaves under it. Keys and serial numbers are made by the caller and passed in.

What a certificate request asks for is checked and then forgotten: the leaf carries nothing of it but the public key and
the one SPIFFE ID. ECDSA draws its per-signature secret inside the cryptography package.
"""

import datetime
from typing import Literal

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID, SignatureAlgorithmOID

from mesh.ca.parsing import parsing
from mesh.ca.svid import key_weakness
from mesh.errors import ConfigError, InvalidIdentity, Refused
from mesh.model.ca import CaRoot, IssuedLeaf
from mesh.names import SpiffeId, parse_spiffe_id

IdentityKind = Literal["service", "agent", "server"]

ROOT_LIFETIME_S = 10 * 365 * 24 * 3600.0  # Consul's RootCertTTL
LEAF_LIFETIME_S = 72 * 3600.0  # Consul's LeafCertTTL: also how long sidecars outlive the last server
BACKDATE_S = 60.0  # clocks of hosts differ; a leaf is valid from a minute before it was made

CSR_BYTES_MAX = 16 * 1024

_CSR_SIGNATURES = frozenset(
    (
        SignatureAlgorithmOID.ECDSA_WITH_SHA256,
        SignatureAlgorithmOID.ECDSA_WITH_SHA384,
        SignatureAlgorithmOID.ECDSA_WITH_SHA512,
        SignatureAlgorithmOID.RSA_WITH_SHA256,
        SignatureAlgorithmOID.RSA_WITH_SHA384,
        SignatureAlgorithmOID.RSA_WITH_SHA512,
        SignatureAlgorithmOID.ED25519,
    )
)


def hex_pairs(data: bytes) -> str:
    """Lower-case hex pairs joined by `:`, as Consul prints fingerprints, key IDs and serial numbers."""
    return data.hex(":")


def serial_hex(serial_number: int) -> str:
    """A serial number as Consul prints it: big-endian, whole bytes, hex pairs."""
    return hex_pairs(serial_number.to_bytes(max(1, (serial_number.bit_length() + 7) // 8), "big"))


def trust_domain(cluster_id: str) -> str:
    """The SPIFFE trust domain of a cluster: `<uuid>.consul`."""
    return f"{cluster_id.lower()}.consul"


def _utc(unix_s: float) -> datetime.datetime:
    return datetime.datetime.fromtimestamp(int(unix_s), datetime.UTC)


def _key_usage(*, signs_certificates: bool) -> x509.KeyUsage:
    return x509.KeyUsage(
        digital_signature=not signs_certificates,  # SPIFFE X.509-SVID 4.3: a signing certificate does not authenticate
        content_commitment=False,
        key_encipherment=False,
        data_encipherment=False,
        key_agreement=False,
        key_cert_sign=signs_certificates,
        crl_sign=signs_certificates,
        encipher_only=False,
        decipher_only=False,
    )


def create_root(
    private_key: ec.EllipticCurvePrivateKey,
    *,
    cluster_id: str,
    serial_number: int,
    not_before_s: float,
    not_after_s: float,
) -> CaRoot:
    """An active, self-signed root for the cluster, its key included: the value is for the replicated state only.

    `private_key` is EC P-256; `serial_number` is random, positive and fits in 63 bits; times are Unix seconds.
    """
    if not 0 < serial_number < 1 << 63:
        raise ConfigError("the serial number of a root must be positive and fit in 63 bits")
    domain = trust_domain(cluster_id)
    subject_key = x509.SubjectKeyIdentifier.from_public_key(private_key.public_key())
    common_name = f"pri-{subject_key.digest.hex()[:8]}.mesh.ca.{cluster_id[:8].lower()}.consul"
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, common_name)])
    certificate = (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(name)
        .public_key(private_key.public_key())
        .serial_number(serial_number)
        .not_valid_before(_utc(not_before_s))
        .not_valid_after(_utc(not_after_s))
        .add_extension(x509.BasicConstraints(ca=True, path_length=None), critical=True)
        .add_extension(_key_usage(signs_certificates=True), critical=True)
        .add_extension(subject_key, critical=False)
        .add_extension(x509.AuthorityKeyIdentifier(subject_key.digest, None, None), critical=False)
        .add_extension(
            x509.SubjectAlternativeName([x509.UniformResourceIdentifier(f"spiffe://{domain}")]), critical=False
        )
        .sign(private_key, hashes.SHA256())
    )
    key_pem = private_key.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )
    return CaRoot(
        root_id=hex_pairs(certificate.fingerprint(hashes.SHA1())),  # an identifier, in Consul's form
        name="Mesh CA Primary Root",
        serial_number=serial_number,
        signing_key_id=hex_pairs(subject_key.digest),
        external_trust_domain=cluster_id.lower(),
        not_before_s=float(int(not_before_s)),
        not_after_s=float(int(not_after_s)),
        root_cert_pem=certificate.public_bytes(serialization.Encoding.PEM).decode(),
        active=True,
        private_key_pem=key_pem.decode(),
        private_key_type="ec",
        private_key_bits=private_key.curve.key_size,
    )


def identity_kind(identity: SpiffeId) -> IdentityKind | None:
    """Which of the mesh's identities the path spells, or None."""
    match identity.path:
        case ("ns", "default", "dc", _, "svc", _):
            return "service"
        case ("agent", "client", "dc", _, "id", _):
            return "agent"
        case ("agent", "server", "dc", _):
            return "server"
    return None


def load_signing_key(root: CaRoot) -> ec.EllipticCurvePrivateKey:
    """The root's private key. Raises Refused when the value carries none, or not one that fits its certificate."""
    with parsing(f"the CA root {root.root_id} cannot sign: its key or certificate is not readable", Refused):
        key = serialization.load_pem_private_key(root.private_key_pem.encode(), password=None)
        certificate = x509.load_pem_x509_certificate(root.root_cert_pem.encode())
    if not isinstance(key, ec.EllipticCurvePrivateKey) or key.public_key() != certificate.public_key():
        raise Refused(f"the CA root {root.root_id} cannot sign: its key does not belong to its certificate")
    return key


def _load_csr(csr_der: bytes) -> x509.CertificateSigningRequest:
    if len(csr_der) > CSR_BYTES_MAX:
        raise Refused(f"a certificate request of {len(csr_der)} bytes is larger than {CSR_BYTES_MAX}")
    with parsing("not a usable certificate request", Refused):
        csr = x509.load_der_x509_csr(csr_der)
        if csr.signature_algorithm_oid not in _CSR_SIGNATURES:
            raise Refused(f"the request is signed with {csr.signature_algorithm_oid.dotted_string}, which is too weak")
        weakness = key_weakness(csr.public_key())
        if weakness is not None:
            raise Refused(f"the request's key is too weak: {weakness}")
        if not csr.is_signature_valid:
            raise Refused("the request is not signed by the key it asks a certificate for")
    return csr


def requested_identity(csr_der: bytes) -> tuple[SpiffeId, x509.CertificateSigningRequest]:
    """The one SPIFFE ID that a certificate request asks for, the request being sound in itself.

    Raises Refused when it is malformed, badly signed, over a weak key, asks to be a CA, or names anything but exactly
    one SPIFFE ID (other URIs, DNS names, addresses).
    """
    csr = _load_csr(csr_der)
    names: list[x509.GeneralName] = []
    with parsing("the request's extensions are malformed", Refused):
        for extension in csr.extensions:
            match extension.value:
                case x509.SubjectAlternativeName() as alternative:
                    names.extend(alternative)
                case x509.BasicConstraints(ca=True):
                    raise Refused("the request asks for a CA certificate")
                case x509.KeyUsage() as usage if usage.key_cert_sign or usage.crl_sign:
                    raise Refused("the request asks for the right to sign certificates or revocation lists")
                case _:
                    pass  # never copied into the leaf
    if len(names) != 1 or not isinstance(names[0], x509.UniformResourceIdentifier):
        raise Refused(f"the request names {len(names)} subjects; it must name exactly one, a SPIFFE ID")
    try:
        return parse_spiffe_id(names[0].value), csr
    except InvalidIdentity as error:
        raise Refused(f"the request names no valid SPIFFE ID: {error}") from error


def sign_csr(
    root: CaRoot,
    signing_key: ec.EllipticCurvePrivateKey,
    csr_der: bytes,
    *,
    datacenter: str,
    serial_number: int,
    not_before_s: float,
    not_after_s: float,
    kinds: tuple[IdentityKind, ...] = ("service", "agent"),
) -> IssuedLeaf:
    """A leaf for the request's key and SPIFFE ID, under `root`, valid between the times (Unix seconds, cut to the
    root's own end). `signing_key` is `load_signing_key(root)`.

    The identity must be of one of `kinds`, in this datacenter and in the root's trust domain. Raises Refused with the
    reason otherwise, and for whatever `requested_identity` refuses.
    """
    identity, csr = requested_identity(csr_der)
    domain = trust_domain(root.external_trust_domain)
    if identity.trust_domain != domain:
        raise Refused(f"{identity} is outside the trust domain {domain}")
    if identity.datacenter != datacenter:
        raise Refused(f"{identity} is not in the datacenter {datacenter}")
    if identity_kind(identity) not in kinds:
        raise Refused(f"{identity} is not an identity that this CA signs here ({', '.join(kinds)})")
    issuer = x509.load_pem_x509_certificate(root.root_cert_pem.encode())
    issuer_key = issuer.extensions.get_extension_for_class(x509.SubjectKeyIdentifier).value
    valid_before_s = min(float(int(not_after_s)), issuer.not_valid_after_utc.timestamp())
    if valid_before_s <= not_before_s:
        raise Refused(f"the CA root {root.root_id} has expired; rotate it")
    leaf = (
        x509.CertificateBuilder()
        .subject_name(x509.Name([]))  # no common name, so that nobody can take it for an identity
        .issuer_name(issuer.subject)
        .public_key(csr.public_key())
        .serial_number(serial_number)
        .not_valid_before(_utc(not_before_s))
        .not_valid_after(_utc(valid_before_s))
        .add_extension(x509.SubjectAlternativeName([x509.UniformResourceIdentifier(str(identity))]), critical=True)
        .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
        .add_extension(_key_usage(signs_certificates=False), critical=True)
        .add_extension(
            x509.ExtendedKeyUsage([ExtendedKeyUsageOID.CLIENT_AUTH, ExtendedKeyUsageOID.SERVER_AUTH]), critical=False
        )
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(csr.public_key()), critical=False)
        .add_extension(x509.AuthorityKeyIdentifier.from_issuer_subject_key_identifier(issuer_key), critical=False)
        .sign(signing_key, hashes.SHA256())
    )
    chain = [leaf.public_bytes(serialization.Encoding.PEM).decode(), *root.intermediate_certs_pem]
    return IssuedLeaf(
        certificate_pem="".join(pem if pem.endswith("\n") else pem + "\n" for pem in chain),
        serial_number=serial_hex(serial_number),
        spiffe_id=str(identity),
        valid_after_s=float(int(not_before_s)),
        valid_before_s=valid_before_s,
        root_id=root.root_id,
    )
