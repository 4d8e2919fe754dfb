"""Random rule sets and requests, and a naive evaluator that reads the stored rules with none of our compiling code."""

import random
import re
from dataclasses import dataclass

from mesh.http.head import RequestHead
from mesh.http.path import normalize_path
from mesh.model.intention import Intention

SERVICE = "api"
SOURCES = ("web", "cart", "admin", "webb")
_PATHS = (
    "/", "/admin", "/admin/", "/admin/users", "/Admin", "/api", "/api/v1", "/api/v1/orders", "/api/v2/orders/17",
    "/apix", "/users/42", "/users/42/secret", "/a/../admin", "/a/%2e%2e/admin", "/%61dmin", "/./admin",
    "/api/v1?x=/admin", "/admin?", "/users/x", "/api/v10", "/%2Fadmin",
)  # fmt: skip
_EXACT = ("/", "/admin", "/api/v1", "/users/42", "/%61dmin", "/admin/")
_PREFIX = ("/", "/admin", "/api/", "/api/v1", "/users", "/a")
_REGEX = ("/api/v[0-9]+", "/api/v[0-9]+/.*", ".*secret.*", "/users/[0-9]+", "/(admin|users)/?.*", "/Admin|/admin")
_METHODS = ("GET", "POST", "PUT", "DELETE", "PATCH", "HEAD", "OPTIONS")
_NAMES = ("x-role", "x-tenant", "user-agent")
_VALUES = ("admin", "Admin", "administrator", "user", "a", "", "guest-admin", "blue", "b")


@dataclass(frozen=True)
class Case:
    """One decision to make."""

    intentions: tuple[Intention, ...]
    default_allow: bool
    source: str
    method: str
    target: str
    headers: tuple[tuple[str, str], ...]

    @property
    def head(self) -> RequestHead:
        """The request as the codec makes it."""
        path, mark, query = self.target.encode().partition(b"?")
        headers = tuple((name.lower().encode(), value.encode()) for name, value in self.headers)
        normal = normalize_path(path)
        return RequestHead(self.method.encode(), normal, query if mark else None, b"api.example", headers)


def make_rules(rng: random.Random) -> tuple[Intention, ...]:
    """Intentions for `api`: each pair at most once, permissions only where Consul takes them."""
    pairs = [(source, at) for source in (*SOURCES[:3], "*") for at in (SERVICE, "*")]
    made: list[Intention] = []
    for source, destination in rng.sample(pairs, rng.randrange(len(pairs))):
        if destination == SERVICE and rng.random() < 0.7:
            permissions = tuple(_permission(rng) for _ in range(rng.randrange(1, 5)))
            made.append(Intention(source, destination, None, permissions))
        else:
            made.append(Intention(source, destination, rng.choice(("allow", "deny"))))
    return tuple(made)


def _permission(rng: random.Random) -> dict[str, object]:
    http: dict[str, object] = {}
    kind = rng.randrange(4)
    if kind == 1:
        http["PathExact"] = rng.choice(_EXACT)
    elif kind == 2:
        http["PathPrefix"] = rng.choice(_PREFIX)
    elif kind == 3:
        http["PathRegex"] = rng.choice(_REGEX)
    if rng.random() < 0.4:
        http["Methods"] = rng.sample(_METHODS, rng.randrange(1, 4))
    if rng.random() < 0.4 or not http:
        http["Header"] = [_header(rng) for _ in range(rng.randrange(1, 3))]
    return {"Action": rng.choice(("allow", "deny")), "HTTP": http}


def _header(rng: random.Random) -> dict[str, object]:
    header: dict[str, object] = {"Name": rng.choice(_NAMES)}
    kind = rng.choice(("Present", "Exact", "Prefix", "Suffix", "Contains", "Regex"))
    if kind == "Present":
        header["Present"] = True
    elif kind == "Regex":
        header["Regex"] = rng.choice(("[a-z]+", "adm.*", "a|b", ".*-admin"))
    else:
        header[kind] = rng.choice([value for value in _VALUES if value])
        if rng.random() < 0.3:
            header["IgnoreCase"] = True
    if rng.random() < 0.3:
        header["Invert"] = True
    return header


def make_case(rng: random.Random, intentions: tuple[Intention, ...], *, repeats: bool = True) -> Case:
    """A request to decide on. `repeats`: headers may come several times."""
    headers: list[tuple[str, str]] = []
    for name in _NAMES:
        for _ in range(rng.choice((0, 1, 1, 2) if repeats else (0, 1))):
            spelled = rng.choice((name, name.upper(), name.title()))
            headers.append((spelled, rng.choice(_VALUES)))
    rng.shuffle(headers)
    return Case(
        intentions, rng.random() < 0.5, rng.choice(SOURCES), rng.choice(_METHODS), rng.choice(_PATHS), tuple(headers)
    )


def oracle(case: Case) -> bool:
    """Whether the request may come in, step by step as the documentation of intentions says."""
    rule = None
    for pair in ((case.source, SERVICE), ("*", SERVICE), (case.source, "*"), ("*", "*")):
        rule = next((one for one in case.intentions if (one.source, one.destination) == pair), None)
        if rule is not None:
            break
    if rule is None:
        return case.default_allow
    if not rule.permissions:
        return rule.action == "allow"
    for permission in rule.permissions:
        if _holds(permission, case):
            return permission["Action"] == "allow"
    return case.default_allow


def _holds(permission: dict, case: Case) -> bool:
    http = permission["HTTP"]
    path = case.head.path.decode()
    if "PathExact" in http and path != normalize_path(http["PathExact"].encode()).decode():
        return False
    if "PathPrefix" in http and path[: len(http["PathPrefix"])] != http["PathPrefix"]:
        return False
    if "PathRegex" in http and re.fullmatch(http["PathRegex"], path) is None:
        return False
    if "Methods" in http and case.method not in http["Methods"]:
        return False
    for wanted in http.get("Header", ()):
        values = [value for name, value in case.headers if name.lower() == wanted["Name"]]
        if len(values) > 1:
            values.append(",".join(values))
        verdicts = [_value_holds(wanted, value) != wanted.get("Invert", False) for value in values]
        if not values:
            holds = "Present" in wanted and wanted.get("Invert", False)
        elif permission["Action"] == "deny":
            holds = any(verdicts)
        else:
            holds = all(verdicts)
        if not holds:
            return False
    return True


def _value_holds(wanted: dict, value: str) -> bool:
    if wanted.get("Present"):
        return True
    if "Regex" in wanted:
        return re.fullmatch(wanted["Regex"], value) is not None
    ((kind, text),) = ((kind, wanted[kind]) for kind in ("Exact", "Prefix", "Suffix", "Contains") if kind in wanted)
    if wanted.get("IgnoreCase"):
        value, text = value.lower(), text.lower()
    size = len(text)
    match kind:
        case "Exact":
            return value == text
        case "Prefix":
            return value[:size] == text
        case "Suffix":
            return value[-size:] == text
        case _:
            return any(value[at : at + size] == text for at in range(len(value)))
