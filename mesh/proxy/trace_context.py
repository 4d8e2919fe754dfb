"""A request's place in a trace, as headers carry it: W3C Trace Context (level 1) and B3, single and multiple headers.

Read leniently and safely: what is malformed counts as absent. Written in the form in which it came.
"""

import re
from collections.abc import Mapping
from typing import Literal

import msgspec

from mesh.http.head import Headers

TraceForm = Literal["w3c", "b3", "b3multi"]

# Everything that carries a place in a trace. A trace that is begun anew drops what it does not continue.
TRACE_HEADERS = frozenset(
    (
        b"traceparent", b"tracestate", b"b3", b"x-b3-traceid", b"x-b3-spanid", b"x-b3-parentspanid", b"x-b3-sampled",
        b"x-b3-flags",
    )
)  # fmt: skip
_ALL_BUT_STATE = TRACE_HEADERS - {b"tracestate"}  # of a W3C trace that goes on: we have no entry of our own in it

# Version 00 has nothing behind the flags; later ones may.
_TRACEPARENT = re.compile(rb"(?:00-([0-9a-f]{32})-([0-9a-f]{16})-([0-9a-f]{2})"
                          rb"|(?!ff|00)[0-9a-f]{2}-([0-9a-f]{32})-([0-9a-f]{16})-([0-9a-f]{2})(?:-.*)?)")  # fmt: skip
_B3 = re.compile(rb"([0-9a-f]{16}|[0-9a-f]{32})-([0-9a-f]{16})(?:-([01d])(?:-[0-9a-f]{16})?)?")
_TRACE_ID = re.compile(rb"[0-9a-f]{16}|[0-9a-f]{32}")
_SPAN_ID = re.compile(rb"[0-9a-f]{16}")
_SAMPLED = {b"1": True, b"0": False, b"true": True, b"false": False, b"d": True}


class RemoteContext(msgspec.Struct, frozen=True):
    """What a request came with. `sampled` None: the decision is left to us (B3). IDs are integers, 0 when there are
    none: B3 can carry a decision alone. `narrow`: a trace ID of 64 bits.
    """

    form: TraceForm
    trace_id: int
    span_id: int
    sampled: bool | None
    narrow: bool = False
    debug: bool = False


class TraceContext(msgspec.Struct, frozen=True):
    """The span that is recorded for a request here. IDs are integers, as OpenTelemetry has them."""

    trace_id: int
    span_id: int
    parent_id: int | None
    form: TraceForm = "w3c"
    narrow: bool = False
    debug: bool = False

    def headers(self) -> Headers:
        """What names this span as the parent of what follows."""
        return place_headers(self.form, self.trace_id, self.span_id, sampled=True, narrow=self.narrow, debug=self.debug,
                             parent_id=self.parent_id)  # fmt: skip


def place_headers(
    form: TraceForm, trace_id: int, span_id: int, *, sampled: bool, narrow: bool = False, debug: bool = False,
    parent_id: int | None = None,
) -> Headers:  # fmt: skip
    """The headers of a place in a trace."""
    if form == "w3c":
        return ((b"traceparent", b"00-%032x-%016x-%02x" % (trace_id, span_id, sampled)),)
    trace = b"%016x" % trace_id if narrow else b"%032x" % trace_id
    span = b"%016x" % span_id
    decision = b"d" if debug else b"1" if sampled else b"0"
    if form == "b3":
        parent = b"" if parent_id is None else b"-%016x" % parent_id
        return ((b"b3", b"%b-%b-%b%b" % (trace, span, decision, parent)),)
    last = ((b"x-b3-flags", b"1"),) if debug else ((b"x-b3-sampled", decision),)
    middle = () if parent_id is None else ((b"x-b3-parentspanid", b"%016x" % parent_id),)
    return ((b"x-b3-traceid", trace), (b"x-b3-spanid", span), *middle, *last)


def read_context(named: Mapping[bytes, bytes]) -> RemoteContext | None:
    """The place that a request's headers (names in lower case) give it, or None. W3C wins over B3, its single header
    over the others.
    """
    traceparent = named.get(b"traceparent")
    if traceparent is not None:
        found = _read_w3c(traceparent)
        if found is not None:
            return found
    single = named.get(b"b3")
    if single is not None:
        found = _read_b3(single)
        if found is not None:
            return found
    return _read_b3_multiple(named)


def _read_w3c(value: bytes) -> RemoteContext | None:
    match = _TRACEPARENT.fullmatch(value)
    if match is None:
        return None
    trace, span, flags = match[1] or match[4], match[2] or match[5], match[3] or match[6]
    trace_id, span_id = int(trace, 16), int(span, 16)
    if not trace_id or not span_id:
        return None
    return RemoteContext("w3c", trace_id, span_id, bool(int(flags, 16) & 1))


def _read_b3(value: bytes) -> RemoteContext | None:
    if value in (b"0", b"1", b"d"):
        return RemoteContext("b3", 0, 0, value != b"0", debug=value == b"d")
    match = _B3.fullmatch(value)
    if match is None:
        return None
    trace_id, span_id = int(match[1], 16), int(match[2], 16)
    if not trace_id or not span_id:
        return None
    sampled = None if match[3] is None else _SAMPLED[match[3]]
    return RemoteContext("b3", trace_id, span_id, sampled, len(match[1]) == 16, match[3] == b"d")


def _read_b3_multiple(named: Mapping[bytes, bytes]) -> RemoteContext | None:
    debug = named.get(b"x-b3-flags") == b"1"
    sampled = True if debug else _SAMPLED.get(named.get(b"x-b3-sampled", b""))
    trace, span = named.get(b"x-b3-traceid"), named.get(b"x-b3-spanid")
    if trace is not None and span is not None and _TRACE_ID.fullmatch(trace) and _SPAN_ID.fullmatch(span):
        trace_id, span_id = int(trace, 16), int(span, 16)
        if trace_id and span_id:
            return RemoteContext("b3multi", trace_id, span_id, sampled, len(trace) == 16, debug)
    if sampled is not None and trace is None and span is None:
        return RemoteContext("b3multi", 0, 0, sampled, debug=debug)
    return None


def replaced(headers: Headers, form: TraceForm, place: Headers) -> Headers:
    """The headers with another place in the same trace; those of other forms would contradict it, and go."""
    gone = _ALL_BUT_STATE if form == "w3c" else TRACE_HEADERS
    return (*(pair for pair in headers if pair[0] not in gone), *place)


def begun(headers: Headers, place: Headers) -> Headers:
    """The headers with a place in a new trace."""
    return (*(pair for pair in headers if pair[0] not in TRACE_HEADERS), *place)
