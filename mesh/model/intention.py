"""Intentions: who may call whom.

Audit mode is asked for in metadata, which every client of Consul's API carries through unharmed: key `mesh-intentions`,
value `audit` (or `enforce`, as is the rule), on a rule, on a service-intentions entry for all its rules, on
service-defaults or proxy-defaults for whole services. On an entry, `mesh-intentions/web` is about source `web` only.
"""

from collections.abc import Mapping
from typing import Literal

import msgspec

WILDCARD = "*"

MODE_KEY = "mesh-intentions"
MODES = ("enforce", "audit")

IntentionAction = Literal["allow", "deny"]


def is_audit(meta: Mapping[str, str], source: str = "") -> bool:
    """Whether metadata asks for audit mode: of everything it is about, or of the rule for `source`."""
    mode = meta.get(f"{MODE_KEY}/{source}") if source else None
    return (meta.get(MODE_KEY) if mode is None else mode) == "audit"


def precedence(*, source: str, destination: str) -> int:
    """Consul's precedence of a pair: 9 both exact, 8 source is a wildcard, 6 destination is a wildcard, 5 both are."""
    if destination != WILDCARD:
        return 9 if source != WILDCARD else 8
    return 6 if source != WILDCARD else 5


class Intention(msgspec.Struct, frozen=True):
    """One rule. `action` is None exactly when L7 `permissions` decide. Times are Unix seconds.

    With `audit`, which the state derives from the metadata of rule and entry, a denial is counted and not enforced.
    """

    source: str
    destination: str
    action: IntentionAction | None = "allow"
    permissions: tuple[dict[str, object], ...] = ()
    intention_id: str = ""  # only intentions made through the deprecated ID endpoints have one
    description: str = ""
    meta: dict[str, str] = {}
    created_at_s: float = 0.0
    updated_at_s: float = 0.0
    create_index: int = 0
    modify_index: int = 0
    audit: bool = False

    @property
    def precedence(self) -> int:
        """Higher wins; see the function of the same name."""
        return precedence(source=self.source, destination=self.destination)
