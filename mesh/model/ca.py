"""The certificate authority as the replicated state holds it."""

import msgspec


class CaRoot(msgspec.Struct, frozen=True):
    """A trust root. `private_key_pem` is empty in everything that leaves the servers."""

    root_id: str  # the certificate's SHA-1 fingerprint as Consul prints it: lower-case hex pairs joined by ":"
    name: str
    serial_number: int
    signing_key_id: str  # subject key identifier, hex pairs joined by ":"
    external_trust_domain: str  # the cluster's UUID; the trust domain is `<uuid>.consul`
    not_before_s: float
    not_after_s: float
    root_cert_pem: str
    intermediate_certs_pem: tuple[str, ...] = ()
    active: bool = False
    private_key_pem: str = ""
    private_key_type: str = "ec"
    private_key_bits: int = 256
    create_index: int = 0
    modify_index: int = 0

    def __repr__(self) -> str:
        """Without the key: commands and states that hold roots end up in logs and assertion messages."""
        return f"CaRoot({self.root_id!r}, trust domain {self.external_trust_domain!r}, active={self.active})"


class CaRoots(msgspec.Struct, frozen=True):
    """What verifiers need: every root still trusted, the active one named. Empty `trust_domain`: no CA yet."""

    active_root_id: str = ""
    trust_domain: str = ""
    roots: tuple[CaRoot, ...] = ()


class IssuedLeaf(msgspec.Struct, frozen=True):
    """A signed leaf: what comes back for a CSR. The private key never left its agent."""

    certificate_pem: str  # leaf first, then any intermediates
    serial_number: str  # lower-case hex pairs joined by ":"
    spiffe_id: str
    valid_after_s: float  # Unix seconds
    valid_before_s: float
    root_id: str
    create_index: int = 0
    modify_index: int = 0
