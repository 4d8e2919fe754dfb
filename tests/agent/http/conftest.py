"""The real server on a loopback port, over the real state in memory."""

from collections.abc import AsyncIterator

import httpx
import pytest
import trio
from api_server import Answer, Api, all_routes, read_answer
from state_backend import MemoryBackend

from agent.http.connection import HttpSettings
from agent.http.server import HttpServer, TcpListen
from agent.runtime import Runtime


@pytest.fixture
def settings() -> HttpSettings:
    return HttpSettings()


@pytest.fixture
async def api(settings: HttpSettings, nursery: trio.Nursery) -> AsyncIterator[Api]:
    backend, runtime = MemoryBackend(), Runtime(seed=1)
    server = HttpServer(all_routes(backend, runtime), (TcpListen("ports.http", "127.0.0.1", 0),), settings, runtime)
    await server.listen()
    nursery.start_soon(server.run)
    host, port = server.addresses[0]
    async with httpx.AsyncClient(base_url=f"http://{host}:{port}", trust_env=False) as http:
        yield Api(http, backend, server, nursery)


@pytest.fixture
def raw_request(api: Api):
    """Sends a target exactly as given, which a URL library would clean first."""

    async def send(method: str, target: str, *headers: str, body: bytes = b"") -> Answer:
        async with await api.connect() as stream:
            lines = [f"{method} {target} HTTP/1.1", "Host: localhost", *headers, f"Content-Length: {len(body)}"]
            await stream.send_all("\r\n".join([*lines, "", ""]).encode() + body)
            return await read_answer(stream, head_only=method == "HEAD")

    return send
