"""The one way in and out for JSON: strict where the standard library is lenient, Go-like where clients need it.

Strict: UTF-8 without BOM, no NaN or overflowing number, no duplicate key, no lone surrogate, nesting up to 64.
Go-like: a Struct's field names match in any case and with or without underscores, `null` means absent, and a field
that the Struct does not have is refused.
"""

import json
import math
import re
from collections.abc import Mapping
from functools import lru_cache
from typing import NoReturn, TypeVar

import msgspec

from mesh.errors import InvalidRequest
from mesh.model.catalog import JsonValue

T = TypeVar("T")

JSON_DEPTH_MAX = 64  # Consul's deepest body (a proxy's opaque config inside a sidecar) stays under 20
_INTEGER_DIGITS_MAX = 20  # 2**64 has 20: no field takes more, and long ones cost quadratic time to read

# An unterminated string matches to the end, so the scan is linear for any input.
_STRING_OR_BRACKET = re.compile(rb'"(?:[^"\\]|\\.)*+"?|[\[\]{}]', re.DOTALL)
_SURROGATE_ESCAPE = re.compile(rb"\\u[dD][89a-fA-F]")
_FAILED = "Request decode failed: "


def parse_json(body: bytes) -> JsonValue:
    """The value in a request body. Raises InvalidRequest, with Consul's 400 text, unless it is strict JSON."""
    _check_depth(body)
    try:
        text = body.decode("utf-8")
        value: JsonValue = json.loads(
            text,
            object_pairs_hook=_unique_object,
            parse_constant=_refuse_constant,
            parse_float=_finite_float,
            parse_int=_bounded_int,
        )
    except UnicodeDecodeError as error:
        raise InvalidRequest(f"{_FAILED}the body is not UTF-8 (byte {error.start})") from error
    except ValueError as error:
        raise InvalidRequest(f"{_FAILED}{error}") from error
    if _SURROGATE_ESCAPE.search(body) is not None:
        _check_strings(value)
    return value


def decode_json(body: bytes, shape: type[T]) -> T:
    """The body as a value of `shape`, a msgspec type. Raises InvalidRequest with Consul's 400 text.

    An empty body reads as `{}`, so that a Struct whose every field has a default accepts it.
    """
    return convert_json(parse_json(body) if body.strip() else {}, shape)


def convert_json(value: JsonValue, shape: type[T]) -> T:
    """As `decode_json`, for a value that is already parsed."""
    canonical = _canonical(value, msgspec.inspect.type_info(shape))
    try:
        return msgspec.convert(canonical, shape)
    except msgspec.ValidationError as error:
        raise InvalidRequest(f"{_FAILED}{error}") from error


def encode_json(value: object) -> bytes:
    """The JSON of dicts, sequences, scalars and msgspec Structs; bytes become base64."""
    return msgspec.json.encode(value)


def fold_name(name: str) -> str:
    """What two spellings of one field name have in common: `ServiceID`, `serviceid` and `service_id` fold alike."""
    return name.replace("_", "").lower()


def sorted_map(mapping: Mapping[str, T]) -> dict[str, T]:
    """The same map in key order, as Consul writes its maps."""
    return dict(sorted(mapping.items()))


def _check_depth(body: bytes) -> None:
    depth = 0
    for match in _STRING_OR_BRACKET.finditer(body):
        token = match.group()
        if token in (b"[", b"{"):
            depth += 1
            if depth > JSON_DEPTH_MAX:
                raise InvalidRequest(f"{_FAILED}nested deeper than {JSON_DEPTH_MAX}")
        elif token in (b"]", b"}"):
            depth -= 1


def _unique_object(pairs: list[tuple[str, JsonValue]]) -> dict[str, JsonValue]:
    value = dict(pairs)
    if len(value) != len(pairs):
        seen: set[str] = set()
        for key, _ in pairs:
            if key in seen:
                raise ValueError(f"json: duplicate field {json.dumps(key)}")
            seen.add(key)
    return value


def _refuse_constant(text: str) -> NoReturn:
    raise ValueError(f"json: {text} is not a number that JSON has")


def _finite_float(text: str) -> float:
    value = float(text)
    if not math.isfinite(value):
        raise ValueError(f"json: number {text[:32]} is out of range")
    return value


def _bounded_int(text: str) -> int:
    if len(text.lstrip("-")) > _INTEGER_DIGITS_MAX:
        raise ValueError(f"json: number of {len(text)} digits is out of range")
    return int(text)


def _check_strings(value: JsonValue) -> None:
    if isinstance(value, str):
        if not value.isascii() and any("\ud800" <= character <= "\udfff" for character in value):
            raise InvalidRequest(f"{_FAILED}a string holds half of a surrogate pair")
    elif isinstance(value, list):
        for item in value:
            _check_strings(item)
    elif isinstance(value, dict):
        for key, item in value.items():
            _check_strings(key)
            _check_strings(item)


@lru_cache(maxsize=256)  # more than there are shapes in the code
def _fields_by_folded_name(shape: type[msgspec.Struct]) -> dict[str, tuple[str, msgspec.inspect.Type]]:
    info = msgspec.inspect.type_info(shape)
    assert isinstance(info, msgspec.inspect.StructType)
    return {fold_name(field.encode_name): (field.encode_name, field.type) for field in info.fields}


def _canonical(value: JsonValue, info: msgspec.inspect.Type) -> JsonValue:
    """The value with every Struct's keys spelled as the Struct spells them, unknown ones refused, nulls left out."""
    if isinstance(info, msgspec.inspect.UnionType):
        info = _option_for(value, info)
    if isinstance(value, dict) and isinstance(info, msgspec.inspect.StructType):
        return _canonical_struct(value, _fields_by_folded_name(info.cls))
    if isinstance(value, dict) and isinstance(info, msgspec.inspect.DictType):
        return {key: _canonical(item, info.value_type) for key, item in value.items() if item is not None}
    if isinstance(value, list) and isinstance(info, msgspec.inspect.CollectionType):
        return [_canonical(item, info.item_type) for item in value]
    return value


def _option_for(value: JsonValue, union: msgspec.inspect.UnionType) -> msgspec.inspect.Type:
    """The member of the union that can hold the value's kind of JSON; the union itself for scalars."""
    for option in union.types:
        if isinstance(value, dict) and isinstance(option, msgspec.inspect.StructType | msgspec.inspect.DictType):
            return option
        if isinstance(value, list) and isinstance(option, msgspec.inspect.CollectionType):
            return option
    return union


def _canonical_struct(
    value: dict[str, JsonValue], fields: dict[str, tuple[str, msgspec.inspect.Type]]
) -> dict[str, JsonValue]:
    result: dict[str, JsonValue] = {}
    seen: set[str] = set()
    for key, item in value.items():
        field = fields.get(fold_name(key))
        if field is None:
            raise InvalidRequest(f"{_FAILED}json: unknown field {json.dumps(key)}")
        name, info = field
        if name in seen:
            raise InvalidRequest(f"{_FAILED}json: duplicate field {json.dumps(key)}")
        seen.add(name)
        if item is not None:
            result[name] = _canonical(item, info)
    return result
