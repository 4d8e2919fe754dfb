"""A real Consul client against the server: py-consul, synchronous, in a thread of its own."""

import consul
import pytest
import trio
from consul.exceptions import BadRequest

pytestmark = pytest.mark.interop


@pytest.fixture
async def call(api):
    """Runs a function of a client in a thread."""
    host, port = api.server.addresses[0]

    async def run(function, *args):
        return await trio.to_thread.run_sync(function, consul.Consul(host=host, port=port), *args)

    return run


async def test_kv(call):
    def use(client: consul.Consul) -> None:
        assert client.kv.get("foo") == ("1", None)
        assert client.kv.put("foo", "bar", flags=50) is True
        index, row = client.kv.get("foo")
        assert (index, row["Value"], row["Flags"]) == ("10", b"bar", 50)
        assert client.kv.put("foo", "other", cas=1) is False
        client.kv.put("dir/a", "1")
        client.kv.put("dir/b", "2")
        assert [row["Key"] for row in client.kv.get("dir/", recurse=True)[1]] == ["dir/a", "dir/b"]
        assert client.kv.get("", keys=True, separator="/")[1] == ["dir/", "foo"]
        assert client.kv.delete("dir/", recurse=True) is True
        assert client.kv.get("dir/", recurse=True)[1] is None
        assert client.kv.get("foo", index=int(index) - 1)[1]["Value"] == b"bar"

    await call(use)


async def test_blocking_get_returns_when_another_client_writes(api, call):
    seen: list[tuple[str, object]] = []

    def watch(client: consul.Consul) -> None:
        index, _ = client.kv.get("watched")
        index, row = client.kv.get("watched", index=index, wait="20s")
        seen.append((index, row["Value"]))

    async with trio.open_nursery() as nursery:
        nursery.start_soon(call, watch)
        with trio.fail_after(10):
            while len(api.backend.registry) == 0:
                await trio.sleep(0.01)
        await api.put("/v1/kv/watched", b"now")
    assert seen == [("10", b"now")]


async def test_catalog_and_health(call):
    def use(client: consul.Consul) -> None:
        service = {"Service": "app", "ID": "app#1", "Port": 3000, "Tags": ["a"]}
        check = {"Name": "up", "Status": "passing", "ServiceID": "app#1"}
        assert client.catalog.register("n1", "10.1.1.1", service=service, check=check) is True
        assert client.catalog.nodes()[1][0]["Node"] == "n1"
        assert client.catalog.services()[1] == {"app": ["a"]}
        assert client.catalog.service("app")[1][0]["ServiceID"] == "app#1"
        assert client.catalog.node("n1")[1]["Services"]["app#1"]["Port"] == 3000
        assert client.catalog.node("nope")[1] is None
        assert client.catalog.datacenters() == ["dc1"]
        assert [row["Service"]["ID"] for row in client.health.service("app", passing=True)[1]] == ["app#1"]
        assert client.health.service("app", tag="b")[1] == []
        assert [row["CheckID"] for row in client.health.checks("app")[1]] == ["up"]
        assert [row["CheckID"] for row in client.health.state("any")[1]] == ["up"]
        assert [row["CheckID"] for row in client.health.node("n1")[1]] == ["up"]
        assert client.catalog.deregister("n1", service_id="app#1") is True
        assert client.health.service("app")[1] == []

    await call(use)


async def test_status_and_errors(call):
    def use(client: consul.Consul) -> None:
        assert client.status.leader() == "127.0.0.1:8300"
        assert client.status.peers() == ["127.0.0.1:8300", "127.0.0.2:8300"]
        with pytest.raises(BadRequest):
            client.kv.put("k", "v", acquire="4ca8e74b-6350-7587-addf-a18084928f3c", cas=1)

    await call(use)
