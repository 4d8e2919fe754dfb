"""Balancing, pooling, retries, reconfiguration and configuration checks: pure decisions."""

import random
from dataclasses import dataclass

import pytest
from hypothesis import given
from hypothesis import strategies as st
from msgspec.structs import replace

from mesh.errors import ConfigError
from mesh.proxy.balancer import Balancer
from mesh.proxy.pool import AGE_MAX_S, IDLE_MAX, REQUESTS_PER_CONNECTION_MAX, ConnectionPool
from mesh.proxy.resources import ListenerKey, changes, listeners
from mesh.proxy.retry import CONNECT_ATTEMPTS_MAX, may_retry
from mesh.proxy.sidecar_config import (
    EndpointConfig,
    InboundListener,
    OutboundListener,
    SidecarConfig,
    TargetConfig,
    WorkerConfig,
    check,
)
from mesh.wire import Codec


@dataclass(eq=False)
class Backend:
    active: int = 0
    weight: int = 1


# ---- balancer


def test_the_less_busy_of_two_is_taken():
    busy, idle = Backend(active=5), Backend()
    balancer = Balancer((busy, idle), random.Random(1))
    chosen = [balancer.choose() for _ in range(1000)]
    # Two equal draws of the busy one (a quarter of the time) are all it gets.
    assert 150 < chosen.count(busy) < 350


def test_choices_follow_weights():
    light, heavy = Backend(weight=1), Backend(weight=9)
    balancer = Balancer((light, heavy), random.Random(2))
    chosen = [balancer.choose() for _ in range(2000)]
    assert 100 < chosen.count(light) < 300


def test_tried_endpoints_are_passed_over_until_none_is_left():
    one, two = Backend(), Backend()
    balancer = Balancer((one, two), random.Random(3))
    assert balancer.choose((one,)) is two
    assert balancer.choose((one, two)) is None
    assert Balancer((), random.Random(3)).choose() is None
    assert Balancer((one,), random.Random(3)).choose() is one


@given(st.lists(st.integers(1, 100), min_size=1, max_size=20), st.integers(0, 2**32))
def test_every_choice_is_one_of_the_endpoints(weights, seed):
    backends = [Backend(weight=weight) for weight in weights]
    balancer = Balancer(backends, random.Random(seed))
    assert all(balancer.choose() in backends for _ in range(50))


def test_two_choices_keep_load_even_where_one_endpoint_is_slow():
    rng = random.Random(4)
    backends = [Backend() for _ in range(10)]
    balancer = Balancer(backends, rng)
    for _ in range(5000):
        chosen = balancer.choose()
        chosen.active += 1
        for index, backend in enumerate(backends):
            if backend.active and rng.random() < (0.01 if index == 0 else 0.2):
                backend.active -= 1
    assert backends[0].active < 40  # it finishes one in a hundred steps: a blind choice would leave some 450 there


# ---- pool


def test_the_most_recent_idle_connection_is_reused_first():
    pool = ConnectionPool(connections_max=2, pending_max=1)
    assert pool.take_idle() is None
    assert [pool.admit(), pool.admit()] == ["open", "open"]
    assert pool.put_idle("a", age_s=0, requests=1)
    assert pool.put_idle("b", age_s=0, requests=1)
    assert (pool.take_idle(), pool.take_idle(), pool.take_idle()) == ("b", "a", None)


def test_over_the_limits_requests_wait_and_then_overflow():
    pool = ConnectionPool(connections_max=1, pending_max=1)
    assert pool.admit() == "open"
    assert pool.admit() == "wait"
    pool.wait("first")
    assert pool.admit() == "overflow"
    assert pool.next_waiting() == "first"
    assert pool.next_waiting() is None
    pool.wait("second")
    pool.forget("second")
    pool.forget("second")
    assert pool.waiting == 0
    pool.remove("connection")
    assert pool.admit() == "open"


def test_old_worn_and_surplus_connections_are_not_kept():
    pool = ConnectionPool(connections_max=10_000, pending_max=1)
    assert not pool.put_idle("old", age_s=AGE_MAX_S + 1, requests=1)
    assert not pool.put_idle("worn", age_s=0, requests=REQUESTS_PER_CONNECTION_MAX)
    for number in range(IDLE_MAX):
        assert pool.put_idle(number, age_s=0, requests=1)
    assert not pool.put_idle("surplus", age_s=0, requests=1)


# ---- retry


