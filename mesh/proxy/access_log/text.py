"""Values as text that stays on its line and in its quotes, whatever a request put into it."""

import re
from json.encoder import encode_basestring_ascii

from mesh.proxy.access_log.record import Value

# Controls, quotes, backslashes and everything outside ASCII: in a text line these are escaped.
_UNSAFE = re.compile(rb'[\x00-\x1f"\\\x7f-\xff]')


def escaped(value: bytes) -> bytes:
    """`value` with Python's escapes (`\\n`, `\\xe9`), and quotes as `\\"`."""
    if _UNSAFE.search(value) is None:
        return value
    return value.decode("latin-1").encode("unicode_escape").replace(b'"', b'\\"')


def shown(value: Value) -> bytes:
    """A value in a text line; `-` when there is none."""
    if type(value) is bytes:
        return escaped(value) if value else b"-"
    if type(value) is int:
        return b"%d" % value
    if value is None:
        return b"-"
    return escaped(str(value).encode("utf-8", "backslashreplace")) if value else b"-"


def json_value(value: Value) -> str:
    """A value as JSON: a number, a string, or null when there is none."""
    if type(value) is int:
        return str(value)
    if not value:
        return "null"
    return json_text(as_text(value))


def as_text(value: Value) -> str:
    """A value inside a larger JSON string, not yet encoded; `-` when there is none."""
    if type(value) is bytes:
        return value.decode("utf-8", "backslashreplace") if value else "-"
    return "-" if value is None or value == "" else str(value)


def json_text(text: str) -> str:
    """A JSON string of ASCII only: readers disagree about which characters beyond it end a line."""
    return encode_basestring_ascii(text.encode("utf-8", "backslashreplace").decode())
