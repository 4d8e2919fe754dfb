"""Moments and durations of a line: START_TIME and its kin, DURATION and its kin."""

import datetime
import re
from collections.abc import Callable

from mesh.errors import ConfigError
from mesh.proxy.access_log.record import LoggedExchange, Named, Reader

_PIECES = re.compile(r"%(?:(s)|E?([1-9])?f|([^sf]))|([^%]+)", re.DOTALL)

_DEFAULT = "%Y-%m-%dT%H:%M:%S.%3fZ"

Clock = Callable[[LoggedExchange, float, float], float]


def start_clock(exchange: LoggedExchange, ended_at: float, offset_s: float) -> float:
    """When the request arrived, in Unix time."""
    return exchange.started_at + offset_s


def end_clock(exchange: LoggedExchange, ended_at: float, offset_s: float) -> float:
    """When its line is made, in Unix time."""
    return ended_at + offset_s


def compile_time(clock: Clock, layout: str, *, local: bool = False) -> Reader:
    """A moment as `layout` has it: strftime(3), `%s` (Unix seconds), `%3f` (digits of the fraction; `%f`: nine).

    Empty: milliseconds and `Z`. Raises ConfigError.
    """
    render = compile_layout(layout or _DEFAULT, local=local)

    def read(exchange: LoggedExchange, ended_at: float, offset_s: float, named: Named) -> str:
        return render(clock(exchange, ended_at, offset_s))

    return read


def compile_layout(layout: str, *, local: bool) -> Callable[[float], str]:
    """From Unix time to text. What changes once a second is made once a second."""
    parts: list[str | int | None] = []  # text for strftime, digits of the fraction, None for whole Unix seconds
    for match in _PIECES.finditer(layout):
        seconds, digits, directive, text = match.groups()
        if seconds:
            parts.append(None)
        elif directive is None and text is None:
            parts.append(int(digits or 9))
        else:
            piece = text if text is not None else f"%{directive}"
            if parts and isinstance(parts[-1], str):
                parts[-1] += piece
            else:
                parts.append(piece)
    zone = None if local else datetime.UTC

    def whole(second: int) -> str:
        # With a NUL where a fraction goes: those are filled in for each line.
        moment = datetime.datetime.fromtimestamp(second, zone)
        made: list[str] = []
        for part in parts:
            if isinstance(part, str):
                made.append(moment.astimezone().strftime(part) if local else moment.strftime(part))
            else:
                made.append(str(second) if part is None else "\0")
        return "".join(made)

    try:
        if "\0" in layout:
            raise ValueError("it holds a NUL")
        whole(1_700_000_000)
    except ValueError as error:
        raise ConfigError(f"the time layout {layout!r} cannot be used: {error}") from error
    fractions = [part for part in parts if isinstance(part, int)]
    made_for = -1
    template: list[str] = []

    def render(unix_time_s: float) -> str:
        nonlocal made_for, template
        second = int(unix_time_s)
        if second != made_for:
            template = whole(second).split("\0")
            made_for = second
        if not fractions:
            return template[0]
        # A double holds Unix time to a quarter of a microsecond: what lies below is noise.
        nanoseconds = min(999_999, round((unix_time_s - second) * 1e6)) * 1000
        if len(fractions) == 1:
            digits = fractions[0]
            return f"{template[0]}{nanoseconds // 10 ** (9 - digits):0{digits}d}{template[1]}"
        text = template[0]
        for digits, following in zip(fractions, template[1:], strict=True):
            text += f"{nanoseconds // 10 ** (9 - digits):0{digits}d}{following}"
        return text

    return render


# -- durations

_UNITS = {"ms": 1e3, "us": 1e6, "ns": 1e9}


def _request_sent(exchange: LoggedExchange) -> float:
    """When the endpoint had been given the whole request; 0 when it never was."""
    sent_at, ended_at = exchange.sent_at, exchange.request_ended_at
    return max(sent_at, ended_at) if sent_at and ended_at else 0.0


# Names as in COMMON_DURATION. What happens to connections is not kept per request: None.
_POINTS: dict[str, Callable[[LoggedExchange, float], float] | None] = {
    "DS_RX_BEG": lambda exchange, ended_at: exchange.started_at,
    "DS_RX_END": lambda exchange, ended_at: exchange.request_ended_at,
    "US_CX_BEG": None,
    "US_CX_END": None,
    "US_HS_END": None,
    "US_TX_BEG": lambda exchange, ended_at: exchange.sent_at,
    "US_TX_END": lambda exchange, ended_at: _request_sent(exchange),
    "US_RX_BEG": lambda exchange, ended_at: exchange.response_at,
    "US_RX_BODY_BEG": lambda exchange, ended_at: exchange.response_at,
    "US_RX_END": lambda exchange, ended_at: ended_at if exchange.response_at else 0.0,
    "DS_TX_BEG": lambda exchange, ended_at: exchange.response_at or ended_at,
    "DS_TX_END": lambda exchange, ended_at: ended_at,
}


def compile_between(first: str, last: str, unit: str = "ms") -> Reader:
    """Whole units from one point to the other; missing when either was not reached. Raises ConfigError."""
    if unit not in _UNITS:
        raise ConfigError(f"COMMON_DURATION: {unit!r} is not one of {', '.join(_UNITS)}")
    for name in (first, last):
        if name not in _POINTS:
            raise ConfigError(f"COMMON_DURATION: {name!r} is not one of {', '.join(_POINTS)}")
    begin, end, scale = _POINTS[first], _POINTS[last], _UNITS[unit]

    def read(exchange: LoggedExchange, ended_at: float, offset_s: float, named: Named) -> int | None:
        if begin is None or end is None:
            return None
        start, stop = begin(exchange, ended_at), end(exchange, ended_at)
        if not start or not stop or stop < start:
            return None
        return int((stop - start) * scale)

    return read


def duration_ms(exchange: LoggedExchange, ended_at: float, offset_s: float, named: Named) -> int:
    """From the first byte of the request to the end of everything."""
    return int((ended_at - exchange.started_at) * 1000.0)


def service_time_ms(exchange: LoggedExchange) -> int | None:
    """What Envoy puts into x-envoy-upstream-service-time: how long the endpoint took to begin its answer."""
    if not exchange.response_at or not exchange.sent_at:
        return None
    return max(0, int((exchange.response_at - exchange.sent_at) * 1000.0))
