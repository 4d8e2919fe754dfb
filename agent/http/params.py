"""The query string: read once, in the spellings that Consul's clients use."""

import re
from urllib.parse import parse_qsl

from mesh.errors import InvalidRequest
from mesh.model.query import Consistency, ReadOptions

WAIT_S_DEFAULT = 300.0  # default_query_time
WAIT_S_MAX = 600.0  # max_query_time
PARAMS_MAX = 256  # repeated node-meta and tag included

_INDEX_MAX = 2**64 - 1
_DURATION = re.compile(r"([+-]?)((?:(?:\d+(?:\.\d*)?|\.\d+)(?:ns|us|µs|μs|ms|s|m|h))+)", re.ASCII)
_DURATION_TERM = re.compile(r"(\d+(?:\.\d*)?|\.\d+)(ns|us|µs|μs|ms|s|m|h)", re.ASCII)
_UNIT_S = {"ns": 1e-9, "us": 1e-6, "µs": 1e-6, "μs": 1e-6, "ms": 1e-3, "s": 1.0, "m": 60.0, "h": 3600.0}
_DURATION_CHARACTERS_MAX = 64
_TRUE = frozenset(("1", "t", "T", "TRUE", "true", "True"))
_FALSE = frozenset(("0", "f", "F", "FALSE", "false", "False"))


def parse_duration_s(text: str) -> float:
    """Seconds in a Go duration such as `1h30m`, `9.978s` or `-2ms`. Raises ValueError for anything else."""
    if text in ("0", "+0", "-0"):
        return 0.0
    match = _DURATION.fullmatch(text) if len(text) <= _DURATION_CHARACTERS_MAX else None
    if match is None:
        raise ValueError(f"{text[:_DURATION_CHARACTERS_MAX]!r} is no duration such as 10s, 1m30s or 250ms")
    total = sum(float(number) * _UNIT_S[unit] for number, unit in _DURATION_TERM.findall(match[2]))
    return -total if match[1] == "-" else total


def format_duration(duration_s: float) -> str:
    """The shortest common Go spelling of a duration: `10s`, `1m30s`, `250ms`, `0s`."""
    nanoseconds = round(duration_s * 1e9)
    sign = "-" if nanoseconds < 0 else ""
    nanoseconds = abs(nanoseconds)
    if nanoseconds == 0:
        return "0s"
    if nanoseconds < 1_000_000_000:
        for unit, size in (("ms", 1_000_000), ("µs", 1_000), ("ns", 1)):
            if nanoseconds >= size:
                return f"{sign}{_decimal(nanoseconds, size)}{unit}"
    minutes, rest = divmod(nanoseconds, 60_000_000_000)
    hours, minutes = divmod(minutes, 60)
    seconds = f"{_decimal(rest, 1_000_000_000)}s"
    if hours:
        return f"{sign}{hours}h{minutes}m{seconds}"
    return f"{sign}{minutes}m{seconds}" if minutes else f"{sign}{seconds}"


def _decimal(amount: int, unit: int) -> str:
    whole, rest = divmod(amount, unit)
    digits = str(rest).rjust(len(str(unit)) - 1, "0").rstrip("0") if rest else ""
    return f"{whole}.{digits}" if digits else str(whole)


