"""The same request goes to the same endpoint through a real Envoy and through our hash balancers."""

import contextlib
import json
import os
import random
import shutil
import socket
import subprocess
import threading
import time
from http.client import HTTPConnection
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
from endpoints import Backend

from mesh.http.head import RequestHead
from mesh.proxy.balancing import make_balancer
from mesh.proxy.hashing import compile_hash, xxh64
from mesh.traffic.policy import HashPolicy, LoadBalancing

pytestmark = [
    pytest.mark.interop,
    pytest.mark.skipif(shutil.which("envoy") is None and "CI" not in os.environ, reason="the envoy binary is missing"),
]

LIMIT_S = 20.0
REQUESTS = 300
WEIGHTS = {"equal": [1, 1, 1, 1, 1, 1], "unequal": [1, 2, 3, 1, 5, 2]}
COMBINED = [{"header": {"header_name": "x-key"}}, {"query_parameter": {"name": "q"}}]
COOKIE = [{"cookie": {"name": "sid", "ttl": "90s", "path": "/shop"}}]
SOURCE = [{"connection_properties": {"source_ip": True}}]
HTTP = "type.googleapis.com/envoy.extensions.filters"


class _NameItself(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    wbufsize = -1  # one write a response: two would wait for the other side's acknowledgement

    def do_GET(self):
        body = "{}:{}".format(*self.server.server_address).encode()
        self.send_response(200)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_arguments):
        pass


def _cluster(name, policy, hosts, weights):
    endpoints = [
        {
            "load_balancing_weight": weight,
            "endpoint": {"address": {"socket_address": {"address": host[0], "port_value": host[1]}}},
        }
        for host, weight in zip(hosts, weights, strict=True)
    ]
    assignment = {"cluster_name": name, "endpoints": [{"lb_endpoints": endpoints}]}
    return {"name": name, "type": "STATIC", "lb_policy": policy, "load_assignment": assignment}


def _configuration(port, hosts):
    clusters, routes = [], []
    for kind in ("ring_hash", "maglev"):
        for name, weights in WEIGHTS.items():
            cluster = f"{kind}-{name}"
            clusters.append(_cluster(cluster, kind.upper(), hosts, weights))
            for path, policies in (("combined", COMBINED), ("cookie", COOKIE), ("source", SOURCE)):
                action = {"cluster": cluster, "hash_policy": policies}
                routes.append({"match": {"prefix": f"/{cluster}/{path}"}, "route": action})
    router = {"@type": f"{HTTP}.http.router.v3.Router"}
    manager = {
        "@type": f"{HTTP}.network.http_connection_manager.v3.HttpConnectionManager",
        "stat_prefix": "in",
        "route_config": {"virtual_hosts": [{"name": "all", "domains": ["*"], "routes": routes}]},
        "http_filters": [{"name": "envoy.filters.http.router", "typed_config": router}],
    }
    listener = {
        "address": {"socket_address": {"address": "127.0.0.1", "port_value": port}},
        "filter_chains": [{"filters": [{"name": "http", "typed_config": manager}]}],
    }
    return {"static_resources": {"listeners": [listener], "clusters": clusters}}


@pytest.fixture(scope="module")
def envoy(tmp_path_factory):
    """(port of an Envoy, its endpoints' addresses in the order of their names)."""
    with contextlib.ExitStack() as stack:
        hosts = []
        for number in range(6):
            server = stack.enter_context(ThreadingHTTPServer((f"127.0.0.{2 + number}", 0), _NameItself))
            server.daemon_threads = True
            thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05})
            thread.start()
            stack.callback(thread.join)
            stack.callback(server.shutdown)
            hosts.append(server.server_address)
        with socket.create_server(("127.0.0.1", 0)) as free:
            port = free.getsockname()[1]
        path = tmp_path_factory.mktemp("envoy") / "envoy.json"
        path.write_text(json.dumps(_configuration(port, hosts)))
        command = ["envoy", "-c", str(path), "--concurrency", "1", "--disable-hot-restart", "-l", "error"]
        process = subprocess.Popen(command, start_new_session=True)
        stack.callback(process.wait, 10)
        stack.callback(process.kill)
        limit = time.monotonic() + LIMIT_S
        while True:
            with contextlib.suppress(OSError):
                socket.create_connection(("127.0.0.1", port), 1.0).close()
                break
            assert process.poll() is None, "envoy ended"
            assert time.monotonic() < limit, "envoy does not listen"
            time.sleep(0.05)
        yield port, [f"{address}:{number}" for address, number in hosts]


