"""Who may come in, on real sockets: per request, per connection, permissive ports, forwarded certificates, audit."""

import hashlib
import socket

import pytest
from msgspec.structs import replace
from peers import TIMEOUT_S, Peer
from processes import wait_until

from agent.dataplane.control import Observed
from mesh.authz.observed import Edge, ObservedListener
from mesh.http.path import PathPolicy
from mesh.model.match import NamedMatch, PathMatch, StringMatch
from mesh.proxy.sidecar_config import AccessLogConfig, Permission, SourceRule

GET = b"GET %s HTTP/1.1\r\nHost: api\r\n%s\r\n"
UPGRADE = b"Connection: upgrade\r\nUpgrade: websocket\r\n"
HELLO = b"HTTP/1.1 200 OK\r\nContent-Length: 5\r\n\r\nhello"
DENIED = b"RBAC: access denied"


def under(prefix):
    return PathMatch("prefix", prefix)


def ask(peer, path=b"/", *headers):
    """Status and body of a GET."""
    lines = b"".join(header + b"\r\n" for header in headers)
    peer.send(GET % (path, lines))
    head, body = peer.read_message()
    return int(head.split()[1]), body


def plain_client(hops):
    peer = Peer(socket.create_connection((hops.address, hops.inbound_port), TIMEOUT_S))
    hops._peers.append(peer)
    return peer


def observed(pair, service="api"):
    reply = pair.worker.ask(Observed(60.0))
    return next(one for one in reply.listeners if one.service == service)


def test_requests_of_one_connection_are_judged_one_by_one(pair):
    permissions = (
        Permission("deny", path=under("/admin")),
        Permission("allow", methods=("GET",), headers=(NamedMatch("x-team", StringMatch("exact", "blue")),)),
    )
    hops = pair.hops(default_allow=False, intentions=(SourceRule("web", None, permissions),))
    hops.serve(HELLO)
    client = hops.client()
    blue = b"X-Team: blue"
    assert ask(client, b"/", blue) == (200, b"hello")
    assert ask(client, b"/") == (403, DENIED)
    assert ask(client, b"/admin/x", blue) == (403, DENIED)
    for disguise in (b"/x/../admin/y", b"/%61dmin", b"/x/%2e%2e/admin", b"/admin?a=/x"):
        assert ask(client, disguise, blue) == (403, DENIED)
    assert ask(client, b"/", blue, b"x-TEAM: red") == (403, DENIED)
    assert ask(client, b"/ok", blue) == (200, b"hello")
    hops.apply(default_allow=False, intentions=(SourceRule("web", "allow"),))
    assert ask(client, b"/admin") == (200, b"hello")


def test_slashes_are_merged_before_rules_are_asked_where_that_is_configured(pair):
    rule = SourceRule("web", None, (Permission("deny", path=under("/admin")),))
    hops = pair.hops(intentions=(rule,))
    hops.serve(HELLO)
    client = hops.tls_client("web")
    assert ask(client, b"//admin") == (200, b"hello")
    hops.apply(intentions=(rule,), path_policy=PathPolicy(merge_slashes=True, escaped_slashes="unescape"))
    assert ask(client, b"//admin") == (403, DENIED)
    assert ask(client, b"/x%2f..%2fadmin") == (403, DENIED)


def test_what_was_upgraded_ends_when_its_request_would_be_refused(pair):
    first = SourceRule("web", None, (Permission("allow", path=under("/ws")), Permission("allow", path=under("/chat"))))
    hops = pair.hops(default_allow=False, intentions=(first,))
    sides = []
    for path in (b"/ws", b"/chat"):
        client = hops.client()
        client.send(GET % (path, UPGRADE))
        app = hops.app()
        app.read_head()
        app.send(b"HTTP/1.1 101 Switching Protocols\r\nConnection: upgrade\r\nUpgrade: websocket\r\n\r\n")
        client.read_head()
        sides.append((client, app))
    (web, web_app), (chat, chat_app) = sides
    hops.apply(default_allow=False, intentions=(SourceRule("web", None, (Permission("allow", path=under("/chat")),)),))
    assert web.at_end()
    assert web_app.at_end()
    chat.send(b"still here")
    assert chat_app.read(10) == b"still here"


