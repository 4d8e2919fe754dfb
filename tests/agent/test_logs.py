"""Log lines: their form, and that a reader who does not read never makes the agent wait."""

import json
import logging
import os
import time

from agent import logs
from agent.logs import JsonFormatter, LineWriter, TextFormatter, logging_to_stdout


def record(level: int, text: str) -> logging.LogRecord:
    made = logging.LogRecord("mesh.raft", level, "", 0, text, (), None)
    made.created, made.msecs = 1_000_000.25, 250.0
    return made


def test_log_lines():
    assert TextFormatter().format(record(logging.WARNING, "x")) == "1970-01-12T13:46:40.250Z [WARN]  raft: x"
    assert json.loads(JsonFormatter().format(record(logging.INFO, 'say "x"\n'))) == {
        "@level": "info",
        "@message": 'say "x"\n',
        "@module": "raft",
        "@timestamp": "1970-01-12T13:46:40.250Z",
    }


def test_lines_reach_standard_output_in_order(capfd):
    with logging_to_stdout("INFO", as_json=False) as output:
        logging.getLogger("mesh.part").info("first %d", 1)
        output.write("second")
        logging.getLogger("mesh.part").debug("below the level")
    logging.getLogger("mesh.part").info("after the end")
    lines = capfd.readouterr().out.splitlines()
    assert [line.rpartition("Z ")[2] for line in lines] == ["[INFO]  part: first 1", "second"]


def test_a_reader_that_does_not_read_costs_lines_not_time(monkeypatch):
    monkeypatch.setattr(logs, "FLUSH_S", 0.05)
    monkeypatch.setattr(logs, "LINES_MAX", 100)
    reader, writer = os.pipe()
    lines = LineWriter(writer)
    started = time.monotonic()
    for number in range(1000):
        lines.write(f"{number} " + "x" * 10_000)
    lines.close()
    assert time.monotonic() - started < 2
    received = b""
    while b"were dropped" not in received:
        received += os.read(reader, 1 << 20)
    assert received.startswith(b"0 xxx")
    os.close(reader)


def test_words_of_others_cannot_forge_lines_or_speak_to_a_terminal():
    line = TextFormatter().format(record(logging.INFO, "node a\n2026 [ERROR] forged \x1b[2J\x9b2J \x00 bücher"))
    assert line.endswith(r"raft: node a\x0a2026 [ERROR] forged \x1b[2J\x9b2J \x00 bücher")
