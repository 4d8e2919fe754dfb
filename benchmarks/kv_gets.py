"""KV gets a second over HTTP at the leader of three servers, 64 connections: default, stale and consistent reads."""

import tempfile
from pathlib import Path

from benchmarks.kv_puts import CONNECTIONS, Result, load
from benchmarks.processes import fetch, mesh_servers

ROUNDS = 2
SECONDS = 5
VALUE = b"x" * 100
MODES = {"default": "", "stale": "?stale", "consistent": "?consistent"}

_LUA = """
request = function()
  return wrk.format("GET", "/v1/kv/bench/key%s")
end
"""


def main() -> None:
    """Prints the table, and what each mode reaches of the default one in the better of two interleaved rounds."""
    best: dict[str, Result] = {}
    with tempfile.TemporaryDirectory(prefix="mesh-bench-") as name:
        folder = Path(name)
        print(f"KV gets at the leader of 3 servers, {CONNECTIONS} connections, {len(VALUE)}-byte value")
        print(f"{'':12}{'gets/s':>10}{'p50 ms':>10}{'p99 ms':>10}{'failed':>10}")
        with mesh_servers(folder) as urls:
            fetch(f"{urls[0]}/v1/kv/bench/key", method="PUT", body=VALUE)
            for _ in range(ROUNDS):
                for mode, query in MODES.items():
                    result = load(urls[0], _LUA % query, folder, seconds=SECONDS)
                    print(f"{mode:12}{result.rate:10.0f}{result.p50_ms:10.1f}{result.p99_ms:10.1f}{result.failed:10}")
                    if mode not in best or result.rate > best[mode].rate:
                        best[mode] = result
    for mode in ("stale", "consistent"):
        print(f"{mode} / default: {best[mode].rate / best['default'].rate:.2f} of its rate")


if __name__ == "__main__":
    main()
