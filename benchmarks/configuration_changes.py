"""What a change of configuration costs a worker that carries traffic.

1. 1,000 services with 10 endpoints each are added: time until they are in force, and the latency of requests to
   another service before and after.
2. Ten changes of policy a second: latency while they happen over the quiet latency, and failed requests.
"""

import statistics
import sys
import threading
import time

import msgspec

from benchmarks.sidecar_pairs import (
    envoy_two_hops,
    parse,
    run_wrk,
    serving,
    two_hops,
    verdict,
)
from mesh.proxy.sidecar_config import EndpointConfig, OutboundListener, SourceRule, TargetConfig

SERVICES = 1000
ENDPOINTS = 10
CONNECTIONS = 32
CHANGES_PER_S = 10
FIRST_PORT = 20_000
LISTEN_ADDRESS = "127.9.9.9"  # nobody else's: a thousand ports are taken


def many_services(authority, config, version):
    """The configuration with SERVICES more upstreams of service web."""
    web, *others = config.sidecars
    added = tuple(
        OutboundListener(
            LISTEN_ADDRESS,
            FIRST_PORT + number,
            TargetConfig(
                f"service-{number}",
                (authority.spiffe_id(f"service-{number}"),),
                tuple(
                    EndpointConfig(f"node-{index}/service-{number}", f"127.8.{index}.1", FIRST_PORT + number)
                    for index in range(ENDPOINTS)
                ),
            ),
            "http",
        )
        for number in range(SERVICES)
    )
    web = msgspec.structs.replace(web, outbound=(*web.outbound, *added))
    return msgspec.structs.replace(config, version=version, sidecars=(web, *others))


def measure_growth(proxies, run, rounds):
    """(seconds to add the services, p50 ratios of requests to another service, after over before)."""
    before = statistics.median(run().p50_ms for _ in range(rounds))
    times = []
    for attempt in range(3):
        config = many_services(proxies.authority, proxies.config, 2 * attempt + 2)
        began = time.perf_counter()
        reply = proxies.worker.configure(config)
        times.append(time.perf_counter() - began)
        assert type(reply).__name__ == "Ack", reply
        if attempt < 2:
            proxies.worker.configure(msgspec.structs.replace(proxies.config, version=2 * attempt + 3))
    after = statistics.median(run().p50_ms for _ in range(rounds))
    proxies.worker.configure(msgspec.structs.replace(proxies.config, version=9))
    return statistics.median(times), before, after


def measure_changes(proxies, run, rounds):
    """(quiet p99, p99 during the changes, failed requests, changes made)."""
    stop = threading.Event()
    made = 0

    def change():
        nonlocal made
        web, api = proxies.config.sidecars
        while not stop.wait(1 / CHANGES_PER_S):
            made += 1
            rules = (SourceRule("web", "allow"), SourceRule(f"other-{made}", "deny"))
            inbound = msgspec.structs.replace(api.inbound, intentions=rules)
            changed = (web, msgspec.structs.replace(api, inbound=inbound))
            reply = proxies.worker.configure(
                msgspec.structs.replace(proxies.config, version=100 + made, sidecars=changed)
            )
            assert type(reply).__name__ == "Ack", reply

    quiet, changing = [], []
    errors = 0
    for _ in range(rounds):
        quiet.append(run())
        stop.clear()
        thread = threading.Thread(target=change)
        thread.start()
        changing.append(run())
        stop.set()
        thread.join()
        errors += changing[-1].errors
    ratio = statistics.median(loud.p99_ms / calm.p99_ms for calm, loud in zip(quiet, changing, strict=True))
    return ratio, statistics.median(one.p99_ms for one in quiet), errors, made


def main(arguments=()):
    """Runs both; 0 when the bars are met."""
    options = parse(__doc__, arguments, rounds=3, seconds=5)
    with serving(two_hops, envoy_two_hops) as proxies:

        def run():
            return run_wrk(proxies.port, options.seconds, proxies.worker.pid, connections=CONNECTIONS)

        run()
        elapsed, before, after = measure_growth(proxies, run, options.rounds)
        print(f"{SERVICES} services with {ENDPOINTS} endpoints each: in force after {elapsed:.2f} s")
        print(f"p50 of another service's requests: {before:.2f} ms before, {after:.2f} ms after ({after / before:.2f})")
        status = verdict("in force < 1 s, p50 within 10 %", met=elapsed < 1.0 and after / before <= 1.1)
        ratio, calm, errors, made = measure_changes(proxies, run, options.rounds)
        print(f"{made} changes of policy at {CHANGES_PER_S} a second: p99 {ratio:.2f} of the quiet {calm:.2f} ms")
        print(f"failed requests: {errors}")
        return status | verdict("p99 <= 1.5 of quiet, no failed request", met=ratio <= 1.5 and errors == 0)


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
