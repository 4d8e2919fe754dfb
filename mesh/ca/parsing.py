"""Reading certificates and requests that a stranger wrote: whatever the cryptography package thinks of them becomes
one error of ours.
"""

import contextlib
import warnings
from collections.abc import Iterator

from cryptography import x509
from cryptography.exceptions import InvalidSignature, UnsupportedAlgorithm
from cryptography.utils import CryptographyDeprecationWarning

from mesh.errors import MeshError

_PARSE_ERRORS = (
    ValueError,
    TypeError,
    UnsupportedAlgorithm,
    InvalidSignature,
    x509.DuplicateExtension,
    x509.ExtensionNotFound,
    x509.InvalidVersion,
    x509.UnsupportedGeneralNameType,
    CryptographyDeprecationWarning,
)


@contextlib.contextmanager
def parsing(what: str, failure: type[MeshError]) -> Iterator[None]:
    """Turns every parse error inside into `failure`, its text beginning with `what`; fields are parsed lazily, so all
    that reads a stranger's value belongs inside. Our own errors pass.

    A field that the package would tolerate with a warning (a serial number that is not positive, for one) is an error
    too: a peer must not get malformed values past us, nor write to our standard error.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("error", CryptographyDeprecationWarning)
        try:
            yield
        except _PARSE_ERRORS as error:
            raise failure(f"{what}: {error}") from error
