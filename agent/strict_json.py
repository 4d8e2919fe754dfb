"""JSON from outside, as strictly as a security boundary needs and as leniently as Go's decoder is with names.

`decode` turns bytes into plain values; `Fields` reads one object of known fields out of them, matching names as Go does
(any case) and, where asked, their snake_case spelling. Durations are Go's: "1m30s", or integer nanoseconds.
"""

import json
import math
import re
from collections.abc import Collection, Iterator, Mapping
from functools import lru_cache
from typing import TypeGuard

from mesh.model import duration

JSON_DEPTH_MAX = 64  # deeper input is an attack on the parser, not a configuration
_INT64_MIN, _UINT64_MAX = -(2**63), 2**64 - 1

_WORD_START = re.compile(r"(?<=[a-z0-9])(?=[A-Z])|(?<=[A-Z])(?=[A-Z][a-z])")


class MalformedJson(ValueError):
    """The bytes are not JSON we accept, or not of the shape expected; the text is fit for an API caller."""


def _refuse_constant(text: str) -> float:
    raise MalformedJson(f"invalid number {text}")


def _integer(text: str) -> int:
    if len(text) > 20 or not _INT64_MIN <= int(text) <= _UINT64_MAX:
        raise MalformedJson(f"number {text[:24]} is outside the range of 64 bits")
    return int(text)


def _float(text: str) -> float:
    value = float(text)
    if math.isinf(value):
        raise MalformedJson(f"number {text[:24]} is out of range")
    return value


def _object(pairs: list[tuple[str, object]]) -> dict[str, object]:
    members = dict(pairs)
    if len(members) != len(pairs):
        seen: set[str] = set()
        for name, _ in pairs:
            if name in seen:
                raise MalformedJson(f"duplicate key {json.dumps(name)}")
            seen.add(name)
    return members


_DECODER = json.JSONDecoder(
    parse_constant=_refuse_constant, parse_int=_integer, parse_float=_float, object_pairs_hook=_object
)


def _check(value: object, *, surrogates: bool) -> None:
    """Raises MalformedJson for nesting beyond JSON_DEPTH_MAX and, when asked, for lone surrogates."""
    level: list[object] = [value]
    depth = 0
    while level:
        containers = [item for item in level if isinstance(item, dict | list)]
        if containers and depth == JSON_DEPTH_MAX:
            raise MalformedJson(f"nested deeper than {JSON_DEPTH_MAX} levels")
        if surrogates:
            texts = [item for item in level if isinstance(item, str)]
            texts.extend(name for item in containers if isinstance(item, dict) for name in item)
            if any("\ud800" <= character <= "\udfff" for text in texts for character in text):
                raise MalformedJson("a string holds half of a surrogate pair")
        level = []
        for item in containers:
            level.extend(item.values() if isinstance(item, dict) else item)
        depth += 1


def decode(data: bytes) -> object:
    """The one JSON value in the bytes: None, bool, int (64 bits), float (finite), str, list or dict.

    Raises MalformedJson for anything that is not UTF-8 (no byte-order mark), for NaN and infinities, numbers out of
    range, duplicate keys, lone surrogates, nesting deeper than JSON_DEPTH_MAX, and trailing bytes. The caller bounds
    the size.
    """
    if not data.strip(b" \t\r\n"):
        raise MalformedJson("EOF")
    try:
        text = data.decode("utf-8")
        value = _DECODER.decode(text)
    except UnicodeDecodeError as error:
        raise MalformedJson(f"invalid UTF-8 at byte {error.start}") from None
    except json.JSONDecodeError as error:
        raise MalformedJson(f"{error.msg} at line {error.lineno} column {error.colno}") from None
    except RecursionError:
        raise MalformedJson(f"nested deeper than {JSON_DEPTH_MAX} levels") from None
    _check(value, surrogates="\\ud" in text or "\\uD" in text)
    return value


def parse_duration_ns(text: str) -> int:
    """Nanoseconds of a Go duration such as "300ms", "-1.5h" or "2h45m". Raises MalformedJson, in Go's words."""
    try:
        return duration.parse_duration_ns(text)
    except ValueError as error:
        raise MalformedJson(str(error)) from None


def parse_duration_s(value: object) -> float:
    """Seconds of a duration as JSON carries it: a Go duration text, or integer nanoseconds. Raises MalformedJson."""
    if isinstance(value, str):
        return parse_duration_ns(value) / 1e9 if value else 0.0
    if not _is_whole(value):
        raise MalformedJson(f'a duration is a text such as "10s" or integer nanoseconds, not {_kind(value)}')
    if abs(value) > duration.DURATION_NS_MAX:
        raise MalformedJson(f"time: invalid duration {value}")
    return value / 1e9


def _is_whole(value: object) -> TypeGuard[int | float]:
    """Whether a JSON value is a number without a fraction (1e3 counts, as in Go)."""
    if isinstance(value, float):
        return value.is_integer()
    return isinstance(value, int) and not isinstance(value, bool)


