"""Log lines: how they look, and how they leave the process without ever making it wait.

A terminal that was stopped with Ctrl-S, or a log collector that hangs, must not stop the agent's loop: gossip would
take it for dead. So a thread of its own writes, and when it falls too far behind, lines are dropped and counted.
"""

import json
import logging
import os
import threading
import time
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager

LINES_MAX = 10_000
FLUSH_S = 1.0  # at the end of the process, for a reader that does not read

TRACE = 5
_LEVELS = {
    "TRACE": TRACE,
    "DEBUG": logging.DEBUG,
    "INFO": logging.INFO,
    "WARN": logging.WARNING,
    "ERROR": logging.ERROR,
}
_NAMES = {number: name for name, number in _LEVELS.items()}


# Names, reasons and peers' words come from other hosts: none of them may begin a line or speak to a terminal.
_ESCAPES = {number: f"\\x{number:02x}" for number in (*range(0x20), *range(0x7F, 0xA0))}


def _stamp(record: logging.LogRecord) -> str:
    whole = time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(record.created))
    return f"{whole}.{int(record.msecs):03d}Z"


class TextFormatter(logging.Formatter):
    """`2026-01-02T03:04:05.678Z [INFO]  part: message`, as Consul lines look."""

    def format(self, record: logging.LogRecord) -> str:
        level = f"[{_NAMES.get(record.levelno, record.levelname)}]"
        text = f"{_stamp(record)} {level:<7} {record.name.removeprefix('mesh.')}: "
        text += record.getMessage().translate(_ESCAPES)
        if record.exc_info:
            text += "\n" + self.formatException(record.exc_info)
        return text


class JsonFormatter(logging.Formatter):
    """One JSON object a line, with hclog's keys."""

    def format(self, record: logging.LogRecord) -> str:
        fields = {
            "@level": _NAMES.get(record.levelno, record.levelname).lower(),
            "@message": record.getMessage(),
            "@module": record.name.removeprefix("mesh."),
            "@timestamp": _stamp(record),
        }
        if record.exc_info:
            fields["error"] = self.formatException(record.exc_info)
        return json.dumps(fields)


class LineWriter:
    """Writes lines to a file descriptor from a thread of its own. `write` never waits."""

    def __init__(self, descriptor: int) -> None:
        self._descriptor = descriptor
        self._lines: deque[str] = deque()
        self._changed = threading.Condition()
        self._is_idle = True
        self._is_closed = False
        self._dropped = 0
        self._thread = threading.Thread(target=self._run, name="log-writer", daemon=True)
        self._thread.start()

    def write(self, text: str) -> None:
        """Hands over a line (or several); drops it when LINES_MAX wait already."""
        with self._changed:
            if len(self._lines) >= LINES_MAX:
                self._dropped += 1
                return
            self._lines.append(text)
            self._is_idle = False
            self._changed.notify_all()

    def close(self) -> None:
        """Waits until all is written, FLUSH_S at most."""
        with self._changed:
            self._changed.wait_for(lambda: self._is_idle, timeout=FLUSH_S)
            self._is_closed = True
            self._changed.notify_all()

    def _run(self) -> None:
        while True:
            with self._changed:
                if not self._lines:
                    self._is_idle = True
                    self._changed.notify_all()
                self._changed.wait_for(lambda: self._lines or self._is_closed)
                if not self._lines:
                    return
                lines = list(self._lines)
                self._lines.clear()
                if self._dropped:
                    lines.append(f"[{self._dropped} log lines were dropped: nobody read them in time]")
                    self._dropped = 0
            data = memoryview("".join(f"{line}\n" for line in lines).encode("utf-8", "backslashreplace"))
            try:
                while data:
                    data = data[os.write(self._descriptor, data) :]
            except OSError:
                continue  # the reader is gone; the agent is not


class _Handler(logging.Handler):
    def __init__(self, writer: LineWriter) -> None:
        super().__init__()
        self._writer = writer

    def emit(self, record: logging.LogRecord) -> None:
        try:
            self._writer.write(self.format(record))
        except Exception:
            self.handleError(record)


@contextmanager
def logging_to_stdout(level: str, *, as_json: bool) -> Iterator[LineWriter]:
    """Has the agent's log go to standard output, where Consul's goes, while open: text or JSON, from `level` up.

    Gives the writer, for what is no log line and must come in order with them.
    """
    writer = LineWriter(1)
    handler = _Handler(writer)
    handler.setFormatter(JsonFormatter() if as_json else TextFormatter())
    logger = logging.getLogger("mesh")
    former_level = logger.level
    logger.addHandler(handler)
    logger.setLevel(_LEVELS[level])
    try:
        yield writer
    finally:
        logger.removeHandler(handler)
        logger.setLevel(former_level)
        writer.close()
