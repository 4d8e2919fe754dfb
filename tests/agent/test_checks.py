import datetime
import socket
import ssl
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path

import pytest
import trio
import trio.testing
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID
from state_backend import MemoryBackend

from agent.check_http import HttpChecker
from agent.check_runs import run_tcp
from agent.checks import FIRST_RUN_S_MAX, CheckRunner, CheckRuns
from agent.definitions import check_definition, service_definition
from agent.local_state import LocalState
from agent.runtime import Runtime
from mesh.errors import NotFound, Refused, Unreachable
from mesh.model.catalog import Node, Service
from mesh.model.check import Check, CheckDefinition, CheckStatus
from mesh.model.command import Register


class Host:
    """A local state with its checks running."""

    def __init__(self, data_dir: Path | None = None, runtime: Runtime | None = None) -> None:
        self.runtime = runtime or Runtime(seed=7)
        self.state = LocalState("node-1", self.runtime, data_dir=data_dir)
        self.backend = MemoryBackend()
        self.runner = CheckRunner(self.state, self.backend, self.runtime, node_name="node-1")

    def status(self, check_id: str) -> str:
        check = self.state.check(check_id)
        return check.status if check else "gone"

    def output(self, check_id: str) -> str:
        check = self.state.check(check_id)
        return check.output if check else "gone"

    async def settled(self) -> None:
        await trio.testing.wait_all_tasks_blocked()


@pytest.fixture
async def host(nursery: trio.Nursery) -> Host:
    made = Host()
    await nursery.start(made.runner.run)
    return made


@asynccontextmanager
async def listening(answer: Callable[[bytes], bytes] | None = None) -> AsyncIterator[str]:
    """A loopback server that reads one request head and answers; its host:port."""
    listeners = await trio.open_tcp_listeners(0, host="127.0.0.1")

    async def serve(stream: trio.SocketStream) -> None:
        async with stream:
            head = b""
            try:
                while answer is not None and b"\r\n\r\n" not in head:
                    data = await stream.receive_some()
                    if not data:
                        return
                    head += data
                if answer is not None:
                    await stream.send_all(answer(head))
            except (trio.BrokenResourceError, trio.ClosedResourceError):
                return

    async with trio.open_nursery() as nursery:
        await nursery.start(trio.serve_listeners, serve, listeners)
        host, port = listeners[0].socket.getsockname()
        yield f"{host}:{port}"
        nursery.cancel_scope.cancel()


def answer_with(status: str, body: bytes = b"", *headers: str) -> Callable[[bytes], bytes]:
    lines = [f"HTTP/1.1 {status}", f"Content-Length: {len(body)}", "Connection: close", *headers]
    data = "\r\n".join(lines).encode() + b"\r\n\r\n" + body
    return lambda head: data


def http_check(url: str, **fields: object) -> CheckDefinition:
    return check_definition({"Name": "c", "HTTP": url, "Interval": "10s", **fields})


async def run_http(definition: CheckDefinition) -> tuple[CheckStatus, str]:
    checker = HttpChecker()
    try:
        with trio.fail_after(20):
            result = await checker.run(definition)
        return result.status, result.output
    finally:
        await checker.close()


@pytest.mark.parametrize(
    ("line", "status"),
    [("200 OK", "passing"), ("204 No Content", "passing"), ("299 Odd", "passing"), ("429 Too Many Requests", "warning"),
     ("404 Not Found", "critical"), ("500 Internal Server Error", "critical"), ("304 Not Modified", "critical")],
)  # fmt: skip
async def test_an_http_answer_decides_the_status_and_is_shown(line: str, status: str) -> None:
    async with listening(answer_with(line, b"body")) as address:
        body = "" if line.startswith(("204", "304")) else "body"
        assert await run_http(http_check(f"http://{address}/x")) == (
            status,
            f"HTTP GET http://{address}/x: {line} Output: {body}",
        )


async def test_an_http_check_sends_what_it_is_told() -> None:
    heads: list[bytes] = []

    def answer(head: bytes) -> bytes:
        heads.append(head)
        return answer_with("200 OK")(head)

    async with listening(answer) as address:
        await run_http(http_check(f"http://{address}/p?q=1", Method="put", Header={"X-A": ["1", "2"]}, Body="hello"))
        await run_http(http_check(f"http://{address}/", Header={"User-Agent": ["mine"]}))
    first, second = (head.decode().lower() for head in heads)
    assert first.startswith("put /p?q=1 http/1.1")
    assert "user-agent: consul health check" in first
    assert "x-a: 1" in first
    assert "x-a: 2" in first
    assert "content-length: 5" in first
    assert second.count("user-agent") == 1
    assert "user-agent: mine" in second


