"""x-forwarded-client-cert: who called, for the application behind a sidecar. Fields and modes are Envoy's.

An element is `By=<our URI>;Hash=<SHA-256 of the certificate, hexadecimal>` and, where asked for, `Cert`, `Subject`,
`URI` and `DNS`; elements of several hops are joined by commas, the nearest caller last.
"""

from collections.abc import Callable, Sequence
from typing import Literal
from urllib.parse import quote

import msgspec
from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.serialization import Encoding

from mesh.ca.svid import load_certificate
from mesh.http.head import Headers

HEADER = b"x-forwarded-client-cert"

ForwardClientCert = Literal["sanitize", "forward", "append_forward", "sanitize_set", "always_forward"]
ClientCertField = Literal["subject", "uri", "dns", "cert"]

_MUST_QUOTE = frozenset(',;="\\')


class ClientCert(msgspec.Struct, frozen=True):
    """What a caller's certificate says. `subject` is RFC 2253 text, `sha256` hexadecimal."""

    sha256: str
    uri: str
    subject: str = ""
    dns: tuple[str, ...] = ()
    pem: str = ""


def describe(der: bytes) -> ClientCert:
    """What a certificate that has been accepted as an identity says."""
    certificate = load_certificate(der)
    names = certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    (uri,) = names.get_values_for_type(x509.UniformResourceIdentifier)
    return ClientCert(
        sha256=certificate.fingerprint(hashes.SHA256()).hex(),
        uri=uri,
        subject=certificate.subject.rfc4514_string(),
        dns=tuple(names.get_values_for_type(x509.DNSName)),
        pem=certificate.public_bytes(Encoding.PEM).decode(),
    )


def element(own_uri: str, cert: ClientCert, fields: Sequence[ClientCertField]) -> bytes:
    """One element: our URI and the certificate's hash always, then the fields asked for, in Envoy's order."""
    parts = [f"By={_quoted(own_uri)}", f"Hash={cert.sha256}"]
    if "cert" in fields:
        parts.append(f'Cert="{quote(cert.pem, safe="")}"')
    if "subject" in fields:
        parts.append(f"Subject={_in_quotes(cert.subject)}")  # always quoted: it has commas, and may be empty
    if "uri" in fields:
        parts.append(f"URI={_quoted(cert.uri)}")
    if "dns" in fields:
        parts.extend(f"DNS={_quoted(name)}" for name in cert.dns)
    return ";".join(parts).encode("utf-8", "replace")


def _quoted(text: str) -> str:
    return _in_quotes(text) if not _MUST_QUOTE.isdisjoint(text) else text


def _in_quotes(text: str) -> str:
    escaped = text.replace("\\", "\\\\").replace('"', '\\"')
    printable = "".join(character if character.isprintable() else "?" for character in escaped)
    return f'"{printable}"'


Edit = Callable[[Headers, bytes], Headers]


def compile_edit(mode: ForwardClientCert) -> Edit | None:
    """What is done to the headers of a request whose caller's element is given (empty: it has no certificate).

    None for `sanitize`: the header is dropped when it is there, and there is nothing to do otherwise.
    """
    match mode:
        case "sanitize":
            return None
        case "always_forward":
            return lambda headers, _: headers
        case "forward":
            return lambda headers, own: headers if own else without(headers)
        case "sanitize_set":
            return lambda headers, own: (*without(headers), (HEADER, own)) if own else without(headers)
        case "append_forward":
            return _append


def _append(headers: Headers, own: bytes) -> Headers:
    if not own:
        return without(headers)
    before = [value for name, value in headers if name == HEADER and value]
    return (*without(headers), (HEADER, b",".join((*before, own))))


def without(headers: Headers) -> Headers:
    """The headers but this one, in any spelling that an application may take for it: to CGI and WSGI `_` is `-`."""
    return tuple(pair for pair in headers if pair[0].replace(b"_", b"-") != HEADER)