def _ours(kind, weights, hosts, *policies):
    endpoints = [Backend(host, host, weight=weight) for host, weight in zip(hosts, weights, strict=True)]
    balancer = make_balancer(endpoints, LoadBalancing(kind=kind), random.Random(1), now=0.0)
    request_hash = compile_hash(policies, random.Random(1))

    def choose(path, query, headers):
        pairs = tuple((name.encode(), value.encode()) for name, value in headers)
        head = RequestHead(
            method=b"GET",
            path=path.encode(),
            query=query.encode() if query else None,
            authority=b"web.mesh",
            headers=pairs,
        )
        return balancer.choose(0.0, request_hash(head, b"127.0.0.1")[0]).host

    return choose


def _get(connection, path, query, headers):
    connection.putrequest("GET", f"{path}?{query}" if query else path)
    for name, value in headers:
        connection.putheader(name, value)
    connection.endheaders()
    response = connection.getresponse()
    return response, response.read().decode()


@pytest.mark.parametrize("kind", ["ring_hash", "maglev"])
@pytest.mark.parametrize("weights", WEIGHTS)
def test_envoy_and_we_send_the_same_request_to_the_same_endpoint(envoy, kind, weights):
    port, hosts = envoy
    connection = HTTPConnection("127.0.0.1", port, timeout=LIMIT_S)
    choose = _ours(kind, WEIGHTS[weights], hosts, HashPolicy("header", "x-key"), HashPolicy("query", "q"))
    path = f"/{kind}-{weights}/combined"
    for number in range(REQUESTS):
        query = f"a=1&q=v{number % 7}&q=w" if number % 2 else ""
        headers = [("x-key", f"user{number}"), *([("x-key", "a second")] if number % 5 == 0 else [])]
        assert _get(connection, path, query, headers)[1] == choose(path, query, headers), (query, headers)
    for query in ("q=", "q", "b=1&q", "q=%41", "q=a%20b&q=c", "Q=1"):
        for key in ("", "some one", "a,b"):
            headers = [("x-key", key)]
            assert _get(connection, path, query, headers)[1] == choose(path, query, headers), (query, key)
    source = _ours(kind, WEIGHTS[weights], hosts, HashPolicy("source_ip"))
    assert _get(connection, f"/{kind}-{weights}/source", "", [])[1] == source("/", "", [])
    connection.close()


def test_envoy_and_we_make_and_read_cookies_alike(envoy):
    port, hosts = envoy
    connection = HTTPConnection("127.0.0.1", port, timeout=LIMIT_S)
    policy = HashPolicy("cookie", "sid", ttl_s=90.0, cookie_path="/shop")
    choose = _ours("ring_hash", WEIGHTS["equal"], hosts, policy)
    response, body = _get(connection, "/ring_hash-equal/cookie", "", [])
    theirs = response.getheader("set-cookie")
    value, _, attributes = theirs.partition("; ")
    assert choose("/", "", [("cookie", value)]) == body
    head = RequestHead(method=b"GET", path=b"/", query=None, authority=b"web.mesh", headers=())
    made, ours = compile_hash((policy,), random.Random(1))(head, b"127.0.0.1")
    assert ours.decode().partition("; ")[2] == attributes
    assert made == xxh64(ours.partition(b'"')[2].partition(b'"')[0])
    for text in ('a=1; sid="xyz"', "sid=xyz; sid=other", "xsid=1; sid=2"):
        headers = [("cookie", text)]
        assert _get(connection, "/ring_hash-equal/cookie", "", headers)[1] == choose("/", "", headers), text
    connection.close()


def test_an_empty_cookie_is_none_to_both(envoy):
    port, _ = envoy
    connection = HTTPConnection("127.0.0.1", port, timeout=LIMIT_S)
    request_hash = compile_hash((HashPolicy("cookie", "sid", ttl_s=90.0),), random.Random(1))
    for text in ("sid=; a=2", 'a=1; sid=""'):
        response, _ = _get(connection, "/ring_hash-equal/cookie", "", [("cookie", text)])
        assert response.getheader("set-cookie")
        headers = ((b"cookie", text.encode()),)
        head = RequestHead(method=b"GET", path=b"/", query=None, authority=b"web.mesh", headers=headers)
        assert request_hash(head, b"127.0.0.1")[1]
    connection.close()
