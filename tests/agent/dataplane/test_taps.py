"""Looking at a worker: its requests as they end, and what it holds."""

import time
from types import SimpleNamespace

import pytest
from msgspec.structs import replace

from agent.dataplane.control import Ack, Describe, EndTap, Nack, Tap
from agent.dataplane.taps import LEASE_S, QUEUED_MAX, TAKEN_MAX, TAPS_MAX, Taps
from mesh.errors import ConfigError, LimitExceeded
from mesh.http.head import RequestHead
from mesh.proxy.sidecar_config import AccessLogConfig
from mesh.proxy.tap import TapFilter

GET = b"GET /x?q=1 HTTP/1.1\r\nHost: api\r\nAuthorization: secret\r\n\r\n"


def exchange():
    head = RequestHead(b"GET", b"/", None, b"api", ())
    return SimpleNamespace(
        request=head, forwarded=head, started_at=1.0, status=200, flags="", bytes_received=0, bytes_sent=0,
        target_name="api", endpoint_host="", route_name="", attempts=1, decision="", caller=None, response_head=None,
    )  # fmt: skip


class Service:
    def __init__(self, name, *, inbound=False):
        self.service_name, self.inbound, self.tap = name, inbound, None


@pytest.fixture
def taps():
    clock = SimpleNamespace(now=100.0)
    services = [Service("web"), Service("api", inbound=True)]
    taps = Taps(lambda: clock.now, lambda: services)
    return taps, services, clock


def test_only_services_that_a_tap_may_want_are_watched_and_none_afterwards(taps):
    taps, (web, api), _ = taps
    assert taps.take("a", TapFilter(service="web")) == ((), 0)
    assert web.tap is not None
    assert api.tap is None
    taps.take("b", TapFilter(direction="inbound"))
    web.tap(exchange(), 2.0)
    api.tap(exchange(), 2.0)
    api.tap(exchange(), 3.0)
    assert [record.service for record in taps.take("a", TapFilter(service="web"))[0]] == ["web"]
    assert [record.duration_s for record in taps.take("b", TapFilter())[0]] == [1.0, 2.0]
    taps.end("b")
    assert api.tap is None
    taps.end("a")
    assert web.tap is None
    taps.end("a")


def test_a_tap_that_nobody_empties_ends_by_itself(taps):
    taps, (web, _), clock = taps
    taps.take("a", TapFilter())
    clock.now += LEASE_S
    taps.expire()
    assert web.tap is not None
    taps.take("a", TapFilter())
    clock.now += LEASE_S + 1
    taps.expire()
    assert web.tap is None


def test_a_tap_is_bounded_and_counts_what_it_loses(taps):
    taps, (web, _), _ = taps
    taps.take("a", TapFilter())
    for _ in range(QUEUED_MAX + 3):
        web.tap(exchange(), 2.0)
    records, dropped = taps.take("a", TapFilter())
    assert (len(records), dropped) == (TAKEN_MAX, 3)


def test_taps_are_few_and_sensible(taps):
    taps, _, clock = taps
    for number in range(TAPS_MAX):
        taps.take(str(number), TapFilter())
    with pytest.raises(LimitExceeded, match="end another one"):
        taps.take("more", TapFilter())
    clock.now += LEASE_S + 1
    with pytest.raises(ConfigError):
        taps.take("odd", TapFilter(status="x"))
    assert taps.take("more", TapFilter()) == ((), 0)


def test_requests_of_a_real_worker_are_shown_as_they_end(pair):
    hops = pair.hops()
    hops.serve()
    wanted = TapFilter(path_prefix="/x", headers=True)
    assert pair.worker.ask(Tap("k", wanted)).records == ()
    client = hops.client()
    client.send(GET)
    client.read_message()
    client.send(GET.replace(b"/x", b"/y"))
    client.read_message()
    seen = []
    deadline = time.monotonic() + 10
    while len(seen) < 2:
        assert time.monotonic() < deadline
        seen += pair.worker.ask(Tap("k", wanted)).records
    assert [(record.service, record.direction, record.source) for record in seen] == [
        ("api", "inbound", "web"), ("web", "outbound", ""),
    ]  # fmt: skip
    inbound, outbound = seen
    assert (outbound.path, outbound.status, outbound.target) == ("/x?q=1", 200, "api")
    assert ("authorization", "(hidden)") in inbound.request_headers
    assert abs(inbound.at_s - time.time()) < 60
    assert isinstance(pair.worker.ask(EndTap("k")), Ack)
    assert "neither a status" in pair.worker.ask(Tap("k", TapFilter(status="x"))).error


def test_a_worker_says_what_it_holds_and_never_its_keys(pair):
    hops = pair.hops()
    hops.serve()
    client = hops.client()
    client.send(GET)
    client.read_message()
    reply = pair.worker.ask(Describe("web"))
    web = reply.description
    assert b"PRIVATE" not in repr(reply).encode()
    (listener,) = web.listeners
    assert (listener.direction, listener.protocol, listener.target, listener.port) == ("outbound", "http", "api", 9191)
    assert (listener.connections, listener.requests, listener.denied) == (1, 1, 0)
    (target,) = web.targets
    assert (target.target, target.endpoints, target.usable, target.ejected) == ("api", 1, 1, 0)
    assert target.spiffe_ids == (pair.authority.spiffe_id("api"),)
    (endpoint,) = web.endpoints
    assert (endpoint.endpoint, endpoint.address, endpoint.state) == ("api-1", f"{hops.address}:21000", "healthy")
    assert (endpoint.active, endpoint.connections, endpoint.idle, endpoint.waiting) == (0, 1, 1, 0)
    assert [route.action for route in web.routes] == ["to api"]
    leaf, root = web.certificates
    assert (leaf.kind, leaf.spiffe_id, root.kind) == ("leaf", pair.authority.spiffe_id("web"), "root")
    assert leaf.valid_after_s < time.time() < leaf.valid_before_s
    assert len(leaf.sha256) == 64
    everything = pair.worker.ask(Describe()).description
    assert {row.proxy_id for row in everything.listeners} == {"web-sidecar-proxy", "api-sidecar-proxy"}
    assert pair.worker.ask(Describe("api-sidecar-proxy")).description.listeners[0].mtls == "strict"
    assert pair.worker.ask(Describe("nobody")).description.listeners == ()


def test_the_last_refusal_is_remembered_with_its_reason(pair):
    hops = pair.hops()
    base = pair.authority.two_hops(
        outbound_port=9191, inbound_port=21000, app_port=8080, address=hops.address, version=pair.next_version()
    )
    web, api = base.sidecars
    bad = replace(base, sidecars=(replace(web, access_log=AccessLogConfig("/dev/null", "%NOPE%")), api))
    before = pair.worker.ask(Describe("web")).description
    assert isinstance(pair.worker.configure(bad), Nack)
    after = pair.worker.ask(Describe("web")).description
    assert (after.version, after.listeners) == (before.version, before.listeners)
    assert after.refused.version == base.version
    assert "there is no operator %NOPE%" in after.refused.reason
    assert abs(after.refused.at_s - time.time()) < 60
