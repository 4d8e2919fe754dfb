"""What the sidecar of one destination enforces, made of the intentions that bear on it."""

from collections.abc import Iterable
from typing import Literal

import msgspec

from mesh.errors import Refused
from mesh.model.intention import Intention
from mesh.model.permission import Permission, permission_of


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


def source_rules(intentions: Iterable[Intention]) -> tuple[SourceRule, ...]:
    """The rules of intentions that share a destination (or have `*`), highest precedence first.

    A rule that cannot be understood refuses.
    """
    ordered = sorted(intentions, key=lambda one: (-one.precedence, one.source, one.action != "deny"))
    return tuple(_source_rule(one) for one in ordered)


def _source_rule(intention: Intention) -> SourceRule:
    source, precedence, audit = intention.source, intention.precedence, intention.audit
    if not intention.permissions:
        action: Literal["allow", "deny"] = "allow" if intention.action == "allow" else "deny"
        return SourceRule(source, action, audit=audit, precedence=precedence)
    try:
        permissions = tuple(permission_of(one, "") for one in intention.permissions)
    except Refused:  # stored by a version that took it; half a rule would let in what it is meant to keep out
        return SourceRule(source, "deny", precedence=precedence)
    return SourceRule(source, None, permissions, audit=audit, precedence=precedence)
