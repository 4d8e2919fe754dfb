"""A real Envoy and our detector hear the same outcomes, and count and eject the same.

OUTLIER_SEED chooses other policies and outcomes.
"""

import os
import random
import shutil
import time

import pytest
from envoy_peer import LIMIT_S, endpoint, envoy, hosts

from mesh.proxy.outlier import EJECTION_KINDS, OutlierDetector
from mesh.traffic.policy import OutlierDetection

pytestmark = [
    pytest.mark.interop,
    pytest.mark.skipif(shutil.which("envoy") is None and "CI" not in os.environ, reason="the envoy binary is missing"),
]

POLICIES = 12
REQUESTS = 60  # for each policy
HOSTS = 6  # that listen; one more does not
ANSWERS = ["200", "204", "404", "429", "500", "501", "502", "503", "504", "599", "reset", "garbage", "slow"]
NEVER_S = 3600.0
INTERVAL_S = 0.4
BATCHES = 3  # of requests that statistics are made of, for each policy
SEED = int(os.environ.get("OUTLIER_SEED", "1"))


def _seconds(value):
    return f"{value:.3f}s"


def _envoy_policy(policy):
    value = {
        name: getattr(policy, name)
        for name in OutlierDetection.__struct_fields__
        if not name.endswith("_s") and name != "uneject_on_passing_check"
    }
    for name in ("interval", "base_ejection_time", "max_ejection_time", "max_ejection_time_jitter"):
        value[name] = _seconds(getattr(policy, f"{name}_s"))
    return value


def _cluster(name, policy, ports):
    """One subset for each host, so that a request names its host, which is used when it is ejected too (panic)."""
    endpoints = [
        {
            "endpoint": endpoint(port),
            "metadata": {"filter_metadata": {"envoy.lb": {"host": str(number)}}},
        }
        for number, port in enumerate(ports)
    ]
    return {
        "name": name,
        "type": "STATIC",
        "lb_policy": "ROUND_ROBIN",
        "lb_subset_config": {"fallback_policy": "NO_FALLBACK", "subset_selectors": [{"keys": ["host"]}]},
        "common_lb_config": {"update_merge_window": "0s"},
        "outlier_detection": _envoy_policy(policy),
        "load_assignment": {"cluster_name": name, "endpoints": [{"lb_endpoints": endpoints}]},
    }


def _routes(ports_of):
    """`/cluster/host` goes to that host."""
    return [
        {
            "match": {"path": f"/{name}/{number}"},
            "route": {"cluster": name, "metadata_match": {"filter_metadata": {"envoy.lb": {"host": str(number)}}}},
        }
        for name, ports in ports_of.items()
        for number in range(len(ports))
    ]


def _envoy(directory, policies, ports_of):
    clusters = [_cluster(name, policy, ports_of[name]) for name, policy in policies.items()]
    return envoy(directory, clusters, _routes(ports_of))


def _send(peer, name, host, answer):
    if answer == "slow":
        peer.get(f"/{name}/{host}", answer, x_envoy_upstream_rq_timeout_ms="15")
    else:
        peer.get(f"/{name}/{host}", answer)


def _counters(peer, name):
    return peer.counters(f"cluster.{name}.outlier_detection.ejections_")


def _ejected(peer, name):
    clusters = {cluster["name"]: cluster for cluster in peer.ask("/clusters?format=json")["cluster_statuses"]}
    return [host["health_status"].get("failed_outlier_check", False) for host in clusters[name]["host_statuses"]]


def _tell(detector, host, answer, now, *, alive):
    record = detector.record(str(host))
    if not alive:
        record.failed("connect", now)
        return
    record.connected()
    if answer.isdigit():
        record.responded(int(answer), now)
    else:
        record.failed({"reset": "reset", "garbage": "protocol", "slow": "per-try-timeout"}[answer], now)


def _counted(detector):
    counted = {"active": detector.stats.active, "overflow": detector.stats.overflow}
    counted["enforced_total"] = detector.stats.enforced_total
    for kind in EJECTION_KINDS:
        counted[f"detected_{kind}"] = detector.stats.detected[kind]
        counted[f"enforced_{kind}"] = detector.stats.enforced[kind]
    return counted


def _random_policy(rng):
    return OutlierDetection(
        consecutive_5xx=rng.choice([2, 3, 5]),
        enforcing_consecutive_5xx=rng.choice([0, 100, 100]),
        consecutive_gateway_failure=rng.choice([2, 3, 5]),
        enforcing_consecutive_gateway_failure=rng.choice([0, 100]),
        consecutive_local_origin_failure=rng.choice([2, 3]),
        enforcing_consecutive_local_origin_failure=rng.choice([0, 100, 100]),
        split_external_local_origin_errors=rng.random() < 0.5,
        max_ejection_percent=rng.choice([10, 20, 34, 50, 100]),
        always_eject_one_host=rng.random() < 0.3,
        interval_s=NEVER_S,
    )


