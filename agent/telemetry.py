"""The agent's own metrics, under Consul's names.

`Metrics` is given to whoever counts. It shows itself as Consul's JSON (the last whole interval of 10 s) and as
Prometheus text (totals since start).
"""

import math
import re
import time
from collections import Counter, deque
from collections.abc import Awaitable, Callable, Mapping

from mesh.errors import MeshError

INTERVAL_S = 10.0  # go-metrics' in-memory sink, which Consul's JSON form shows
SAMPLES_KEPT = 1024  # per name, for quantiles
NAMES_MAX = 2048  # label sets come from configuration, never from requests; this guards against a mistake

Labels = tuple[tuple[str, str], ...]
MetricKey = tuple[str, Labels]

_QUANTILES = (0.5, 0.9, 0.99)


class _Aggregate:
    """Count, sum, extremes and spread of one interval."""

    __slots__ = ("count", "maximum", "minimum", "squares", "total")

    def __init__(self) -> None:
        self.count = 0
        self.total = self.squares = 0.0
        self.minimum, self.maximum = math.inf, -math.inf

    def add(self, value: float) -> None:
        self.count += 1
        self.total += value
        self.squares += value * value
        if value < self.minimum:  # `min` and `max` cost three times as much, and this runs for every request
            self.minimum = value
        if value > self.maximum:
            self.maximum = value

    def row(self, name: str, labels: Labels) -> dict[str, object]:
        spread = 0.0
        if self.count > 1:
            spread = math.sqrt(max(0.0, (self.squares - self.total**2 / self.count) / (self.count - 1)))
        return {
            "Name": name,
            "Count": self.count,
            "Rate": self.total / INTERVAL_S,
            "Sum": self.total,
            "Min": self.minimum,
            "Max": self.maximum,
            "Mean": self.total / self.count,
            "Stddev": spread,
            "Labels": dict(labels),
        }


class _Interval:
    def __init__(self, number: int) -> None:
        self.number = number
        self.start_s = number * INTERVAL_S
        self.end_s = (number + 1) * INTERVAL_S
        self.counters: dict[MetricKey, _Aggregate] = {}
        self.samples: dict[MetricKey, _Aggregate] = {}


