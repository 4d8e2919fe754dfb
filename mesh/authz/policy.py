"""The rules of one listener, compiled: a dict lookup by the caller, then, where requests decide, a few closures.

What decides, as Consul renders it for Envoy (agent/xds/rbac.go, read for its meaning): the rule of highest precedence
whose source is the caller or `*` is the only one that counts. Of its permissions the first that holds of the request
decides; when none holds the default does, not the next rule. On a listener that does not speak HTTP a rule with
permissions refuses. (Consul arrives there by subtracting each rule's source from all rules below it, and each
permission from those after it; whatever has the default's action is then left out.)

A header that appears several times is several values. A deny holds when one of them matches, or all of them joined by
commas, an allow only when each does and what they make joined: judged only one way, a repeated header talks its way
around a rule (Envoy CVE-2026-26308, Consul CVE-2024-10006). Envoy 1.40 judges them joined, so we never let in what it
would refuse, and refuse some that it lets in.
"""

from collections.abc import Callable, Iterable, Sequence

import msgspec
from msgspec.structs import force_setattr, replace

from mesh.authz.rules import SourceRule
from mesh.errors import ConfigError, ProtocolError
from mesh.http.head import RequestHead
from mesh.http.path import normalize_path
from mesh.model.intention import WILDCARD
from mesh.model.match import NamedMatch, PathMatch
from mesh.model.matching import compile_path, compile_string
from mesh.model.permission import Permission


class Verdict(msgspec.Struct, frozen=True, gc=False):
    """What happens to a request, and by which rule: `web=>api deny`, `web=>api permission 2 deny`, empty: the default.

    `audit_denied`: it would be refused, were the rule not in audit mode; `allowed` is True then. `text` is for access
    logs (`allowed: web=>api allow`, `denied: default`, `audit-denied: rule web=>api deny`), `details` for Envoy's
    RESPONSE_CODE_DETAILS of a refusal (no blanks, `none` when no rule matched). Both are made once, with the rule.
    """

    allowed: bool
    rule: str
    audit_denied: bool = False
    text: str = ""
    details: str = ""

    def __post_init__(self) -> None:
        rule = self.rule or "default"
        text = (
            f"audit-denied: rule {rule}" if self.audit_denied else f"{'allowed' if self.allowed else 'denied'}: {rule}"
        )
        name = self.rule.replace(" ", "_") or "none"
        force_setattr(self, "text", text)
        force_setattr(self, "details", f"rbac_access_denied_matched_policy[{name}]")


class _Condition(msgspec.Struct, frozen=True):
    """A permission, compiled. None: it does not ask."""

    methods: frozenset[bytes] | None
    path: Callable[[bytes], bool] | None
    headers: Callable[[RequestHead], bool] | None
    verdict: Verdict

    def holds_of_line(self, method: bytes, path: bytes) -> bool:
        """Whether method and path are as it asks."""
        return (self.methods is None or method in self.methods) and (self.path is None or self.path(path))


class Requests:
    """A rule with permissions: decides request by request."""

    __slots__ = ("_compiled", "_conditions", "_otherwise")

    def __init__(self, conditions: Sequence[_Condition], otherwise: Verdict) -> None:
        self._conditions = tuple(conditions)
        self._compiled = tuple((one.methods, one.path, one.headers, one.verdict) for one in conditions)
        self._otherwise = otherwise

    def decide(self, head: RequestHead) -> Verdict:
        """The verdict of the first permission that holds of the request, else the default's."""
        method, path = head.method, head.path
        for methods, path_holds, headers_hold, verdict in self._compiled:
            if (
                (methods is None or method in methods)
                and (path_holds is None or path_holds(path))
                and (headers_hold is None or headers_hold(head))
            ):
                return verdict
        return self._otherwise

    def foresee(self, method: bytes, path: bytes) -> tuple[Verdict, ...]:
        """Every verdict that is possible for such a request, its headers unknown."""
        possible: list[Verdict] = []
        for condition in self._conditions:
            if condition.holds_of_line(method, path):
                possible.append(condition.verdict)
                if condition.headers is None:
                    return tuple(possible)
        return (*possible, self._otherwise)

    def possible(self) -> tuple[Verdict, ...]:
        """Every verdict there is."""
        return (*(condition.verdict for condition in self._conditions), self._otherwise)


