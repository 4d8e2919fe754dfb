"""Random route tables and requests, and a naive interpreter that says which rule must answer: it tries one by one."""

import re
from dataclasses import dataclass
from urllib.parse import unquote_to_bytes

from mesh.http.head import RequestHead
from mesh.model.match import NamedMatch, PathMatch, RouteMatch, StringMatch
from mesh.traffic.route import DirectResponse, RouteTable, Rule, VirtualHost

PORT, SCHEME = 8080, "http"
_PATHS = (
    "/",
    "/a",
    "/a/",
    "/a/b",
    "/a/bc",
    "/a/b/c",
    "/ab",
    "/A/B",
    "/api/v1",
    "/api/v1/x",
    "/api/v12",
    "/b",
    "/b.html",
)
_REGEXES = ("/a.*", "/[ab]/?.*", "/api/v[0-9]+", "/(a|api)/[^/]+/.*", ".*c", "/b\\.html", "/A/.*", "/x*", ".*/b(/.*)?")
_NAMES = ("x-version", "x-user", "x-env", "cookie")
_TEXTS = ("v1", "v2", "V1", "v1,v2", "canary", "", "can", "1")
_TEXT_REGEXES = ("v[12]", "can.*", ".*", "[^,]+", "V1|canary")
_PARAMETERS = ("q", "page")
_METHODS = ("GET", "POST", "PUT", "DELETE", "HEAD")
_DOMAINS = ("a.mesh", "web.a.mesh", "*.a.mesh", "*.mesh", "a.*", "web.*", "b")
_AUTHORITIES = (
    "a.mesh",
    "web.a.mesh",
    "x.web.a.mesh",
    "a.mesh:8080",
    "A.Mesh",
    "web.b",
    "a.b",
    "b",
    "b:80",
    "[::1]:80",
    "c",
)
_SOURCES = ("web", "api", "batch")
_METADATA = (("version", "1"), ("team", "x"))


@dataclass(frozen=True)
class Case:
    """A table with what its listener is, and one request."""

    table: RouteTable
    head: RequestHead
    source: str
    fixed_source: bool
    metadata: tuple[tuple[str, str], ...] | None


def _some(rng, values, share):
    return tuple(value for value in values if rng.random() < share)


_TEXT_KINDS = ("exact", "exact", "exact", "prefix", "suffix", "contains", "regex", "present")


def _text_match(rng, *, kinds=_TEXT_KINDS, inverted=0.2):
    kind = rng.choice(kinds)
    value = "" if kind == "present" else rng.choice(_TEXT_REGEXES if kind == "regex" else [t for t in _TEXTS if t])
    ignore_case = kind != "present" and rng.random() < 0.2
    return StringMatch(kind, value, ignore_case, invert=rng.random() < inverted)


def _envoys(named):
    """The same, unless it is inverted and holds of empty text: to Envoy a header that is missing is empty then."""
    match = named.match
    if match.kind == "regex" and match.invert and re.fullmatch(match.value, ""):
        return NamedMatch(named.name, StringMatch(match.kind, match.value, match.ignore_case))
    return named


def _path_match(rng):
    kind = rng.choice(("exact", "exact", "prefix", "prefix", "segment", "segment", "regex"))
    value = rng.choice(_REGEXES if kind == "regex" else _PATHS)
    return PathMatch(kind, value, ignore_case=rng.random() < 0.15)


def _match(rng, *, plain):
    def maybe(share, make, otherwise=()):
        return make() if rng.random() < share else otherwise

    def header(named):
        return _envoys(named) if plain else named

    return RouteMatch(
        path=maybe(0.8, lambda: _path_match(rng), None),
        headers=maybe(
            0.4, lambda: tuple(header(NamedMatch(name, _text_match(rng))) for name in _some(rng, _NAMES, 0.4))
        ),
        query=maybe(
            0.2,
            lambda: tuple(
                NamedMatch(name, _text_match(rng, kinds=("exact", "regex", "present"), inverted=0.0 if plain else 0.2))
                for name in _some(rng, _PARAMETERS, 0.6)
            ),
        ),
        methods=maybe(0.25, lambda: _some(rng, _METHODS, 0.4)),
        authorities=()
        if plain
        else maybe(0.1, lambda: (StringMatch("suffix", "mesh"), StringMatch("exact", "b", invert=rng.random() < 0.5))),
        schemes=() if plain else maybe(0.1, lambda: (rng.choice(("http", "https")),)),
        ports=() if plain else maybe(0.1, lambda: _some(rng, (8080, 9090), 0.5)),
        sources=() if plain else maybe(0.2, lambda: _some(rng, _SOURCES, 0.5)),
        source_metadata=() if plain else maybe(0.1, lambda: _some(rng, _METADATA, 0.5)),
    )


def make_table(rng, *, plain=False):
    """A table whose rules answer with their own name. `plain`: only conditions that are about the request itself."""
    domains = [*_some(rng, _DOMAINS, 0.3), "*"]
    rng.shuffle(domains)
    hosts = []
    while domains:
        taken, domains = domains[:2], domains[2:]
        name = f"h{len(hosts)}"
        rules = tuple(
            Rule(
                DirectResponse(200, f"{name}.{number}"),
                name=f"{name}.{number}",
                matches=tuple(
                    _match(rng, plain=plain) for _ in range(rng.choice((0, 1, 1, 1, 1, 2, 3)) or (number < 8))
                ),
            )
            for number in range(rng.choice((1, 3, 8, 16)))
        )
        hosts.append(VirtualHost(rules, name, tuple(taken)))
    return RouteTable(tuple(hosts), "generated")


