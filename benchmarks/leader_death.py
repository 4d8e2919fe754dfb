"""The leader of three servers is killed with SIGKILL under sidecar traffic: who notices, and for how long.

Needs no peer. Run: `python -m benchmarks.leader_death [--rounds 5]`.
"""

import argparse
import statistics
import sys
import tempfile
import time
from pathlib import Path

from meshed import TO_API, Meshed, meshed
from peers import Load

REQUESTS_PER_S = 500
AFTER_S = 2.0


def one_round(mesh: Meshed) -> tuple[float, float, int, int]:
    """Seconds until a new leader is known and until a write through a client succeeds; requests, failed ones."""
    with Load(mesh.web.address, TO_API, requests_per_s=REQUESTS_PER_S) as load:
        load.wait(REQUESTS_PER_S)
        leader = mesh.cluster.leader()
        others = [server for server in mesh.cluster.servers if server is not leader]
        leader.kill()
        killed_at = time.monotonic()
        while {server.leader() for server in others} - {server.rpc_address for server in others}:
            time.sleep(0.005)
        elected_s = time.monotonic() - killed_at
        while not mesh.web.writes():
            time.sleep(0.005)
        writes_s = time.monotonic() - killed_at
        time.sleep(AFTER_S)
        load.wait(REQUESTS_PER_S)
    return elected_s, writes_s, load.count, len(load.failures)


def main(arguments=()):
    """Prints a row per timing; 0 when no request failed and each bar is met."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=3)
    rounds = parser.parse_args(list(arguments)).rounds
    print(f"leader killed under {REQUESTS_PER_S} requests/s through two sidecars, {rounds} rounds: median and worst")
    print(f"{'timing':10}{'new leader s':>18}{'writes again s':>18}{'requests':>10}{'failed':>8}")
    met = True
    for label, flags, bar_s in (("default", (), 5.0), ("-dev", ("-dev",), 1.0)):
        results = []
        for _ in range(rounds):  # a cluster each: a server of dev mode has forgotten everything when it comes back
            with (
                tempfile.TemporaryDirectory(prefix="mesh-bench-") as name,
                meshed(Path(name), server_flags=flags) as mesh,
            ):
                results.append(one_round(mesh))
        elected, writes, requests, failed = zip(*results, strict=True)
        print(
            f"{label:10}{statistics.median(elected):>10.2f}{max(elected):>8.2f}{statistics.median(writes):>10.2f}"
            f"{max(writes):>8.2f}{sum(requests):>10}{sum(failed):>8}"
        )
        met = met and not sum(failed) and max(elected) < bar_s
    print(f"bar (no failed request; new leader within 5 s, 1 s with -dev timing): {'met' if met else 'NOT met'}")
    return 0 if met else 1


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
