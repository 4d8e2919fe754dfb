"""W3C trace context on the way through, and spans of sampled requests to OTLP.

Without an endpoint nothing of OpenTelemetry is imported, and a request costs one header at most. With one, finished
spans go to the SDK's batch processor: its own thread, a bounded queue, spans dropped when it is full.
"""

import random
import re
import threading
from typing import TYPE_CHECKING

import msgspec

if TYPE_CHECKING:
    from opentelemetry.sdk.trace.export import BatchSpanProcessor

QUEUE_SPANS_MAX = 2048

_TRACEPARENT = re.compile(rb"([0-9a-f]{2})-([0-9a-f]{32})-([0-9a-f]{16})-([0-9a-f]{2})(?:-.*)?")


class TraceContext(msgspec.Struct, frozen=True):
    """A sampled request's place in a trace (W3C Trace Context). IDs are integers, as OpenTelemetry has them."""

    trace_id: int
    span_id: int
    parent_id: int | None

    @property
    def header(self) -> bytes:
        """The traceparent value that names this span as the parent."""
        return b"00-%032x-%016x-01" % (self.trace_id, self.span_id)


class Span(msgspec.Struct, frozen=True):
    """One finished hop. Times are Unix nanoseconds."""

    context: TraceContext
    name: str
    inbound: bool
    start_ns: int
    end_ns: int
    status: int
    attributes: dict[str, str | int]


class Tracer:
    """Continues or starts traces. One per worker and configuration of tracing."""

    def __init__(self, rng: random.Random, *, endpoint: str = "", sampling: float = 0.0) -> None:
        self._rng = rng
        self._sampling = sampling
        self._processor = _processor(endpoint) if endpoint else None

    @property
    def exporting(self) -> bool:
        """Whether spans go anywhere."""
        return self._processor is not None

    def random_bits(self) -> int:
        """128 random bits."""
        return self._rng.getrandbits(128)

    def start(self) -> bytes:
        """The traceparent of a new trace that is not recorded here: cheap, for requests that arrive without one."""
        bits = self._rng.getrandbits(192) | 1 << 191 | 1  # neither ID may be all zeroes
        return b"00-%032x-%016x-00" % (bits >> 64, bits & 0xFFFFFFFFFFFFFFFF)

    def span(self, traceparent: bytes | None) -> TraceContext | None:
        """A span to record for a request, or None when it is not sampled. Only while exporting."""
        match = _TRACEPARENT.fullmatch(traceparent) if traceparent is not None else None
        if match is None or match[1] == b"ff":
            if self._rng.random() >= self._sampling:
                return None
            return TraceContext(self._rng.getrandbits(128) | 1, self._rng.getrandbits(64) | 1, None)
        if not int(match[4], 16) & 1:
            return None
        return TraceContext(int(match[2], 16), self._rng.getrandbits(64) | 1, int(match[3], 16))

    def record(self, span: Span) -> None:
        """Hands a span to the exporter's queue. Never blocks."""
        if self._processor is not None:
            self._processor.on_end(_readable(span))  # type: ignore[arg-type]  # built below, typed by the SDK

    def shutdown(self, *, wait_s: float = 0.0) -> None:
        """Stops the exporter. What is queued is sent from a thread, which we wait for `wait_s` at most."""
        if self._processor is not None:
            sender = threading.Thread(target=self._processor.shutdown, name="span-export", daemon=True)
            sender.start()
            sender.join(wait_s)


def is_traceparent(value: bytes) -> bool:
    """Whether a header value is one that another tracer would accept."""
    return _TRACEPARENT.fullmatch(value) is not None


def _processor(endpoint: str) -> "BatchSpanProcessor":
    from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
    from opentelemetry.sdk.trace.export import BatchSpanProcessor

    exporter = OTLPSpanExporter(endpoint=f"{endpoint.rstrip('/')}/v1/traces", timeout=5)
    return BatchSpanProcessor(exporter, max_queue_size=QUEUE_SPANS_MAX)


def _readable(span: Span) -> object:
    from opentelemetry.sdk.resources import Resource
    from opentelemetry.sdk.trace import ReadableSpan
    from opentelemetry.trace import SpanContext, SpanKind, Status, StatusCode, TraceFlags

    def place(span_id: int) -> SpanContext:
        flags = TraceFlags(TraceFlags.SAMPLED)
        return SpanContext(span.context.trace_id, span_id, is_remote=False, trace_flags=flags)

    failed = span.status >= 500 or span.status == 0
    return ReadableSpan(
        name=span.name,
        context=place(span.context.span_id),
        parent=None if span.context.parent_id is None else place(span.context.parent_id),
        resource=Resource.create({"service.name": str(span.attributes.get("mesh.service", "mesh"))}),
        attributes=span.attributes,
        kind=SpanKind.SERVER if span.inbound else SpanKind.CLIENT,
        status=Status(StatusCode.ERROR if failed else StatusCode.UNSET),
        start_time=span.start_ns,
        end_time=span.end_ns,
    )