async def test_redirects_are_followed_unless_disabled() -> None:
    async with listening(answer_with("200 OK")) as target:
        redirect = answer_with("302 Found", b"", f"Location: http://{target}/")
        async with listening(redirect) as address:
            assert (await run_http(http_check(f"http://{address}/")))[0] == "passing"
            assert (await run_http(http_check(f"http://{address}/", DisableRedirects=True)))[0] == "critical"


async def test_a_redirect_loop_ends() -> None:
    async with listening(answer_with("302 Found", b"", "Location: /again")) as address:
        status, output = await run_http(http_check(f"http://{address}/"))
    assert status == "critical"
    assert "redirect" in output


async def test_only_the_first_bytes_of_a_body_are_shown() -> None:
    async with listening(answer_with("200 OK", b"x" * 1_000_000)) as address:
        status, output = await run_http(http_check(f"http://{address}/"))
    assert status == "passing"
    assert output.endswith("Output: " + "x" * 4096)


@pytest.mark.parametrize(
    "garbage", [b"", b"SSH-2.0\r\n\r\n", b"HTTP/1.1 999999 X\r\n\r\n", b"HTTP/1.1 200 OK\r\nContent-Length: -1\r\n\r\n"]
)
async def test_a_server_that_talks_nonsense_is_critical(garbage: bytes) -> None:
    async with listening(lambda head: garbage) as address:
        assert (await run_http(http_check(f"http://{address}/")))[0] == "critical"


def self_signed(name: str, folder: Path) -> ssl.SSLContext:
    """A server's TLS context with a certificate that no system trusts."""
    key = ec.generate_private_key(ec.SECP256R1())
    subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)])
    now = datetime.datetime.now(datetime.UTC)
    certificate = (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(subject)
        .public_key(key.public_key())
        .serial_number(1)
        .not_valid_before(now - datetime.timedelta(hours=1))
        .not_valid_after(now + datetime.timedelta(hours=1))
        .add_extension(x509.SubjectAlternativeName([x509.DNSName(name)]), critical=False)
        .sign(key, hashes.SHA256())
    )
    pem = folder / "server.pem"
    private = key.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )
    pem.write_bytes(private + certificate.public_bytes(serialization.Encoding.PEM))
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(pem)
    return context


async def test_an_untrusted_certificate_is_critical_unless_verification_is_skipped(tmp_path: Path) -> None:
    context = self_signed("app.internal", tmp_path)
    names: list[str | None] = []
    context.sni_callback = lambda connection, name, old: names.append(name)
    listeners = await trio.open_tcp_listeners(0, host="127.0.0.1")
    host, port = listeners[0].socket.getsockname()
    url = f"https://{host}:{port}/"

    async def serve(stream: trio.SocketStream) -> None:
        tls = trio.SSLStream(stream, context, server_side=True)
        try:
            await tls.do_handshake()
            await tls.receive_some()
            await tls.send_all(answer_with("200 OK")(b""))
        except trio.BrokenResourceError:
            return
        finally:
            await trio.aclose_forcefully(tls)

    async with trio.open_nursery() as nursery:
        await nursery.start(trio.serve_listeners, serve, listeners)
        status, output = await run_http(http_check(url))
        assert status == "critical"
        assert "certificate" in output.lower()
        assert (await run_http(http_check(url, TLSSkipVerify=True, TLSServerName="app.internal")))[0] == "passing"
        nursery.cancel_scope.cancel()
    assert names[-1] == "app.internal"


async def test_nobody_listening_is_critical_and_says_why() -> None:
    async with listening() as address:
        pass
    status, output = await run_http(http_check(f"http://{address}/"))
    assert status == "critical"
    assert output == f'GET "http://{address}/": Connection refused'
    result = await run_tcp(address)
    assert (result.status, result.output) == ("critical", f"TCP connect {address}: Connection refused")


async def test_a_tcp_connection_is_enough_to_pass() -> None:
    async with listening() as address:
        result = await run_tcp(address)
    assert (result.status, result.output) == ("passing", f"TCP connect {address}: Success")


