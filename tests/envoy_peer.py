"""A real Envoy in front of hosts that do as each request says: for tests that compare its decisions with ours."""

import contextlib
import json
import socket
import subprocess
import threading
import time
from http.client import HTTPConnection

LIMIT_S = 20.0
HTTP = "type.googleapis.com/envoy.extensions.filters"


def _serve(listener):
    with contextlib.suppress(OSError):
        while True:
            connection, _ = listener.accept()
            threading.Thread(target=_answer, args=(connection,), daemon=True).start()


def _answer(connection):
    """Answers each request with what its `x-answer` asks for: a status and headers (`503 grpc-status=14`), `reset`,
    `garbage`, or `slow`: nothing until Envoy gives up.
    """
    with connection, contextlib.suppress(OSError):
        while request := connection.recv(65536):
            answer = request.lower().split(b"x-answer: ")[1].split(b"\r\n")[0].decode()
            if answer == "reset":
                return
            if answer == "garbage":
                connection.sendall(b"garbage\r\n\r\n")
                return
            if answer == "slow":
                connection.recv(65536)
                return
            status, *headers = answer.split()
            lines = [f"HTTP/1.1 {status} X", *(header.replace("=", ": ", 1) for header in headers)]
            if status != "204":
                lines.append("content-length: 0")
            connection.sendall("\r\n".join([*lines, "", ""]).encode())


@contextlib.contextmanager
def hosts(count):
    """The ports of so many hosts, and of one that refuses connections."""
    listeners = [socket.create_server(("127.0.0.1", 0)) for _ in range(count)]
    with socket.socket() as dead:
        dead.bind(("127.0.0.1", 0))  # it does not listen
        for listener in listeners:
            threading.Thread(target=_serve, args=(listener,), daemon=True).start()
        try:
            yield [listener.getsockname()[1] for listener in listeners], dead.getsockname()[1]
        finally:
            for listener in listeners:
                listener.close()


def endpoint(port):
    """As Envoy's clusters name it."""
    return {"address": {"socket_address": {"address": "127.0.0.1", "port_value": port}}}


def _configuration(port, admin_port, clusters, routes):
    manager = {
        "@type": f"{HTTP}.network.http_connection_manager.v3.HttpConnectionManager",
        "stat_prefix": "in",
        "use_remote_address": True,  # loopback is internal: override headers are heard
        "internal_address_config": {"cidr_ranges": [{"address_prefix": "127.0.0.0", "prefix_len": 8}]},
        "route_config": {"virtual_hosts": [{"name": "all", "domains": ["*"], "routes": routes}]},
        "http_filters": [
            {"name": "envoy.filters.http.router", "typed_config": {"@type": f"{HTTP}.http.router.v3.Router"}}
        ],
    }
    listener = {
        "name": "in",
        **endpoint(port),
        "filter_chains": [
            {"filters": [{"name": "envoy.filters.network.http_connection_manager", "typed_config": manager}]}
        ],
    }
    return {"admin": endpoint(admin_port), "static_resources": {"listeners": [listener], "clusters": clusters}}


class Peer:
    """A running Envoy: what is asked of it, and what it has counted."""

    def __init__(self, port, admin_port):
        self._data = HTTPConnection("127.0.0.1", port, timeout=LIMIT_S)
        self._admin = HTTPConnection("127.0.0.1", admin_port, timeout=LIMIT_S)

    def close(self):
        self._data.close()
        self._admin.close()

    def get(self, path, answer, **headers):
        """The status that comes back for a request that asks its host for `answer`."""
        named = {name.replace("_", "-"): value for name, value in headers.items()}
        self._data.request("GET", path, headers={"x-answer": answer, **named})
        response = self._data.getresponse()
        response.read()
        return response.status

    def ask(self, path):
        """A page of the administration, decoded."""
        self._admin.request("GET", path)
        return json.loads(self._admin.getresponse().read())

    def counters(self, prefix):
        """Counters and gauges whose names begin so, by the rest of their names."""
        answer = self.ask(f"/stats?format=json&filter=^{prefix}")
        return {stat["name"].removeprefix(prefix): stat["value"] for stat in answer["stats"] if "name" in stat}


@contextlib.contextmanager
def envoy(directory, clusters, routes):
    """A Peer with these clusters and routes; the process ends with the block."""
    with socket.create_server(("127.0.0.1", 0)) as first, socket.create_server(("127.0.0.1", 0)) as second:
        port, admin_port = first.getsockname()[1], second.getsockname()[1]
    path = directory / "envoy.json"
    path.write_text(json.dumps(_configuration(port, admin_port, clusters, routes)))
    with (directory / "envoy.log").open("wb") as log:
        process = subprocess.Popen(
            ["envoy", "-c", str(path), "--concurrency", "1", "--log-level", "warning", "--disable-hot-restart"],
            stdout=log,
            stderr=log,
        )
    try:
        deadline = time.monotonic() + LIMIT_S
        while True:
            with contextlib.suppress(OSError):
                socket.create_connection(("127.0.0.1", port), 1.0).close()
                break
            assert process.poll() is None, (directory / "envoy.log").read_text()
            assert time.monotonic() < deadline, "Envoy did not begin to listen"
            time.sleep(0.05)
        with contextlib.closing(Peer(port, admin_port)) as peer:
            yield peer
    finally:
        process.kill()
        process.wait()
