"""Gossip encryption: AES-GCM with a ring of keys, in memberlist's envelope (version byte, nonce, text and tag)."""

from collections.abc import Callable, Sequence

from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers.aead import AESGCM

from mesh.errors import ConfigError
from mesh.gossip.wire_error import WireError

NONCE_BYTES = 12
TAG_BYTES = 16
ENVELOPE_BYTES = 1 + NONCE_BYTES + TAG_BYTES
# Each key costs one failed decryption per foreign packet, so the ring is short.
KEYS_MAX = 5
_VERSION_PADDED = 0
_VERSION = 1
_BLOCK_BYTES = 16


class Keyring:
    """Keys of one pool: the first encrypts, all are tried to decrypt.

    `nonce_source` returns 12 unpredictable bytes, never the same twice under one key (NIST SP 800-38D §8).
    """

    def __init__(self, keys: Sequence[bytes], nonce_source: Callable[[], bytes]) -> None:
        if not 1 <= len(keys) <= KEYS_MAX:
            raise ConfigError(f"a gossip keyring holds 1 to {KEYS_MAX} keys, not {len(keys)}")
        for key in keys:
            if len(key) not in (16, 24, 32):
                raise ConfigError(f"a gossip encryption key must be 16, 24 or 32 bytes, not {len(key)}")
        self._ciphers = tuple(AESGCM(key) for key in keys)
        self._nonce_source = nonce_source

    def seal(self, plain: bytes, associated: bytes) -> bytes:
        """`plain` encrypted with the first key in the envelope of version 1 (no padding)."""
        nonce = self._nonce_source()
        assert len(nonce) == NONCE_BYTES
        return b"\x01" + nonce + self._ciphers[0].encrypt(nonce, plain, associated)

    def open(self, sealed: bytes, associated: bytes) -> bytes:
        """The plain bytes. Raises WireError when no key of the ring opens it or the envelope is not one."""
        if len(sealed) < ENVELOPE_BYTES:
            raise WireError("decrypt", f"{len(sealed)} bytes are too few for an encrypted message")
        version = sealed[0]
        if version > _VERSION:
            raise WireError("decrypt", f"encryption version {version} is unknown (or the message is not encrypted)")
        nonce, text = sealed[1 : 1 + NONCE_BYTES], sealed[1 + NONCE_BYTES :]
        for cipher in self._ciphers:
            try:
                plain = cipher.decrypt(nonce, text, associated)
            except InvalidTag:
                continue
            return _unpadded(plain) if version == _VERSION_PADDED else plain
        raise WireError("decrypt", "no key of the ring opens the message: wrong key, or not encrypted")


def _unpadded(plain: bytes) -> bytes:
    """Version 0 pads to the cipher's block as PKCS #7 does (RFC 5652 §6.3)."""
    count = plain[-1] if plain else 0
    if not 1 <= count <= _BLOCK_BYTES or len(plain) < count or plain[-count:] != bytes((count,)) * count:
        raise WireError("decrypt", "a padded message has bad padding")
    return plain[:-count]
