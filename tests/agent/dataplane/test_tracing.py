"""Trace context in and out, and spans that arrive at a collector."""

import http.server
import random
import threading
import time

import pytest
from msgspec.structs import replace
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest

from agent.dataplane.control import Ack
from agent.dataplane.tracing import Tracer
from mesh.proxy.trace_context import RemoteContext, read_context

TRACE_ID = 0x0AF7651916CD43DD8448EB211C80319C
SAMPLED = b"00-%032x-b7ad6b7169203331-01" % TRACE_ID
UNSAMPLED = SAMPLED[:-1] + b"0"


@pytest.fixture
def exporting():
    """Makes tracers that record, for a collector that nobody runs."""
    made = []

    def make(**settings):
        tracer = Tracer(random.Random(1), endpoint="http://127.0.0.1:1", **settings)
        made.append(tracer)
        return tracer

    yield make
    for tracer in made:
        tracer.shutdown()


def traced(tracer, *headers):
    """The headers as they go on, and the context."""
    passed, context = tracer.trace(headers, dict(headers))
    return dict(passed), context


def test_without_an_exporter_new_traces_are_valid_and_not_sampled():
    tracer = Tracer(random.Random(1))
    assert not tracer.exporting
    values = {traced(tracer, (b"a", b"b"))[0][b"traceparent"] for _ in range(100)}
    assert len(values) == 100
    assert all(read_context({b"traceparent": value}).sampled is False for value in values)
    passed, context = traced(Tracer(random.Random(1), form="b3"))
    assert read_context(passed).sampled is False
    assert (list(passed), context) == ([b"b3"], None)


@pytest.mark.parametrize("header", [(b"traceparent", SAMPLED), (b"traceparent", b"junk"), (b"b3", b"1"),
                                    (b"x-b3-sampled", b"1"), (b"x-b3-traceid", b"junk")])  # fmt: skip
def test_without_an_exporter_what_is_there_passes_untouched(header):
    headers = (header, (b"tracestate", b"a=b"))
    assert Tracer(random.Random(1)).trace(headers, dict(headers)) == (headers, None)


def test_a_callers_decision_stands(exporting):
    always, never = exporting(sampling=1.0), exporting(sampling=0.0)
    passed, span = traced(never, (b"traceparent", SAMPLED), (b"tracestate", b"v=1"), (b"b3", b"0"))
    assert (span.trace_id, span.parent_id) == (TRACE_ID, 0xB7AD6B7169203331)
    assert passed == {b"traceparent": b"00-%032x-%016x-01" % (TRACE_ID, span.span_id), b"tracestate": b"v=1"}
    assert traced(always, (b"traceparent", UNSAMPLED)) == ({b"traceparent": UNSAMPLED}, None)
    assert traced(always, (b"b3", b"0")) == ({b"b3": b"0"}, None)
    assert traced(always, (b"x-b3-sampled", b"0")) == ({b"x-b3-sampled": b"0"}, None)


def test_b3_goes_on_as_b3(exporting):
    tracer = exporting(sampling=0.0)
    passed, span = traced(tracer, (b"b3", b"80f198ee56343ba8-e457b5a2e4d86bd1-1-05e3ac9a4f6e3b90"))
    assert (span.trace_id, span.parent_id) == (0x80F198EE56343BA8, 0xE457B5A2E4D86BD1)
    assert passed == {b"b3": b"80f198ee56343ba8-%016x-1-e457b5a2e4d86bd1" % span.span_id}
    multi = (
        (b"x-b3-traceid", b"80f198ee56343ba864fe8b2a57d3eff7"), (b"x-b3-spanid", b"e457b5a2e4d86bd1"),
        (b"x-b3-parentspanid", b"05e3ac9a4f6e3b90"), (b"x-b3-flags", b"1"), (b"x-other", b"kept"),
    )  # fmt: skip
    passed, span = traced(tracer, *multi)
    assert passed == {
        b"x-b3-traceid": b"80f198ee56343ba864fe8b2a57d3eff7", b"x-b3-spanid": b"%016x" % span.span_id,
        b"x-b3-parentspanid": b"e457b5a2e4d86bd1", b"x-b3-flags": b"1", b"x-other": b"kept",
    }  # fmt: skip
    passed, span = traced(tracer, (b"b3", b"d"))
    assert span.parent_id is None
    assert passed[b"b3"].endswith(b"-d")


def test_a_decision_that_is_left_to_us_is_made_once_and_told(exporting):
    left = (b"b3", b"80f198ee56343ba864fe8b2a57d3eff7-e457b5a2e4d86bd1")
    passed, span = traced(exporting(sampling=0.0), left)
    assert (passed, span) == ({b"b3": left[1] + b"-0"}, None)
    passed, span = traced(exporting(sampling=1.0), left)
    assert read_context(passed).sampled is True


@pytest.mark.parametrize("form", ["w3c", "b3", "b3multi"])
def test_new_traces_begin_in_the_form_that_is_configured_and_drop_what_is_malformed(exporting, form):
    junk = ((b"traceparent", b"00-xyz"), (b"tracestate", b"v=1"), (b"x-b3-traceid", b"1"), (b"a", b"b"))
    passed, span = traced(exporting(sampling=1.0, form=form), *junk)
    assert read_context(passed) == RemoteContext(form, span.trace_id, span.span_id, True)
    assert b"tracestate" not in passed
    assert passed[b"a"] == b"b"
    passed, span = traced(exporting(sampling=0.0, form=form), *junk)
    assert span is None
    assert (read_context(passed).form, read_context(passed).sampled) == (form, False)


@pytest.fixture
def collector():
    """An OTLP/HTTP collector."""
    spans = []

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_POST(self):
            request = ExportTraceServiceRequest()
            request.ParseFromString(self.rfile.read(int(self.headers["Content-Length"])))
            for resource in request.resource_spans:
                for scope in resource.scope_spans:
                    spans.extend(scope.spans)
            self.send_response(200)
            self.send_header("Content-Length", "0")
            self.end_headers()

        def log_message(self, *arguments):
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}", spans
    server.shutdown()
    server.server_close()


def test_both_hops_of_a_sampled_request_reach_the_collector(pair, collector):
    endpoint, spans = collector
    hops = pair.hops()
    hops.serve()
    config = replace(
        pair.authority.two_hops(
            outbound_port=9191, inbound_port=21000, app_port=8080, address=hops.address, version=pair.next_version()
        ),
        tracing_endpoint=endpoint,
    )
    assert pair.worker.configure(config) == Ack(config.version)
    client = hops.client()
    for trace in (SAMPLED, UNSAMPLED):
        client.send(b"GET /x HTTP/1.1\r\nHost: api\r\ntraceparent: " + trace + b"\r\n\r\n")
        client.read_message()
    hops.apply()  # tracing is off again: what is queued is sent
    deadline = time.monotonic() + 10
    while len(spans) < 2:
        assert time.monotonic() < deadline
        time.sleep(0.01)
    outbound, inbound = sorted(spans, key=lambda span: span.name, reverse=True)
    assert (outbound.name, inbound.name) == ("outbound GET", "inbound GET")
    assert int.from_bytes(outbound.trace_id, "big") == int.from_bytes(inbound.trace_id, "big") == TRACE_ID
    assert inbound.parent_span_id == outbound.span_id
    assert outbound.parent_span_id == bytes.fromhex("b7ad6b7169203331")
    attributes = {item.key: item.value for item in inbound.attributes}
    assert attributes["http.response.status_code"].int_value == 200
    assert attributes["url.path"].string_value == "/x"
    assert attributes["mesh.attempts"].int_value == 1
    assert len(spans) == 2