def test_audit_lets_requests_in_counts_them_and_says_so(pair):
    rule = SourceRule("web", None, (Permission("allow", path=under("/public")),), audit=True)
    counter = 'mesh_intentions_audit_denied_total{destination="api",source="web"}'
    hops = pair.hops(default_allow=False, intentions=(rule, SourceRule("*", "deny", precedence=8)))
    hops.serve(HELLO)
    client = hops.client()
    assert ask(client, b"/public") == (200, b"hello")
    assert ask(client, b"/secret") == (200, b"hello")
    assert ask(hops.tls_client("cart"), b"/public") == (403, DENIED)
    assert pair.worker.counters()[counter] == 1
    assert "audit: GET /secret of web to api would have been refused by rule web=>api no permission" in (
        pair.worker.log.read_text()
    )
    hops.apply(default_allow=False, audit=True)
    assert ask(hops.tls_client("cart"), b"/public") == (200, b"hello")


def test_the_access_log_says_which_rule_decided(pair, tmp_path):
    log = tmp_path / "access.log"
    rules = (
        SourceRule("web", None, (Permission("deny", path=under("/admin")), Permission("allow", path=under("/")))),
        SourceRule("cart", "deny", audit=True),
    )
    hops = pair.hops(default_allow=False, intentions=rules)
    hops.serve(HELLO)
    text_format = "%REQ(:PATH)% %POLICY_DECISION% | %RESPONSE_CODE_DETAILS%\n"
    config = hops.apply(default_allow=False, intentions=rules)
    sidecars = tuple(
        replace(one, access_log=AccessLogConfig(str(log), text_format)) if one.inbound is not None else one
        for one in config.sidecars
    )
    pair.worker.configure(replace(config, version=pair.next_version(), sidecars=sidecars))
    web = hops.tls_client("web")
    ask(web, b"/a")
    ask(web, b"/admin")
    ask(hops.tls_client("cart"), b"/c")
    ask(hops.tls_client("other"), b"/d")
    pair.worker.configure(replace(config, version=pair.next_version()))  # closes the log
    wait_until(lambda: log.exists() and log.read_text().count("\n") == 4)
    assert sorted(log.read_text().splitlines()) == [
        "/a allowed: web=>api permission 2 allow | via_upstream",
        "/admin denied: web=>api permission 1 deny | rbac_access_denied_matched_policy[web=>api_permission_1_deny]",
        "/c audit-denied: rule cart=>api deny | via_upstream",
        "/d denied: default | rbac_access_denied_matched_policy[none]",
    ]


def test_an_audited_tcp_service_takes_connections_and_counts_them(pair):
    counter = 'mesh_intentions_audit_denied_total{destination="api",source="web"}'
    hops = pair.hops(protocol="tcp", default_allow=True, intentions=(SourceRule("web", "deny", audit=True),))
    hops.client().send(b"x")
    assert hops.app().read(1) == b"x"
    assert pair.worker.counters()[counter] == 1


@pytest.mark.parametrize("protocol", ["http", "tcp"])
def test_a_strict_port_refuses_plain_connections(pair, protocol):
    hops = pair.hops(protocol=protocol)
    client = plain_client(hops)
    client.send(GET % (b"/", b""))
    assert client.was_reset() or client.at_end()


def test_a_permissive_port_takes_both_and_plain_callers_are_nobody(pair):
    rules = (
        SourceRule("web", "allow"),
        SourceRule("*", None, (Permission("allow", path=under("/open")),), precedence=8),
    )
    hops = pair.hops(default_allow=False, intentions=rules, mtls="permissive", forward_client_cert="append_forward")
    hops.serve(HELLO)
    plain = plain_client(hops)
    assert ask(plain, b"/open") == (200, b"hello")
    assert ask(plain, b"/closed") == (403, DENIED)
    assert ask(hops.tls_client("web"), b"/closed") == (200, b"hello")
    assert ask(hops.client(), b"/closed") == (200, b"hello")
    slow = plain_client(hops)
    for byte in GET % (b"/open", b""):
        slow.send(bytes((byte,)))
    assert slow.read_message()[1] == b"hello"
    assert pair.worker.counters()['mesh_inbound_plaintext_connections_total{local_cluster="api"}'] >= 2
    sources = {(edge.source, edge.path): (edge.allowed, edge.denied) for edge in observed(pair).edges}
    assert sources["", "/open"] == (2, 0)
    assert sources["", "/closed"] == (0, 1)


