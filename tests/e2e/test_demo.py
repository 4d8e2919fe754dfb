"""The demo is the main job: if any promise of it fails, so does its status; and it leaves nothing behind."""

import contextlib
import os
import signal
import socket
import subprocess
import sys
import uuid
from pathlib import Path

import pytest

pytestmark = pytest.mark.e2e

_COMMAND = [sys.executable, "-m", "agent", "demo", "-once"]
_ROOT = Path(__file__).parents[2]


def _left_behind(mark: str) -> list[str]:
    found = []
    for process in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            if mark.encode() in (process / "environ").read_bytes():
                found.append((process / "cmdline").read_text())
    return found


def test_the_demo_shows_everything_it_promises_and_leaves_nothing_behind() -> None:
    mark = uuid.uuid4().hex
    result = subprocess.run(
        _COMMAND,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=120,
        cwd=_ROOT,
        env={**os.environ, "MARK": mark},
    )
    assert result.returncode == 0, result.stdout + result.stderr
    assert "403 'RBAC: access denied'" in result.stdout
    assert "failed: 0" in result.stdout
    assert _left_behind(mark) == []


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_a_demo_that_is_interrupted_says_so_and_leaves_nothing_behind(number: signal.Signals) -> None:
    mark = uuid.uuid4().hex
    with subprocess.Popen(
        _COMMAND,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        cwd=_ROOT,
        env={**os.environ, "MARK": mark, "PYTHONUNBUFFERED": "1"},
    ) as demo:
        assert demo.stdout is not None
        assert "Starting three server agents" in demo.stdout.readline()
        demo.send_signal(number)
        output, _ = demo.communicate(timeout=60)
    assert demo.returncode == 128 + number
    assert "Stopped before the end." in output
    assert _left_behind(mark) == []


def test_a_demo_that_cannot_have_its_ports_ends_with_the_reason() -> None:
    with contextlib.ExitStack() as stack:
        for port in range(18500, 19500, 100):
            held = stack.enter_context(socket.socket())
            with contextlib.suppress(OSError):  # another demo has it: as good
                held.bind(("127.0.0.1", port))
                held.listen()
        result = subprocess.run(
            _COMMAND, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=60, cwd=_ROOT
        )
    assert result.returncode == 1
    assert "The demo failed: no free block of ports from 18500 to 19500" in result.stderr