def make_head(rng, *, plain=False):
    """A request; `plain`: each header once, nothing escaped, no header empty."""
    texts = [text for text in _TEXTS if text or not plain]
    headers = [(name.encode(), rng.choice(texts).encode()) for name in _some(rng, _NAMES, 0.5)]
    if not plain:
        headers += [(name.encode(), rng.choice(texts).encode()) for name in _some(rng, _NAMES, 0.1)]
    query = None
    if rng.random() < 0.5:
        parts = [f"{name}={rng.choice(texts)}" for name in _some(rng, (*_PARAMETERS, *_PARAMETERS), 0.4)]
        parts += [] if plain else _some(rng, ("q", "p%61ge=v%31", "%71=", "&"), 0.2)
        query = "&".join(parts).encode()
    return RequestHead(
        method=rng.choice(_METHODS[:4] if plain else _METHODS).encode(),
        path=rng.choice((*_PATHS, "/a/b/d", "/a/b/c/d", "/zzz", "/b/", "/api", "/api/v1/", "/a/B")).encode(),
        query=query,
        authority=rng.choice([one for one in _AUTHORITIES if not (plain and one.startswith("["))]).encode(),
        headers=tuple(headers),
    )


def make_case(rng, table):
    """A request to a table, from one of the callers."""
    source = rng.choice(_SOURCES)
    return Case(table, make_head(rng), source, rng.random() < 0.5, rng.choice((None, (), _METADATA[:1], _METADATA)))


def _text_holds(match, text):
    if text is None:
        return match.invert
    value, subject = match.value, text.decode()
    if match.ignore_case and match.kind != "regex":
        value, subject = value.lower(), subject.lower()
    holds = {
        "present": lambda: True,
        "exact": lambda: subject == value,
        "prefix": lambda: subject.startswith(value),
        "suffix": lambda: subject.endswith(value),
        "contains": lambda: value in subject,
        "regex": lambda: re.fullmatch(value, subject, re.IGNORECASE if match.ignore_case else 0) is not None,
    }[match.kind]()
    return holds is not match.invert


def _path_holds(match, path):
    value, subject = match.value, path.decode()
    if match.kind == "regex":
        return re.fullmatch(value, subject, re.IGNORECASE if match.ignore_case else 0) is not None
    if match.ignore_case:
        value, subject = value.lower(), subject.lower()
    if match.kind == "segment":
        wanted = [part for part in value.split("/") if part]
        return subject.startswith("/") and subject.split("/")[1 : 1 + len(wanted)] == wanted
    return subject == value if match.kind == "exact" else subject.startswith(value)


def _header(head, name):
    values = [value for candidate, value in head.headers if candidate == name.encode()]
    return (b"; " if name == "cookie" else b",").join(values) if values else None


def _parameter(head, name):
    for part in (head.query or b"").split(b"&") if head.query is not None else ():
        key, *value = part.split(b"=", 1)
        if unquote_to_bytes(key) == name.encode():
            return unquote_to_bytes(value[0]) if value else b""
    return None


def host_of(authority):
    """Without port, in lower case."""
    return re.sub(r":[0-9]+$", "", authority.decode().lower())


def _holds(match, case):
    head = case.head
    return (
        (match.path is None or _path_holds(match.path, head.path))
        and all(_text_holds(one.match, _header(head, one.name)) for one in match.headers)
        and all(_text_holds(one.match, _parameter(head, one.name)) for one in match.query)
        and (not match.methods or head.method.decode() in match.methods)
        and (
            not match.authorities
            or any(_text_holds(one, host_of(head.authority).encode()) for one in match.authorities)
        )
        and (not match.schemes or SCHEME in match.schemes)
        and (not match.ports or PORT in match.ports)
        and (not match.sources or case.source in match.sources)
        and all(pair in (case.metadata or ()) for pair in match.source_metadata)
    )


def _specificity(domain, host):
    """Greater is more specific; None: it is another host's."""
    if domain == host:
        return (3, 0)
    if domain == "*":
        return (0, 0)
    if domain.startswith("*") and host.endswith(domain[1:]) and len(host) >= len(domain):
        return (2, len(domain))
    if domain.endswith("*") and host.startswith(domain[:-1]) and len(host) >= len(domain):
        return (1, len(domain))
    return None


def oracle(case):
    """The name of the rule that answers, or None."""
    host = host_of(case.head.authority)
    ranked = [
        (specificity, virtual_host)
        for virtual_host in case.table.hosts
        for domain in virtual_host.domains
        if (specificity := _specificity(domain, host)) is not None
    ]
    if not ranked:
        return None
    chosen = max(ranked, key=lambda pair: pair[0])[1]
    for rule in chosen.rules:
        if not rule.matches or any(_holds(match, case) for match in rule.matches):
            return rule.name
    return None
