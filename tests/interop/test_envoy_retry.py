"""A real Envoy and our rules decide alike which answers are tried again, by any mix of conditions."""

import os
import random
import shutil

import pytest
from envoy_peer import endpoint, envoy, hosts

from mesh.http.head import RequestHead, ResponseHead
from mesh.proxy.retry import compile_retry, retry_verdict
from mesh.traffic.policy import RetryPolicy

pytestmark = [
    pytest.mark.interop,
    pytest.mark.skipif(shutil.which("envoy") is None and "CI" not in os.environ, reason="the envoy binary is missing"),
]

REQUESTS = 400
SEED = int(os.environ.get("RETRY_SEED", "1"))
ON = [
    "5xx", "gateway-error", "reset", "reset-before-request", "connect-failure", "refused-stream", "retriable-4xx",
    "retriable-status-codes", "retriable-headers", "envoy-ratelimited", "nonsense",
]  # fmt: skip
GRPC_ON = ["cancelled", "deadline-exceeded", "internal", "resource-exhausted", "unavailable", "nonsense"]
ANSWERS = [
    "200", "200 x-again=1", "200 grpc-status=0", "200 grpc-status=1", "200 grpc-status=4", "200 grpc-status=8",
    "200 grpc-status=13", "200 grpc-status=14", "404", "409", "418", "429", "429 x-envoy-ratelimited=true", "500",
    "500 x-envoy-overloaded=true", "502", "503", "503 x-envoy-ratelimited=true", "503 x-again=1", "504", "reset",
    "garbage", "slow", "refused",
]  # fmt: skip
FAILURES = {"reset": "reset", "garbage": "protocol", "slow": "per-try-timeout", "refused": "connect"}


def _cluster(name, port):
    assignment = {"cluster_name": name, "endpoints": [{"lb_endpoints": [{"endpoint": endpoint(port)}]}]}
    return {"name": name, "type": "STATIC", "load_assignment": assignment}


def _route(name):
    pause = {"base_interval": "0.001s", "max_interval": "0.001s"}
    return {"match": {"path": f"/{name}"}, "route": {"cluster": name, "retry_policy": {"retry_back_off": pause}}}


def _overrides(rng):
    headers = {}
    if rng.random() < 0.9:
        headers["x-envoy-retry-on"] = ",".join(rng.sample(ON, rng.randint(1, 3)))
    if rng.random() < 0.5:
        headers["x-envoy-retry-grpc-on"] = ",".join(rng.sample(GRPC_ON, rng.randint(1, 3)))
    if rng.random() < 0.6:
        headers["x-envoy-max-retries"] = rng.choice(["0", "1", "2", "3", "many"])
    if rng.random() < 0.5:
        headers["x-envoy-retriable-status-codes"] = rng.choice(["418", "200,418", "404, 418", "x"])
    if rng.random() < 0.5:
        headers["x-envoy-retriable-header-names"] = rng.choice(["x-again", "x-none,X-Again", "x-none"])
    return headers


def _expected(headers, answer):
    """How many retries our rules make of it, and whether they were used up."""
    pairs = tuple((name.encode(), value.encode()) for name, value in headers.items())
    head = RequestHead(b"GET", b"/", None, b"host", pairs)
    _, rules, _ = compile_retry(RetryPolicy(conditions=())).with_headers(head, 15.0, honored=True)
    if answer in FAILURES:
        wanted = rules.after_failure(FAILURES[answer])
    else:
        status, *fields = answer.split()
        received = tuple(tuple(field.encode().split(b"=")) for field in fields)
        wanted = rules.after_response(ResponseHead(int(status), received))
    retries, verdict = 0, "no"
    while (
        wanted and (verdict := retry_verdict(rules, retries=retries, replayable=True, admitted=lambda: True)) == "retry"
    ):
        retries += 1
    return retries, int(verdict == "limit_exceeded")


def test_envoy_retries_what_we_retry(tmp_path):
    rng = random.Random(SEED)
    with hosts(1) as (ports, dead):
        clusters = [_cluster("alive", ports[0]), _cluster("dead", dead)]
        with envoy(tmp_path, clusters, [_route("alive"), _route("dead")]) as peer:
            counted = dict.fromkeys(("alive", "dead"), (0, 0))
            for _ in range(REQUESTS):
                headers, answer = _overrides(rng), rng.choice(ANSWERS)
                name = "dead" if answer == "refused" else "alive"
                if answer == "slow":
                    headers["x-envoy-upstream-rq-per-try-timeout-ms"] = "10"
                peer.get(f"/{name}", answer, **headers)
                counters = peer.counters(f"cluster.{name}.upstream_rq_retry")
                now = (counters[""], counters["_limit_exceeded"])
                before, counted[name] = counted[name], now
                assert (now[0] - before[0], now[1] - before[1]) == _expected(headers, answer), (headers, answer)
