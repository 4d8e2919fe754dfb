"""What the data plane's benchmarks share: one worker of ours and one Envoy with equal features, an application, load.

    client (wrk) -> outbound sidecar -> mTLS -> inbound sidecar -> application (nginx)

Each proxy holds both sidecars in one process pinned to core 0; client and application share core 1. Rounds alternate
between the two proxies, and a ratio is the median over the pairs, so that a busy machine hurts both alike.

On in both, at each hop: 50 routing rules (the last one matches), a retry policy with a per-try timeout, outlier
detection, the caller's identity checked, access log to a file, statistics, request ID and trace headers.
"""

import argparse
import re
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
import urllib.request
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(REPOSITORY), str(REPOSITORY / "tests")]

from sidecars import Authority, WorkerProcess, cpu_seconds, free_ports  # noqa: E402

from benchmarks import envoy  # noqa: E402
from mesh.model.match import NamedMatch, PathMatch, RouteMatch, StringMatch  # noqa: E402
from mesh.proxy.sidecar_config import (  # noqa: E402
    AccessLogConfig,
    EndpointConfig,
    InboundListener,
    LimitsConfig,
    OutboundListener,
    SourceRule,
    TargetConfig,
    WorkerConfig,
)
from mesh.traffic.policy import OutlierDetection, RetryPolicy  # noqa: E402
from mesh.traffic.route import Forward, RouteTable, Rule, VirtualHost, WeightedTarget  # noqa: E402

BODY = b"hello from the application behind the mesh\n"
LARGE_BYTES = 1024 * 1024
ADDRESS = "127.0.0.1"
_UNITS_MS = {"us": 0.001, "ms": 1.0, "s": 1000.0, "m": 60000.0}


@dataclass(frozen=True)
class Result:
    """One run of load against one proxy."""

    per_s: float
    p50_ms: float
    p99_ms: float
    cpu_us: float  # per request, or per MiB
    rss_mib: float
    errors: int


@dataclass(frozen=True)
class Proxies:
    """The two, serving; ports are their outbound listeners."""

    port: int
    envoy_port: int
    worker: WorkerProcess
    envoy: subprocess.Popen
    authority: Authority
    config: WorkerConfig
    envoy_inbound: int
    directory: Path


def rules(target: str) -> RouteTable:
    """As many as Envoy gets (see benchmarks/envoy.py), the last one for everything."""
    forward = Forward((WeightedTarget(target),))
    retry = RetryPolicy(("gateway-error", "connect-failure", "refused-stream"), retries=2, per_try_timeout_s=5.0)
    others = tuple(
        Rule(
            forward,
            name=f"service-{number}",
            matches=(
                RouteMatch(
                    path=PathMatch("prefix", f"/service-{number}/"),
                    headers=(NamedMatch("x-version", StringMatch("exact", f"v{number}")),),
                ),
            ),
            retry=retry,
        )
        for number in range(envoy.RULES - 1)
    )
    last = Rule(forward, name="all", matches=(RouteMatch(path=PathMatch("prefix", "/")),), retry=retry)
    return RouteTable((VirtualHost((*others, last)),))


_LIMITS = LimitsConfig(connections_max=100_000, pending_requests_max=100_000, requests_max=100_000)


def two_hops(authority, directory, *, outbound, inbound, application, protocol="http"):
    """Our configuration of the module's picture."""
    http = protocol == "http"
    target = TargetConfig(
        "api",
        (authority.spiffe_id("api"),),
        (EndpointConfig("api-1", ADDRESS, inbound),),
        limits=_LIMITS,
        outlier=OutlierDetection() if http else None,
    )
    near = OutboundListener(
        ADDRESS, outbound, target, protocol, connections_max=100_000, routes=rules("api") if http else RouteTable()
    )
    far = InboundListener(
        ADDRESS,
        inbound,
        ADDRESS,
        application,
        protocol,
        intentions=(SourceRule("web", "allow"),),
        connections_max=100_000,
        routes=rules("local_app") if http else RouteTable(),
    )
    log = AccessLogConfig(str(directory / "mesh-access.log")) if http else AccessLogConfig()
    sidecars = (
        authority.sidecar("web", outbound=[near], access_log=log),
        authority.sidecar("api", inbound=far, access_log=log),
    )
    return WorkerConfig(1, sidecars)


