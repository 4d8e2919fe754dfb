"""The asking side of a leaf: the certificate request, when to renew, and whether what came back is ours."""

import random
from collections.abc import Sequence

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec

from mesh.ca.parsing import parsing
from mesh.ca.svid import load_certificate, verify_chain, verify_svid
from mesh.errors import InvalidIdentity
from mesh.model.ca import IssuedLeaf
from mesh.names import SpiffeId, parse_spiffe_id

# A leaf renews at a random moment in this part of its life; after it, at once. The spread keeps agents that started
# together from renewing together; the rest of the life is what an outage of the servers may last.
RENEW_FROM = 0.6
RENEW_UNTIL = 0.9


def create_csr(private_key: ec.EllipticCurvePrivateKey, identity: SpiffeId) -> bytes:
    """A certificate request (DER, PKCS #10) for the identity. Raises InvalidIdentity when the ID is not a valid one:
    a service's name may be legal in the catalog and still not fit in a SPIFFE ID.
    """
    uri = str(parse_spiffe_id(str(identity)))
    csr = (
        x509.CertificateSigningRequestBuilder()
        .subject_name(x509.Name([]))
        .add_extension(x509.SubjectAlternativeName([x509.UniformResourceIdentifier(uri)]), critical=True)
        .sign(private_key, hashes.SHA256())
    )
    return csr.public_bytes(serialization.Encoding.DER)


def renewal_at_s(issued: IssuedLeaf, *, now_s: float, rng: random.Random) -> float:
    """When to ask for the next leaf (Unix seconds): random in 60 to 90 % of its life, `now_s` when that is past."""
    life_s = issued.valid_before_s - issued.valid_after_s
    earliest_s = max(now_s, issued.valid_after_s + RENEW_FROM * life_s)
    latest_s = issued.valid_after_s + RENEW_UNTIL * life_s
    return now_s if earliest_s >= latest_s else rng.uniform(earliest_s, latest_s)


def pem_to_der(pem: str) -> tuple[bytes, ...]:
    """The certificates of a PEM text, in order. Raises InvalidIdentity when there is none or one is malformed."""
    with parsing("not PEM certificates", InvalidIdentity):
        certificates = x509.load_pem_x509_certificates(pem.encode())
    return tuple(certificate.public_bytes(serialization.Encoding.DER) for certificate in certificates)


def check_issued(
    issued: IssuedLeaf,
    private_key: ec.EllipticCurvePrivateKey,
    *,
    identity: SpiffeId,
    roots_pem: Sequence[str],
    now_s: float,
) -> None:
    """Raises InvalidIdentity unless the leaf is for our key and identity, valid now, and leads to one of the roots."""
    chain = pem_to_der(issued.certificate_pem)
    proven = verify_svid(chain[0], trust_domain=identity.trust_domain, role="server", now_s=now_s)
    if proven != identity:
        raise InvalidIdentity(f"the leaf is for {proven}, not for {identity}")
    if load_certificate(chain[0]).public_key() != private_key.public_key():
        raise InvalidIdentity(f"the leaf for {identity} is over another key than the one requested")
    verify_chain(chain, [der for pem in roots_pem for der in pem_to_der(pem)], now_s=now_s)
