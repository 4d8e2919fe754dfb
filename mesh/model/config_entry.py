"""Central configuration: stored as given, keyed by kind and name; only service-intentions are taken apart."""

import msgspec

SERVICE_INTENTIONS = "service-intentions"


class ConfigEntry(msgspec.Struct, frozen=True):
    """`body` holds the kind's own fields in CamelCase, without Kind, Name, Meta and the indexes."""

    kind: str
    name: str
    body: dict[str, object] = {}
    meta: dict[str, str] = {}
    create_index: int = 0
    modify_index: int = 0
