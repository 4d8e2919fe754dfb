"""Two hops with mTLS between, HTTP/1.1, 32 connections: one of our workers against one Envoy worker.

See sidecar_pairs.py for the picture and the features that are on. Needs wrk, nginx and Envoy.
"""

import sys

from benchmarks.sidecar_pairs import alternate, envoy_two_hops, parse, report, run_wrk, serving, two_hops, verdict

CONNECTIONS = 32


def main(arguments=()):
    """Runs the comparison; 0 when the bar is met."""
    options = parse(__doc__, arguments)
    with serving(two_hops, envoy_two_hops) as proxies:
        pairs = alternate(
            proxies, lambda port, pid: run_wrk(port, options.seconds, pid, connections=CONNECTIONS), options.rounds
        )
    ratios = report(f"two hops, mTLS, HTTP/1.1, {CONNECTIONS} connections", pairs)
    met = ratios["per_s"] >= 1.0 and ratios["p50_ms"] <= 1.0 and ratios["p99_ms"] <= 1.0 and ratios["rss_mib"] < 1.0
    return verdict("requests/s >= 1.0, p50 and p99 <= 1.0, memory < 1.0 of Envoy's", met=met)


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
