"""Samples as Prometheus text, made piece by piece: a worker with thousands of targets does not stop for them."""

from collections.abc import Iterable

from agent.dataplane.metrics import Sample

SERIES_MAX = 200_000  # in one answer; those beyond are counted in mesh_metrics_series_dropped

_GAUGES = ("_active", "_healthy", "_total_gauge", "_live", "_uptime", "membership_total", "_open", "_ejected")
_DROPPED = "mesh_metrics_series_dropped"


def _escape(value: str) -> str:
    return value.replace("\\", "\\\\").replace('"', '\\"').replace("\n", "\\n")


def sample_name(name: str, labels: dict[str, str]) -> str:
    """`name{label="value",...}`, labels sorted."""
    if not labels:
        return name
    inner = ",".join([f'{key}="{_escape(value)}"' for key, value in sorted(labels.items())])
    return f"{name}{{{inner}}}"


def is_gauge(name: str) -> bool:
    """Whether the value may fall."""
    return name.endswith(_GAUGES)


class Exposition:
    """Samples, grouped by metric. `counters` are the same values by name, labels folded in."""

    def __init__(self) -> None:
        self.counters: dict[str, float] = {}
        self._kinds: dict[str, str] = {}
        self._families: dict[str, list[str]] = {}

    def add(self, samples: Iterable[Sample]) -> None:
        """Some more."""
        for name, labels, value in samples:
            family, kind = name, "gauge" if is_gauge(name) else "counter"
            if name.endswith(("_bucket", "_sum", "_count")):
                family, kind = name.rpartition("_")[0], "histogram"
            if len(self.counters) >= SERIES_MAX and name != _DROPPED:
                self.counters[_DROPPED] = self.counters.get(_DROPPED, 0.0) + 1.0
                continue
            shown = sample_name(name, labels)
            self.counters[shown] = value
            self._kinds[family] = kind
            self._families.setdefault(family, []).append(f"{shown} {value:.15g}")

    def text(self) -> str:
        """The Prometheus text format, version 0.0.4."""
        lines: list[str] = []
        for family in sorted(self._families):
            lines.append(f"# TYPE {family} {self._kinds[family]}")
            lines.extend(self._families[family])
        if _DROPPED in self.counters:
            lines += [f"# TYPE {_DROPPED} counter", f"{_DROPPED} {self.counters[_DROPPED]:.15g}"]
        return "\n".join(lines) + "\n"
