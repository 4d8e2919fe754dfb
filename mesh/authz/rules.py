"""What the sidecar of one destination enforces, made of the intentions that bear on it."""

from collections.abc import Iterable, Mapping
from typing import Literal

import msgspec

from mesh.errors import Refused
from mesh.model.intention import Intention
from mesh.model.permission import Permission, permission_of

AUDIT_KEY = "mesh-mode"  # in an intention's Meta, or that of its entry or of a service's defaults
AUDIT_VALUE = "audit"


class SourceRule(msgspec.Struct, frozen=True):
    """One intention as the callee's sidecar needs it: `source` is a service name or `*`.

    `action` is None exactly when `permissions` decide. With `audit` its denials are counted and logged, not enforced.
    `precedence` is Consul's; those below 8 come from rules whose destination is `*`.
    """

    source: str
    action: Literal["allow", "deny"] | None
    permissions: tuple[Permission, ...] = ()
    audit: bool = False
    precedence: int = 9


def is_audit(meta: Mapping[str, str]) -> bool:
    """Whether metadata asks for audit mode: `mesh-mode` = `audit`. Any other value enforces."""
    return meta.get(AUDIT_KEY) == AUDIT_VALUE


def source_rules(intentions: Iterable[Intention], *, audited: frozenset[str] = frozenset()) -> tuple[SourceRule, ...]:
    """The rules of intentions that share a destination (or have `*`), highest precedence first.

    `audited`: destinations whose whole entry is in audit mode. A rule that cannot be understood refuses.
    """
    ordered = sorted(intentions, key=lambda one: (-one.precedence, one.source, one.action != "deny"))
    return tuple(_source_rule(one, audit=one.destination in audited or is_audit(one.meta)) for one in ordered)


def _source_rule(intention: Intention, *, audit: bool) -> SourceRule:
    source, precedence = intention.source, intention.precedence
    if not intention.permissions:
        action: Literal["allow", "deny"] = "allow" if intention.action == "allow" else "deny"
        return SourceRule(source, action, audit=audit, precedence=precedence)
    try:
        permissions = tuple(permission_of(one, "") for one in intention.permissions)
    except Refused:  # stored by a version that took it; half a rule would let in what it is meant to keep out
        return SourceRule(source, "deny", precedence=precedence)
    return SourceRule(source, None, permissions, audit=audit, precedence=precedence)
