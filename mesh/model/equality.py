"""Whether a write says anything new."""

import msgspec

# Sorted map keys, and one encoding per type: True, 1 and 1.0 are equal in Python but not the same configuration, and
# a NaN, which is not equal to itself, must not make every rewrite of its entry a change.
_CANONICAL = msgspec.msgpack.Encoder(order="deterministic")


def canonical(value: object) -> bytes:
    """Bytes that are equal exactly when the values are, whatever the order of their maps."""
    return _CANONICAL.encode(value)


def same(one: object, other: object) -> bool:
    """Whether both values have the same canonical bytes."""
    return _CANONICAL.encode(one) == _CANONICAL.encode(other)