def envoy_two_hops(authority, directory, *, outbound, inbound, application, protocol="http"):
    """Envoy's configuration of the same."""
    near_tls = envoy.tls_context(directory, "web", peer_id=authority.spiffe_id("api"))
    far_tls = envoy.tls_context(directory, "api", peer_id=authority.spiffe_id("web"))
    if protocol == "http":
        log = directory / "envoy-access.log"
        near = envoy.http("outbound", "remote", access_log=log)
        far = envoy.http("inbound", "local", access_log=log, allowed_id=authority.spiffe_id("web"))
    else:
        near, far = envoy.tcp_proxy("outbound", "remote"), envoy.tcp_proxy("inbound", "local")
    return envoy.configuration(
        [envoy.listener("outbound", outbound, near), envoy.listener("inbound", inbound, far, tls=far_tls)],
        [
            envoy.cluster("remote", inbound, tls=near_tls, outlier=protocol == "http"),
            envoy.cluster("local", application),
        ],
    )


def one_hop(authority, directory, *, outbound, inbound, application, protocol="http"):
    """Ours: plain in, plain out."""
    http = protocol == "http"
    target = TargetConfig(
        "api",
        (),
        (EndpointConfig("api-1", ADDRESS, application),),
        limits=_LIMITS,
        outlier=OutlierDetection() if http else None,
        plain=True,
    )
    listener = OutboundListener(
        ADDRESS, outbound, target, protocol, connections_max=100_000, routes=rules("api") if http else RouteTable()
    )
    log = AccessLogConfig(str(directory / "mesh-access.log")) if http else AccessLogConfig()
    return WorkerConfig(1, (authority.sidecar("web", outbound=[listener], access_log=log),))


def envoy_one_hop(authority, directory, *, outbound, inbound, application, protocol="http"):
    """Envoy's: plain in, plain out."""
    if protocol == "http":
        near = envoy.http("outbound", "local", access_log=directory / "envoy-access.log")
    else:
        near = envoy.tcp_proxy("outbound", "local")
    return envoy.configuration(
        [envoy.listener("outbound", outbound, near)],
        [envoy.cluster("local", application, outlier=protocol == "http")],
    )


def start_application(directory, port):
    """nginx: a short answer at /, LARGE_BYTES at /large."""
    (directory / "large").write_bytes(b"x" * LARGE_BYTES)
    configuration = directory / "nginx.conf"
    configuration.write_text(
        f"daemon off; worker_processes 1; pid {directory}/nginx.pid; error_log {directory}/nginx.log;\n"
        "user root;\n"
        "events { worker_connections 16384; }\n"
        f"http {{ access_log off; keepalive_requests 1000000000; client_body_temp_path {directory}/body;\n"
        f"  proxy_temp_path {directory}/p; fastcgi_temp_path {directory}/f; uwsgi_temp_path {directory}/u;\n"
        f"  scgi_temp_path {directory}/s;\n"
        f"  server {{ listen {ADDRESS}:{port} backlog=8192; location / {{ return 200 '{BODY.decode().strip()}\\n'; }}\n"
        f"    location = /large {{ root {directory}; }} }} }}\n"
    )
    return subprocess.Popen(["taskset", "-c", "1", "nginx", "-c", str(configuration), "-p", str(directory)])


def wait_serving(port, within_s=20):
    """Until the application answers through this port."""
    deadline = time.monotonic() + within_s
    while True:
        try:
            with urllib.request.urlopen(f"http://{ADDRESS}:{port}/", timeout=5) as response:
                if response.read() == BODY:
                    return
        except OSError:
            if time.monotonic() > deadline:
                raise
        time.sleep(0.05)


@contextmanager
def serving(ours, theirs, *, application=start_application, check=wait_serving, **arguments):
    """Both proxies and the application, up and answering. `ours` and `theirs` make the configurations."""
    authority = Authority()
    outbound, inbound, envoy_outbound, envoy_inbound, application_port = free_ports(5)
    with tempfile.TemporaryDirectory() as name:
        directory = Path(name)
        directory.chmod(0o755)
        for service in ("web", "api"):
            chain, key = authority.leaf(service)
            (directory / f"{service}.crt").write_text(chain)
            (directory / f"{service}.key").write_text(key)
        (directory / "ca.crt").write_text(authority.root.root_cert_pem)
        config = ours(
            authority, directory, outbound=outbound, inbound=inbound, application=application_port, **arguments
        )
        envoy_config = theirs(
            authority, directory, outbound=envoy_outbound, inbound=envoy_inbound, application=application_port,
            **arguments,
        )  # fmt: skip
        processes = [application(directory, application_port)]
        worker = WorkerProcess(directory, affinity=0)
        try:
            processes.append(envoy.start(envoy_config, directory))
            reply = worker.configure(config)
            assert type(reply).__name__ == "Ack", reply
            for port in (application_port, outbound, envoy_outbound):
                check(port)
            yield Proxies(outbound, envoy_outbound, worker, processes[-1], authority, config, envoy_inbound, directory)
        finally:
            worker.close()
            for process in processes:
                process.terminate()
                process.wait(20)


