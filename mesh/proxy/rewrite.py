"""What a rule makes of a request's path and host, and the Location of a redirect."""

from collections.abc import Callable

from mesh.errors import ConfigError
from mesh.http.head import RequestHead, first_value
from mesh.model.match import PathMatch
from mesh.model.matching import compile_pattern
from mesh.traffic.route import Redirect, RegexRewrite

PathRewrite = Callable[[bytes], bytes]  # of a path without its query; the result may bring a query of its own

_DEFAULT_PORTS = {b"http": b"80", b"https": b"443"}


def compile_prefix_rewrite(path: PathMatch | None, replacement: str) -> PathRewrite:
    """Replaces what `path` matched: a prefix; for an exact or regex match, the whole path.

    A prefix is replaced by character, as in Envoy: `/a` by `/` makes `//b` of `/a/b`. A segment prefix is replaced by
    segments, as in the Gateway API: `/a` by `/` makes `/b` of it.
    """
    text = replacement.encode()
    if path is None or path.kind == "prefix":
        # A rule for every path matches the prefix `/`; `*` (of OPTIONS) does not begin with it.
        prefix = b"/" if path is None else path.value.encode()
        length = len(prefix)
        return lambda whole: text + whole[length:] if whole.startswith(b"/") else whole
    if path.kind == "segment":
        length = len(path.value.encode().rstrip(b"/"))
        bare = text.rstrip(b"/")
        return lambda whole: bare + whole[length:] or b"/"
    return lambda _: text


def compile_regex_rewrite(rewrite: RegexRewrite) -> PathRewrite:
    """Replaces every match. Raises ConfigError for a bad pattern, and for a substitution that names no group of it."""
    pattern = compile_pattern(rewrite.pattern)
    pieces: list[bytes | int] = []
    rest = rewrite.substitution
    while rest:
        text, backslash, rest = rest.partition("\\")
        pieces.append(text.encode())
        if not backslash:
            break
        if rest[:1] == "\\":
            pieces.append(b"\\")
        elif rest[:1].isdecimal() and rest.isascii() and int(rest[0]) <= pattern.groups:
            pieces.append(int(rest[0]))
        else:
            raise ConfigError(
                f"substitution {rewrite.substitution!r}: \\{rest[:1]} is neither \\\\ nor one of the pattern's "
                f"{pattern.groups} groups"
            )
        rest = rest[1:]
    kept = tuple(piece for piece in pieces if piece != b"")
    return lambda path: pattern.replace(path, kept)


def canonical(path: bytes) -> bytes:
    """A rewritten path in the form in which paths are forwarded: from `/`, without dot segments (RFC 3986 5.2.4).

    `/a` replaced by `/b/` makes `/b/../c` of `/a../c`; what is sent must not mean something else to its reader.
    """
    if not path.startswith(b"/") and path != b"*":
        path = b"/" + path
    if b"/." not in path:
        return path
    kept: list[bytes] = []
    segments = path.split(b"/")[1:]
    for segment in segments:
        if segment == b"..":
            del kept[-1:]
        elif segment != b".":
            kept.append(segment)
    if segments[-1] in (b".", b".."):
        kept.append(b"")
    return b"/" + b"/".join(kept)


def with_query(path: bytes, query: bytes | None) -> tuple[bytes, bytes | None]:
    """A rewritten path and the request's query; a query that the rewrite brought stays in front of the request's."""
    path, mark, brought = path.partition(b"?")
    if not mark:
        return canonical(path), query
    return canonical(path), brought if query is None else brought + b"?" + query


def _host(authority: bytes, scheme: bytes, head_scheme: bytes, *, keep_port: bool) -> bytes:
    """The request's host; without its port when another is given, or when it is the old scheme's own."""
    host, colon, port = authority.rpartition(b":")
    if not colon or port.endswith(b"]"):
        return authority
    if not keep_port or (scheme != head_scheme and port == _DEFAULT_PORTS.get(head_scheme)):
        return host
    return authority


def compile_redirect(redirect: Redirect, path: PathMatch | None, scheme: str) -> Callable[[RequestHead], bytes]:
    """A function that makes the Location of the answer to a request, absolute, as Envoy makes it.

    `scheme` is the listener's; a request's own X-Forwarded-Proto goes before it. A query in `redirect.path` replaces
    the request's.
    """
    own_scheme = scheme.encode()
    scheme_wanted = redirect.scheme.encode()
    host_wanted = redirect.host.encode()
    port_wanted = b":%d" % redirect.port if redirect.port else b""
    path_wanted = redirect.path.encode()
    rewrite = None if redirect.prefix_rewrite is None else compile_prefix_rewrite(path, redirect.prefix_rewrite)

    def location(head: RequestHead) -> bytes:
        forwarded = first_value(head.headers, b"x-forwarded-proto")
        head_scheme = forwarded if forwarded in _DEFAULT_PORTS else own_scheme
        scheme = scheme_wanted or head_scheme
        host = host_wanted or _host(head.authority, scheme, head_scheme, keep_port=not port_wanted)
        query = None if redirect.strip_query else head.query
        if path_wanted:
            target = path_wanted
            if b"?" in target:
                query = None
        elif rewrite is not None:
            target, query = with_query(rewrite(head.path), query)
        else:
            target = head.path
        if query is not None:
            target = target + b"?" + query
        # Without a Host (HTTP/1.0) only a relative reference is true.
        return scheme + b"://" + host + port_wanted + target if host else target

    return location
