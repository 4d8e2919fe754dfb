"""The demo is the main job: if any promise of it fails, so does its status."""

import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.e2e


def test_the_demo_shows_everything_it_promises() -> None:
    result = subprocess.run(
        [sys.executable, "-m", "agent", "demo", "-once"],
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=120,
        cwd=Path(__file__).parents[2],
    )
    assert result.returncode == 0, result.stdout + result.stderr
    assert "403 'RBAC: access denied'" in result.stdout
    assert "failed: 0" in result.stdout
