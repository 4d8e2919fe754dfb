"""`make bench`: every comparison in turn, or those named (`make bench ARGS="kv_puts"`)."""

import importlib
import sys

BENCHMARKS = (
    "two_hops", "one_hop", "large_bodies", "tcp_relay", "idle_connections", "configuration_changes",
    "kv_puts", "kv_gets", "intention_flips", "leader_death", "footprint", "worker_soak", "policy_oracle",
)  # fmt: skip


def main() -> int:
    """Runs the benchmarks named on the command line (all by default). Status 2 for an unknown name."""
    names = sys.argv[1:] or list(BENCHMARKS)
    unknown = [name for name in names if name not in BENCHMARKS]
    if unknown:
        print(f"no benchmark {unknown[0]!r}; there are: {', '.join(BENCHMARKS)}", file=sys.stderr)
        return 2
    for name in names:
        importlib.import_module(f"benchmarks.{name}").main()
    return 0


if __name__ == "__main__":
    sys.exit(main())
