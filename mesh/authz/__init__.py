"""Who may call whom: intentions by precedence, per connection and per request, and what another set would change."""

from mesh.authz.connections import Decision, authorize
from mesh.authz.policy import Policy, Verdict, rule_problems
from mesh.authz.rules import SourceRule, source_rules

__all__ = ["Decision", "Policy", "SourceRule", "Verdict", "authorize", "rule_problems", "source_rules"]