class Params:
    """The parameters of one request, percent-decoded. As in Go, the first of several equal names counts."""

    def __init__(self, query: str = "") -> None:
        """Raises InvalidRequest for a query that is not UTF-8 or has more than PARAMS_MAX parameters."""
        self._values: dict[str, list[str]] = {}
        try:
            pairs = parse_qsl(query, keep_blank_values=True, errors="strict", max_num_fields=PARAMS_MAX)
        except UnicodeDecodeError as error:
            raise InvalidRequest("The query string is not UTF-8") from error
        except ValueError as error:
            raise InvalidRequest(f"The query string has more than {PARAMS_MAX} parameters") from error
        for name, value in pairs:
            self._values.setdefault(name, []).append(value)

    def has(self, name: str) -> bool:
        """Whether the parameter is there: `?stale`, `?stale=` and `?stale=1` all are."""
        return name in self._values

    def get(self, name: str, default: str = "") -> str:
        """Its first value, else the default."""
        return self._values.get(name, (default,))[0]

    def all(self, name: str) -> tuple[str, ...]:
        """Every value, in order."""
        return tuple(self._values.get(name, ()))

    def flag(self, name: str) -> bool:
        """A boolean: absent is False, present and empty is True. Raises InvalidRequest for what Go would not parse."""
        if name not in self._values:
            return False
        value = self.get(name)
        if value == "" or value in _TRUE:
            return True
        if value in _FALSE:
            return False
        raise InvalidRequest(f"Invalid value for ?{name}: {value!r} is not a boolean")

    def unsigned(self, name: str) -> int | None:
        """An unsigned 64-bit number, None when absent or empty. Raises InvalidRequest."""
        text = self.get(name)
        if text == "":
            return None
        value = _unsigned(text)
        if value is None:
            raise InvalidRequest(f"Invalid value for ?{name}: {text[:32]!r} is not an unsigned 64-bit number")
        return value

    def node_meta(self) -> dict[str, str]:
        """Every `node-meta=key:value`, all of which a node must have."""
        return dict(_split_pair(text) for text in self.all("node-meta"))

    def datacenter(self) -> str:
        """The datacenter asked for (`datacenter` wins over `dc`), empty for the agent's own."""
        return self.get("datacenter") or self.get("dc")

    def wait_s(self) -> float:
        """How long a blocking read may wait: `wait`, default 300 s, at most 600 s. Raises InvalidRequest."""
        text = self.get("wait")
        if text == "":
            return WAIT_S_DEFAULT
        try:
            wait_s = parse_duration_s(text)
        except ValueError as error:
            raise InvalidRequest("Invalid wait time") from error
        if wait_s < 0:
            raise InvalidRequest("Invalid wait time")
        return min(wait_s, WAIT_S_MAX) if wait_s > 0 else WAIT_S_DEFAULT

    def index(self) -> int:
        """The index to block on, 0 for none. Raises InvalidRequest."""
        text = self.get("index")
        index = 0 if text == "" else _unsigned(text)
        if index is None:
            raise InvalidRequest("Invalid index")
        return index

    def consistency(self) -> Consistency:
        """How fresh the answer must be. Raises InvalidRequest for a contradiction."""
        stale, consistent = self.has("stale"), self.has("consistent")
        if stale and consistent:
            raise InvalidRequest("Cannot specify ?stale with ?consistent, conflicting semantics.")
        if self.has("cached") and consistent:
            raise InvalidRequest("Cannot specify ?cached with ?consistent, conflicting semantics.")
        if stale:
            return "stale"
        return "consistent" if consistent else "default"

    def read_options(self) -> ReadOptions:
        """Everything above that says how to read. Raises InvalidRequest."""
        consistency = self.consistency()
        max_stale_s: float | None = None
        if self.get("max_stale"):
            try:
                max_stale_s = parse_duration_s(self.get("max_stale"))
            except ValueError as error:
                raise InvalidRequest("Invalid max_stale value") from error
            if max_stale_s < 0:
                raise InvalidRequest("Invalid max_stale value")
            # A bound on staleness is a wish for a stale read, unless the leader's own answer was asked for.
            if consistency == "default" and not self.has("leader"):
                consistency = "stale"
        return ReadOptions(
            min_index=self.index(), wait_s=self.wait_s(), consistency=consistency, max_stale_s=max_stale_s
        )


def _unsigned(text: str) -> int | None:
    if not (text.isascii() and text.isdigit() and len(text) <= 20):
        return None
    value = int(text)
    return value if value <= _INDEX_MAX else None


def _split_pair(text: str) -> tuple[str, str]:
    key, _, value = text.partition(":")
    return key, value
