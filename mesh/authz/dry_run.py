"""What another set of intentions would change for the traffic that was seen: nothing is enforced, nothing is written.

Each edge that was observed (caller, service, method, path) is judged by the rules of now and by those proposed. Headers
are not kept, so where a rule looks at them the verdict is "depends"; a path template is judged by whole paths that were
seen under it, and where these disagree it depends, too.
"""

from collections.abc import Callable, Iterable, Sequence
from typing import Literal

import msgspec

from mesh.authz.observed import OVERFLOW_PATH, Edge, ObservedListener
from mesh.authz.policy import Policy, Verdict
from mesh.authz.rules import SourceRule, source_rules
from mesh.model.intention import WILDCARD, Intention

Outcome = Literal["allow", "deny", "audit", "depends"]
Change = Literal["cut", "may-cut", "opened", "may-open", "audited", "none"]

_ORDER: tuple[Change, ...] = ("cut", "may-cut", "opened", "may-open", "audited", "none")


class JudgedEdge(msgspec.Struct, frozen=True):
    """One edge under both sets of rules. `allowed` and `denied` are what was seen, `rule` the proposed ones that would
    decide, empty for the default. `source` empty: callers without an identity.
    """

    source: str
    destination: str
    method: str
    path: str
    allowed: int
    denied: int
    now: Outcome
    proposed: Outcome
    change: Change
    rules: tuple[str, ...]
    samples: tuple[str, ...] = ()


def replaced(
    current: Iterable[Intention], proposed: Sequence[Intention], destinations: Iterable[str]
) -> list[Intention]:
    """The rules once each of the destinations has the proposed ones and no others."""
    named = frozenset(destinations)
    return [rule for rule in current if rule.destination not in named] + list(proposed)


def judge(
    listeners: Iterable[ObservedListener],
    current: Sequence[Intention],
    proposed: Sequence[Intention],
    *,
    default_allow: bool,
    audited: Callable[[str], bool] = lambda _: False,
) -> tuple[JudgedEdge, ...]:
    """Every edge, those that would be cut first, and the busiest first among equals. `audited`: which services are in
    audit mode as a whole.
    """
    judged: list[JudgedEdge] = []
    for listener in listeners:
        before, after = (
            _Side(listener, rules, default_allow=default_allow, audit=audited(listener.service))
            for rules in (current, proposed)
        )
        judged.extend(_judge(edge, listener.service, before, after) for edge in listener.edges)
    judged.sort(
        key=lambda one: (
            _ORDER.index(one.change),
            -one.allowed - one.denied,
            one.destination,
            one.source,
            one.method,
            one.path,
        )
    )
    return tuple(judged)


class _Side:
    """One set of rules, for one listener."""

    def __init__(
        self, listener: ObservedListener, rules: Iterable[Intention], *, default_allow: bool, audit: bool
    ) -> None:
        self._rules = source_rules(rule for rule in rules if rule.destination in (listener.service, WILDCARD))
        self._http = listener.http
        self._policy = Policy(
            self._rules, default_allow=default_allow, service=listener.service, http=listener.http, audit=audit
        )

    def rule(self, source: str) -> SourceRule | None:
        """The one that decides for a caller."""
        return next((rule for rule in self._rules if rule.source in (source, WILDCARD)), None)

    def verdicts(self, edge: Edge) -> list[Verdict]:
        """Every verdict that its requests could meet."""
        if not self._http:
            return [self._policy.connection(edge.source)]
        if edge.path == OVERFLOW_PATH:
            return list(self._policy.possible(edge.source))
        method = edge.method.encode("latin-1", "replace")
        paths = edge.samples or (edge.path,)  # of a path that is too long to keep there is only the template
        return [
            verdict
            for path in paths
            for verdict in self._policy.foresee(edge.source, method, path.encode("latin-1", "replace"))
        ]


def _judge(edge: Edge, service: str, before: _Side, after: _Side) -> JudgedEdge:
    future = after.verdicts(edge)
    now, then = _outcome(before.verdicts(edge)), _outcome(future)
    return JudgedEdge(
        source=edge.source,
        destination=service,
        method=edge.method,
        path=edge.path,
        allowed=edge.allowed,
        denied=edge.denied,
        now=now,
        proposed=then,
        change=_change(edge, now, then, same=before.rule(edge.source) == after.rule(edge.source)),
        rules=tuple(dict.fromkeys(verdict.rule for verdict in future)),
        samples=edge.samples,
    )


def _outcome(verdicts: Sequence[Verdict]) -> Outcome:
    kinds = {"audit" if one.audit_denied else "allow" if one.allowed else "deny" for one in verdicts}
    if len(kinds) > 1:
        return "depends" if "deny" in kinds else "audit"
    if "allow" in kinds:
        return "allow"
    return "deny" if "deny" in kinds else "audit"


def _change(edge: Edge, now: Outcome, then: Outcome, *, same: bool) -> Change:
    if same:
        return "none"
    passes = now in ("allow", "audit") or (now == "depends" and edge.allowed > 0)
    stopped = now == "deny" or (now == "depends" and edge.denied > 0)
    match then:
        case "deny":
            return "cut" if passes else "none"
        case "depends":
            return "may-cut" if passes else "may-open"
        case "allow":
            return "opened" if stopped else "none"
        case "audit":
            return "opened" if stopped else "audited" if now != "audit" else "none"
