"""Access logs: lines are made when a request ends, and handed in batches to whoever writes them."""

import os
import socket
import time
from collections.abc import Callable, Iterable
from functools import partial
from typing import Protocol

import msgspec

from agent.dataplane.log_files import LineFile
from agent.dataplane.otlp import LogEntry, OtlpSender, encode_logs
from mesh.errors import ConfigError
from mesh.proxy.access_log.formats import Line, compile_log
from mesh.proxy.access_log.record import LoggedExchange, Surroundings
from mesh.proxy.sidecar_config import AccessLogConfig
from mesh.proxy.trace_context import TraceContext

BATCH_LINES = 256  # then they are handed over at once; otherwise when the worker flushes, once a second
LAST_LINES_S = 2.0  # for what is still queued when a log is closed
OTLP = "otlp"

Clock = Callable[[], float]


def surroundings() -> Surroundings:
    """This process's, for HOSTNAME and ENVIRONMENT."""
    return Surroundings(socket.gethostname(), dict(os.environ))


class TracedExchange(LoggedExchange, Protocol):
    """With the span that it is recorded as, if any."""

    @property
    def context(self) -> object: ...


class AccessLog:
    """One format to one destination. `add` is on the path of every request."""

    def __init__(self, line: Line, clock: Clock) -> None:
        """`clock` is the reactor's."""
        self._line = line
        self._clock = clock
        self._offset_s = time.time() - clock()

    def add(self, exchange: TracedExchange, ended_at: float) -> None:
        """One request that is over; `ended_at` is the reactor's time."""
        raise AssertionError("a log has a destination")

    def flush(self) -> None:
        """Hands over what there is."""
        # The system's clock may have been set: what ends from now on is stamped with its new time.
        self._offset_s = time.time() - self._clock()


class FileLog(AccessLog):
    """To a file or stream."""

    def __init__(self, line: Line, clock: Clock, file: LineFile) -> None:
        super().__init__(line, clock)
        self._file = file
        self._lines: list[bytes] = []

    def add(self, exchange: TracedExchange, ended_at: float) -> None:
        """AccessLog's."""
        lines = self._lines
        lines.append(self._line(exchange, ended_at, self._offset_s))
        if len(lines) >= BATCH_LINES:
            self.flush()

    def flush(self) -> None:
        """AccessLog's."""
        super().flush()
        if self._lines:
            lines, self._lines = self._lines, []
            self._file.write(lines)


class OtlpLog(AccessLog):
    """To a collector; a recorded span's IDs go with its line."""

    def __init__(self, line: Line, clock: Clock, sender: OtlpSender[LogEntry]) -> None:
        super().__init__(line, clock)
        self._sender = sender
        self._entries: list[LogEntry] = []

    def add(self, exchange: TracedExchange, ended_at: float) -> None:
        """AccessLog's."""
        unix_ns = int((exchange.started_at + self._offset_s) * 1e9)
        line = self._line(exchange, ended_at, self._offset_s)[:-1]
        context = exchange.context
        if isinstance(context, TraceContext):
            self._entries.append(LogEntry(unix_ns, line, context.trace_id, context.span_id))
        else:
            self._entries.append(LogEntry(unix_ns, line))
        if len(self._entries) >= BATCH_LINES:
            self.flush()

    def flush(self) -> None:
        """AccessLog's."""
        super().flush()
        if self._entries:
            entries, self._entries = self._entries, []
            self._sender.put(entries)


class _Prepared(msgspec.Struct):
    """What a configuration needs that there is not yet."""

    wanted: frozenset[AccessLogConfig]
    logs: dict[AccessLogConfig, AccessLog]
    files: dict[str, LineFile]
    sender: OtlpSender[LogEntry] | None
    endpoint: str


