"""Durable raft commits per second: three servers, sqlite3, an fsync per batch, 256 proposals of 200 bytes at a time.

By default each server is a process of its own and they talk over loopback TCP (length-prefixed messages); with
`--one-process` all three share one interpreter and an in-memory network, which shows the cost of the whole per commit.
Run: python -m benchmarks.raft_commit [--one-process] [--seconds 5] [--outstanding 256] [--memory] [--idle]
"""

from __future__ import annotations

import argparse
import os
import random
import struct
import sys
import tempfile
import time
from collections import deque
from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path

import trio

from agent.raft_driver import LeadershipChanged, RaftDriver
from agent.raft_store import MemoryRaftStore, RaftStore, SqliteRaftStore
from mesh.errors import MeshError
from mesh.raft.config import RaftConfig

NAMES = ("a", "b", "c")
PORT = 18470


class Counter:
    """The cheapest state machine."""

    def __init__(self) -> None:
        self.applied = 0

    def apply(self, index: int, data: bytes) -> object:
        self.applied += 1
        return index

    def snapshot(self) -> Callable[[], Iterable[bytes]]:
        frozen = b"%d" % self.applied
        return lambda: [frozen]

    def restore(self, index: int, chunks: Iterable[bytes]) -> None:
        self.applied = int(b"".join(chunks))


def make_driver(name: str, folder: Path, send: Callable[[str, bytes], None], *, memory: bool) -> RaftDriver:
    store: RaftStore = MemoryRaftStore() if memory else SqliteRaftStore(folder / name)

    def ignore(_: LeadershipChanged) -> None:
        return None

    return RaftDriver(
        node_id=name,
        config=RaftConfig.consul_default(),
        store=store,
        state_machine=Counter(),
        send=send,
        rng=random.Random(name),
        on_leadership=ignore,
    )


async def load(driver: RaftDriver, seconds: float, outstanding: int) -> None:
    latencies: list[float] = []
    end = trio.current_time() + seconds
    data = os.urandom(200)

    async def client() -> None:
        while trio.current_time() < end:
            started = time.perf_counter()
            await driver.propose(data)
            latencies.append(time.perf_counter() - started)

    await driver.propose(data)
    started, cpu = time.perf_counter(), time.process_time()
    async with trio.open_nursery() as nursery:
        for _ in range(outstanding):
            nursery.start_soon(client)
    elapsed, cpu = time.perf_counter() - started, time.process_time() - cpu
    latencies.sort()
    p50, p99 = (latencies[int(len(latencies) * q)] * 1000 for q in (0.5, 0.99))
    print(
        f"{outstanding:>12} {len(latencies) / elapsed:>12,.0f} {p50:>8.2f} {p99:>8.2f} {cpu / elapsed:>10.0%}"
        f" {cpu / len(latencies) * 1e6:>14.1f}",
        flush=True,
    )


async def measure(driver: RaftDriver, args: argparse.Namespace) -> None:
    if args.idle:
        cpu, started = time.process_time(), time.perf_counter()
        await trio.sleep(args.seconds)
        share = (time.process_time() - cpu) / (time.perf_counter() - started)
        print(f"idle, this process ({'three servers' if args.one_process else 'the leader'}): {share:.2%} of one core")
        return
    print(f"{'outstanding':>12} {'commits/s':>12} {'p50 ms':>8} {'p99 ms':>8} {'CPU':>10} {'CPU us/commit':>14}")
    for outstanding in (1, 64, args.outstanding):
        await load(driver, args.seconds, outstanding)


async def wait_for_leader(drivers: list[RaftDriver]) -> RaftDriver | None:
    while True:
        for driver in drivers:
            if driver.lease_valid():
                return driver
        if len(drivers) == 1 and drivers[0].status.leader_id is not None and drivers[0].status.role != "leader":
            return None
        await trio.sleep(0.05)


