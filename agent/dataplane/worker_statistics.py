"""The counters of several workers as those of one: each sample is their sum, and no counter ever goes down.

Prometheus takes a counter that falls for one that began anew, and adds all of it once more. So what a worker had
counted when it was last asked stays in the sum after its end.
"""

from collections.abc import Iterable

SAMPLES_KEPT_MAX = 50_000  # of workers that are gone; above it, those that no living worker shows are forgotten
_LATEST = ("envoy_server_live", "envoy_server_uptime")  # a sum of these would say nothing


class WorkerStatistics:
    """What is shown, and what workers that are gone had counted."""

    def __init__(self) -> None:
        self._gone: dict[str, float] = {}

    def retire(self, text: str) -> None:
        """A worker is gone; `text` is what it last showed."""
        kinds, samples = _parse(text)
        for name, value in samples.items():
            if kinds.get(_family(name), "counter") != "gauge":
                self._gone[name] = self._gone.get(name, 0.0) + value

    def merged(self, texts: Iterable[str]) -> str:
        """The Prometheus text of all workers together; empty when there is none."""
        kinds: dict[str, str] = {}
        totals: dict[str, float] = {}
        for text in texts:
            shown, samples = _parse(text)
            kinds |= shown
            for name, value in samples.items():
                total = totals.get(name, 0.0)
                totals[name] = max(total, value) if name.startswith(_LATEST) else total + value
        if not totals:
            return ""
        if len(self._gone) > SAMPLES_KEPT_MAX:
            self._gone = {name: value for name, value in self._gone.items() if name in totals}
        for name, value in self._gone.items():
            # A listener that is no longer served is not shown, as in one worker.
            if name in totals:
                totals[name] += value
        families: dict[str, list[str]] = {}
        for name, value in totals.items():
            families.setdefault(_family_of(name, kinds), []).append(f"{name} {value:.15g}")
        lines: list[str] = []
        for family in sorted(families):
            lines += [f"# TYPE {family} {kinds.get(family, 'untyped')}", *families[family]]
        return "\n".join(lines) + "\n"


def _parse(text: str) -> tuple[dict[str, str], dict[str, float]]:
    kinds: dict[str, str] = {}
    samples: dict[str, float] = {}
    for line in text.splitlines():
        if line.startswith("# TYPE "):
            _, _, family, kind = line.split(" ", 3)
            kinds[family] = kind
        elif line and not line.startswith("#"):
            name, _, value = line.rpartition(" ")
            samples[name] = float(value)
    return kinds, samples


def _family(name: str) -> str:
    return name.partition("{")[0]


def _family_of(name: str, kinds: dict[str, str]) -> str:
    family = _family(name)
    for suffix in ("_bucket", "_sum", "_count"):
        if kinds.get(family.removesuffix(suffix)) == "histogram":
            return family.removesuffix(suffix)
    return family
