"""One plain hop, HTTP/1.1, 32 connections: one of our workers against one Envoy worker. See sidecar_pairs.py."""

import sys

from benchmarks.sidecar_pairs import alternate, envoy_one_hop, one_hop, parse, report, run_wrk, serving, verdict

CONNECTIONS = 32


def main(arguments=()):
    """Runs the comparison; 0 when the bar is met."""
    options = parse(__doc__, arguments)
    with serving(one_hop, envoy_one_hop) as proxies:
        pairs = alternate(
            proxies, lambda port, pid: run_wrk(port, options.seconds, pid, connections=CONNECTIONS), options.rounds
        )
    ratios = report(f"one hop, plain, HTTP/1.1, {CONNECTIONS} connections", pairs)
    return verdict("requests/s >= 1.0 of Envoy's", met=ratios["per_s"] >= 1.0)


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
