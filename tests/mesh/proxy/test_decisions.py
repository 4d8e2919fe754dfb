"""Pooling, reconfiguration and configuration checks: pure decisions."""

import pytest
from msgspec.structs import replace

from mesh.errors import ConfigError
from mesh.proxy.pool import AGE_MAX_S, IDLE_MAX, REQUESTS_PER_CONNECTION_MAX, ConnectionPool
from mesh.proxy.resources import ListenerKey, changes, listeners
from mesh.proxy.sidecar_config import (
    EndpointConfig,
    InboundListener,
    OutboundListener,
    SidecarConfig,
    TargetConfig,
    WorkerConfig,
    check,
)
from mesh.traffic.policy import PoolPolicy
from mesh.wire import Codec

# ---- pool


def test_the_most_recent_idle_connection_is_reused_first():
    pool = ConnectionPool()
    assert pool.take_idle() is None
    assert pool.put_idle("a", 0, 1, PoolPolicy())
    assert pool.put_idle("b", 0, 1, PoolPolicy())
    assert (pool.take_idle(), pool.take_idle(), pool.take_idle()) == ("b", "a", None)


def test_those_who_wait_are_served_in_order_unless_they_give_up():
    pool = ConnectionPool()
    for name in ("first", "second", "third"):
        pool.wait(name)
    assert pool.forget("second")
    assert not pool.forget("second")
    assert pool.waiting == 2
    assert (pool.next_waiting(), pool.next_waiting(), pool.next_waiting()) == ("first", "third", None)


def test_old_worn_and_surplus_connections_are_not_kept():
    pool = ConnectionPool()
    assert not pool.put_idle("old", AGE_MAX_S + 1, 1, PoolPolicy())
    assert not pool.put_idle("worn", 0, REQUESTS_PER_CONNECTION_MAX, PoolPolicy())
    for number in range(IDLE_MAX):
        assert pool.put_idle(number, 0, 1, PoolPolicy())
    assert not pool.put_idle("surplus", 0, 1, PoolPolicy())


def test_a_policy_says_when_a_connection_is_old_or_worn():
    pool, policy = ConnectionPool(), PoolPolicy(requests_max=2, age_max_s=10.0)
    assert pool.put_idle("fresh", 10.0, 1, policy)
    assert not pool.put_idle("old", 10.1, 1, policy)
    assert not pool.put_idle("worn", 0.0, 2, policy)


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
