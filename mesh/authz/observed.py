"""Who called what lately, per listener: what a proposed set of rules is tried against before it is enforced.

A cell is one caller, method and path template (identifiers in a path become `*`); it counts what was let in and what
was refused, per minute for the last hour. Everything is bounded: what finds no room counts as its caller's overflow.
"""

import re
from array import array
from collections.abc import Iterable, Sequence

import msgspec

MINUTES = 60  # of history
CELLS_MAX = 1000  # per listener
OVERFLOW_CELLS_MAX = 100  # callers that get an overflow cell of their own
SPELLINGS_MAX = 2048  # (caller, method, path) that are known to belong to a cell
SAMPLES_MAX = 4  # whole paths kept per cell: rules are tried against them, not against the template
SAMPLE_BYTES_MAX = 200
SEGMENTS_MAX = 5  # of a template
REPORT_EDGES_MAX = 4000  # in one report, the busiest first

OVERFLOW_PATH = "/**"
_WINDOW_MINUTE_S = 60.0

# A number, something long in hexadecimal (a hash, a UUID), or something very long is an identifier, not a name.
_IDENTIFIER = re.compile(rb"\d+|[0-9A-Fa-f]{8,}|[0-9A-Fa-f]{4,}(?:-[0-9A-Fa-f]{2,})+|(?=.*\d)[^/]{16,}|[^/]{33,}")


class Edge(msgspec.Struct, frozen=True):
    """One caller's use of one template over a window. A TCP service has neither method nor path.

    `source` empty: callers without an identity.
    """

    source: str
    method: str
    path: str
    allowed: int
    denied: int
    samples: tuple[str, ...] = ()


class ObservedListener(msgspec.Struct, frozen=True):
    """What one inbound listener saw. `observed_s`: how much of the window it has been watching for."""

    service: str
    http: bool
    observed_s: float
    edges: tuple[Edge, ...]
    left_out: int = 0  # requests of edges that found no room in the report


def path_template(path: bytes) -> str:
    """The path with its identifiers replaced: `/orders/1234/items` gives `/orders/*/items`."""
    segments = path.split(b"/")[1:]
    named = [b"*" if _IDENTIFIER.fullmatch(segment) else segment[:SAMPLE_BYTES_MAX] for segment in segments]
    if len(named) > SEGMENTS_MAX:
        named = [*named[:SEGMENTS_MAX], b"**"]
    return (b"/" + b"/".join(named)).decode("latin-1")[:SAMPLE_BYTES_MAX]


class _Cell:
    __slots__ = ("allowed", "denied", "history", "method", "path", "samples", "source")

    def __init__(self, source: str, method: str, path: str) -> None:
        self.source = source
        self.method = method
        self.path = path
        self.samples: list[bytes] = []
        self.allowed = 0  # in the current minute
        self.denied = 0
        self.history: array[int] | None = None  # allowed and denied of each past minute, made when there is one

    def total(self, slots: Iterable[int]) -> tuple[int, int]:
        """What was let in and refused: now, and in those minutes."""
        allowed, denied, history = self.allowed, self.denied, self.history
        if history is not None:
            for slot in slots:
                allowed += history[2 * slot]
                denied += history[2 * slot + 1]
        return allowed, denied


