"""Which requests: conditions on text, paths, headers, queries, sources. Values only; `matching` compiles them."""

from typing import Literal

import msgspec

StringKind = Literal["exact", "prefix", "suffix", "contains", "regex", "present"]
PathKind = Literal["exact", "prefix", "segment", "regex"]


class StringMatch(msgspec.Struct, frozen=True):
    """A condition on one text. `regex` must match the whole text (RE2 syntax); `present` asks only that there is one.

    With `invert` the condition holds when it otherwise would not: for headers and parameters also when there is none.
    """

    kind: StringKind
    value: str = ""
    ignore_case: bool = False
    invert: bool = False


class PathMatch(msgspec.Struct, frozen=True):
    """A condition on the normalised path without its query.

    `prefix` is by character (`/a` matches `/ab`), `segment` by whole segments (`/a` matches `/a` and `/a/b`, not `/ab`;
    `/` matches all), `regex` matches the whole path (RE2).
    """

    kind: PathKind
    value: str
    ignore_case: bool = False


class NamedMatch(msgspec.Struct, frozen=True):
    """A condition on one header (name in lower case; several values of a header are joined with commas) or on one query
    parameter (its first value, percent-decoded).
    """

    name: str
    match: StringMatch


class RouteMatch(msgspec.Struct, frozen=True):
    """All that is given must hold; what is empty always does.

    `authorities` are tried against Host without its port, in lower case; `ports` against the listener's (or original
    destination's) port; `sources` against the calling service's name; `source_metadata` against the caller's service
    meta, which only its own sidecar knows: on the callee's side a match that asks for it never holds.
    """

    path: PathMatch | None = None
    headers: tuple[NamedMatch, ...] = ()
    query: tuple[NamedMatch, ...] = ()
    methods: tuple[str, ...] = ()
    authorities: tuple[StringMatch, ...] = ()
    schemes: tuple[str, ...] = ()
    ports: tuple[int, ...] = ()
    sources: tuple[str, ...] = ()
    source_metadata: tuple[tuple[str, str], ...] = ()