def test_envoy_counts_and_ejects_as_we_do(tmp_path):
    rng = random.Random(SEED)
    policies = {f"c{number}x": _random_policy(rng) for number in range(POLICIES)}
    with hosts(HOSTS) as (ports, dead):
        ports_of = {name: [*ports[: rng.randint(1, HOSTS)], dead] for name in policies}
        with _envoy(tmp_path, policies, ports_of) as peer:
            for name, policy in policies.items():
                detector = OutlierDetector(policy, random.Random(1), lambda record: None, now=0.0)
                count = len(ports_of[name])
                detector.endpoints_changed(map(str, range(count)))
                bad = rng.random()  # some policies see mostly failures
                told = []
                for _ in range(REQUESTS):
                    host = rng.randrange(count)
                    answer = rng.choice(ANSWERS[4:] if rng.random() < bad else ANSWERS)
                    told.append((host, answer))
                    _tell(detector, host, answer, 0.0, alive=host < count - 1)
                    _send(peer, name, host, answer)
                    assert _ejected(peer, name) == [detector.is_ejected(str(number)) for number in range(count)], told
                counters = _counters(peer, name)
                ours = _counted(detector)
                assert {key: counters[key] for key in ours} == ours, (policy, told)


def _statistics_policy(rng, **enforcing):
    return OutlierDetection(
        consecutive_5xx=10**6,
        consecutive_gateway_failure=1,
        enforcing_consecutive_gateway_failure=100,
        max_ejection_percent=100,
        interval_s=INTERVAL_S,
        base_ejection_time_s=0.001,  # until the next tick
        max_ejection_time_s=0.001,
        success_rate_minimum_hosts=rng.randint(3, 5),
        success_rate_request_volume=rng.randint(6, 9),
        success_rate_stdev_factor=rng.choice([500, 1000, 1500]),
        failure_percentage_threshold=rng.choice([30, 50, 70]),
        failure_percentage_minimum_hosts=rng.randint(3, 5),
        failure_percentage_request_volume=rng.randint(6, 9),
        **enforcing,
    )


def _wait_for_tick(peer, name, marker):
    """The host `marker` has been ejected: the tick takes it back. Who is ejected right after it."""
    deadline = time.monotonic() + LIMIT_S
    while (ejected := _ejected(peer, name))[marker]:
        assert time.monotonic() < deadline, "no tick came"
    return ejected


def _batch_agrees(rng, peer, name, policy):
    """One interval of requests; False when it took too long to be in one interval, and says nothing."""
    detector = OutlierDetector(policy, random.Random(1), lambda record: None, now=0.0)
    detector.endpoints_changed(map(str, range(HOSTS)))
    marker = HOSTS - 1
    _send(peer, name, marker, "503")
    _wait_for_tick(peer, name, marker)
    began = time.monotonic()
    before = _counters(peer, name)
    for host in range(marker):
        bad = rng.random()
        for _ in range(rng.randint(4, 12)):
            answer = "500" if rng.random() < bad else "200"
            _send(peer, name, host, answer)
            _tell(detector, host, answer, 0.1, alive=True)
    _send(peer, name, marker, "503")
    _tell(detector, marker, "503", 0.1, alive=True)
    if time.monotonic() - began > 0.7 * INTERVAL_S:
        return False
    ejected = _wait_for_tick(peer, name, marker)
    after = _counters(peer, name)
    detector.tick(INTERVAL_S)
    assert ejected == [detector.is_ejected(str(number)) for number in range(HOSTS)]
    ours = _counted(detector)
    del ours["active"]
    assert {key: after[key] - before[key] for key in ours} == ours
    return True


def test_envoy_judges_by_statistics_as_we_do(tmp_path):
    rng = random.Random(SEED)
    policies = {
        "rate": _statistics_policy(rng),
        "percentage": _statistics_policy(rng, enforcing_success_rate=0, enforcing_failure_percentage=100),
    }
    with hosts(HOSTS) as (ports, _dead):
        ports_of = dict.fromkeys(policies, ports)
        with _envoy(tmp_path, policies, ports_of) as peer:
            for name, policy in policies.items():
                agreed = 0
                deadline = time.monotonic() + LIMIT_S
                while agreed < BATCHES:
                    agreed += _batch_agrees(rng, peer, name, policy)
                    assert time.monotonic() < deadline, "this machine is too slow for the interval"
