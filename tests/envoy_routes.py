"""Neutral route tables compiled to Envoy's RouteConfiguration (JSON-able values), and a real Envoy that routes by them.

Conditions that the listener decides (port, scheme, source, metadata) are not compiled here: Envoy's listeners are one
per port, and its source conditions filter chains.
"""

import contextlib
import json
import socket
import subprocess
import time
from http.client import HTTPConnection

from envoy_peer import HTTP, LIMIT_S, endpoint

from mesh.traffic.route import DirectResponse

WHICH = "x-route"  # the response header that names the rule


def _string(match):
    if match.kind == "regex":
        return {"safe_regex": {"regex": f"(?i:{match.value})" if match.ignore_case else match.value}}
    return {match.kind: match.value, "ignore_case": match.ignore_case}


def _header(named):
    match = named.match
    if match.kind == "present":
        return {"name": named.name, "present_match": True, "invert_match": match.invert}
    # Without `treat_missing_header_as_empty` an inverted condition does not hold of a header that is not there.
    return {
        "name": named.name,
        "string_match": _string(match),
        "invert_match": match.invert,
        "treat_missing_header_as_empty": match.invert,
    }


def _parameter(named):
    assert not named.match.invert, "Envoy has no inverted condition on a parameter"
    if named.match.kind == "present":
        return {"name": named.name, "present_match": True}
    return {"name": named.name, "string_match": _string(named.match)}


def _path(path):
    if path is None:
        return {"prefix": "/"}
    if path.kind == "regex":
        return {"safe_regex": {"regex": f"(?i:{path.value})" if path.ignore_case else path.value}}
    kind = {"exact": "path", "prefix": "prefix", "segment": "path_separated_prefix"}[path.kind]
    value = path.value
    if path.kind == "segment":
        value = value.rstrip("/")
        if not value:
            kind, value = "prefix", "/"
    return {kind: value, "case_sensitive": not path.ignore_case}


def _methods(methods):
    return {"name": ":method", "string_match": {"safe_regex": {"regex": "|".join(methods)}}}


def match_of(match):
    """Envoy's RouteMatch; None stands for the one that always holds."""
    if match is None:
        return {"prefix": "/"}
    compiled = _path(match.path)
    headers = [_header(one) for one in match.headers]
    if match.methods:
        headers.append(_methods(match.methods))
    if headers:
        compiled["headers"] = headers
    if match.query:
        compiled["query_parameters"] = [_parameter(one) for one in match.query]
    return compiled


def routes_of(rule):
    """A rule's matches as routes of Envoy, each answering with the rule's name."""
    assert isinstance(rule.action, DirectResponse)
    return [
        {
            "name": rule.name,
            "match": match_of(match),
            "direct_response": {"status": rule.action.status},
            "response_headers_to_add": [{"header": {"key": WHICH, "value": rule.name}}],
        }
        for match in (rule.matches or (None,))
    ]


def configuration_of(table):
    """Envoy's RouteConfiguration."""
    return {
        "name": table.name,
        "ignore_port_in_host_matching": True,
        "virtual_hosts": [
            {
                "name": host.name,
                "domains": list(host.domains),
                "routes": [route for rule in host.rules for route in routes_of(rule)],
            }
            for host in table.hosts
        ],
    }


def _listener(number, port, table):
    manager = {
        "@type": f"{HTTP}.network.http_connection_manager.v3.HttpConnectionManager",
        "stat_prefix": str(number),
        "route_config": configuration_of(table),
        "http_filters": [
            {"name": "envoy.filters.http.router", "typed_config": {"@type": f"{HTTP}.http.router.v3.Router"}}
        ],
    }
    return {
        "name": str(number),
        **endpoint(port),
        "filter_chains": [
            {"filters": [{"name": "envoy.filters.network.http_connection_manager", "typed_config": manager}]}
        ],
    }


class EnvoyRoutes:
    """A running Envoy with one listener per table."""

    def __init__(self, ports):
        self._ports = ports
        self._connections = {}

    def close(self):
        for connection in self._connections.values():
            connection.close()

    def route(self, number, head):
        """The name of the rule that answers, or None."""
        connection = self._connections.get(number)
        if connection is None:
            connection = self._connections[number] = HTTPConnection("127.0.0.1", self._ports[number], timeout=LIMIT_S)
        connection.putrequest(head.method.decode(), head.target.decode(), skip_host=True, skip_accept_encoding=True)
        connection.putheader("Host", head.authority.decode())
        for name, value in head.headers:
            connection.putheader(name.decode(), value.decode())
        connection.endheaders()
        response = connection.getresponse()
        response.read()
        name = response.getheader(WHICH)
        assert response.status == (404 if name is None else 200), (response.status, head)
        return name


@contextlib.contextmanager
def envoy_routes(directory, tables):
    """An EnvoyRoutes for these tables; the process ends with the block."""
    with contextlib.ExitStack() as reserved:
        sockets = [reserved.enter_context(socket.create_server(("127.0.0.1", 0))) for _ in tables]
        ports = [one.getsockname()[1] for one in sockets]
    listeners = [_listener(number, port, table) for number, (port, table) in enumerate(zip(ports, tables, strict=True))]
    path = directory / "envoy.json"
    path.write_text(json.dumps({"static_resources": {"listeners": listeners}}))
    with (directory / "envoy.log").open("wb") as log:
        process = subprocess.Popen(
            ["envoy", "-c", str(path), "--concurrency", "1", "--log-level", "warning", "--disable-hot-restart"],
            stdout=log,
            stderr=log,
        )
    try:
        deadline = time.monotonic() + LIMIT_S
        for port in ports:
            while True:
                with contextlib.suppress(OSError):
                    socket.create_connection(("127.0.0.1", port), 1.0).close()
                    break
                assert process.poll() is None, (directory / "envoy.log").read_text()
                assert time.monotonic() < deadline, "Envoy did not begin to listen"
                time.sleep(0.05)
        with contextlib.closing(EnvoyRoutes(ports)) as running:
            yield running
    finally:
        process.kill()
        process.wait()
