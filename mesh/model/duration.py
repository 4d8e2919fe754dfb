"""Go's durations as text: "300ms", "1m30s", "-1.5h". What config entries and query parameters carry."""

import json
import re

DURATION_NS_MAX = 2**63 - 1  # Go's time.Duration: about 292 years

_UNITS_NS = {
    "ns": 1, "us": 1_000, "µs": 1_000, "μs": 1_000, "ms": 1_000_000,
    "s": 1_000_000_000, "m": 60_000_000_000, "h": 3_600_000_000_000,
}  # fmt: skip
_DURATION = re.compile(r"[+-]?((\d+\.?\d*|\.\d+)(ns|us|µs|μs|ms|s|m|h))+", re.ASCII)
_DURATION_PART = re.compile(r"(\d*)\.?(\d*)(ns|us|µs|μs|ms|s|m|h)", re.ASCII)
_DURATION_TEXT_MAX = 64


def parse_duration_ns(text: str) -> int:
    """Nanoseconds of a Go duration such as "300ms", "-1.5h" or "2h45m". Raises ValueError, in Go's words."""
    if text in ("0", "+0", "-0"):
        return 0
    if len(text) > _DURATION_TEXT_MAX or _DURATION.fullmatch(text) is None:
        if re.fullmatch(r"[+-]?(\d+\.?\d*|\.\d+)", text[:_DURATION_TEXT_MAX], re.ASCII):
            raise ValueError(f"time: missing unit in duration {json.dumps(text, ensure_ascii=False)}")
        raise ValueError(f"time: invalid duration {json.dumps(text[:_DURATION_TEXT_MAX], ensure_ascii=False)}")
    total = 0
    for whole, fraction, unit in _DURATION_PART.findall(text.lstrip("+-")):
        total += int(whole or "0") * _UNITS_NS[unit]
        total += int(fraction or "0") * _UNITS_NS[unit] // 10 ** len(fraction)
    if total > DURATION_NS_MAX:
        raise ValueError(f"time: invalid duration {json.dumps(text)}")
    return -total if text.startswith("-") else total


def format_duration(seconds: float) -> str:
    """Go's text of a duration: "1m30s", "1.5s", "250ms", "0s"."""
    total = round(seconds * 1e9)
    sign, total = ("-", -total) if total < 0 else ("", total)
    if total == 0:
        return "0s"
    if total < 1_000_000_000:
        unit = next(unit for unit in ("ms", "µs", "ns") if total >= _UNITS_NS[unit])
        return f"{sign}{_decimal(total, _UNITS_NS[unit])}{unit}"
    minutes, rest = divmod(total, _UNITS_NS["m"])
    hours, minutes = divmod(minutes, 60)
    text = f"{_decimal(rest, _UNITS_NS['s'])}s"
    if hours:
        text = f"{hours}h{minutes}m{text}"
    elif minutes:
        text = f"{minutes}m{text}"
    return sign + text


def _decimal(amount: int, unit: int) -> str:
    whole, rest = divmod(amount, unit)
    digits = str(unit + rest)[1:].rstrip("0")
    return f"{whole}.{digits}" if digits else str(whole)
