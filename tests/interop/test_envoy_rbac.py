"""A real Envoy, given intentions as Consul compiles them to RBAC, and our policy decide alike."""

import os
import random
import shutil
from dataclasses import replace

import pytest
from envoy_rbac import envoy_policies
from policy_cases import SERVICE, make_case, make_rules, oracle

from mesh.authz import Policy, source_rules

pytestmark = [
    pytest.mark.interop,
    pytest.mark.skipif(shutil.which("envoy") is None and "CI" not in os.environ, reason="the envoy binary is missing"),
]

SETS = int(os.environ.get("RBAC_SETS", "100"))  # of rules; ten requests each
SEED = int(os.environ.get("RBAC_SEED", "1"))


def cases(rng, *, repeats):
    """Rule sets with their defaults, and per set ten requests."""
    sets = [(make_rules(rng), rng.random() < 0.5) for _ in range(SETS)]
    requests = [
        (number, replace(make_case(rng, rules, repeats=repeats), default_allow=default_allow))
        for number, (rules, default_allow) in enumerate(sets)
        for _ in range(10)
    ]
    return sets, requests


def ours(case):
    policy = Policy(source_rules(case.intentions), default_allow=case.default_allow, service=SERVICE, http=True)
    return policy.verdict(case.source, case.head).allowed


def test_envoy_and_we_decide_alike(tmp_path):
    sets, requests = cases(random.Random(SEED), repeats=False)
    with envoy_policies(tmp_path, sets) as envoy:
        for number, case in requests:
            assert envoy.allows(number, case) is ours(case) is oracle(case), case


def test_a_repeated_header_never_gets_in_where_envoy_refuses(tmp_path):
    sets, requests = cases(random.Random(SEED + 1), repeats=True)
    with envoy_policies(tmp_path, sets) as envoy:
        for number, case in requests:
            assert not ours(case) or envoy.allows(number, case), case
