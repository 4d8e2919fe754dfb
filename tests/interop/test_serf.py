"""Real `serf` agents (Debian package serf) and ours in one pool, seen from both sides."""

import base64
import json
import os
import random
import shutil
import signal
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import pytest
import trio

from agent.gossip_driver import GossipDriver
from mesh.gossip.config import LAN
from mesh.gossip.events import GossipEvent, MemberFailed, MemberLeft

pytestmark = [
    pytest.mark.interop,
    pytest.mark.skipif(shutil.which("serf") is None and "CI" not in os.environ, reason="the serf binary is missing"),
]
# A rumour that misses somebody is repaired by the next full exchange, 30 s later at most; all else takes seconds.
LIMIT_S = 45.0
KEY = bytes(range(32))


@contextmanager
def serf_agent(name: str, host: str, *arguments: str, join: str | None = None) -> Iterator["Serf"]:
    command = ["serf", "agent", f"-node={name}", f"-bind={host}:7946", f"-rpc-addr={host}:7373", "-profile=lan"]
    # Retried, for the agent to join may not listen yet.
    command += [f"-retry-join={join}", "-retry-interval=200ms"] if join else []
    process = subprocess.Popen(
        [*command, *arguments], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, start_new_session=True
    )
    try:
        yield Serf(name, host, process)
    finally:
        if process.poll() is None:
            process.kill()
        process.wait(10)
        process.stdout.close()


class Serf:
    def __init__(self, name: str, host: str, process: subprocess.Popen) -> None:
        self.name = name
        self.host = host
        self.process = process

    async def wait_listening(self) -> None:
        async def accepts() -> bool:
            try:
                stream = await trio.open_tcp_stream(self.host, 7373)
            except OSError:
                return False
            await stream.aclose()
            return True

        with trio.fail_after(10):
            while not await accepts():
                assert self.process.poll() is None, self.process.stdout.read().decode()
                await trio.sleep(0.05)

    async def members(self) -> dict[str, dict]:
        result = await trio.run_process(
            ["serf", "members", "-format=json", f"-rpc-addr={self.host}:7373"], capture_stdout=True
        )
        return {member["name"]: member for member in json.loads(result.stdout)["members"]}

    async def wait_member(self, name: str, status: str, *, limit_s: float = LIMIT_S, **tags: str) -> None:
        members: dict[str, dict] = {}
        with trio.move_on_after(limit_s):
            while True:
                members = await self.members()
                found = members.get(name)
                if found is not None and found["status"] == status and tags.items() <= found["tags"].items():
                    return
                await trio.sleep(0.1)
        raise AssertionError(f"{self.name} does not see {name} {status} {tags}: {members}")

    async def run(self, *command: str) -> int:
        """The exit status of that `serf` command."""
        rpc = f"-rpc-addr={self.host}:7373"
        with trio.fail_after(LIMIT_S):
            result = await trio.run_process(
                ["serf", command[0], rpc, *command[1:]], check=False, capture_stdout=True, capture_stderr=True
            )
        return result.returncode


@contextmanager
def octet(second: int) -> Iterator[str]:
    """A loopback network of our own: 127.<second>.x.y."""
    for third in random.SystemRandom().sample(range(1, 250), 20):
        with socket.socket() as probe:
            try:
                probe.bind((f"127.{second}.{third}.1", 7946))
            except OSError:
                continue
        yield f"127.{second}.{third}"
        return
    raise AssertionError("no free loopback network")


def ours(name: str, host: str, events: list[GossipEvent], keys: tuple[bytes, ...] = (), **tags: str) -> GossipDriver:
    return GossipDriver(
        name=name,
        bind=(host, 7946),
        advertise=(host, 7946),
        tags=tags,
        config=LAN,
        keys=keys,
        rng=random.Random(name),
        on_event=events.append,
    )


async def wait_until(condition: Callable[[], bool], limit_s: float = LIMIT_S) -> None:
    with trio.fail_after(limit_s):
        while not condition():
            await trio.sleep(0.05)


def status(driver: GossipDriver, name: str) -> str | None:
    return {member.name: member.status for member in driver.members()}.get(name)


async def test_mixed_pools_plain_and_encrypted_see_joins_tags_leaves_and_failures_both_ways():
    # Both at once: most of the time goes into waiting for suspicions to end.
    async with trio.open_nursery() as nursery:
        nursery.start_soon(mixed_pool, ())
        nursery.start_soon(mixed_pool, (KEY,))


