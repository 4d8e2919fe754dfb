"""KV puts a second over HTTP, 64 connections, three servers on this machine: Mesh against etcd's JSON gateway."""

import re
import shutil
import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path

from benchmarks.processes import etcd_servers, fdatasync_ms, mesh_servers

CONNECTIONS = 64
SECONDS = 8
ROUNDS = 2

_MESH_LUA = """
local n = 0
request = function()
  n = n + 1
  return wrk.format("PUT", "/v1/kv/bench/" .. (n % 10000), nil, string.rep("x", 100))
end
"""

# Keys and values of etcd's gateway are base64: 8 characters for the key, 136 for 100 bytes.
_ETCD_LUA = """
local n = 0
local value = string.rep("eHh4", 33) .. "eA=="
request = function()
  n = n + 1
  local key = string.format("%08d", n % 10000)
  return wrk.format("POST", "/v3/kv/put", nil, '{"key":"' .. key .. '","value":"' .. value .. '"}')
end
"""


@dataclass(frozen=True)
class Result:
    """Requests a second, latencies in milliseconds, answers that were not 2xx."""

    rate: float
    p50_ms: float
    p99_ms: float
    failed: int


def load(url: str, script: str, folder: Path, seconds: int = SECONDS) -> Result:
    """Runs wrk with the script against the URL."""
    wrk = shutil.which("wrk")
    if wrk is None:
        raise FileNotFoundError("wrk is not installed (Debian package wrk)")
    path = folder / "load.lua"
    path.write_text(script)
    command = [wrk, "-t1", f"-c{CONNECTIONS}", f"-d{seconds}s", "--latency", "-s", str(path), url]
    output = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    rate = re.search(r"Requests/sec:\s+([\d.]+)", output)
    failed = re.search(r"Non-2xx or 3xx responses: (\d+)", output)
    assert rate is not None, output
    return Result(
        float(rate[1]), _milliseconds(output, "50%"), _milliseconds(output, "99%"), int(failed[1]) if failed else 0
    )


def _milliseconds(output: str, percentile: str) -> float:
    found = re.search(rf"{percentile}\s+([\d.]+)(us|ms|s)", output)
    assert found is not None, output
    return float(found[1]) * {"us": 0.001, "ms": 1.0, "s": 1000.0}[found[2]]


def main() -> None:
    """Prints the table, and the ratio of the better of two interleaved rounds."""
    best: dict[str, Result] = {}
    with tempfile.TemporaryDirectory(prefix="mesh-bench-") as name:
        folder = Path(name)
        print(
            f"KV puts, {CONNECTIONS} connections, 3 servers, 100-byte values; fdatasync {fdatasync_ms(folder):.2f} ms"
        )
        print(f"{'':10}{'puts/s':>10}{'p50 ms':>10}{'p99 ms':>10}{'failed':>10}")
        for round_number in range(ROUNDS):
            for peer, servers, script in (("mesh", mesh_servers, _MESH_LUA), ("etcd", etcd_servers, _ETCD_LUA)):
                place = folder / f"{peer}-{round_number}"
                place.mkdir()
                with servers(place) as urls:
                    load(urls[0], script, place, seconds=1)
                    result = load(urls[0], script, place)
                print(f"{peer:10}{result.rate:10.0f}{result.p50_ms:10.1f}{result.p99_ms:10.1f}{result.failed:10}")
                if peer not in best or result.rate > best[peer].rate:
                    best[peer] = result
    print(f"mesh / etcd: {best['mesh'].rate / best['etcd'].rate:.2f} of its rate")


if __name__ == "__main__":
    main()
