"""The examples are run as their readers would run them."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = [pytest.mark.e2e, pytest.mark.interop]

_VM = Path(__file__).parents[2] / "examples" / "vm"
_TOOLS = ("ip", "curl", "bash")


@pytest.mark.skipif(
    not os.environ.get("CI") and (os.geteuid() != 0 or not all(map(shutil.which, _TOOLS))),
    reason="needs root, iproute2 and curl for network namespaces",
)
def test_five_hosts_become_an_encrypted_mesh() -> None:
    result = subprocess.run(
        [str(_VM / "on-namespaces")],
        env={**os.environ, "MESH": str(Path(sys.executable).with_name("mesh"))},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=180,
    )
    assert result.returncode == 0, result.stdout + result.stderr
    assert "All of it held" in result.stdout


@pytest.mark.skipif(
    not os.environ.get("CI") and shutil.which("systemd-analyze") is None, reason="needs systemd-analyze"
)
def test_the_systemd_unit_is_valid(tmp_path: Path) -> None:
    unit = tmp_path / "mesh.service"
    unit.write_text((_VM / "mesh.service").read_text().replace("/opt/mesh/bin/mesh", sys.executable))
    result = subprocess.run(["systemd-analyze", "verify", str(unit)], capture_output=True, text=True, timeout=60)
    assert result.returncode == 0, result.stderr
    assert "Unknown" not in result.stderr
