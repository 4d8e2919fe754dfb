"""Plain TCP through two sidecars of a real worker."""

import random
import threading

import pytest

from mesh.proxy.sidecar_config import EndpointConfig, SourceRule


def test_bytes_pass_both_ways_and_each_half_closes_on_its_own(pair):
    hops = pair.hops(protocol="tcp")
    client = hops.client()
    client.send(b"ping")
    app = hops.app()
    assert app.read(4) == b"ping"
    client.end()
    assert app.at_end()
    app.send(b"pong, after you had ended")
    assert client.read(25) == b"pong, after you had ended"
    app.end()
    assert client.at_end()


def test_half_close_while_the_other_side_is_sending_loses_nothing(pair):
    hops = pair.hops(protocol="tcp")
    data = random.Random(1).randbytes(4_000_000)
    for _ in range(5):
        client = hops.client()
        app = hops.app()
        sender = threading.Thread(target=lambda app=app: (app.send(data), app.end()))
        sender.start()
        client.send(b"request")
        client.end()  # close_notify on the mTLS leg, while megabytes come the other way
        assert client.read(len(data)) == data
        assert client.at_end()
        assert app.read(7) == b"request"
        sender.join()


def test_the_server_may_speak_first(pair):
    hops = pair.hops(protocol="tcp")
    client = hops.client()
    hops.app().send(b"220 ready\r\n")
    assert client.read(11) == b"220 ready\r\n"


def test_large_streams_both_ways_at_once(pair):
    hops = pair.hops(protocol="tcp")
    client = hops.client()
    app = hops.app()
    up, down = random.Random(2).randbytes(3_000_000), random.Random(3).randbytes(3_000_000)
    threads = [threading.Thread(target=client.send, args=(up,)), threading.Thread(target=app.send, args=(down,))]
    for thread in threads:
        thread.start()
    received = []
    reader = threading.Thread(target=lambda: received.append(app.read(len(up))))
    reader.start()
    assert client.read(len(down)) == down
    reader.join()
    assert received == [up]
    for thread in threads:
        thread.join()


def test_a_reset_on_one_side_is_a_reset_on_the_other(pair):
    hops = pair.hops(protocol="tcp")
    client = hops.client()
    app = hops.app()
    client.send(b"x")
    app.read(1)
    client.reset()
    assert app.was_reset()
    client = hops.client()
    app = hops.app()
    client.send(b"x")
    app.read(1)
    app.reset()
    assert client.was_reset()


def test_denied_callers_are_closed_and_a_new_deny_closes_matching_connections_only(pair):
    rules = (SourceRule("web", "allow"),)
    hops = pair.hops(protocol="tcp", default_allow=False, intentions=rules)
    client = hops.client()
    app = hops.app()
    client.send(b"x")
    app.read(1)
    other = hops.tls_client("other")
    assert other.at_end()
    hops.apply(default_allow=False, intentions=(SourceRule("other", "deny"), *rules))
    client.send(b"y")
    assert app.read(1) == b"y"
    hops.apply(default_allow=True, intentions=(SourceRule("web", "deny"),))
    assert client.at_end()
    assert app.at_end()
    assert hops.client().at_end()
    allowed = hops.tls_client("other")
    allowed.send(b"z")
    assert hops.app().read(1) == b"z"


def test_an_unreachable_endpoint_is_passed_over(pair):
    hops = pair.hops(protocol="tcp")
    for _ in range(8):
        hops.apply(
            target={
                "endpoints": (
                    EndpointConfig("dead", hops.address, 1),
                    EndpointConfig("alive", hops.address, hops.inbound_port),
                ),
                "expected_spiffe_ids": (pair.authority.spiffe_id("api"),),
            }
        )
        client = hops.client()
        client.send(b"x")
        assert hops.app().read(1) == b"x"
    dead = hops.pair.hops(protocol="tcp", target={"endpoints": (EndpointConfig("dead", hops.address, 1),)})
    assert dead.client().at_end()


def test_a_slow_reader_stops_the_writer_in_bounded_memory(pair):
    hops = pair.hops(protocol="tcp")
    hops.client()
    app = hops.app()
    before = pair.worker.rss_bytes()
    app.sock.settimeout(0.3)
    sent = 0
    with pytest.raises(TimeoutError):  # noqa: PT012
        while sent < 256 * 1024 * 1024:
            sent += app.sock.send(b"x" * 65536)
    assert pair.worker.rss_bytes() - before < 16 * 1024 * 1024
