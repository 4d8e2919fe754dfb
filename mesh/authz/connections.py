"""Who may call whom, per connection: intentions by precedence, else the default policy.

Precedence (9 both names exact, 8 any source, 6 any destination, 5 any to any) leaves no ties between valid rules, as
a source and a destination have one rule. Names are compared exactly and as whole strings, as identities are.
"""

from collections.abc import Iterable

import msgspec

from mesh.model.intention import WILDCARD, Intention

DEFAULT_BY_ACLS = "Default behavior configured by ACLs"


class Decision(msgspec.Struct, frozen=True):
    """Whether a connection may be made, and why; `intention` is the rule that decided, None when the default did."""

    allowed: bool
    reason: str
    intention: Intention | None = None


def authorize(
    intentions: Iterable[Intention],
    *,
    source: str,
    destination: str,
    default_allow: bool,
) -> Decision:
    """Decides a connection between two services. Rules with L7 permissions never allow one: they need its requests."""
    matching = [
        rule for rule in intentions if rule.source in (source, WILDCARD) and rule.destination in (destination, WILDCARD)
    ]
    if not matching:
        return Decision(default_allow, DEFAULT_BY_ACLS)
    rule = max(matching, key=lambda one: (one.precedence, one.action != "allow"))  # among equals refuse
    if rule.permissions or rule.action is None:
        return Decision(allowed=False, reason=f"Matched L7 intention: {describe(rule)}", intention=rule)
    text = f"Matched L4 intention: {describe(rule)}"
    return Decision(allowed=rule.action == "allow", reason=text, intention=rule)


def describe(rule: Intention) -> str:
    """One line of text: names, ID when it has one, precedence and what it does."""
    identifier = f"ID: {rule.intention_id}, " if rule.intention_id else ""
    does = f"Permissions: {len(rule.permissions)}" if rule.permissions else f"Action: {str(rule.action).upper()}"
    return f"default/{rule.source} => default/{rule.destination} ({identifier}Precedence: {rule.precedence}, {does})"