class EdgeTable:
    """Counts requests. `count` costs a dict lookup for a spelling that is known."""

    def __init__(self, now: float) -> None:
        self._started_at = now
        self._minute = int(now // _WINDOW_MINUTE_S)
        self._rolls_at = (self._minute + 1) * _WINDOW_MINUTE_S
        self._spellings: dict[tuple[str, bytes, bytes], _Cell] = {}
        self._cells: dict[tuple[str, str, str], _Cell] = {}

    def __len__(self) -> int:
        return len(self._cells)

    def count(self, source: str, method: bytes, path: bytes, now: float, *, allowed: bool) -> None:
        """One request, or a TCP connection (no method, no path)."""
        if now >= self._rolls_at:
            self._roll(now)
        cell = self._spellings.get((source, method, path))
        if cell is None:
            cell = self._find(source, method, path)
        if allowed:
            cell.allowed += 1
        else:
            cell.denied += 1

    def report(self, since_s: float, now: float) -> tuple[float, tuple[Edge, ...], int]:
        """For how long of the last `since_s` seconds this table has been counting, the edges seen in that time (the
        busiest first, at most REPORT_EDGES_MAX), and how many requests are of edges left out.
        """
        if now >= self._rolls_at:
            self._roll(now)
        past = min(MINUTES - 1, max(0, int(-(-since_s // _WINDOW_MINUTE_S))))
        slots = [(self._minute - ago) % MINUTES for ago in range(1, past + 1)]
        found: list[Edge] = []
        for cell in self._cells.values():
            allowed, denied = cell.total(slots)
            if allowed or denied:
                samples = tuple(sample.decode("latin-1") for sample in cell.samples)
                found.append(Edge(cell.source, cell.method, cell.path, allowed, denied, samples))
        found.sort(key=lambda edge: (-edge.allowed - edge.denied, edge.source, edge.method, edge.path))
        left_out = sum(edge.allowed + edge.denied for edge in found[REPORT_EDGES_MAX:])
        return min(since_s, now - self._started_at), tuple(found[:REPORT_EDGES_MAX]), left_out

    def _find(self, source: str, method: bytes, path: bytes) -> _Cell:
        key = (source, method[:16].decode("latin-1"), path_template(path) if path else "")
        cell = self._cells.get(key)
        if cell is None:
            cell = self._make(key)
        if len(path) <= SAMPLE_BYTES_MAX:
            if path and len(cell.samples) < SAMPLES_MAX and path not in cell.samples and cell.path != OVERFLOW_PATH:
                cell.samples.append(path)
            if len(self._spellings) >= SPELLINGS_MAX:
                self._spellings.clear()
            self._spellings[source, method, path] = cell
        return cell

    def _make(self, key: tuple[str, str, str]) -> _Cell:
        if len(self._cells) >= CELLS_MAX:
            source = key[0] if len(self._cells) < CELLS_MAX + OVERFLOW_CELLS_MAX else "*"
            key = (source, "*", OVERFLOW_PATH)
        cell = self._cells.get(key)
        if cell is None:
            cell = self._cells[key] = _Cell(*key)
        return cell

    def _roll(self, now: float) -> None:
        """Puts the minute that is over into the history, and forgets what has been idle for all of it."""
        minute = int(now // _WINDOW_MINUTE_S)
        over = [at % MINUTES for at in range(self._minute, min(minute, self._minute + MINUTES))]
        idle: list[tuple[str, str, str]] = []
        for key, cell in self._cells.items():
            history = cell.history
            if history is None:
                if not (cell.allowed or cell.denied):
                    idle.append(key)
                    continue
                history = cell.history = array("Q", bytes(16 * MINUTES))
            for slot in over:
                history[2 * slot] = history[2 * slot + 1] = 0
            slot = over[0]
            history[2 * slot], history[2 * slot + 1] = cell.allowed, cell.denied
            cell.allowed = cell.denied = 0
            if len(over) >= MINUTES or not any(history):
                idle.append(key)
        for key in idle:
            del self._cells[key]
        if idle:
            self._spellings.clear()
        self._minute = minute
        self._rolls_at = (minute + 1) * _WINDOW_MINUTE_S


def merged(listeners: Sequence[ObservedListener]) -> tuple[ObservedListener, ...]:
    """Listeners of one service and protocol as one; each is trusted for what it says itself."""
    services: dict[tuple[str, bool], list[ObservedListener]] = {}
    for listener in listeners:
        services.setdefault((listener.service, listener.http), []).append(listener)
    return tuple(_merge(group) for _, group in sorted(services.items()))


def _merge(group: list[ObservedListener]) -> ObservedListener:
    edges: dict[tuple[str, str, str], Edge] = {}
    for edge in (edge for listener in group for edge in listener.edges):
        key = (edge.source, edge.method, edge.path)
        other = edges.get(key)
        if other is not None:
            samples = tuple(dict.fromkeys((*other.samples, *edge.samples)))[: 2 * SAMPLES_MAX]
            edge = Edge(*key, edge.allowed + other.allowed, edge.denied + other.denied, samples)
        edges[key] = edge
    return ObservedListener(
        group[0].service,
        group[0].http,
        min(listener.observed_s for listener in group),
        tuple(edge for _, edge in sorted(edges.items())),
        sum(listener.left_out for listener in group),
    )
