"""Opaque configuration of proxies and config entries: JSON whose shape is not trusted. What is wrong is absent."""

from collections.abc import Mapping


def table(values: Mapping[str, object], key: str) -> Mapping[str, object]:
    """The object under a key, else an empty one."""
    value = values.get(key)
    return value if isinstance(value, dict) else {}


def text(values: Mapping[str, object], key: str) -> str:
    """The text under a key, else an empty one."""
    value = values.get(key)
    return value if isinstance(value, str) else ""


def integer(values: Mapping[str, object], key: str) -> int:
    """The value if it is a positive whole number, else 0."""
    value = values.get(key)
    if isinstance(value, bool) or not isinstance(value, int | float) or not 1 <= value < 2**31:
        return 0
    return int(value)


def milliseconds(values: Mapping[str, object], key: str) -> float:
    """Seconds of a positive number of milliseconds, else 0."""
    return integer(values, key) / 1000.0