class AccessLogs:
    """All logs of one worker. A configuration is prepared first, and then either committed or abandoned."""

    def __init__(self, clock: Clock, around: Surroundings) -> None:
        """`clock` is the reactor's."""
        self._clock = clock
        self._around = around
        self._logs: dict[AccessLogConfig, AccessLog] = {}
        self._files: dict[str, LineFile] = {}
        self._sender: OtlpSender[LogEntry] | None = None
        self._endpoint = ""
        self._lost = 0  # by destinations that are closed by now

    def prepare(self, configs: Iterable[AccessLogConfig], *, otlp_endpoint: str) -> _Prepared:
        """Compiles formats and opens destinations that are new. Raises ConfigError, with nothing left open."""
        wanted = frozenset(config for config in configs if config.path)
        if otlp_endpoint != self._endpoint:
            renewed = frozenset(config for config in wanted if config.path == OTLP)
        else:
            renewed = frozenset()
        prepared = _Prepared(wanted, {}, {}, None, otlp_endpoint)
        try:
            for config in sorted(wanted - (self._logs.keys() - renewed), key=repr):
                prepared.logs[config] = self._open(config, prepared)
        except ConfigError:
            self.abandon(prepared)
            raise
        return prepared

    def _open(self, config: AccessLogConfig, prepared: _Prepared) -> AccessLog:
        try:
            line = compile_log(config.text_format, config.json_format, self._around)
        except ConfigError as error:
            raise ConfigError(f"the access log's format cannot be used: {error}") from error
        if config.path == OTLP:
            return OtlpLog(line, self._clock, self._collector(prepared))
        file = self._files.get(config.path) or prepared.files.get(config.path)
        if file is None:
            file = prepared.files[config.path] = LineFile(config.path)
        return FileLog(line, self._clock, file)

    def _collector(self, prepared: _Prepared) -> OtlpSender[LogEntry]:
        if prepared.sender is not None:
            return prepared.sender
        if self._sender is not None and prepared.endpoint == self._endpoint:
            return self._sender
        if not prepared.endpoint:
            raise ConfigError("the access log goes to OTLP, but no collector is known; set OTEL_EXPORTER_OTLP_ENDPOINT")
        encode = partial(encode_logs, hostname=self._around.hostname)
        prepared.sender = OtlpSender(prepared.endpoint, "/v1/logs", encode)
        return prepared.sender

    def commit(self, prepared: _Prepared) -> None:
        """From now on these are the logs; what is no longer wanted is written out and closed."""
        former = self._logs
        self._logs = {config: log for config, log in former.items() if config in prepared.wanted} | prepared.logs
        kept = set(map(id, self._logs.values()))
        for log in former.values():
            if id(log) not in kept:
                log.flush()
        self._files.update(prepared.files)
        for path in self._files.keys() - {config.path for config in prepared.wanted}:
            self._retire(self._files.pop(path))
        if prepared.sender is not None or not any(config.path == OTLP for config in prepared.wanted):
            if self._sender is not None:
                self._retire(self._sender)
            self._sender = prepared.sender
        self._endpoint = prepared.endpoint

    def _retire(self, destination: LineFile | OtlpSender[LogEntry]) -> None:
        destination.close(wait_s=0.0)  # its thread writes the rest: a new configuration waits for nobody's disk
        self._lost += destination.dropped

    def abandon(self, prepared: _Prepared) -> None:
        """The configuration is not used after all."""
        for file in prepared.files.values():
            file.close(wait_s=0.0)

    def get(self, config: AccessLogConfig) -> AccessLog | None:
        """The log of a configuration that is committed; None when it has none."""
        return self._logs.get(config)

    def flush(self) -> None:
        """Hands over what has been collected: once a second."""
        for log in self._logs.values():
            log.flush()

    def reopen(self) -> None:
        """Opens every file anew before its next line."""
        for file in self._files.values():
            file.reopen()

    def close(self) -> None:
        """Writes what there is, for LAST_LINES_S at most."""
        self.flush()
        for file in self._files.values():
            file.close(wait_s=LAST_LINES_S)
        if self._sender is not None:
            self._sender.close(wait_s=LAST_LINES_S)
        self._logs, self._files, self._sender = {}, {}, None

    @property
    def dropped(self) -> int:
        """Lines that nobody will read, since the start."""
        sender = self._sender.dropped if self._sender is not None else 0
        return self._lost + sender + sum(file.dropped for file in self._files.values())
