"""Reading config entries' bodies: JSON in Consul's CamelCase, checked for what is needed here. Raises ConfigError."""

from collections.abc import Mapping
from typing import TypeVar

from mesh.errors import ConfigError
from mesh.model.duration import parse_duration_ns

ValueT = TypeVar("ValueT")


class Table:
    """One JSON object, and where it is, for messages. What is absent or null reads as empty."""

    __slots__ = ("_values", "where")

    def __init__(self, values: object, where: str) -> None:
        if values is None:
            values = {}
        if not isinstance(values, Mapping):
            raise ConfigError(f"{where} is not an object")
        self._values: Mapping[str, object] = values
        self.where = where

    def __contains__(self, name: str) -> bool:
        return self._values.get(name) is not None

    def table(self, name: str) -> "Table":
        """A nested object."""
        return Table(self._values.get(name), f"{self.where}.{name}")

    def tables(self, name: str) -> tuple["Table", ...]:
        """A list of objects."""
        return tuple(
            Table(item, f"{self.where}.{name}[{position}]") for position, item in enumerate(self._list(name, object))
        )

    def named_tables(self, name: str) -> dict[str, "Table"]:
        """An object whose members are objects under names of the user's."""
        values = self._values.get(name) or {}
        if not isinstance(values, Mapping):
            raise ConfigError(f"{self.where}.{name} is not an object")
        return {key: Table(value, f"{self.where}.{name}[{key}]") for key, value in values.items()}

    def text(self, name: str) -> str:
        """A text."""
        value = self._values.get(name)
        if not isinstance(value, str | None):
            raise ConfigError(f"{self.where}.{name} is not a text")
        return value or ""

    def flag(self, name: str) -> bool:
        """A truth value."""
        value = self._values.get(name)
        if not isinstance(value, bool | None):
            raise ConfigError(f"{self.where}.{name} is not true or false")
        return value is True

    def integer(self, name: str, *, least: int = 0, most: int = 2**31 - 1) -> int:
        """A whole number within bounds, 0 when absent."""
        value = self.number(name)
        if name not in self:
            return 0
        if value != int(value) or not least <= value <= most:
            raise ConfigError(f"{self.where}.{name} is {value:g}, which is not a whole number from {least} to {most}")
        return int(value)

    def number(self, name: str) -> float:
        """A number."""
        value = self._values.get(name)
        if value is None:
            return 0.0
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise ConfigError(f"{self.where}.{name} is not a number")
        return float(value)

    def duration_s(self, name: str) -> float:
        """Seconds of a duration: a text such as "10s", or nanoseconds."""
        value = self._values.get(name)
        if isinstance(value, str):
            try:
                return parse_duration_ns(value) / 1e9 if value else 0.0
            except ValueError as error:
                raise ConfigError(f"{self.where}.{name}: {error}") from None
        return self.number(name) / 1e9

    def texts(self, name: str) -> tuple[str, ...]:
        """A list of texts."""
        return tuple(self._list(name, str))

    def integers(self, name: str) -> tuple[int, ...]:
        """A list of whole numbers."""
        return tuple(self._list(name, int))

    def text_map(self, name: str) -> tuple[tuple[str, str], ...]:
        """An object of texts, as pairs in its order."""
        values = self._values.get(name) or {}
        if not isinstance(values, Mapping) or not all(isinstance(value, str) for value in values.values()):
            raise ConfigError(f"{self.where}.{name} is not an object of texts")
        return tuple((key, str(value)) for key, value in values.items())

    def _list(self, name: str, kind: type[ValueT]) -> list[ValueT]:
        value = self._values.get(name)
        if value is None:
            return []
        if not isinstance(value, list | tuple) or not all(isinstance(item, kind) for item in value):
            raise ConfigError(f"{self.where}.{name} is not a list of the right kind")
        return list(value)