async def mixed_pool(keys: tuple[bytes, ...]) -> None:
    encrypt = ["-encrypt=" + base64.b64encode(KEY).decode()] if keys else []
    events: list[GossipEvent] = []
    with (
        octet(79 if keys else 78) as net,
        serf_agent("serf1", f"{net}.1", "-tag=side=go", *encrypt) as serf1,
        serf_agent("serf2", f"{net}.2", *encrypt, join=f"{net}.1") as serf2,
    ):
        await serf1.wait_listening()
        await serf2.wait_listening()
        async with trio.open_nursery() as nursery:
            mesh1 = ours("mesh1", f"{net}.11", events, keys, role="consul", dc="dc1")
            await nursery.start(mesh1.run)
            assert await mesh1.join([f"{net}.1", f"{net}.99"]) == 1

            # Both see everybody alive with the right address and tags.
            await wait_until(lambda: status(mesh1, "serf1") == status(mesh1, "serf2") == "alive")
            (seen,) = [member for member in mesh1.members() if member.name == "serf1"]
            assert (seen.address, seen.port, seen.tags) == (f"{net}.1", 7946, {"side": "go"})
            for serf in (serf1, serf2):
                await serf.wait_member("mesh1", "alive", role="consul", dc="dc1")
            assert (await serf1.members())["mesh1"]["addr"] == f"{net}.11:7946"

            # Changed tags, both ways.
            mesh1.set_tags({"role": "consul", "dc": "dc2"})
            await serf2.wait_member("mesh1", "alive", dc="dc2")
            assert await serf1.run("tags", "-set", "side=gopher") == 0
            await wait_until(lambda: any(m.name == "serf1" and m.tags == {"side": "gopher"} for m in mesh1.members()))

            # Events, queries and reachability of Serf pass through a pool with us in it.
            assert await serf1.run("event", "deploy", "1") == 0
            assert await serf1.run("query", "-timeout=1s", "load") == 0

            # Graceful leaves are left, both ways.
            await leave_gracefully(f"{net}.12", f"{net}.1", keys, mesh1, serf2)
            await wait_until(lambda: status(mesh1, "mesh2") == "left")
            serf2.process.send_signal(signal.SIGINT)
            await wait_until(lambda: status(mesh1, "serf2") == "left")
            assert [e.member.name for e in events if isinstance(e, MemberLeft)] == ["mesh2", "serf2"]

            # A process of ours is killed, and one of theirs: failed, both ways.
            with (
                mesh_process(f"{net}.13", f"{net}.1", keys) as killed,
                serf_agent("serf3", f"{net}.3", *encrypt, join=f"{net}.11") as serf3,
            ):
                for name in ("killed", "serf3"):
                    await serf1.wait_member(name, "alive")
                await wait_until(lambda: status(mesh1, "killed") == status(mesh1, "serf3") == "alive")
                killed.kill()
                serf3.process.kill()
                await wait_until(lambda: status(mesh1, "killed") == status(mesh1, "serf3") == "failed")
                for name in ("killed", "serf3"):
                    await serf1.wait_member(name, "failed")
            assert {e.member.name for e in events if isinstance(e, MemberFailed)} == {"killed", "serf3"}

            # An operator removes a failed member: at our side, and at theirs.
            assert await mesh1.force_leave("killed")
            await serf1.wait_member("killed", "left")
            assert await serf1.run("force-leave", "serf3") == 0
            await wait_until(lambda: status(mesh1, "serf3") == "left")
            assert not any(reason in mesh1.counters for reason in ("msgpack", "field", "decrypt", "checksum", "type"))
            nursery.cancel_scope.cancel()


async def leave_gracefully(host: str, seed: str, keys: tuple[bytes, ...], mesh1: GossipDriver, observer: Serf) -> None:
    """A second agent of ours joins, is seen, leaves, and is seen as left by a real serf."""
    async with trio.open_nursery() as nursery:
        mesh2 = ours("mesh2", host, [], keys, role="short")
        await nursery.start(mesh2.run)
        await mesh2.join([seed])
        await observer.wait_member("mesh2", "alive", role="short")
        await wait_until(lambda: status(mesh1, "mesh2") == "alive")
        await mesh2.leave()
        nursery.cancel_scope.cancel()
    await observer.wait_member("mesh2", "left")


@contextmanager
def mesh_process(host: str, seed: str, keys: tuple[bytes, ...]) -> Iterator[subprocess.Popen]:
    """An agent of ours in a process of its own, to be killed."""
    program = (
        "import random, trio\n"
        "from agent.gossip_driver import GossipDriver\n"
        "from mesh.gossip.config import LAN\n"
        "async def main():\n"
        f"    driver = GossipDriver(name='killed', bind=({host!r}, 7946), advertise=({host!r}, 7946), tags={{}},\n"
        f"        config=LAN, keys={keys!r}, rng=random.Random(1), on_event=lambda event: None)\n"
        "    async with trio.open_nursery() as nursery:\n"
        "        await nursery.start(driver.run)\n"
        f"        await driver.join([{seed!r}])\n"
        "trio.run(main)\n"
    )
    process = subprocess.Popen([sys.executable, "-c", program])
    try:
        yield process
    finally:
        if process.poll() is None:
            process.kill()
        process.wait(10)


async def test_agent_without_the_key_neither_joins_nor_disturbs():
    events: list[GossipEvent] = []
    encrypt = "-encrypt=" + base64.b64encode(KEY).decode()
    with octet(80) as net, serf_agent("serf1", f"{net}.1", encrypt) as serf1:
        await serf1.wait_listening()
        async with trio.open_nursery() as nursery:
            with_key = ours("with-key", f"{net}.11", events, (KEY,))
            other_key = ours("other-key", f"{net}.12", [], (bytes(32),))
            for driver in (with_key, other_key):
                await nursery.start(driver.run)
            await with_key.join([f"{net}.1"])
            for seed in (f"{net}.1", f"{net}.11"):
                with pytest.raises(Exception, match="could be joined"):
                    await other_key.join([seed])
            await serf1.wait_member("with-key", "alive")
            assert "other-key" not in await serf1.members()
            assert status(with_key, "other-key") is None
            assert with_key.counters["decrypt"] == 1
            nursery.cancel_scope.cancel()