class Metrics:
    """Counters, gauges and samples of one agent. Names are dotted, `consul.` first."""

    def __init__(self, unix_time_s: Callable[[], float]) -> None:
        self._unix_time_s = unix_time_s
        self._current = _Interval(self._interval_number())
        self._last = _Interval(self._current.number - 1)
        self._totals: Counter[MetricKey] = Counter()
        self._sums: Counter[MetricKey] = Counter()
        self._recent: dict[MetricKey, deque[float]] = {}
        self._gauges: dict[MetricKey, Callable[[], float]] = {}

    def _interval_number(self) -> int:
        return int(self._unix_time_s() // INTERVAL_S)

    def _interval(self) -> _Interval:
        if self._current.start_s <= self._unix_time_s() < self._current.end_s:
            return self._current
        number = self._interval_number()
        if number != self._current.number:
            # After a quiet time the interval before this one is empty, not the last one in which something happened.
            self._last = self._current if number == self._current.number + 1 else _Interval(number - 1)
            self._current = _Interval(number)
        return self._current

    def count(self, name: str, value: float = 1, **labels: str) -> None:
        """Adds to a counter."""
        key = _key(name, labels)
        if key not in self._totals and len(self._totals) >= NAMES_MAX:
            return
        self._totals[key] += value  # type: ignore[assignment]  # counts may be fractions; Counter adds them fine
        _add(self._interval().counters, key, value)

    def sample(self, name: str, value: float, **labels: str) -> None:
        """Notes one observation; durations are milliseconds, as in Consul."""
        key = _key(name, labels)
        recent = self._recent.get(key)
        if recent is None:
            if len(self._recent) >= NAMES_MAX:
                return
            recent = self._recent[key] = deque(maxlen=SAMPLES_KEPT)
        recent.append(value)
        self._totals[key] += 1
        self._sums[key] += value  # type: ignore[assignment]
        _add(self._interval().samples, key, value)

    def gauge(self, name: str, read: Callable[[], float], **labels: str) -> None:
        """Has `read` asked for the value whenever metrics are shown. It must not raise and must not wait."""
        self._gauges[_key(name, labels)] = read

    def json_form(self) -> dict[str, object]:
        """The body of /v1/agent/metrics."""
        self._interval()
        shown = self._last
        stamp = time.strftime("%Y-%m-%d %H:%M:%S +0000 UTC", time.gmtime(shown.number * INTERVAL_S))
        return {
            "Timestamp": stamp,
            "Gauges": [
                {"Name": name, "Value": read(), "Labels": dict(labels)}
                for (name, labels), read in sorted(self._gauges.items(), key=lambda item: item[0])
            ],
            "Points": [],
            "Counters": [shown.counters[key].row(*key) for key in sorted(shown.counters)],
            "Samples": [shown.samples[key].row(*key) for key in sorted(shown.samples)],
        }

    def prometheus_text(self) -> str:
        """Text exposition format 0.0.4 of everything since start."""
        families: dict[tuple[str, str], list[str]] = {}
        for (name, labels), read in self._gauges.items():
            family = _family(name)
            families.setdefault((family, "gauge"), []).append(f"{family}{_text(labels)} {_number(read())}")
        for (name, labels), total in self._totals.items():
            family = _family(name)
            recent = self._recent.get((name, labels))
            if recent is None:
                families.setdefault((family, "counter"), []).append(f"{family}{_text(labels)} {_number(total)}")
                continue
            rows = families.setdefault((family, "summary"), [])
            ordered = sorted(recent)
            for quantile in _QUANTILES:
                value = ordered[min(len(ordered) - 1, int(quantile * len(ordered)))]
                rows.append(f"{family}{_text((*labels, ('quantile', str(quantile))))} {_number(value)}")
            rows.append(f"{family}_sum{_text(labels)} {_number(self._sums[name, labels])}")
            rows.append(f"{family}_count{_text(labels)} {_number(total)}")
        lines = []
        for (family, kind), rows in sorted(families.items()):
            lines += [f"# TYPE {family} {kind}", *rows]
        return "".join(f"{line}\n" for line in lines)

    async def exposition(self) -> str:
        """As `prometheus_text`: what is shown where no worker adds its own."""
        return self.prometheus_text()


class MergedMetrics:
    """The agent's metrics together with its worker's Prometheus text."""

    def __init__(self, metrics: Metrics, worker_text: Callable[[], Awaitable[str]]) -> None:
        """`worker_text` may raise Unreachable: then the agent's own are shown."""
        self._metrics = metrics
        self._worker_text = worker_text

    def json_form(self) -> dict[str, object]:
        """See Metrics: the agent's own only, as the JSON form is Consul's."""
        return self._metrics.json_form()

    async def exposition(self) -> str:
        """Both, as Prometheus text."""
        text = self._metrics.prometheus_text()
        try:
            return text + await self._worker_text()
        except MeshError:
            return text


def _add(aggregates: dict[MetricKey, _Aggregate], key: MetricKey, value: float) -> None:
    aggregate = aggregates.get(key)
    if aggregate is None:
        aggregate = aggregates[key] = _Aggregate()
    aggregate.add(value)


def _key(name: str, labels: Mapping[str, str]) -> MetricKey:
    return name, tuple(sorted(labels.items())) if labels else ()


def _family(name: str) -> str:
    return re.sub(r"[^a-zA-Z0-9_:]", "_", name)


def _text(labels: Labels) -> str:
    if not labels:
        return ""
    pairs = (f'{_family(name)}="{_escaped(value)}"' for name, value in labels)
    return "{" + ",".join(pairs) + "}"


def _escaped(value: str) -> str:
    return value.replace("\\", "\\\\").replace('"', '\\"').replace("\n", "\\n")


def _number(value: float) -> str:
    return str(int(value)) if value == int(value) else repr(value)
