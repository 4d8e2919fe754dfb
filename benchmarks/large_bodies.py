"""256 connections fetching 1 MiB bodies over two hops with mTLS: ours against Envoy's. See sidecar_pairs.py."""

import sys

from benchmarks.sidecar_pairs import alternate, envoy_two_hops, parse, report, run_wrk, serving, two_hops, verdict

CONNECTIONS = 256


def main(arguments=()):
    """Runs the comparison; 0 when the bar is met."""
    options = parse(__doc__, arguments, rounds=3, seconds=8)
    with serving(two_hops, envoy_two_hops) as proxies:
        pairs = alternate(
            proxies,
            lambda port, pid: run_wrk(port, options.seconds, pid, connections=CONNECTIONS, path="/large"),
            options.rounds,
        )
    ratios = report(f"two hops, mTLS, bodies of 1 MiB, {CONNECTIONS} connections", pairs)
    return verdict("requests/s >= 0.7 of Envoy's", met=ratios["per_s"] >= 0.7)


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
