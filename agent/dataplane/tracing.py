"""Trace context on the way through (W3C, B3), and spans of sampled requests to OTLP.

Without an endpoint nothing of OpenTelemetry is imported, and a request costs one header at most. With one, finished
spans go to the SDK's batch processor: its own thread, a bounded queue, spans dropped when it is full.
"""

import random
import threading
import time
from collections.abc import Mapping
from typing import TYPE_CHECKING, Protocol

import msgspec

from mesh.http.head import Headers, RequestHead
from mesh.proxy.trace_context import (
    RemoteContext,
    TraceContext,
    TraceForm,
    begun,
    place_headers,
    read_context,
    replaced,
)

if TYPE_CHECKING:
    from opentelemetry.sdk.trace.export import BatchSpanProcessor

QUEUE_SPANS_MAX = 2048


class Span(msgspec.Struct, frozen=True):
    """One finished hop. Times are Unix nanoseconds."""

    context: TraceContext
    name: str
    inbound: bool
    start_ns: int
    end_ns: int
    status: int
    attributes: dict[str, str | int]


class TracedExchange(Protocol):
    """What a span says about an exchange that is over."""

    @property
    def forwarded(self) -> RequestHead: ...
    @property
    def started_at(self) -> float: ...
    @property
    def status(self) -> int: ...
    @property
    def flags(self) -> str: ...
    @property
    def attempts(self) -> int: ...
    @property
    def endpoint_host(self) -> str: ...
    @property
    def route_name(self) -> str: ...
    @property
    def upstream_failure(self) -> str: ...


class Tracer:
    """Continues or starts traces. One per worker and configuration of tracing."""

    def __init__(
        self, rng: random.Random, *, endpoint: str = "", sampling: float = 0.0, form: TraceForm = "w3c"
    ) -> None:
        """`sampling`: the share of new traces that is recorded. `form`: how those are passed on."""
        self._rng = rng
        self._sampling = sampling
        self._form: TraceForm = form
        self._processor = _processor(endpoint) if endpoint else None

    @property
    def exporting(self) -> bool:
        """Whether spans go anywhere."""
        return self._processor is not None

    def random_bits(self) -> int:
        """128 random bits."""
        return self._rng.getrandbits(128)

    def trace(self, headers: Headers, named: Mapping[bytes, bytes]) -> tuple[Headers, TraceContext | None]:
        """A request's headers as they are passed on, and the span to record for it, or None when it is not sampled.

        `named` are the same headers by name. A caller's decision stands. While nothing is exported, a trace that is
        there passes untouched: we take no part in it.
        """
        if self._processor is None:
            if b"traceparent" in named or b"b3" in named or b"x-b3-traceid" in named or b"x-b3-sampled" in named:
                return headers, None
            if self._form == "w3c":
                return (*headers, (b"traceparent", self._unsampled())), None
            return self._begin(headers, sampled=False)
        remote = read_context(named)
        if remote is None:
            return self._begin(headers, sampled=self._chosen())
        if remote.sampled is False:
            return headers, None
        return self._continue(headers, remote)

    def _chosen(self) -> bool:
        return self._rng.random() < self._sampling

    def _unsampled(self) -> bytes:
        """The traceparent of a new trace that is not recorded: on the path of most requests."""
        bits = self._rng.getrandbits(192) | 1 << 191 | 1  # neither ID may be all zeroes
        return b"00-%032x-%016x-00" % (bits >> 64, bits & 0xFFFFFFFFFFFFFFFF)

    def _new_ids(self) -> tuple[int, int]:
        return self._rng.getrandbits(128) | 1, self._rng.getrandbits(64) | 1

    def _begin(self, headers: Headers, *, sampled: bool) -> tuple[Headers, TraceContext | None]:
        trace_id, span_id = self._new_ids()
        if not sampled:
            return begun(headers, place_headers(self._form, trace_id, span_id, sampled=False)), None
        context = TraceContext(trace_id, span_id, None, self._form)
        return begun(headers, context.headers()), context

    def _continue(self, headers: Headers, remote: RemoteContext) -> tuple[Headers, TraceContext | None]:
        form, narrow = remote.form, remote.narrow
        if not remote.trace_id:  # only a decision: the trace begins here, in the caller's form
            trace_id, span_id = self._new_ids()
            context = TraceContext(trace_id, span_id, None, form, debug=remote.debug)
            return begun(headers, context.headers()), context
        if remote.sampled is None and not self._chosen():
            place = place_headers(form, remote.trace_id, remote.span_id, sampled=False, narrow=narrow)
            return replaced(headers, form, place), None
        span_id = self._rng.getrandbits(64) | 1
        context = TraceContext(remote.trace_id, span_id, remote.span_id, form, narrow, remote.debug)
        return replaced(headers, form, context.headers()), context

    def finish(
        self, exchange: TracedExchange, context: TraceContext, ended_at: float, *, service: str, inbound: bool
    ) -> None:
        """Records the span of an exchange that is over; `ended_at` is on its clock."""
        end_ns = time.time_ns()
        head = exchange.forwarded
        method = head.method.decode("latin-1")
        attributes: dict[str, str | int] = {
            "mesh.service": service,
            "http.request.method": method,
            "url.path": head.path.decode("latin-1"),
            "server.address": head.authority.decode("latin-1"),
            "http.response.status_code": exchange.status,
            "network.peer.address": exchange.endpoint_host,
            "mesh.attempts": exchange.attempts,
        }
        for name, value in (
            ("mesh.response_flags", exchange.flags),
            ("mesh.route", exchange.route_name),
            ("mesh.upstream_failure", exchange.upstream_failure),
        ):
            if value:
                attributes[name] = value
        self.record(
            Span(
                context=context,
                name=f"{'inbound' if inbound else 'outbound'} {method}",
                inbound=inbound,
                start_ns=end_ns - int((ended_at - exchange.started_at) * 1e9),
                end_ns=end_ns,
                status=exchange.status,
                attributes=attributes,
            )
        )

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

    # A server is not to blame for what its callers ask for (OpenTelemetry's semantic conventions for HTTP spans).
    failed = span.status == 0 or span.status >= (500 if span.inbound else 400)
    attributes = {**span.attributes, "error.type": str(span.status or "caller left")} if failed else span.attributes
    return ReadableSpan(
        name=span.name,
        context=place(span.context.span_id),
        parent=None if span.context.parent_id is None else place(span.context.parent_id),
        resource=Resource.create({"service.name": str(span.attributes.get("mesh.service", "mesh"))}),
        attributes=attributes,
        kind=SpanKind.SERVER if span.inbound else SpanKind.CLIENT,
        status=Status(StatusCode.ERROR if failed else StatusCode.UNSET),
        start_time=span.start_ns,
        end_time=span.end_ns,
    )
