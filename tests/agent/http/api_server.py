"""The routes of the API over the real state in memory, and clients of it."""

from dataclasses import dataclass

import httpx
import trio
from state_backend import MemoryBackend

from agent.http.catalog import CatalogApi
from agent.http.config_entries import ConfigApi
from agent.http.connect_ca import ConnectCaApi
from agent.http.health import HealthApi
from agent.http.intentions import IntentionsApi
from agent.http.kv import KvApi
from agent.http.request import Route
from agent.http.server import HttpServer
from agent.http.status import StatusApi
from agent.runtime import Runtime


@dataclass
class Api:
    """A client and what it talks to."""

    http: httpx.AsyncClient
    backend: MemoryBackend
    server: HttpServer
    nursery: trio.Nursery

    async def get(self, path: str, **params: object) -> httpx.Response:
        return await self.http.get(path, params={name: str(value) for name, value in params.items()})

    async def put(self, path: str, body: object = None, **params: object) -> httpx.Response:
        kept = {name: str(value) for name, value in params.items()}
        if isinstance(body, bytes):
            return await self.http.put(path, params=kept, content=body)
        return await self.http.put(path, params=kept, json=body)

    async def connect(self) -> trio.SocketStream:
        """A bare connection to the server."""
        return await trio.open_tcp_stream(*self.server.addresses[0])


def all_routes(backend: MemoryBackend, runtime: Runtime) -> list[Route]:
    families = (
        StatusApi(backend, "dc1"),
        CatalogApi(backend, "dc1"),
        HealthApi(backend, "dc1"),
        KvApi(backend, "dc1"),
        IntentionsApi(backend, "dc1", runtime),
        ConnectCaApi(backend, "dc1"),
        ConfigApi(backend, "dc1", runtime),
    )
    return [route for family in families for route in family.routes()]


@dataclass
class Answer:
    """A response, read from the wire."""

    status: int
    headers: dict[str, str]
    body: bytes


async def read_answer(stream: trio.abc.ReceiveStream, buffered: bytes = b"", *, head_only: bool = False) -> Answer:
    """The next response on a connection; nothing may follow it there yet."""
    while b"\r\n\r\n" not in buffered:
        data = await stream.receive_some()
        assert data, f"the connection ended after {buffered!r}"
        buffered += data
    head, _, body = buffered.partition(b"\r\n\r\n")
    status_line, *lines = head.decode("latin-1").split("\r\n")
    headers = {name.lower(): value for name, _, value in (line.partition(": ") for line in lines)}
    length = 0 if head_only else int(headers["content-length"])
    while len(body) < length:
        data = await stream.receive_some()
        assert data
        body += data
    assert len(body) == length
    return Answer(int(status_line.split()[1]), headers, body)