class Policy:
    """The rules of one destination. Never raises: a rule that cannot be compiled refuses."""

    __slots__ = ("_by_source", "_otherwise", "problems")

    def __init__(
        self,
        rules: Iterable[SourceRule],
        *,
        default_allow: bool,
        service: str = "",
        http: bool = False,
        audit: bool = False,
    ) -> None:
        """`rules` are those whose destination is `service` or `*`, highest precedence first. `audit`: of everything."""
        self.problems: tuple[str, ...] = ()  # rules that refuse because they cannot be applied here, and why
        default = _verdict("", allowed=default_allow, audit=audit)
        self._otherwise: Verdict | Requests = default
        self._by_source: dict[str, Verdict | Requests] = {}
        for rule in rules:
            decider = self._compile(rule, service, default_allow=default_allow, http=http, audit=audit or rule.audit)
            if rule.source == WILDCARD:
                self._otherwise = decider
                break  # it decides for everyone; what follows has lower precedence
            self._by_source.setdefault(rule.source, decider)

    def _compile(
        self, rule: SourceRule, service: str, *, default_allow: bool, http: bool, audit: bool
    ) -> "Verdict | Requests":
        name = f"{rule.source}=>{service if rule.precedence >= 8 else WILDCARD}"
        if not rule.permissions:
            action = "allow" if rule.action == "allow" else "deny"
            return _verdict(f"{name} {action}", allowed=action == "allow", audit=audit)
        if not http:
            self.problems += (f"rule {name} has permissions, and the service's protocol is not http: it refuses",)
            return _verdict(f"{name} needs http", allowed=False, audit=audit)
        try:
            conditions = [
                _condition(
                    one, _verdict(f"{name} permission {at} {one.action}", allowed=one.action == "allow", audit=audit)
                )
                for at, one in enumerate(rule.permissions, start=1)
            ]
        except (ConfigError, UnicodeError) as error:
            self.problems += (f"rule {name} cannot be understood, so it refuses: {error}",)
            return Verdict(allowed=False, rule=f"{name} cannot be understood")
        otherwise = _verdict("" if default_allow else f"{name} no permission", allowed=default_allow, audit=audit)
        return Requests(conditions, otherwise)

    def verdict(self, source: str, head: RequestHead) -> Verdict:
        """What happens to this request of that caller (empty: nobody in particular)."""
        decider = self._by_source.get(source, self._otherwise)
        if type(decider) is Verdict:
            return decider
        assert type(decider) is Requests
        return decider.decide(head)

    def connection(self, source: str) -> Verdict:
        """What happens to that caller's connection, on a listener that does not speak HTTP."""
        decider = self._by_source.get(source, self._otherwise)
        assert type(decider) is Verdict, "only HTTP listeners decide on requests"
        return decider

    def foresee(self, source: str, method: bytes, path: bytes) -> tuple[Verdict, ...]:
        """As `verdict`, for a request of which the headers are not known: each verdict that they could lead to."""
        decider = self._by_source.get(source, self._otherwise)
        if type(decider) is Verdict:
            return (decider,)
        assert type(decider) is Requests
        return decider.foresee(method, path)

    def possible(self, source: str) -> tuple[Verdict, ...]:
        """Every verdict that some request of that caller could meet."""
        decider = self._by_source.get(source, self._otherwise)
        if type(decider) is Verdict:
            return (decider,)
        assert type(decider) is Requests
        return decider.possible()


def rule_problems(rules: Sequence[SourceRule], *, http: bool, service: str) -> tuple[str, ...]:
    """Which rules refuse because they cannot be applied to such a service, a sentence each."""
    if not any(rule.permissions for rule in rules):
        return ()
    return Policy(rules, default_allow=False, service=service, http=http).problems


def _verdict(rule: str, *, allowed: bool, audit: bool) -> Verdict:
    if audit and not allowed:
        return Verdict(allowed=True, rule=rule, audit_denied=True)
    return Verdict(allowed=allowed, rule=rule)


def _condition(permission: Permission, verdict: Verdict) -> _Condition:
    """Raises ConfigError for a pattern that is none."""
    return _Condition(
        methods=frozenset(method.encode() for method in permission.methods) or None,
        path=compile_path(_canonical(permission.path)) if permission.path is not None else None,
        headers=_headers(permission.headers, every=permission.action == "allow") if permission.headers else None,
        verdict=verdict,
    )


def _canonical(match: PathMatch) -> PathMatch:
    """Requests are matched in their canonical spelling; a rule that was written in another one means the same."""
    if match.kind == "regex" or match.value.rpartition("/")[2] in (".", ".."):
        return match
    try:
        return replace(match, value=normalize_path(match.value.encode()).decode())
    except (ProtocolError, UnicodeError):
        return match  # no request has such a path: it would have been answered 400


def _headers(matches: Sequence[NamedMatch], *, every: bool) -> Callable[[RequestHead], bool]:
    # As Envoy has it: of a header that is missing only its absence can be asked for, whatever else is inverted.
    compiled = tuple(
        (_values_of(one.name), compile_string(one.match), one.match.kind == "present" and one.match.invert)
        for one in matches
    )

    def hold(head: RequestHead) -> bool:
        for values_of, holds, wants_none in compiled:
            values = values_of(head)
            if not values:
                if not wants_none:
                    return False
            elif len(values) == 1:
                if not holds(values[0]):
                    return False
            elif not (all if every else any)(holds(value) for value in (*values, b",".join(values))):
                return False
        return True

    return hold


def _one(value: bytes | None) -> tuple[bytes, ...]:
    return () if value is None else (value,)


# What a head holds elsewhere than among its headers.
_ELSEWHERE: dict[str, Callable[[RequestHead], Sequence[bytes]]] = {
    ":authority": lambda head: (head.authority,),
    "host": lambda head: (head.authority,),
    ":method": lambda head: (head.method,),
    ":path": lambda head: (head.target,),
    "upgrade": lambda head: _one(head.upgrade or None),
    "content-length": lambda head: _one(None if head.content_length is None else b"%d" % head.content_length),
    "transfer-encoding": lambda head: (b"chunked",) if head.chunked else (),
    "expect": lambda head: (b"100-continue",) if head.expects_continue else (),
}


def _values_of(name: str) -> Callable[[RequestHead], Sequence[bytes]]:
    elsewhere = _ELSEWHERE.get(name)
    if elsewhere is not None:
        return elsewhere
    wanted = name.encode()
    return lambda head: [value for key, value in head.headers if key == wanted]
