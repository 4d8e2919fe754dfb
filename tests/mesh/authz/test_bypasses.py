"""Spellings that have got past meshes: what is refused in one of them is refused in all."""

import posixpath
import random
import urllib.parse

import pytest

from mesh.authz import Policy, SourceRule
from mesh.http.h1 import Rejected, ServerConnection
from mesh.http.head import RequestHead
from mesh.http.path import PathPolicy
from mesh.model.match import NamedMatch, PathMatch, StringMatch
from mesh.model.permission import Permission

STRICT = PathPolicy(merge_slashes=True, escaped_slashes="unescape")
VARIANTS = 3000


def policy(*permissions: Permission, default_allow: bool = True) -> Policy:
    return Policy([SourceRule("web", None, permissions)], default_allow=default_allow, service="api", http=True)


def receive(target: bytes, headers: bytes = b"", path_policy: PathPolicy = STRICT) -> RequestHead | Rejected:
    first, *_ = ServerConnection(path_policy).receive_data(
        b"GET %s HTTP/1.1\r\nHost: api\r\n%s\r\n" % (target, headers)
    )
    return first


def spelling(rng: random.Random, path: str) -> str:
    """The path in some other spelling: escapes in either case, dot segments, doubled and escaped slashes, a query."""
    made = ""
    for character in path:
        if character == "/":
            made += rng.choice(("/", "/", "//", "/./", "/x/../", "/%2e/", "%2F", "%2f", "\\", "/x/%2E%2e/"))
        elif rng.random() < 0.3:
            escape = f"%{ord(character):02x}"
            made += rng.choice((escape, escape.upper(), escape))
        else:
            made += character
    return "/" + made.lstrip("/\\") + rng.choice(("", "?", "?a=/open", "?x=%2F..", "/", "/deep"))


def application_sees(target: str) -> str:
    """What a lenient application makes of it."""
    path = urllib.parse.unquote(target.partition("?")[0]).replace("\\", "/")
    return posixpath.normpath("/" + path.lstrip("/"))


@pytest.mark.parametrize("seed", range(3))
def test_no_spelling_of_a_denied_path_gets_in(seed):
    rng = random.Random(seed)
    denying = policy(Permission("deny", path=PathMatch("prefix", "/admin")))
    allowing = policy(Permission("allow", path=PathMatch("prefix", "/open")), default_allow=False)
    refused = judged = 0
    for _ in range(VARIANTS // 3):
        target = spelling(rng, rng.choice(("/admin", "/admin/users", "/open/../admin", "/open/x")))
        head = receive(target.encode())
        if isinstance(head, Rejected):
            refused += 1
            continue
        if application_sees(target).startswith("/admin"):
            judged += 1
            assert not denying.verdict("web", head).allowed, target
            assert not allowing.verdict("web", head).allowed, target
        assert application_sees(head.path.decode()) == application_sees(target)  # forwarded is what was judged
    assert judged > VARIANTS // 6
    assert refused < VARIANTS // 6


@pytest.mark.parametrize("seed", range(3))
def test_no_spelling_of_a_denied_header_gets_in(seed):
    rng = random.Random(seed)
    denying = policy(Permission("deny", headers=(NamedMatch("x-debug", StringMatch("exact", "on")),)))
    for _ in range(VARIANTS // 3):
        lines = [("X-Debug", "on")] + [
            (rng.choice(("x-debug", "X-DEBUG", "x-other")), rng.choice(("off", "on", "", "on,off")))
            for _ in range(rng.randrange(5))
        ]
        rng.shuffle(lines)
        spelled = "".join(
            "".join(rng.choice((letter.upper(), letter.lower())) for letter in name)
            + rng.choice((":", ": ", ":\t"))
            + f"{value}\r\n"
            for name, value in lines
        )
        head = receive(b"/", spelled.encode())
        assert isinstance(head, RequestHead)
        assert not denying.verdict("web", head).allowed, spelled


@pytest.mark.parametrize(
    "headers",
    [b"Connection: x-debug\r\nX-Debug: on\r\n", b"Connection: keep-alive, X-Debug\r\nx-debug: on\r\n"],
)
def test_a_header_declared_hop_by_hop_is_judged_or_does_not_arrive(headers):
    denying = policy(Permission("deny", headers=(NamedMatch("x-debug", StringMatch("exact", "on")),)))
    head = receive(b"/", headers)
    assert isinstance(head, RequestHead)
    assert not denying.verdict("web", head).allowed or all(name != b"x-debug" for name, _ in head.headers)