def _kind(value: object) -> str:
    """Go's word for a JSON value's type, for messages."""
    match value:
        case None:
            return "null"
        case bool():
            return "bool"
        case int() | float():
            return "number"
        case str():
            return "string"
        case list():
            return "array"
    return "object"


def snake_case(name: str) -> str:
    """`DeregisterCriticalServiceAfter` -> `deregister_critical_service_after`, `ServiceID` -> `service_id`."""
    return _WORD_START.sub("_", name).lower()


@lru_cache(maxsize=256)
def _spellings(names: tuple[str, ...], *, snake: bool) -> dict[str, str]:
    table = {name.lower(): name for name in names}
    if snake:
        table.update({snake_case(name): name for name in names})
    return table


class Fields:
    """The members of one JSON object whose fields are all known, under their canonical names.

    Every reader returns the type's zero value for an absent or null member, as Go does, and raises MalformedJson for
    one of another type.
    """

    def __init__(
        self,
        value: object,
        names: tuple[str, ...],
        *,
        where: str = "",
        snake: bool = True,
        aliases: Mapping[str, str] | None = None,
    ) -> None:
        """Takes `value` apart. `names`: the canonical field names. `aliases`: further lower-case spellings -> canonical
        name. `where`: what precedes a field's name in messages. Raises MalformedJson for a non-object, an unknown field
        and for two spellings of one field.
        """
        self._where = f"{where}." if where else ""
        if value is None:
            value = {}
        if not isinstance(value, dict):
            raise MalformedJson(f"json: cannot unmarshal {_kind(value)} into {where or 'value'} of type object")
        spellings = _spellings(names, snake=snake)
        self._values: dict[str, object] = {}
        for given, member in value.items():
            lowered = given.lower()
            name = spellings.get(lowered) or (aliases or {}).get(lowered)
            if name is None:
                raise MalformedJson(f"json: unknown field {json.dumps(given, ensure_ascii=False)}")
            if name in self._values:
                raise MalformedJson(f"json: field {self._where}{name} is given twice")
            self._values[name] = member

    def __contains__(self, name: str) -> bool:
        """Whether the field is given and not null."""
        return self._values.get(name) is not None

    def __iter__(self) -> Iterator[str]:
        """The canonical names of the given fields, null ones too."""
        return iter(self._values)

    def _mismatch(self, name: str, value: object, wanted: str) -> MalformedJson:
        return MalformedJson(f"json: cannot unmarshal {_kind(value)} into field {self._where}{name} of type {wanted}")

    def raw(self, name: str) -> object:
        """The member as decoded, None when absent."""
        return self._values.get(name)

    def text(self, name: str, default: str = "") -> str:
        value = self._values.get(name)
        if value is None:
            return default
        if not isinstance(value, str):
            raise self._mismatch(name, value, "string")
        return value

    def boolean(self, name: str, *, default: bool = False) -> bool:
        value = self._values.get(name)
        if value is None:
            return default
        if not isinstance(value, bool):
            raise self._mismatch(name, value, "bool")
        return value

    def integer(self, name: str, default: int = 0, *, low: int = -(2**63), high: int = 2**63 - 1) -> int:
        """An integer within [low, high]; a float without a fraction counts, as 1e3 does in Go."""
        value = self._values.get(name)
        if value is None:
            return default
        if not _is_whole(value):
            raise self._mismatch(name, value, "int")
        if not low <= value <= high:
            raise MalformedJson(f"json: number {value} in field {self._where}{name} is outside {low} to {high}")
        return int(value)

    def duration_s(self, name: str) -> float:
        """Seconds; given as a Go duration text or integer nanoseconds."""
        value = self._values.get(name)
        if value is None:
            return 0.0
        try:
            return parse_duration_s(value)
        except MalformedJson as error:
            raise MalformedJson(f"{self._where}{name}: {error}") from None

    def items(self, name: str) -> list[object]:
        value = self._values.get(name)
        if value is None:
            return []
        if not isinstance(value, list):
            raise self._mismatch(name, value, "array")
        return value

    def texts(self, name: str) -> tuple[str, ...]:
        values = self.items(name)
        texts = tuple(value for value in values if isinstance(value, str))
        if len(texts) != len(values):
            raise self._mismatch(name, next(value for value in values if not isinstance(value, str)), "[]string")
        return texts

    def mapping(self, name: str) -> dict[str, object]:
        """An object with free keys, as decoded."""
        value = self._values.get(name)
        if value is None:
            return {}
        if not isinstance(value, dict):
            raise self._mismatch(name, value, "map")
        return value

    def text_map(self, name: str) -> dict[str, str]:
        texts: dict[str, str] = {}
        for key, value in self.mapping(name).items():
            if not isinstance(value, str):
                raise self._mismatch(f"{name}[{key}]", value, "string")
            texts[key] = value
        return texts

    def choice(self, name: str, allowed: Collection[str]) -> str:
        """A text that is one of `allowed`, or empty."""
        value = self.text(name)
        if value and value not in allowed:
            raise MalformedJson(f"{self._where}{name}: {json.dumps(value)} is not one of {', '.join(sorted(allowed))}")
        return value
