"""Where access log lines go: files that are rotated, pipes that stall, a collector; and formats that are refused."""

import http.server
import json
import os
import signal
import threading
import time

import pytest
from msgspec.structs import replace
from opentelemetry.proto.collector.logs.v1.logs_service_pb2 import ExportLogsServiceRequest

from agent.dataplane.access_log import AccessLogs
from agent.dataplane.control import Ack, Nack
from agent.dataplane.log_files import QUEUED_BYTES_MAX, LineFile
from agent.dataplane.otlp import BATCHES_MAX, LogEntry, OtlpSender, encode_logs, headers_from_environment
from mesh.errors import ConfigError
from mesh.proxy.access_log.record import Surroundings
from mesh.proxy.sidecar_config import AccessLogConfig

TIMEOUT_S = 10.0


def until(done):
    deadline = time.monotonic() + TIMEOUT_S
    while not (result := done()):
        assert time.monotonic() < deadline
        time.sleep(0.01)
    return result


def configured(pair, hops, log, **fields):
    base = pair.authority.two_hops(
        outbound_port=9191, inbound_port=21000, app_port=8080, address=hops.address, version=pair.next_version()
    )
    web, api = base.sidecars
    config = replace(base, sidecars=(replace(web, access_log=log), api), **fields)
    return config, pair.worker.configure(config)


def test_json_lines_of_a_request_and_of_its_connections(pair, tmp_path):
    hops = pair.hops()
    hops.serve()
    path = tmp_path / "access.json"
    layout = {
        "code": "%RESPONSE_CODE%", "near": "%DOWNSTREAM_LOCAL_ADDRESS%", "peer": "%DOWNSTREAM_REMOTE_ADDRESS%",
        "tls": "%DOWNSTREAM_TLS_VERSION%", "chain": "%FILTER_CHAIN_NAME%", "trace": "%TRACE_ID%",
        "connection": "%CONNECTION_ID%",
    }  # fmt: skip
    config, reply = configured(pair, hops, AccessLogConfig(str(path), json_format=json.dumps(layout)))
    assert reply == Ack(config.version)
    client = hops.client()
    client.send(b"GET /x HTTP/1.1\r\nHost: api\r\n\r\n")
    client.read_message()
    line = json.loads(until(lambda: path.exists() and path.read_text()))
    assert (line["code"], line["tls"], line["chain"]) == (200, None, "api")
    assert line["near"] == f"{hops.address}:9191"
    assert line["peer"].rpartition(":")[2] == str(client.sock.getsockname()[1])
    assert len(line["trace"]) == 32
    assert line["connection"] > 0


def test_a_bad_format_is_refused_and_the_log_before_it_stays(pair, tmp_path):
    hops = pair.hops()
    hops.serve()
    path = tmp_path / "access.log"
    config, reply = configured(pair, hops, AccessLogConfig(str(path), "%PROTOCOL%"))
    assert reply == Ack(config.version)
    refused, reply = configured(pair, hops, AccessLogConfig(str(tmp_path / "other"), "a %NO_SUCH%"))
    assert isinstance(reply, Nack)
    assert reply.version == refused.version
    assert "position 3: there is no operator %NO_SUCH%" in reply.error
    assert not (tmp_path / "other").exists()
    client = hops.client()
    client.send(b"GET /x HTTP/1.1\r\nHost: api\r\n\r\n")
    client.read_message()
    assert until(lambda: path.read_text()) == "HTTP/1.1\n"
    _, reply = configured(pair, hops, AccessLogConfig("otlp"))
    assert "no collector is known" in reply.error


def test_a_renamed_file_is_opened_anew_and_sigusr1_does_so_at_once(pair, tmp_path):
    hops = pair.hops()
    hops.serve()
    path = tmp_path / "access.log"
    config, reply = configured(pair, hops, AccessLogConfig(str(path), "%PROTOCOL%"))
    assert reply == Ack(config.version)

    def ask():
        client = hops.client()
        client.send(b"GET /x HTTP/1.1\r\nHost: api\r\n\r\n")
        client.read_message()

    ask()
    until(lambda: path.read_text())
    path.rename(tmp_path / "access.1")
    os.kill(pair.worker.process.pid, signal.SIGUSR1)
    ask()
    assert until(lambda: path.exists() and path.read_text()) == "HTTP/1.1\n"
    assert (tmp_path / "access.1").read_text() == "HTTP/1.1\n"


def test_a_file_that_was_moved_away_is_noticed_without_a_signal(tmp_path, monkeypatch):
    monkeypatch.setattr("agent.dataplane.log_files.RENAMED_CHECK_S", 0.0)
    path = tmp_path / "log"
    file = LineFile(str(path))
    file.write([b"one\n"])
    until(lambda: path.read_text() == "one\n")
    path.rename(tmp_path / "log.1")
    file.write([b"two\n", b"three\n"])
    until(lambda: path.exists() and path.read_text() == "two\nthree\n")
    path.unlink()
    path.mkdir()  # cannot be opened: lines go on to where they went
    file.write([b"four\n"])
    file.close(wait_s=TIMEOUT_S)
    assert file.dropped == 0
    file.write([b"late\n"])
    assert file.dropped == 1