def rss_mib(pid):
    """Resident memory of a process."""
    text = Path(f"/proc/{pid}/status").read_text()
    return int(re.search(r"VmRSS:\s+(\d+)", text)[1]) / 1024


def run_wrk(port, seconds, pid, *, connections, path="/path"):
    """wrk's figures for one run, and what the proxy spent."""
    before = cpu_seconds(pid)
    output = subprocess.run(
        ["taskset", "-c", "1", "wrk", "-t1", f"-c{connections}", f"-d{seconds}s", "--timeout", "10s", "--latency",
         f"http://{ADDRESS}:{port}{path}"],
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
        per_s=float(re.search(r"Requests/sec:\s+([\d.]+)", output)[1]),
        p50_ms=latency("50"),
        p99_ms=latency("99"),
        cpu_us=spent / max(1, total) * 1e6,
        rss_mib=rss_mib(pid),
        errors=errors + (int(refused[1]) if refused else 0),
    )


def alternate(proxies, run, rounds):
    """Pairs (ours, Envoy's) of `run(port, pid)`, after a warm-up of each."""
    for port, pid in ((proxies.port, proxies.worker.pid), (proxies.envoy_port, proxies.envoy.pid)):
        run(port, pid)  # connections, caches
    return [(run(proxies.port, proxies.worker.pid), run(proxies.envoy_port, proxies.envoy.pid)) for _ in range(rounds)]


def median(results, field):
    """The median of one figure."""
    return statistics.median(getattr(result, field) for result in results)


def report(title, pairs, *, unit="req/s", cpu="CPU us/req"):
    """Prints both proxies' medians; returns the median ratios by field."""
    ours, theirs = [pair[0] for pair in pairs], [pair[1] for pair in pairs]
    print(f"{title}; {len(pairs)} alternating rounds, medians")
    print(f"{'':14}{unit:>10}{'p50 ms':>9}{'p99 ms':>9}{cpu:>12}{'RSS MiB':>9}{'errors':>8}")
    for label, results in (("Mesh", ours), ("Envoy", theirs)):
        print(
            f"{label:14}{median(results, 'per_s'):>10.0f}{median(results, 'p50_ms'):>9.2f}"
            f"{median(results, 'p99_ms'):>9.2f}{median(results, 'cpu_us'):>12.1f}"
            f"{median(results, 'rss_mib'):>9.1f}{sum(result.errors for result in results):>8}"
        )
    ratios = {
        field: statistics.median(getattr(mine, field) / max(1e-9, getattr(other, field)) for mine, other in pairs)
        for field in ("per_s", "p50_ms", "p99_ms", "cpu_us", "rss_mib")
    }
    print(
        f"{'Mesh / Envoy':14}{ratios['per_s']:>10.2f}{ratios['p50_ms']:>9.2f}{ratios['p99_ms']:>9.2f}"
        f"{ratios['cpu_us']:>12.2f}{ratios['rss_mib']:>9.2f}"
    )
    return ratios


def parse(documentation, arguments, *, rounds=5, seconds=4, tools=("wrk", "nginx", "taskset")):
    """The options all of these have. Exits with status 2 when a tool is missing."""
    parser = argparse.ArgumentParser(description=documentation.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=rounds)
    parser.add_argument("--seconds", type=int, default=seconds)
    for tool in tools:
        if shutil.which(tool) is None:
            print(f"{tool} was not found; install it to run this benchmark", file=sys.stderr)
            raise SystemExit(2)
    envoy.find_envoy()
    return parser.parse_args(list(arguments))


def verdict(text, *, met):
    """Prints whether a bar is met; the exit status."""
    print(f"bar ({text}): {'met' if met else 'NOT met'}")
    return 0 if met else 1