async def test_a_check_runs_soon_and_then_every_interval(host: Host, autojump_clock: trio.testing.MockClock) -> None:
    async with listening() as address:
        await host.state.add_check(check_definition({"Name": "c", "TCP": address, "Interval": "60s"}))
        assert host.status("c") == "critical"
        await trio.sleep(FIRST_RUN_S_MAX + 0.1)
        assert host.status("c") == "passing"
    await trio.sleep(121)
    assert host.status("c") == "critical"


@pytest.mark.parametrize("answer", [b"", b"HTTP/1.1 200 OK\r\nContent-Length: 9\r\n\r\n123"])
async def test_a_server_that_does_not_finish_its_answer_is_critical_at_the_timeout(answer: bytes) -> None:
    async def stall(stream: trio.SocketStream) -> None:
        await stream.send_all(answer)
        await trio.sleep_forever()

    listeners = await trio.open_tcp_listeners(0, host="127.0.0.1")
    host, port = listeners[0].socket.getsockname()
    async with trio.open_nursery() as nursery:
        await nursery.start(trio.serve_listeners, stall, listeners)
        runs = CheckRuns()
        result = await runs.run(http_check(f"http://{host}:{port}/", Timeout="100ms"))
        await runs.close()
        nursery.cancel_scope.cancel()
    assert (result.status, result.output) == ("critical", f"GET http://{host}:{port}/: no answer within 0.1 s")


async def test_a_service_that_listens_a_little_late_passes_soon_and_is_then_left_alone(
    host: Host, autojump_clock: trio.testing.MockClock
) -> None:
    connections: list[float] = []

    async def accept(stream: trio.SocketStream) -> None:
        connections.append(trio.current_time())
        await stream.aclose()

    with socket.create_server(("127.0.0.1", 0)) as reserved:
        port = reserved.getsockname()[1]
    await host.state.add_check(check_definition({"Name": "c", "TCP": f"127.0.0.1:{port}", "Interval": "30s"}))
    await trio.sleep(5)
    assert host.status("c") == "critical"
    listeners = await trio.open_tcp_listeners(port, host="127.0.0.1")
    async with trio.open_nursery() as nursery:
        await nursery.start(trio.serve_listeners, accept, listeners)
        await trio.sleep(1.1)
        assert host.status("c") == "passing"
        await trio.sleep(300)
        nursery.cancel_scope.cancel()
    assert 300 / 30 <= len(connections) <= 300 / 30 + 2


async def test_thresholds_hold_a_status_until_enough_runs_agree(
    host: Host, autojump_clock: trio.testing.MockClock
) -> None:
    fields = {"Interval": "10s", "FailuresBeforeCritical": 3, "FailuresBeforeWarning": 2, "Status": "passing"}
    async with listening() as address:
        pass
    await host.state.add_check(check_definition({"Name": "c", "TCP": address, **fields}))
    seen: list[str] = []
    host.state.subscribe(lambda: seen.append(host.status("c")))
    await trio.sleep(60)
    assert seen[:2] == ["warning", "critical"]


async def test_a_changed_definition_is_run_in_place_of_the_old(
    host: Host, autojump_clock: trio.testing.MockClock
) -> None:
    async with listening() as dead:
        pass
    await host.state.add_check(check_definition({"Name": "c", "TCP": dead, "Interval": "10s"}))
    await trio.sleep(30)
    async with listening() as address:
        await host.state.add_check(check_definition({"Name": "c", "TCP": address, "Interval": "10s"}))
        await trio.sleep(5)
        assert host.status("c") == "passing"
        await host.state.remove_check("c")
        await trio.sleep(30)
    assert host.state.checks() == ()


async def test_ttl_lapses_exactly_after_the_last_heartbeat(host: Host, autojump_clock: trio.testing.MockClock) -> None:
    await host.state.add_check(check_definition({"Name": "beat", "TTL": "100ms"}))
    await host.settled()
    for _ in range(3):
        await host.runner.heartbeat("beat", status="passing", output="fine")
        await trio.sleep(0.09)
        assert host.status("beat") == "passing"
    await trio.sleep(0.02)
    assert (host.status("beat"), host.output("beat")) == (
        "critical",
        "TTL expired (last output before timeout follows): fine",
    )
    await trio.sleep(60)
    assert host.output("beat").count("TTL expired") == 1
    await host.runner.heartbeat("beat", status="warning", output="back")
    assert (host.status("beat"), host.output("beat")) == ("warning", "back")
    await trio.sleep(0.11)
    assert host.status("beat") == "critical"