def test_a_reader_that_stalls_costs_lines_and_never_time(tmp_path):
    path = tmp_path / "pipe"
    os.mkfifo(path)
    with pytest.raises(ConfigError, match="cannot be opened"):
        LineFile(str(path))
    reader = os.open(path, os.O_RDONLY | os.O_NONBLOCK)
    try:
        file = LineFile(str(path))
        line = b"x" * (1024 * 1024 - 1) + b"\n"
        for _ in range(QUEUED_BYTES_MAX // len(line) + 3):
            file.write([line])
        assert 3 <= file.dropped <= 4
        file.close(wait_s=0.0)
    finally:
        os.close(reader)


@pytest.fixture
def collector():
    """An OTLP/HTTP collector of logs; `statuses` are its next answers."""
    received, statuses = [], []

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_POST(self):
            request = ExportLogsServiceRequest()
            request.ParseFromString(self.rfile.read(int(self.headers["Content-Length"])))
            status = statuses.pop(0) if statuses else 200
            if status == 200:
                received.append((self.path, dict(self.headers), request))
            self.send_response(status)
            self.send_header("Content-Length", "0")
            self.end_headers()

        def log_message(self, *arguments):
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}", received, statuses
    server.shutdown()
    server.server_close()


def test_lines_reach_a_collector_with_the_ids_of_their_span(pair, collector):
    endpoint, received, _ = collector
    hops = pair.hops()
    hops.serve()
    log = AccessLogConfig("otlp", "%REQ(:PATH)%")
    config, reply = configured(pair, hops, log, tracing_endpoint=endpoint, trace_sampling=0.0)
    assert reply == Ack(config.version)
    client = hops.client()
    trace = b"0af7651916cd43dd8448eb211c80319c"
    client.send(b"GET /a HTTP/1.1\r\nHost: api\r\ntraceparent: 00-" + trace + b"-b7ad6b7169203331-01\r\n\r\n")
    client.read_message()
    client.send(b"GET /b HTTP/1.1\r\nHost: api\r\n\r\n")
    client.read_message()
    records = until(
        lambda: (
            len(
                found := [
                    record
                    for path, _, request in received
                    if path == "/v1/logs"
                    for resource in request.resource_logs
                    for scope in resource.scope_logs
                    for record in scope.log_records
                ]
            )
            == 2
            and found
        )
    )
    assert [record.body.string_value for record in records] == ["/a", "/b"]
    assert records[0].trace_id.hex() == trace.decode()
    assert len(records[0].span_id) == 8
    assert records[1].trace_id == b""
    assert abs(records[0].time_unix_nano / 1e9 - time.time()) < 60


def test_a_collector_that_is_away_for_a_moment_gets_everything(collector, monkeypatch):
    monkeypatch.setattr("agent.dataplane.otlp.RETRY_PAUSES_S", (0.001, 0.001))
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_HEADERS", "X-Key=a%20b,,bad")
    endpoint, received, statuses = collector
    statuses += [503, 429]
    sender = OtlpSender(endpoint + "/", "/v1/logs", lambda entries: encode_logs(entries, hostname="h"))
    sender.put([LogEntry(1, b"kept")])
    until(lambda: received)
    statuses += [400]  # it will not take this one at any time
    sender.put([LogEntry(1, b"refused"), LogEntry(2, b"refused")])
    until(lambda: sender.dropped == 2)
    sender.put([LogEntry(1, b"last")])
    sender.close(wait_s=TIMEOUT_S)
    assert [len(request.resource_logs[0].scope_logs[0].log_records) for _, _, request in received] == [1, 1]
    assert received[0][1]["x-key"] == "a b"
    assert headers_from_environment() == {"x-key": "a b"}


def test_a_collector_that_does_not_keep_up_costs_entries(monkeypatch):
    monkeypatch.setattr("agent.dataplane.otlp.RETRY_PAUSES_S", ())
    started, go_on = threading.Event(), threading.Event()

    def encode(items):
        started.set()
        go_on.wait(TIMEOUT_S)
        return b""

    sender = OtlpSender("http://127.0.0.1:1", "/v1/logs", encode)
    sender.put([1])
    started.wait(TIMEOUT_S)
    for _ in range(BATCHES_MAX):
        sender.put([1, 2])
    assert sender.dropped == 0
    sender.put([1, 2, 3])
    assert sender.dropped == 3
    go_on.set()
    until(lambda: sender.dropped == 3 + 1 + 2 * BATCHES_MAX)  # nobody listens there
    sender.close(wait_s=TIMEOUT_S)


def test_logs_share_files_and_an_abandoned_configuration_leaves_nothing(tmp_path):
    logs = AccessLogs(time.monotonic, Surroundings())
    text, other = AccessLogConfig(str(tmp_path / "a"), "x"), AccessLogConfig(str(tmp_path / "a"), "y")
    logs.commit(logs.prepare([text, other, AccessLogConfig()], otlp_endpoint=""))
    first = logs.get(text)
    assert first is not None
    assert first is not logs.get(other)
    assert logs.get(AccessLogConfig()) is None
    logs.abandon(logs.prepare([AccessLogConfig(str(tmp_path / "b"))], otlp_endpoint=""))
    with pytest.raises(ConfigError, match="format cannot be used"):
        logs.prepare([AccessLogConfig(str(tmp_path / "c")), AccessLogConfig("z", "%X%")], otlp_endpoint="")
    logs.commit(logs.prepare([text], otlp_endpoint=""))
    assert logs.get(text) is first
    assert logs.get(other) is None
    logs.close()
    assert logs.dropped == 0
