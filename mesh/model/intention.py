"""Intentions: who may call whom."""

from typing import Literal

import msgspec

WILDCARD = "*"

IntentionAction = Literal["allow", "deny"]


def precedence(*, source: str, destination: str) -> int:
    """Consul's precedence of a pair: 9 both exact, 8 source is a wildcard, 6 destination is a wildcard, 5 both are."""
    if destination != WILDCARD:
        return 9 if source != WILDCARD else 8
    return 6 if source != WILDCARD else 5


class Intention(msgspec.Struct, frozen=True):
    """One rule. `action` is None exactly when L7 `permissions` decide. Times are Unix seconds."""

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

    @property
    def precedence(self) -> int:
        """Higher wins; see the function of the same name."""
        return precedence(source=self.source, destination=self.destination)
