"""Policy verdicts by the hundred thousand: ours against a naive evaluator, and against Envoy's RBAC.

`python -m benchmarks.policy_oracle [--cases N] [--envoy N] [--seed N]`; exits 1 at the first mismatch.
"""

import argparse
import random
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path

from envoy_rbac import envoy_policies
from policy_cases import SERVICE, make_case, make_rules, oracle

from benchmarks.envoy import find_envoy
from mesh.authz import Policy, source_rules

PER_SET = 10
SETS_PER_ENVOY = 500


def _policy(rules, default_allow):
    return Policy(source_rules(rules), default_allow=default_allow, service=SERVICE, http=True)


def _against_oracle(rng, cases):
    started, allowed = time.perf_counter(), 0
    for _ in range(cases // PER_SET):
        rules = make_rules(rng)
        policies = [_policy(rules, default_allow) for default_allow in (False, True)]
        for _ in range(PER_SET):
            case = make_case(rng, rules)
            verdict = policies[case.default_allow].verdict(case.source, case.head)
            allowed += verdict.allowed
            if verdict.allowed is not oracle(case):
                print(f"mismatch: {verdict.text}: {case}")
                return False
    elapsed = time.perf_counter() - started
    print(f"naive evaluator: {cases} cases, 0 mismatches, {allowed / cases:.0%} allowed, {elapsed:.1f} s")
    return True


def _against_envoy(rng, cases):
    done = 0
    while done < cases:
        sets = [(make_rules(rng), rng.random() < 0.5) for _ in range(min(SETS_PER_ENVOY, (cases - done) // PER_SET))]
        with tempfile.TemporaryDirectory() as folder, envoy_policies(Path(folder), sets, binary=find_envoy()) as envoy:
            for number, (rules, default_allow) in enumerate(sets):
                policy = _policy(rules, default_allow)
                for _ in range(PER_SET):
                    case = replace(make_case(rng, rules, repeats=False), default_allow=default_allow)
                    verdict = policy.verdict(case.source, case.head)
                    if verdict.allowed is not envoy.allows(number, case):
                        print(f"mismatch with Envoy: {verdict.text}: {case}")
                        return False
                    done += 1
    print(f"Envoy's RBAC: {done} of {cases} agree")
    return True


def main(arguments=()):
    """Exits with status 1 at a mismatch."""
    parser = argparse.ArgumentParser(prog="policy-oracle")
    parser.add_argument("--cases", type=int, default=100_000)
    parser.add_argument("--envoy", type=int, default=5_000, help="cases to ask Envoy; 0: none")
    parser.add_argument("--seed", type=int, default=random.SystemRandom().getrandbits(32))
    given = parser.parse_args(arguments)
    print(f"seed {given.seed}")
    rng = random.Random(given.seed)
    agrees = _against_oracle(rng, given.cases) and (not given.envoy or _against_envoy(rng, given.envoy))
    if not agrees:
        raise SystemExit(1)


if __name__ == "__main__":
    main(sys.argv[1:])
