"""/v1/agent/proxy over the wire, and the commands that read it."""

import json
import threading

import httpx
import pytest
import trio
from click.testing import CliRunner

from agent.cli.main import cli
from agent.http.agent_proxy import AgentProxyApi
from agent.http.connection import HttpSettings
from agent.http.request import ApiResponse, Route
from agent.http.server import HttpServer, TcpListen
from agent.runtime import Runtime
from agent.sidecars import Problem
from mesh.errors import Refused, Unreachable
from mesh.proxy.description import (
    CertificateDescription,
    Description,
    EndpointDescription,
    ListenerDescription,
    Refusal,
    RouteDescription,
    TargetDescription,
)
from mesh.proxy.tap import TapRecord


def record(**fields):
    values = {
        "at_s": 1000.25, "service": "web", "direction": "outbound", "source": "", "method": "GET", "path": "/a",
        "authority": "api", "status": 200, "flags": "", "duration_s": 0.0125, "bytes_received": 0, "bytes_sent": 2,
        "target": "api", "endpoint": "10.0.0.1:80", "route": "", "attempts": 1, "request_id": "id",
    }  # fmt: skip
    return TapRecord(**{**values, **fields})


def worker(pid, *, requests=1, state="healthy", refused=None):
    proxy, near, since_s = "web-sidecar-proxy", "127.0.0.1:9191", 4.0 if state == "ejected" else 0.0
    listener = ListenerDescription(
        proxy, "web", "outbound", "127.0.0.1", 9191, "http", "api", 0, 0, "", 0, True, 8192, 1, requests, 0, ""
    )
    endpoint = EndpointDescription(
        proxy, near, "api", "n/api", "10.0.0.1:80", state, 1, 0, "", requests, 2, 1, 0, 3, "consecutive_5xx", since_s
    )
    target = TargetDescription(
        proxy, near, "api", ("spiffe://x",), "least_request", 1, 1, 0, requests, 0, 0, 2, 1024, 2**31, 1024,
        ("retries 2",),
    )  # fmt: skip
    route = RouteDescription("web-sidecar-proxy", "127.0.0.1:9191", "h", ("*",), "r", ("path exact /a",), "to api", ())
    leaf = CertificateDescription("web-sidecar-proxy", "web", "leaf", "", "spiffe://x/web", "01:02", 0.0, 4e9, "ab")
    return Description(pid, 5, refused, (listener,), (route,), (target,), (endpoint,), (leaf,))


class Views:
    """The workers, as a test wants them."""

    def __init__(self):
        self.workers = (worker(1),)
        self.batches = []
        self.filters = []
        self.ended = []

    async def describe(self, service):
        if isinstance(self.workers, Exception):
            raise self.workers
        return self.workers if service in ("", "web") else (Description(1, 5),)

    async def tap(self, key, wanted):
        self.filters.append(wanted)
        batch = self.batches.pop(0) if self.batches else ((), 0)
        if isinstance(batch, Exception):
            raise batch
        return batch

    async def end_tap(self, key):
        self.ended.append(key)


class Served:
    def __init__(self, views, problems, address):
        self.views, self.problems, self.address = views, problems, address
        self.url = f"http://{address}"

    def run(self, *arguments):
        return CliRunner().invoke(cli, [*arguments[:2], "-http-addr", self.address, *arguments[2:]])


@pytest.fixture
def served():
    """The server in a thread of its own: commands are synchronous."""
    views, problems = Views(), []
    started, stop = threading.Event(), threading.Event()
    found = []

    async def bad(request):
        async def stream(send):
            await send(b"first")
            raise RuntimeError("a bug")

        return ApiResponse(stream=stream)

    async def serve():
        runtime = Runtime(seed=1)
        routes = [*AgentProxyApi(views, lambda: problems, runtime, "dc1").routes(), Route("GET", "/v1/test/bad", bad)]
        server = HttpServer(routes, (TcpListen("ports.http", "127.0.0.1", 0),), HttpSettings(), runtime)
        await server.listen()
        found.append(f"127.0.0.1:{server.addresses[0][1]}")
        async with trio.open_nursery() as nursery:
            nursery.start_soon(server.run)
            started.set()
            while not stop.is_set():
                await trio.sleep(0.01)
            await server.drain(1.0)
            nursery.cancel_scope.cancel()

    thread = threading.Thread(target=trio.run, args=(serve,))
    thread.start()
    assert started.wait(10)
    yield Served(views, problems, found[0])
    stop.set()
    thread.join(10)
    assert not thread.is_alive()


def test_the_configuration_is_that_of_all_workers_with_what_is_not_served(served):
    served.problems.append(Problem("web-sidecar-proxy", "web", "its port is taken"))
    answer = httpx.get(f"{served.url}/v1/agent/proxy/config?service=web").json()
    assert answer["Problems"] == [{"ProxyId": "web-sidecar-proxy", "Service": "web", "Reason": "its port is taken"}]
    (only,) = answer["Workers"]
    assert (only["Pid"], only["Version"], only["Refused"]) == (1, 5, None)
    assert only["Endpoints"][0]["State"] == "healthy"
    served.problems.clear()
    missing = httpx.get(f"{served.url}/v1/agent/proxy/config?service=nobody")
    assert (missing.status_code, missing.text) == (404, "This agent serves no sidecar of a service 'nobody'")
    served.views.workers = Unreachable("No proxy worker is running")
    assert httpx.get(f"{served.url}/v1/agent/proxy/config").status_code == 500


