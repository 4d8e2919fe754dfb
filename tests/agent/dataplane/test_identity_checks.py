"""Who may speak to whom, between the handshake and the first byte."""

import socket
import time

import pytest
from mesh_pair import Peer
from sidecars import Authority

from agent.dataplane.control import Ack
from mesh.proxy.sidecar_config import EndpointConfig

GET = b"GET / HTTP/1.1\r\nHost: api\r\n\r\n"


def test_a_server_with_another_identity_gets_no_request(pair):
    hops = pair.hops(target={"expected_spiffe_ids": (pair.authority.spiffe_id("database"),)})
    client = hops.client()
    client.send(GET)
    head, body = client.read_message()
    assert head.startswith(b"HTTP/1.1 503 ")
    assert body.endswith(b"reset reason: remote connection failure")
    assert "identity was refused" in pair.worker.log.read_text()
    assert pair.worker.counter("envoy_cluster_ssl_fail_verify_san") > 0
    hops.listener.settimeout(0.2)
    with pytest.raises(TimeoutError):
        hops.app()


def test_plaintext_at_the_inbound_listener_reaches_nobody(pair):
    hops = pair.hops()
    client = Peer(socket.create_connection((hops.address, hops.inbound_port)))
    client.send(GET)
    while client._fill():
        pass
    client.close()
    assert b"HTTP" not in client.buffer


def test_a_client_of_another_authority_is_refused(pair):
    hops = pair.hops()
    stranger = Authority("99999999-2222-3333-4444-555555555555")
    with pytest.raises(OSError):  # noqa: PT012 - with TLS 1.3 the refusal arrives with the first read
        client = hops.tls_client(leaf=stranger.leaf("web"))
        client.send(GET)
        client.read(1)


def test_an_expired_client_is_refused(pair):
    hops = pair.hops()
    leaf = pair.authority.leaf("web", not_before_s=time.time() - 50, not_after_s=time.time() - 5)
    with pytest.raises(OSError):  # noqa: PT012
        client = hops.tls_client(leaf=leaf)
        client.send(GET)
        client.read(1)


def test_a_connection_lasts_no_longer_than_its_clients_certificate(pair):
    hops = pair.hops()
    hops.serve()
    leaf = pair.authority.leaf("web", not_after_s=time.time() + 2)
    ends_at = int(time.time()) + 3  # certificates count whole seconds
    client = hops.tls_client(leaf=leaf)
    client.send(GET)
    assert client.read_message()[1] == b"ok"
    while time.time() < ends_at:
        client.sock.settimeout(max(0.01, ends_at - time.time()))
        with pytest.raises(TimeoutError):
            client._fill()  # silence until then
    client.sock.settimeout(5)
    client.send(GET + GET)
    assert client.read_message()[0].startswith(b"HTTP/1.1 403 ")
    assert client.at_end()


def test_sessions_are_never_resumed(pair):
    hops = pair.hops()
    client = hops.tls_client()
    client.send(GET)
    app = hops.app()
    app.read_message()
    app.send(b"HTTP/1.1 200 OK\r\nContent-Length: 0\r\n\r\n")
    client.read_message()
    session = client.sock.session
    assert session is None or not session.has_ticket


def test_an_endpoint_that_fails_verification_is_passed_over_for_one_that_passes(pair):
    hops = pair.hops()
    impostor = pair.hops()
    impostor_config = pair.authority.two_hops(
        outbound_port=9191, inbound_port=21000, app_port=8080, address=impostor.address, version=pair.next_version()
    )
    _web, api = impostor_config.sidecars
    fake = pair.authority.sidecar("impostor", inbound=api.inbound)
    real = hops.pair.authority.two_hops(
        outbound_port=9191, inbound_port=21000, app_port=8080, address=hops.address, version=pair.next_version(),
        target={"endpoints": (
            EndpointConfig("fake", impostor.address, 21000), EndpointConfig("real", hops.address, 21000),
        )},
    )  # fmt: skip
    config = type(real)(real.version, (*real.sidecars, fake))
    reply = pair.worker.configure(config)
    assert reply == Ack(config.version)
    app = None
    for _ in range(6):
        client = hops.client()
        client.send(b"POST / HTTP/1.1\r\nHost: api\r\nContent-Length: 4\r\nConnection: close\r\n\r\nbody")
        app = app or hops.app()
        assert app.read_message()[1] == b"body"
        app.send(b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nok")
        assert client.read_message()[1] == b"ok"
    impostor.listener.settimeout(0.1)
    with pytest.raises(TimeoutError):
        impostor.app()