@pytest.mark.parametrize("method", [b"GET", b"POST"])
def test_connect_failures_are_retried_a_few_times(method):
    arguments = {"method": method, "reused": False, "resets": 0, "replayable": False}
    assert may_retry("connect", attempts=CONNECT_ATTEMPTS_MAX - 1, **arguments)
    assert not may_retry("connect", attempts=CONNECT_ATTEMPTS_MAX, **arguments)


@pytest.mark.parametrize(
    ("changes_", "expected"),
    [
        ({}, True),
        ({"method": b"DELETE"}, True),
        ({"method": b"POST"}, False),
        ({"method": b"PATCH"}, False),
        ({"reused": False}, False),
        ({"resets": 1}, False),
        ({"replayable": False}, False),
    ],
)
def test_a_reset_is_retried_once_when_that_is_harmless(changes_, expected):
    arguments = {"method": b"GET", "attempts": 1, "reused": True, "resets": 0, "replayable": True, **changes_}
    assert may_retry("reset", **arguments) is expected


# ---- configuration


def sidecar(name="web", *, inbound_port=21000, outbound_ports=(9191,), **fields):
    target = TargetConfig("api", ("spiffe://td/ns/default/dc/dc1/svc/api",), (EndpointConfig("1", "10.0.0.1", 80),))
    return SidecarConfig(
        proxy_id=f"{name}-proxy", service=name, datacenter="dc1", trust_domain="td", spiffe_id="spiffe://td/x",
        certificate_chain_pem="chain", private_key_pem="very secret", trust_roots_pem=("root",),
        inbound=InboundListener("0.0.0.0", inbound_port, "127.0.0.1", 8080) if inbound_port else None,
        outbound=tuple(OutboundListener("127.0.0.1", port, target) for port in outbound_ports), **fields,
    )  # fmt: skip


def test_a_configuration_survives_the_wire_and_hides_its_keys():
    config = WorkerConfig(7, (sidecar(),))
    codec = Codec(WorkerConfig)
    assert codec.decode(codec.encode(config)) == config
    assert "very secret" not in repr(config)
    check(config)


def endpoint(**fields):
    base = sidecar()
    (listener,) = base.outbound
    target = replace(listener.target, endpoints=(replace(listener.target.endpoints[0], **fields),))
    return replace(base, outbound=(replace(listener, target=target),))


def unexpecting():
    base = sidecar()
    (listener,) = base.outbound
    return replace(base, outbound=(replace(listener, target=replace(listener.target, expected_spiffe_ids=())),))


@pytest.mark.parametrize(
    ("config", "words"),
    [
        (WorkerConfig(1, (sidecar(), sidecar())), "web-proxy appears twice"),
        (WorkerConfig(1, (sidecar(), sidecar("api"))), "appears twice"),
        (WorkerConfig(1, (sidecar(inbound_port=70000),)), "port 70000"),
        (WorkerConfig(1, (sidecar(outbound_ports=(0,)),)), "port 0"),
        (WorkerConfig(1, (replace(sidecar(), private_key_pem=""),)), "no certificate, key or trust roots"),
        (WorkerConfig(1, (endpoint(port=0),)), "endpoint 1: port 0"),
        (WorkerConfig(1, (endpoint(weight=0),)), "weight 0"),
        (WorkerConfig(1, (endpoint(address="a b"),)), "'a b' is not an address"),
        (WorkerConfig(1, (unexpecting(),)), "no SPIFFE ID is expected"),
        (WorkerConfig(1, (), trace_sampling=2.0), "trace_sampling"),
    ],
)
def test_what_cannot_be_served_is_named(config, words):
    with pytest.raises(ConfigError, match=words):
        check(config)


def test_changes_between_configurations():
    before = WorkerConfig(1, (sidecar(outbound_ports=(9191, 9192)),))
    after = WorkerConfig(2, (sidecar(outbound_ports=(9192, 9193)), sidecar("api", inbound_port=0, outbound_ports=())))
    change = changes(before, after)
    assert change.opened == (ListenerKey("127.0.0.1", 9193),)
    assert change.closed == (ListenerKey("127.0.0.1", 9191),)
    assert [served.key.port for served in change.served] == [21000, 9192, 9193]
    assert changes(before, before).opened == changes(before, before).closed == ()


def test_a_service_is_another_one_when_its_protocol_changes():
    (inbound, _) = listeners(WorkerConfig(1, (sidecar(),)))
    changed = replace(inbound, listener=replace(inbound.listener, protocol="http"))
    assert inbound.key == changed.key
    assert inbound.service_key != changed.service_key
