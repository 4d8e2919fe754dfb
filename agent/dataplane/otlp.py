"""Telemetry to an OTLP/HTTP collector (OpenTelemetry Protocol 1.x, protobuf), by a thread with a bounded queue.

Spans go through the SDK (tracing.py). Logs and metrics are encoded here: the SDK's logs are not public yet, and its
metrics keep a second set of counters. Nothing of OpenTelemetry is imported before the first batch.
"""

import logging
import os
import queue
import threading
import time
from collections.abc import Callable, Sequence
from typing import Generic, TypeVar

import msgspec

_LOG = logging.getLogger("mesh.dataplane")

BATCHES_MAX = 64  # waiting; when the collector does not keep up, further ones are dropped and counted
SEND_TIMEOUT_S = 10.0
RETRY_PAUSES_S = (0.5, 2.0)  # for what a collector may take at another time: 429, 502, 503, 504, no connection
FAILURE_LOG_INTERVAL_S = 60.0
_RETRIABLE = frozenset((429, 502, 503, 504))

ItemT = TypeVar("ItemT")


class LogEntry(msgspec.Struct, frozen=True, gc=False):
    """One access log line, without its line feed. IDs are 0 when the request is in no recorded trace."""

    unix_ns: int
    line: bytes
    trace_id: int = 0
    span_id: int = 0


def headers_from_environment() -> dict[str, str]:
    """OTEL_EXPORTER_OTLP_HEADERS: `name=value` pairs, comma-separated, values percent-encoded."""
    from urllib.parse import unquote

    pairs = (pair.partition("=") for pair in os.environ.get("OTEL_EXPORTER_OTLP_HEADERS", "").split(","))
    return {name.strip().lower(): unquote(value.strip()) for name, equals, value in pairs if equals and name.strip()}


class OtlpSender(Generic[ItemT]):
    """Batches to one path of a collector. `put` never waits."""

    def __init__(self, endpoint: str, path: str, encode: Callable[[Sequence[ItemT]], bytes]) -> None:
        """`endpoint` is the collector's base URL, `path` the signal's (`/v1/logs`)."""
        self._url = endpoint.rstrip("/") + path
        self._encode = encode
        self._queue: queue.Queue[Sequence[ItemT] | None] = queue.Queue(BATCHES_MAX)
        self._overflowed = 0
        self._failed = 0
        self._ending = threading.Event()
        self._failure_logged_at = float("-inf")
        self._thread: threading.Thread | None = None

    @property
    def dropped(self) -> int:
        """Items that never reached the collector."""
        return self._overflowed + self._failed

    def put(self, items: Sequence[ItemT]) -> None:
        """Hands over one batch."""
        if self._thread is None:
            self._thread = threading.Thread(target=self._run, name="otlp", daemon=True)
            self._thread.start()
        try:
            self._queue.put_nowait(items)
        except queue.Full:
            self._overflowed += len(items)

    def close(self, *, wait_s: float) -> None:
        """Sends the rest, for `wait_s` at most. Called once."""
        if self._thread is None:
            return
        self._ending.set()
        try:
            self._queue.put_nowait(None)
        except queue.Full:
            return  # the thread ends with the process
        self._thread.join(wait_s)

    # ---- the sender's thread

    def _run(self) -> None:
        import httpx

        headers = {**headers_from_environment(), "content-type": "application/x-protobuf"}
        with httpx.Client(timeout=SEND_TIMEOUT_S, headers=headers, trust_env=False) as client:
            while (items := self._queue.get()) is not None:
                try:
                    reason = self._send(client, self._encode(items))
                except Exception as error:  # an odd value must not end the export for good
                    reason = repr(error)
                if reason:
                    self._failed += len(items)
                    self._complain(reason)

    def _send(self, client: "httpx.Client", data: bytes) -> str:  # type: ignore[name-defined]  # noqa: F821
        """Why the collector does not have it, or empty."""
        import httpx

        reason = ""
        for pause_s in (*RETRY_PAUSES_S, 0.0):
            try:
                response = client.post(self._url, content=data)
            except httpx.HTTPError as error:
                reason = str(error) or type(error).__name__
            else:
                if response.is_success:
                    return ""
                reason = f"it answered {response.status_code}"
                if response.status_code not in _RETRIABLE:
                    return reason
            if not pause_s or self._ending.wait(pause_s):
                break
        return reason

    def _complain(self, reason: str) -> None:
        now = time.monotonic()
        if now - self._failure_logged_at >= FAILURE_LOG_INTERVAL_S:
            self._failure_logged_at = now
            _LOG.warning("%s does not take our telemetry: %s; what it refuses is dropped", self._url, reason)


def encode_logs(entries: Sequence[LogEntry], *, hostname: str) -> bytes:
    """An ExportLogsServiceRequest."""
    from opentelemetry.proto.collector.logs.v1.logs_service_pb2 import ExportLogsServiceRequest
    from opentelemetry.proto.logs.v1.logs_pb2 import SEVERITY_NUMBER_INFO

    request = ExportLogsServiceRequest()
    resource_logs = request.resource_logs.add()
    for name, text in (("service.name", "mesh"), ("host.name", hostname)):
        attribute = resource_logs.resource.attributes.add()
        attribute.key = name
        attribute.value.string_value = text
    scope = resource_logs.scope_logs.add()
    scope.scope.name = "mesh.access_log"
    now_ns = time.time_ns()
    for entry in entries:
        record = scope.log_records.add()
        record.time_unix_nano = entry.unix_ns
        record.observed_time_unix_nano = now_ns
        record.severity_number = SEVERITY_NUMBER_INFO
        record.body.string_value = entry.line.decode("ascii", "backslashreplace")
        if entry.trace_id:
            record.trace_id = entry.trace_id.to_bytes(16, "big")
            record.span_id = entry.span_id.to_bytes(8, "big")
    data: bytes = request.SerializeToString()
    return data
