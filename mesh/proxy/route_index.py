"""First match wins, without trying every rule: an index over ordered conditions.

Exact paths are looked up; prefixes are found by one binary search, since among sorted texts those that begin a path
form one chain of ancestors; what is left (regular expressions, rules for any path) belongs to every path. Each path
found has its candidates merged in order. Where many candidates remain, one thing that tells most of them apart (a
header's exact value, the method) narrows them once more. Nothing depends on what earlier requests asked for, except
for one remembered result per index.
"""

from bisect import bisect_right
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Generic, TypeVar

from mesh.errors import InvalidRequest
from mesh.http.head import RequestHead
from mesh.model.match import NamedMatch, PathMatch, RouteMatch
from mesh.model.matching import compile_path, joined_value
from mesh.model.pattern import PatternSet
from mesh.proxy.conditions import Check, compile_conditions, host_name, query_value

Item = TypeVar("Item")

SPLIT_FROM = 6  # candidates from which telling them apart by one look-up pays
SPLIT_DEPTH_MAX = 3
PATTERN_SET_FROM = 4  # regular expressions on the path from which trying them together pays
MERGED_MAX = 500_000  # candidates held in merged lists per index; past it lists are merged per request


@dataclass(frozen=True)
class _Entry(Generic[Item]):
    order: int
    match: RouteMatch
    check: Check | None
    item: Item


Value = Callable[[RequestHead, str], bytes | None]


class _Split(Generic[Item]):
    """Candidates told apart by one value of the request."""

    __slots__ = ("rest", "table", "value")

    def __init__(self, value: Value, table: dict[bytes, "_Found[Item]"], rest: "_Found[Item]") -> None:
        self.value = value
        self.table = table
        self.rest = rest

    def narrow(self, head: RequestHead, source: str) -> "_Found[Item]":
        """The candidates that this request's value leaves."""
        value = self.value(head, source)
        return self.rest if value is None else self.table.get(value, self.rest)


class _Unmerged(Generic[Item]):
    """Candidates of an index too large to merge them for every path in advance."""

    __slots__ = ("lists",)

    def __init__(self, lists: tuple[list[_Entry[Item]], ...]) -> None:
        self.lists = lists

    def narrow(self, _head: RequestHead, _source: str) -> "_Found[Item]":
        """The candidates in order."""
        return tuple((entry.check, entry.item) for entry in _merged(*self.lists))


_Found = tuple[tuple[Check | None, Item], ...] | _Split[Item] | _Unmerged[Item]
_Key = tuple[str, str]  # what is looked at, and the header's or parameter's name


def _exact_values(matches: Iterable[NamedMatch]) -> Iterable[tuple[str, frozenset[bytes]]]:
    for named in matches:
        if named.match.kind == "exact" and not named.match.invert and not named.match.ignore_case:
            yield named.name, frozenset((named.match.value.encode(),))


def _values(match: RouteMatch) -> dict[_Key, frozenset[bytes]]:
    """For each thing that one look-up can tell: the values of it that the match allows."""
    values: dict[_Key, frozenset[bytes]] = {}
    if match.methods:
        values["method", ""] = frozenset(method.encode() for method in match.methods)
    if match.sources:
        values["source", ""] = frozenset(source.encode() for source in match.sources)
    if match.authorities and all(
        one.kind == "exact" and not one.invert and not one.ignore_case for one in match.authorities
    ):
        values["authority", ""] = frozenset(one.value.encode() for one in match.authorities)
    values.update((("header", name.lower()), allowed) for name, allowed in _exact_values(match.headers))
    values.update((("query", name), allowed) for name, allowed in _exact_values(match.query))
    return values


def _reader(key: _Key) -> Value:
    kind, text = key
    name = text.encode()
    match kind:
        case "method":
            return lambda head, _: head.method
        case "source":
            return lambda _, source: source.encode()
        case "authority":
            return lambda head, _: host_name(head.authority)
        case "header":
            return lambda head, _: joined_value(head.headers, name)
        case _:
            return lambda head, _: query_value(head.query, name)


def _narrowed(entries: Sequence[_Entry[Item]], depth: int = SPLIT_DEPTH_MAX) -> _Found[Item]:
    """The candidates as they are tried, split where that at least halves the longest list."""
    if len(entries) >= SPLIT_FROM and depth:
        allowed = [_values(entry.match) for entry in entries]
        best: tuple[int, _Key] | None = None
        for key in sorted({key for one in allowed for key in one}):
            counts: dict[bytes, int] = {}
            free = 0
            for one in allowed:
                for value in one.get(key, ()):
                    counts[value] = counts.get(value, 0) + 1
                free += key not in one
            longest = free + max(counts.values())
            # Entries that allow any value are repeated under each: that may not grow without bound.
            if longest * 2 <= len(entries) and free * len(counts) <= 4 * len(entries):
                best = min(best, (longest, key)) if best else (longest, key)
        if best is not None:
            key = best[1]
            lists: dict[bytes, list[_Entry[Item]]] = {value: [] for one in allowed for value in one.get(key, ())}
            rest: list[_Entry[Item]] = []
            for entry, one in zip(entries, allowed, strict=True):
                if key in one:
                    for value in sorted(one[key]):
                        lists[value].append(entry)
                    continue
                rest.append(entry)
                for entries_of_value in lists.values():
                    entries_of_value.append(entry)
            table = {value: _narrowed(lists[value], depth - 1) for value in sorted(lists)}
            return _Split(_reader(key), table, _narrowed(rest, depth - 1))
    return tuple((entry.check, entry.item) for entry in entries)


