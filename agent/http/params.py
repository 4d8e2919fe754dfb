"""The query string: read once, in the spellings that Consul's clients use."""

from collections.abc import Mapping
from urllib.parse import parse_qsl

from agent.strict_json import MalformedJson, parse_duration_ns
from mesh.errors import InvalidRequest
from mesh.model.query import Consistency, ReadOptions

WAIT_S_DEFAULT = 300.0  # default_query_time
WAIT_S_MAX = 600.0  # max_query_time
PARAMS_MAX = 256  # repeated node-meta and tag included

_INDEX_MAX = 2**64 - 1
_TRUE = frozenset(("1", "t", "T", "TRUE", "true", "True"))
_FALSE = frozenset(("0", "f", "F", "FALSE", "false", "False"))


def _duration_s(text: str, invalid: str) -> float:
    """Seconds, not negative. Raises InvalidRequest(invalid)."""
    try:
        duration_ns = parse_duration_ns(text)
    except MalformedJson as error:
        raise InvalidRequest(invalid) from error
    if duration_ns < 0:
        raise InvalidRequest(invalid)
    return duration_ns / 1e9


class Params:
    """The parameters of one request, percent-decoded. As in Go, the first of several equal names counts."""

    def __init__(
        self, query: str = "", *, wait_s_default: float = WAIT_S_DEFAULT, wait_s_max: float = WAIT_S_MAX
    ) -> None:
        """Raises InvalidRequest for a query that is not UTF-8 or has more than PARAMS_MAX parameters."""
        self._wait_s_default = wait_s_default
        self._wait_s_max = wait_s_max
        self._values: dict[str, list[str]] = {}
        if not query:
            return
        try:
            pairs = _pairs(query)
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
        values = self._values.get(name)
        return default if values is None else values[0]

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

    def refuse_enterprise(self, headers: Mapping[str, str]) -> None:
        """Raises InvalidRequest for namespaces and admin partitions, which this edition of the API does not have.

        `headers`: the request's, where a client may name them too.
        """
        for name, header, noun in (
            ("ns", "X-Consul-Namespace", "Namespaces"),
            ("partition", "X-Consul-Partition", "Partitions"),
        ):
            if self.get(name):
                raise InvalidRequest(f'Invalid query parameter: "{name}" - {noun} are a Consul Enterprise feature')
            if headers.get(header.lower()):
                raise InvalidRequest(f'Invalid header: "{header}" - {noun} are a Consul Enterprise feature')

    def wait_s(self) -> float:
        """How long a blocking read may wait: `wait`, by default 300 s, at most 600 s. Raises InvalidRequest."""
        text = self.get("wait")
        wait_s = _duration_s(text, "Invalid wait time") if text else 0.0
        return min(wait_s, self._wait_s_max) if wait_s > 0 else self._wait_s_default

    def duration_s(self, name: str, otherwise: float) -> float:
        """A duration such as `15m`, in seconds; `otherwise` when absent or empty. Raises InvalidRequest."""
        text = self.get(name)
        return _duration_s(text, f"Invalid value for ?{name}") if text else otherwise

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
        if not self._values:
            return ReadOptions(wait_s=self._wait_s_default)
        consistency = self.consistency()
        max_stale_s: float | None = None
        if self.get("max_stale"):
            max_stale_s = _duration_s(self.get("max_stale"), "Invalid max_stale value")
            # A bound on staleness is a wish for a stale read, unless the leader's own answer was asked for.
            if consistency == "default" and not self.has("leader"):
                consistency = "stale"
        return ReadOptions(
            min_index=self.index(), wait_s=self.wait_s(), consistency=consistency, max_stale_s=max_stale_s
        )


def _pairs(query: str) -> list[tuple[str, str]]:
    """Names and values. Raises ValueError when there are too many, UnicodeDecodeError when they are not UTF-8."""
    if "%" not in query and "+" not in query and query.count("&") < PARAMS_MAX:
        # Nothing to decode, as in most: what is below takes ten times as long for `stale`.
        split = [part.partition("=") for part in query.split("&") if part]
        return [(name, value) for name, _, value in split]
    return parse_qsl(query, keep_blank_values=True, errors="strict", max_num_fields=PARAMS_MAX)


def _unsigned(text: str) -> int | None:
    if not (text.isascii() and text.isdigit() and len(text) <= 20):
        return None
    value = int(text)
    return value if value <= _INDEX_MAX else None


def _split_pair(text: str) -> tuple[str, str]:
    key, _, value = text.partition(":")
    return key, value