def test_a_plain_caller_cannot_bring_a_certificate_with_it(pair):
    hops = pair.hops(mtls="permissive", forward_client_cert="append_forward")
    client = plain_client(hops)
    client.send(GET % (b"/", b"X-Forwarded-Client-Cert: By=me;URI=spiffe://forged\r\n"))
    assert b"x-forwarded-client-cert" not in hops.app().read_head().lower()


def test_a_connection_to_a_permissive_port_that_says_nothing_leaves_nothing_behind(pair):
    hops = pair.hops(mtls="permissive", connections_max=2)
    for _ in range(6):
        plain_client(hops).close()
    hops.serve(HELLO)
    while True:  # the worker hears of each end in its own time
        with_room = plain_client(hops)
        try:
            assert ask(with_room) == (200, b"hello")
            break
        except (AssertionError, OSError):
            continue
    hops.apply(mtls="permissive")


def test_a_permissive_tcp_port_lets_the_server_speak_first(pair):
    hops = pair.hops(protocol="tcp", mtls="permissive", intentions=(SourceRule("*", "allow", precedence=8),))
    client = plain_client(hops)
    app = hops.app()
    app.send(b"220 ready")
    assert client.read(9) == b"220 ready"
    client.send(b"x")
    assert app.read(1) == b"x"
    hops.apply(mtls="permissive", intentions=(SourceRule("web", "allow"),), default_allow=False)
    assert client.at_end()
    assert app.at_end()


def forwarded_cert(hops, client, *, given=b""):
    client.send(GET % (b"/", b"X-Forwarded-Client-Cert: %s\r\n" % given if given else b""))
    head = hops.app().read_head().decode()
    lines = [line for line in head.split("\r\n") if line.lower().startswith("x-forwarded-client-cert:")]
    assert len(lines) <= 1
    return lines[0].partition(": ")[2] if lines else None


@pytest.mark.parametrize(
    ("mode", "expected"),
    [
        ("sanitize", None),
        ("forward", "By=x"),
        ("always_forward", "By=x"),
        ("sanitize_set", "{own}"),
        ("append_forward", "By=x,{own}"),
    ],
)
def test_the_callers_certificate_is_forwarded_as_configured(pair, mode, expected):
    hops = pair.hops(forward_client_cert=mode)
    leaf = pair.authority.leaf("web")
    client = hops.tls_client("web", leaf=leaf)
    got = forwarded_cert(hops, client, given=b"By=x")
    from cryptography import x509
    from cryptography.hazmat.primitives.serialization import Encoding

    der = x509.load_pem_x509_certificate(leaf[0].encode()).public_bytes(Encoding.DER)
    digest = hashlib.sha256(der).hexdigest()
    own = f"By={pair.authority.spiffe_id('api')};Hash={digest};URI={pair.authority.spiffe_id('web')}"
    assert got == (expected.format(own=own) if expected is not None else None)


def test_connections_from_before_forwarding_was_asked_for_forward_too(pair):
    hops = pair.hops()
    client = hops.tls_client("web")
    client.send(GET % (b"/", b""))
    app = hops.app()
    app.read_head()
    app.send(HELLO)
    client.read_message()
    hops.apply(forward_client_cert="sanitize_set")
    client.send(GET % (b"/", b""))
    assert "URI=" + pair.authority.spiffe_id("web") in app.read_head().decode()


def test_the_worker_remembers_who_called(pair):
    rules = (SourceRule("web", None, (Permission("deny", path=under("/admin")),)), SourceRule("cart", "deny"))
    hops = pair.hops(default_allow=True, intentions=rules)
    hops.serve(HELLO)
    client = hops.client()
    for path in (b"/orders/1", b"/orders/2", b"/admin", b"/a/../admin"):
        ask(client, path)
    ask(hops.tls_client("cart"))
    listener = observed(pair)
    assert isinstance(listener, ObservedListener)
    assert listener.http
    ours = [edge for edge in listener.edges if edge.path in ("/orders/*", "/admin") or edge.source == "cart"]
    assert sorted(ours, key=lambda edge: (edge.source, edge.path)) == [
        Edge("cart", "GET", "/", 0, 1, ("/",)),
        Edge("web", "GET", "/admin", 0, 2, ("/admin",)),
        Edge("web", "GET", "/orders/*", 2, 0, ("/orders/1", "/orders/2")),
    ]