async def one_process(args: argparse.Namespace, folder: Path) -> None:
    channels = {name: trio.open_memory_channel[tuple[str, bytes]](10000) for name in NAMES}
    drivers: dict[str, RaftDriver] = {}

    def sender(name: str) -> Callable[[str, bytes], None]:
        return lambda peer_id, data: channels[peer_id][0].send_nowait((name, data))

    async def receive(name: str) -> None:
        async for sender_id, data in channels[name][1]:
            drivers[name].receive_message(sender_id, data)

    async with trio.open_nursery() as nursery:
        for name in NAMES:
            drivers[name] = make_driver(name, folder, sender(name), memory=args.memory)
            await nursery.start(drivers[name].run)
            nursery.start_soon(receive, name)
        drivers["a"].bootstrap(dict.fromkeys(NAMES, ""))
        leader = await wait_for_leader(list(drivers.values()))
        assert leader is not None
        await measure(leader, args)
        nursery.cancel_scope.cancel()


class Link:
    """To one peer: whole messages in order, written together, dropped when the peer is away or too far behind."""

    def __init__(self, name: str, port: int) -> None:
        self._name, self._port = name, port
        self._queue: deque[bytes] = deque()
        self._wake = trio.Event()

    def send(self, data: bytes) -> None:
        if len(self._queue) < 10000:
            self._queue.append(struct.pack(">I", len(data)) + data)
            self._wake.set()

    async def run(self) -> None:
        while True:
            try:
                stream = await trio.open_tcp_stream("127.0.0.1", self._port)
                await stream.send_all(self._name.encode())
                while True:
                    await self._wake.wait()
                    self._wake = trio.Event()
                    data = b"".join(self._queue)
                    self._queue.clear()
                    await stream.send_all(data)
            except (OSError, trio.BrokenResourceError):
                await trio.sleep(0.1)


async def one_of_three(args: argparse.Namespace, folder: Path, name: str) -> None:
    links = {peer: Link(name, PORT + NAMES.index(peer)) for peer in NAMES if peer != name}
    driver = make_driver(name, folder, lambda peer_id, data: links[peer_id].send(data), memory=args.memory)

    async def serve(stream: trio.SocketStream) -> None:
        buffer = bytearray()
        peer = (await stream.receive_some(1)).decode()
        try:
            async for data in stream:
                buffer += data
                at = 0
                while len(buffer) - at >= 4:
                    (size,) = struct.unpack_from(">I", buffer, at)
                    if len(buffer) - at - 4 < size:
                        break
                    driver.receive_message(peer, bytes(buffer[at + 4 : at + 4 + size]))
                    at += 4 + size
                del buffer[:at]
        except trio.BrokenResourceError:
            pass

    async with trio.open_nursery() as nursery:
        listen = partial(trio.serve_tcp, serve, PORT + NAMES.index(name), host="127.0.0.1")
        await nursery.start(listen)
        for link in links.values():
            nursery.start_soon(link.run)
        await nursery.start(driver.run)
        if name == "a":
            driver.bootstrap(dict.fromkeys(NAMES, ""))
        if await wait_for_leader([driver]) is not None:
            await measure(driver, args)
            (folder / "done").touch()
        with trio.move_on_after(60):
            while not (folder / "done").exists():
                await trio.sleep(0.2)
        nursery.cancel_scope.cancel()


def main() -> int:
    parser = argparse.ArgumentParser()
    parser.add_argument("--one-process", action="store_true")
    parser.add_argument("--memory", action="store_true", help="no disk at all")
    parser.add_argument("--idle", action="store_true", help="measure an idle leader instead")
    parser.add_argument("--seconds", type=float, default=5.0)
    parser.add_argument("--outstanding", type=int, default=256)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        try:
            if args.one_process:
                trio.run(one_process, args, Path(folder))
                return 0
            children = []
            for name in NAMES:
                child = os.fork()
                if child == 0:
                    trio.run(one_of_three, args, Path(folder), name)
                    sys.stdout.flush()
                    os._exit(0)
                children.append(child)
            return max(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children)
        except MeshError as error:
            print(error, file=sys.stderr)
            return 1


if __name__ == "__main__":
    sys.exit(main())
