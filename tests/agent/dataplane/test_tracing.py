"""W3C trace context, and spans that arrive at a collector."""

import http.server
import random
import threading
import time

import pytest
from msgspec.structs import replace
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest

from agent.dataplane.control import Ack
from agent.dataplane.tracing import Tracer, is_traceparent

TRACE_ID = 0x0AF7651916CD43DD8448EB211C80319C
SAMPLED = b"00-%032x-b7ad6b7169203331-01" % TRACE_ID
UNSAMPLED = SAMPLED[:-1] + b"0"


def test_without_an_exporter_new_traces_are_valid_and_not_sampled():
    tracer = Tracer(random.Random(1))
    assert not tracer.exporting
    values = {tracer.start() for _ in range(100)}
    assert len(values) == 100
    assert all(is_traceparent(value) and value.endswith(b"-00") for value in values)


@pytest.mark.parametrize("value", [b"", b"00", b"00-xyz", b"zz" + SAMPLED[2:], SAMPLED[:-1], SAMPLED.upper()])
def test_malformed_contexts_are_recognised(value):
    assert not is_traceparent(value)


def test_a_sampled_context_is_continued_and_an_unsampled_one_is_left_alone():
    tracer = Tracer(random.Random(1), sampling=1.0)
    span = tracer.span(SAMPLED)
    assert (span.trace_id, span.parent_id) == (TRACE_ID, 0xB7AD6B7169203331)
    assert span.header == b"00-%032x-%016x-01" % (TRACE_ID, span.span_id)
    assert tracer.span(UNSAMPLED) is None
    assert tracer.span(None).parent_id is None
    assert Tracer(random.Random(1), sampling=0.0).span(None) is None


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
    assert len(spans) == 2
