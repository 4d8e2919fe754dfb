"""Contexts for mutual TLS between agents and sidecars, and the peer's identity after a handshake.

A resumed session skips OpenSSL's certificate check, so an expired client would stay welcome. Tickets are therefore off
wherever we are the server, which ends resumption in TLS 1.3. In TLS 1.2 a client may still resume by session ID: the
ssl module has no switch for that cache. Two rules make it harmless: `peer_spiffe_id` is called, and checks the dates,
on every connection, resumed or not; and one context belongs to one trust bundle and one leaf. When either changes, make
a new context: it knows no session of the old one.
"""

import contextlib
import os
import ssl
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Protocol, cast

from mesh.ca.svid import Role, check_chain_size, verify_svid
from mesh.errors import ConfigError, InvalidIdentity
from mesh.names import SpiffeId

# Forward-secret AEAD suites for TLS 1.2 (RFC 9325 section 4.2); those of TLS 1.3 all are, and are not set here.
_CIPHERS = "ECDHE+AESGCM:ECDHE+CHACHA20:@SECLEVEL=2"


class _Certificate(Protocol):
    def public_bytes(self, encoding: int) -> bytes: ...


class _InnerSslObject(Protocol):
    def get_unverified_chain(self) -> list[_Certificate] | None: ...


def _write_all(descriptor: int, data: bytes) -> None:
    view = memoryview(data)
    while view:
        view = view[os.write(descriptor, view) :]


@contextlib.contextmanager
def _as_path(data: bytes, directory: Path | None) -> Iterator[str]:
    """A path under which OpenSSL can read the bytes once: it loads keys from paths only.

    An anonymous memory file never reaches a disk. Where there is none, or no /proc to name it, a file with mode 0600 in
    `directory` (the data directory) is removed before this returns.
    """
    if hasattr(os, "memfd_create") and os.path.isdir("/proc/self/fd"):
        descriptor = os.memfd_create("mesh-leaf", os.MFD_CLOEXEC)
        try:
            _write_all(descriptor, data)
            yield f"/proc/self/fd/{descriptor}"
        finally:
            os.close(descriptor)
        return
    descriptor, path = tempfile.mkstemp(prefix=".leaf-", dir=directory)  # mkstemp: mode 0600
    try:
        try:
            _write_all(descriptor, data)
        finally:
            os.close(descriptor)
        yield path
    finally:
        os.unlink(path)


def _context(
    protocol: int,
    certificate_chain_pem: str,
    private_key_pem: str,
    roots_pem: Sequence[str],
    alpn_protocols: Sequence[str],
    key_directory: Path | None,
) -> ssl.SSLContext:
    context = ssl.SSLContext(protocol)
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    context.set_ciphers(_CIPHERS)
    context.check_hostname = False  # identity is the SPIFFE ID, checked on the DER after the handshake
    context.verify_mode = ssl.CERT_REQUIRED
    context.options |= ssl.OP_NO_TICKET | ssl.OP_NO_RENEGOTIATION | ssl.OP_NO_COMPRESSION
    if not roots_pem:
        # Without a bundle nothing can be verified; a context that trusts nobody is a mistake better seen here.
        raise ConfigError("a TLS context needs at least one trust root")
    try:
        context.load_verify_locations(cadata="\n".join(roots_pem))
        with _as_path(f"{certificate_chain_pem}\n{private_key_pem}".encode(), key_directory) as path:
            context.load_cert_chain(path)
    except (ssl.SSLError, ValueError) as error:
        raise ConfigError(f"the certificate, key or trust roots cannot be used for TLS: {error}") from error
    if alpn_protocols:
        context.set_alpn_protocols(list(alpn_protocols))
    return context


def server_context(
    certificate_chain_pem: str,
    private_key_pem: str,
    roots_pem: Sequence[str],
    *,
    alpn_protocols: Sequence[str] = (),
    key_directory: Path | None = None,
) -> ssl.SSLContext:
    """A context for the accepting side of mutual TLS: TLS 1.2 or 1.3, a client certificate under one of the roots is
    required, no tickets, no renegotiation. `certificate_chain_pem`: leaf first.

    The caller checks `peer_spiffe_id` after the handshake. Raises ConfigError when the material cannot be used.
    """
    context = _context(
        ssl.PROTOCOL_TLS_SERVER, certificate_chain_pem, private_key_pem, roots_pem, alpn_protocols, key_directory
    )
    context.num_tickets = 0
    return context


def client_context(
    certificate_chain_pem: str,
    private_key_pem: str,
    roots_pem: Sequence[str],
    *,
    alpn_protocols: Sequence[str] = (),
    key_directory: Path | None = None,
) -> ssl.SSLContext:
    """A context for the connecting side: as `server_context`. Host names are not checked; the caller compares
    `peer_spiffe_id` with whom it meant to reach, before it sends a byte.
    """
    return _context(
        ssl.PROTOCOL_TLS_CLIENT, certificate_chain_pem, private_key_pem, roots_pem, alpn_protocols, key_directory
    )


def peer_chain_der(ssl_object: ssl.SSLObject | ssl.SSLSocket) -> tuple[bytes, ...]:
    """The certificates that the peer presented, leaf first, as DER; empty when there are none."""
    public = getattr(ssl_object, "get_unverified_chain", None)
    if public is not None:  # Python 3.13 and later
        return tuple(cast("list[bytes] | None", public()) or ())
    inner = cast("_InnerSslObject | None", getattr(ssl_object, "_sslobj", None))
    if inner is None:
        return ()
    return tuple(certificate.public_bytes(_ENCODING_DER) for certificate in inner.get_unverified_chain() or ())


_ENCODING_DER = 2  # _ssl.ENCODING_DER; X509_FILETYPE_ASN1 in OpenSSL


def peer_spiffe_id(
    ssl_object: ssl.SSLObject | ssl.SSLSocket, *, trust_domain: str, role: Role, now_s: float
) -> SpiffeId:
    """Who is at the other end of a finished handshake; `role` is the peer's, `now_s` Unix seconds.

    Raises InvalidIdentity with the reason; the connection must then close before any byte of it is used. To be called
    on every connection, resumed ones too (see the module's text); a caller may cache `read_svid`, never this.
    """
    chain = peer_chain_der(ssl_object)
    check_chain_size(chain)
    leaf = ssl_object.getpeercert(binary_form=True)
    if leaf is None or leaf != chain[0]:
        raise InvalidIdentity(f"the {role} presented no certificate of its own")
    return verify_svid(leaf, trust_domain=trust_domain, role=role, now_s=now_s)
