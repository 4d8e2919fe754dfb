"""What agents and workers cost when nothing happens, and how fast they come and go.

Three servers and two clients with a service each and a sidecar, idle for `--seconds`; then starts and stops.
Run: `python -m benchmarks.footprint [--seconds 20]`.
"""

import argparse
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from meshed import meshed
from processes import AgentProcess, cpu_seconds, rss_mib, wait_until

SETTLE_S = 5.0


def idle(seconds: float) -> list[tuple[str, float, float, float]]:
    """Rows of name, share of one core in percent, MiB, and the bar for the latter."""
    with tempfile.TemporaryDirectory() as name, meshed(Path(name)) as mesh:
        time.sleep(SETTLE_S)
        leader = mesh.cluster.leader()
        processes = {
            "server, leader": (leader.running.pid, 70.0),
            "server, follower": (next(one for one in mesh.cluster.servers if one is not leader).running.pid, 70.0),
            "client": (mesh.web.running.pid, 70.0),
            "worker": (mesh.web.worker_pid(), 45.0),
        }
        before = {label: cpu_seconds(pid) for label, (pid, _) in processes.items()}
        time.sleep(seconds)
        return [
            (label, (cpu_seconds(pid) - before[label]) / seconds * 100, rss_mib(pid), bar)
            for label, (pid, bar) in processes.items()
        ]


def version_ms() -> float:
    started = time.monotonic()
    subprocess.run([Path(sys.executable).with_name("mesh"), "version"], check=True, capture_output=True)
    return (time.monotonic() - started) * 1000


def dev_s() -> float:
    """From start until a write succeeds."""
    with tempfile.TemporaryDirectory() as name:
        agent = AgentProcess("dev", Path(name), "-dev")
        started = time.monotonic()
        agent.start()
        try:
            wait_until(agent.writes)
            return time.monotonic() - started
        finally:
            agent.kill()


def stop_s(number: signal.Signals) -> tuple[float, float]:
    """Seconds that the leader and a client with traffic behind it need to end."""
    with tempfile.TemporaryDirectory() as name, meshed(Path(name)) as mesh:
        times = []
        for agent in (mesh.cluster.leader(), mesh.cluster.clients[1]):
            started = time.monotonic()
            assert agent.stop(number, timeout_s=30.0) == 0
            times.append(time.monotonic() - started)
        return times[0], times[1]


def main(arguments=()):
    """Prints the table; 0 when every bar is met."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seconds", type=float, default=20.0)
    seconds = parser.parse_args(list(arguments)).seconds
    met = True
    print(f"{'idle':20}{'% of a core':>14}{'MiB':>8}{'bar':>8}")
    for label, share, mib, bar in idle(seconds):
        print(f"{label:20}{share:>14.2f}{mib:>8.1f}{bar:>8.0f}")
        met = met and mib < bar and share < 1.0
    version, dev = statistics.median(version_ms() for _ in range(9)), statistics.median(dev_s() for _ in range(3))
    print(f"mesh version: {version:.0f} ms (bar 150); -dev until a write succeeds: {dev:.2f} s (bar 1)")
    met = met and version < 150 and dev < 1.0
    for number in (signal.SIGTERM, signal.SIGINT):
        server, client = stop_s(number)
        print(f"{number.name}: the leader ends after {server:.1f} s, a client after {client:.1f} s (bar 10)")
        met = met and max(server, client) < 10
    print(f"bars: {'met' if met else 'NOT met'}")
    return 0 if met else 1


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