class _Paths:
    """The regular expressions on the path of one index, tried together."""

    __slots__ = ("_found", "_path", "_patterns", "_set")

    def __init__(self, matches: Sequence[PathMatch]) -> None:
        self._patterns = tuple(map(compile_path, matches))
        self._path = b""
        self._found: frozenset[int] | None = None
        self._set: PatternSet | None = None
        if len(matches) >= PATTERN_SET_FROM:
            texts = [f"(?i:{match.value})" if match.ignore_case else match.value for match in matches]
            try:
                self._set = PatternSet(texts)
            except InvalidRequest:
                return  # too large together: one by one

    def check(self, position: int) -> Check:
        """Whether the pattern at this position matches the path."""
        pattern = self._patterns[position]
        patterns = self._set
        if patterns is None:
            return lambda head, _: pattern(head.path)

        def check_path(head: RequestHead, _source: str) -> bool:
            path = head.path
            if path != self._path:
                self._found = patterns.matches(path)
                self._path = path
            found = self._found
            return pattern(path) if found is None else position in found

        return check_path


def _keys(path: PathMatch | None) -> tuple[tuple[bytes, ...], tuple[bytes, ...]] | None:
    """The exact paths and the prefixes that fulfil it; None when it cannot be said so."""
    if path is None or (path.kind == "prefix" and not path.value):
        return None
    if path.ignore_case or path.kind == "regex":
        return None
    value = path.value.encode()
    if path.kind == "exact":
        return (value,), ()
    if path.kind == "prefix":
        return (), (value,)
    value = value.rstrip(b"/")
    return (value,), (value + b"/",)


def _merged(*lists: Sequence[_Entry[Item]]) -> list[_Entry[Item]]:
    """In order, up to the first that always holds."""
    entries: list[_Entry[Item]] = []
    for entry in sorted((entry for one in lists for entry in one), key=lambda entry: entry.order):
        if entries and entries[-1].order == entry.order:
            continue
        entries.append(entry)
        if entry.check is None:
            break
    return entries


class RouteIndex(Generic[Item]):
    """Ordered (conditions, item) pairs; `first` finds the first whose conditions hold. Raises ConfigError."""

    __slots__ = ("_ancestors", "_exact", "_lists", "_prefixes", "_rest", "always")

    def __init__(self, pairs: Sequence[tuple[RouteMatch, Item]]) -> None:
        exact: dict[bytes, list[_Entry[Item]]] = {}
        starts: dict[bytes, list[_Entry[Item]]] = {}
        anywhere: list[_Entry[Item]] = []
        regexes = [match.path for match, _ in pairs if match.path is not None and match.path.kind == "regex"]
        paths = _Paths(regexes)
        position = 0
        for order, (match, item) in enumerate(pairs):
            keys = _keys(match.path)
            check: Check | None = None
            if match.path is not None and match.path.kind == "regex":
                check = paths.check(position)
                position += 1
            elif keys is None and match.path is not None and (match.path.value or match.path.kind != "prefix"):
                check = _on_path(compile_path(match.path))
            entry = _Entry(order, match, compile_conditions(match, check), item)
            if keys is None:
                anywhere.append(entry)
                continue
            for path in keys[0]:
                exact.setdefault(path, []).append(entry)
            for prefix in keys[1]:
                starts.setdefault(prefix, []).append(entry)
        # What every request gets, whatever it asks for; None: it depends.
        first = anywhere[0] if anywhere else None
        self.always: Item | None = first.item if first is not None and first.check is None and not first.order else None
        self._build(exact, starts, anywhere)

    def _build(
        self,
        exact: dict[bytes, list[_Entry[Item]]],
        starts: dict[bytes, list[_Entry[Item]]],
        anywhere: list[_Entry[Item]],
    ) -> None:
        self._prefixes = sorted(starts)
        self._ancestors: list[int] = []
        budget = MERGED_MAX

        def candidates(lists: tuple[list[_Entry[Item]], ...]) -> _Found[Item]:
            nonlocal budget
            budget -= sum(map(len, lists))
            return _narrowed(_merged(*lists)) if budget >= 0 else _Unmerged(lists)

        chains: list[tuple[list[_Entry[Item]], ...]] = []
        for position, prefix in enumerate(self._prefixes):
            ancestor = position - 1
            while ancestor >= 0 and not prefix.startswith(self._prefixes[ancestor]):
                ancestor = self._ancestors[ancestor]
            self._ancestors.append(ancestor)
            chains.append((starts[prefix], *(chains[ancestor] if ancestor >= 0 else (anywhere,))))
        self._rest = candidates((anywhere,))
        self._lists = list(map(candidates, chains))
        self._exact: dict[bytes, _Found[Item]] = {}
        for path in sorted(exact):
            longest = self._longest(path)
            self._exact[path] = candidates((exact[path], *(chains[longest] if longest >= 0 else (anywhere,))))

    def _longest(self, path: bytes) -> int:
        """The position of the longest prefix that the path begins with, or -1."""
        prefixes = self._prefixes
        position = bisect_right(prefixes, path) - 1
        while position >= 0 and not path.startswith(prefixes[position]):
            position = self._ancestors[position]
        return position

    def first(self, head: RequestHead, source: str) -> Item | None:
        """The first item whose conditions hold of this request, or None."""
        path = head.path
        found = self._exact.get(path)
        if found is None:
            found = self._rest
            if self._prefixes:
                position = self._longest(path)
                if position >= 0:
                    found = self._lists[position]
        while not isinstance(found, tuple):
            found = found.narrow(head, source)
        for check, item in found:
            if check is None or check(head, source):
                return item
        return None


def _on_path(check: Callable[[bytes], bool]) -> Check:
    return lambda head, _: check(head.path)