def test_requests_stream_until_there_are_enough_and_the_tap_ends(served):
    served.views.batches = [((), 0), ((record(),), 0), ((), 2), ((record(path="/b"), record(path="/c")), 2)]
    with httpx.stream("GET", f"{served.url}/v1/agent/proxy/tap?max=2&method=GET&headers") as response:
        assert response.headers["content-type"] == "application/x-ndjson"
        lines = [json.loads(line) for line in response.iter_lines()]
    assert [line.get("Path", line.get("Dropped")) for line in lines] == ["/a", 2, "/b"]
    assert len(served.views.ended) == 1
    assert (served.views.filters[0].method, served.views.filters[0].headers) == ("GET", True)


def test_a_client_that_leaves_ends_its_tap(served):
    served.views.batches = [((), 0), ((record(),), 0)]
    with httpx.stream("GET", f"{served.url}/v1/agent/proxy/tap") as response:
        next(response.iter_lines())
    for _ in range(500):
        if served.views.ended:
            break
        threading.Event().wait(0.01)
    assert len(served.views.ended) == 1


@pytest.mark.parametrize(
    ("query", "status", "text"),
    [
        ("direction=up", 400, "Invalid direction 'up'"),
        ("status=abc", 400, "Invalid filter: status 'abc'"),
        ("max=-1", 400, "is not an unsigned 64-bit number"),
        ("dc=other", 500, "No path to datacenter"),
    ],
)
def test_a_tap_that_makes_no_sense_is_refused_before_it_begins(served, query, status, text):
    answer = httpx.get(f"{served.url}/v1/agent/proxy/tap?{query}")
    assert (answer.status_code, text in answer.text) == (status, True)


def test_a_worker_that_refuses_is_heard_before_and_during_the_answer(served):
    served.views.batches = [Refused("8 taps are active")]
    assert "8 taps are active" in httpx.get(f"{served.url}/v1/agent/proxy/tap").text
    served.views.batches = [((), 0), Unreachable("gone")]
    assert httpx.get(f"{served.url}/v1/agent/proxy/tap").text == '{"Error":"gone"}\n'


def test_an_answer_that_breaks_off_is_not_taken_for_a_whole_one(served):
    with pytest.raises(httpx.RemoteProtocolError):
        httpx.get(f"{served.url}/v1/test/bad")
    assert httpx.head(f"{served.url}/v1/test/bad").status_code == 200


def test_the_tap_command_prints_a_line_a_request(served):
    hostile = record(path="/\x1b[2J", request_headers=(("a", "b"),), response_headers=(("c", "d"),), flags="UF")
    served.views.batches = [((), 0), ((record(), hostile), 1)]
    result = served.run("tap", "-max=2")
    first, second, third, fourth, fifth = result.stdout.splitlines()
    assert first.split()[:4] == ["TIME", "DIRECTION", "SOURCE", "TARGET"]
    assert second.split()[1:] == ["outbound", "-", "api", "GET", "200", "-", "12.5", "10.0.0.1:80", "api/a"]
    assert third.endswith("api/\N{REPLACEMENT CHARACTER}[2J")
    assert (fourth.strip(), fifth.strip()) == ("> a: b", "< c: d")
    assert "1 requests more" in result.stderr
    assert result.exit_code == 0
    served.views.batches = [((), 0), ((record(),), 0)]
    assert json.loads(served.run("tap", "-max=1", "-format=json").stdout)["Path"] == "/a"
    served.views.batches = [((), 0), Unreachable("gone")]
    failed = served.run("tap")
    assert (failed.exit_code, "Error: gone" in failed.stderr) == (1, True)
    assert served.run("tap", "-status=x").exit_code == 1
    assert served.run("tap", "-direction=up").exit_code == 2


def run_config(served, *arguments):
    result = CliRunner().invoke(cli, ["proxy-config", arguments[0], "-http-addr", served.address, *arguments[1:]])
    assert result.exit_code == 0, result.output
    return result


@pytest.mark.parametrize(
    ("section", "cells"),
    [
        ("listeners", ["web-sidecar-proxy", "outbound", "127.0.0.1:9191", "http", "api", "2", "3"]),
        ("routes", ["path exact /a", "to api"]),
        ("targets", ["least_request", "1/1", "3 of 2048", "4 of 2048", "retries 2"]),
        ("endpoints", ["n/api", "10.0.0.1:80", "ejected 1/2, healthy 1/2", "6"]),
        ("certs", ["leaf", "spiffe://x/web", "01:02", " d)"]),
    ],
)
def test_workers_are_shown_as_one(served, section, cells):
    served.views.workers = (worker(1), worker(2, requests=2, state="ejected"))
    lines = run_config(served, section).stdout.splitlines()
    assert len(lines) == 2
    for cell in cells:
        assert cell in lines[1]


def test_a_refusal_is_shown_with_its_reason(served):
    served.views.workers = (worker(1, refused=Refusal(6, "port taken", 1000.0)),)
    served.problems.append(Problem("web-sidecar-proxy", "web", "no good"))
    result = run_config(served, "listeners", "-service", "web")
    assert "Worker 1 serves version 5; the last it refused was version 6" in result.stderr
    assert "port taken" in result.stderr
    assert "web-sidecar-proxy: no good" in result.stderr
    shown = json.loads(run_config(served, "endpoints", "-format=json").stdout)
    assert shown["Workers"][0]["Refused"]["Reason"] == "port taken"
    assert shown["Endpoints"][0]["Address"] == "10.0.0.1:80"
    result = CliRunner().invoke(cli, ["proxy-config", "certs", "-http-addr", served.address, "-service=nobody"])
    assert result.exit_code == 1
    assert "serves no sidecar" in result.output
