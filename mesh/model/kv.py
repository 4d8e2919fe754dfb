"""A key of the KV store."""

import msgspec


class KvEntry(msgspec.Struct, frozen=True):
    key: str
    value: bytes = b""
    flags: int = 0  # unsigned 64 bit, opaque to the store
    lock_index: int = 0
    session: str = ""
    create_index: int = 0
    modify_index: int = 0