async def test_a_ttl_check_that_never_beats_expires(host: Host, autojump_clock: trio.testing.MockClock) -> None:
    await host.state.add_check(check_definition({"Name": "beat", "TTL": "1s", "Status": "passing"}))
    await trio.sleep(1.01)
    assert (host.status("beat"), host.output("beat")) == ("critical", "TTL expired")


async def test_a_restored_ttl_result_lives_only_for_what_was_left(
    tmp_path: Path, nursery: trio.Nursery, autojump_clock: trio.testing.MockClock
) -> None:
    class Wall(Runtime):
        wall_s = 1000.0

        def unix_time_s(self) -> float:
            return self.wall_s

    runtime = Wall(seed=1)
    first = Host(tmp_path, runtime)
    await first.state.add_check(check_definition({"Name": "beat", "TTL": "30s"}))
    await first.runner.heartbeat("beat", status="passing", output="alive")
    runtime.wall_s += 20
    second = Host(tmp_path, runtime)
    await second.state.restore()
    await nursery.start(second.runner.run)
    await trio.sleep(9.9)
    assert second.status("beat") == "passing"
    await trio.sleep(0.2)
    assert second.status("beat") == "critical"


async def test_only_a_known_ttl_check_takes_heartbeats(host: Host) -> None:
    await host.state.add_check(check_definition({"Name": "tcp", "TCP": "127.0.0.1:1", "Interval": "10s"}))
    with pytest.raises(NotFound, match='Unknown check ID "x"'):
        await host.runner.heartbeat("x", status="passing", output="")
    with pytest.raises(Refused, match='CheckID "tcp" does not have associated TTL'):
        await host.runner.heartbeat("tcp", status="passing", output="")


async def test_a_local_alias_follows_its_service_and_the_node_at_once(host: Host) -> None:
    await host.state.add_check(check_definition({"Name": "mirror", "AliasService": "web"}))
    await host.settled()
    assert host.status("mirror") == "critical"
    await host.state.add_service(service_definition({"Name": "web", "Check": {"TTL": "60s", "Status": "passing"}}))
    await host.settled()
    assert (host.status("mirror"), host.output("mirror")) == ("passing", "All checks passing.")
    await host.runner.heartbeat("service:web", status="warning", output="hot")
    await host.settled()
    assert host.status("mirror") == "warning"
    await host.runner.heartbeat("service:web", status="passing", output="")
    await host.state.add_check(check_definition({"Name": "disk", "TTL": "60s"}))
    await host.settled()
    assert host.status("mirror") == "critical"


async def test_a_sidecar_is_as_healthy_as_its_parent(host: Host) -> None:
    body = {"Name": "web", "Check": {"TTL": "60s", "Status": "passing"}, "Connect": {"SidecarService": {}}}
    await host.state.add_service(service_definition(body))
    await host.settled()
    assert host.status("service:web-sidecar-proxy:2") == "passing"
    await host.runner.heartbeat("service:web", status="critical", output="")
    await host.settled()
    assert host.status("service:web-sidecar-proxy:2") == "critical"


async def test_a_remote_alias_follows_the_catalog_and_outlives_its_servers(
    host: Host, autojump_clock: trio.testing.MockClock
) -> None:
    node = Node("node-2", "10.0.0.2")

    async def catalog(status: CheckStatus) -> None:
        check = Check("node-2", "c", "c", status, service_id="db")
        await host.backend.apply(Register(node, Service("db", "db"), (check,)))

    await catalog("passing")
    await host.state.add_check(check_definition({"Name": "mirror", "AliasNode": "node-2", "AliasService": "db"}))
    await trio.sleep(1)
    assert host.status("mirror") == "passing"
    await catalog("critical")
    await trio.sleep(1)
    assert host.status("mirror") == "critical"
    host.backend.failure = Unreachable("no server answers")
    await trio.sleep(100)
    assert host.status("mirror") == "critical"
    host.backend.failure = None
    await catalog("passing")
    await trio.sleep(100)
    assert host.status("mirror") == "passing"


async def test_a_service_critical_for_too_long_is_deregistered(
    host: Host, autojump_clock: trio.testing.MockClock
) -> None:
    check = {"TTL": "10s", "DeregisterCriticalServiceAfter": "90s"}
    await host.state.add_service(service_definition({"Name": "web", "Check": check}))
    await host.settled()
    await trio.sleep(80)
    await host.runner.heartbeat("service:web", status="passing", output="")
    await trio.sleep(99)  # critical again for 89 s
    assert host.state.service("web") is not None
    await trio.sleep(2)
    assert host.state.service("web") is None
