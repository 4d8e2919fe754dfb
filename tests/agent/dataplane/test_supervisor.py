"""The supervisor with real worker processes: started, fed, taken over, restarted, replaced, drained."""

import contextlib
import itertools
import os
import random
import signal
import stat
import sys

import pytest
import trio
import trio.testing
from hypothesis import given, settings
from hypothesis import strategies as st
from sidecars import Authority, loopback_address

from agent.dataplane import place as place_module
from agent.dataplane import supervisor as supervisor_module
from agent.dataplane.control import (
    REPLIES,
    Ack,
    Configure,
    Drain,
    FrameReader,
    Nack,
    Ping,
    Pong,
    StatsReply,
    frame,
)
from agent.dataplane.control_client import ControlClient, connect
from agent.dataplane.supervisor import WorkerSupervisor
from agent.dataplane.worker_process import WorkerDirectory
from agent.runtime import Runtime
from mesh.errors import ConfigError, ProtocolError, Refused, Unreachable
from mesh.proxy.sidecar_config import WorkerConfig

EMPTY = WorkerConfig(version=0)

# Workers that outlive their agent are the point here: their process objects are dropped while they run.
pytestmark = pytest.mark.filterwarnings("ignore::ResourceWarning")


def is_alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    with open(f"/proc/{pid}/stat") as file:
        return file.read().rsplit(")", 1)[1].split()[0] != "Z"


async def gone(pid: int) -> None:
    with trio.fail_after(10):
        while is_alive(pid):
            await trio.sleep(0.02)


@pytest.fixture
def reaper():
    """Kills the workers that a test leaves running."""
    pids: list[int] = []
    yield pids
    for pid in pids:
        if is_alive(pid):
            os.kill(pid, signal.SIGKILL)


def new(tmp_path, **options) -> WorkerSupervisor:
    return WorkerSupervisor(runtime=Runtime(seed=1), data_dir=tmp_path, **options)


async def test_worker_starts_with_the_first_configuration_and_is_fed_by_acknowledged_versions(
    tmp_path, nursery, reaper
):
    supervisor = new(tmp_path)
    assert not supervisor.fresh  # it has not looked yet: a worker may be serving
    looked = trio.Event()
    supervisor.subscribe(looked.set)
    await nursery.start(supervisor.run)
    await looked.wait()
    assert supervisor.fresh
    assert not supervisor.running
    assert await supervisor.stats() == ""
    with trio.fail_after(15):
        await supervisor.configure(EMPTY)
    reaper.append(supervisor.pid)
    assert supervisor.starts == 1
    assert not supervisor.fresh
    assert "envoy_server_live 1" in await supervisor.stats()
    assert stat.S_IMODE((tmp_path / "workers").stat().st_mode) == 0o700
    assert stat.S_IMODE((tmp_path / "worker.log").stat().st_mode) == 0o600
    assert os.getsid(supervisor.pid) == supervisor.pid != os.getsid(0)

    bad = Authority().two_hops(outbound_port=7, inbound_port=7, app_port=8080, address=loopback_address(), version=0)
    bad = WorkerConfig(version=0, sidecars=(bad.sidecars[0], bad.sidecars[0]))
    with pytest.raises(Refused, match="appears twice"):
        await supervisor.configure(bad)
    await supervisor.configure(EMPTY)  # the refusal broke nothing


async def test_worker_that_dies_is_replaced_and_told_the_last_accepted_configuration(tmp_path, nursery, reaper):
    supervisor = new(tmp_path)
    await nursery.start(supervisor.run)
    changes = []
    address = loopback_address()
    config = Authority().two_hops(outbound_port=9191, inbound_port=21000, app_port=8080, address=address, version=0)
    with trio.fail_after(15):
        await supervisor.configure(config)
    first = supervisor.pid
    supervisor.subscribe(lambda: supervisor.pid and changes.append(supervisor.pid))
    os.kill(first, signal.SIGKILL)
    with trio.fail_after(20):
        while not changes:
            await trio.sleep(0.02)
    reaper.append(supervisor.pid)
    assert supervisor.pid not in (0, first)
    assert supervisor.starts == 2
    stream = await trio.open_tcp_stream(address, 9191)  # its listeners are back
    await stream.aclose()


async def test_worker_outlives_its_agent_and_the_next_agent_takes_it_over(tmp_path, reaper):
    async with trio.open_nursery() as agent:
        supervisor = new(tmp_path)
        await agent.start(supervisor.run)
        with trio.fail_after(15):
            await supervisor.configure(EMPTY)
            await supervisor.configure(EMPTY)
        pid = supervisor.pid
        reaper.append(pid)
        agent.cancel_scope.cancel()  # as a crash does: nothing is said to the worker
    assert is_alive(pid)
    (tmp_path / "workers" / "99.sock").touch()  # and a dead socket of some earlier worker
    async with trio.open_nursery() as agent:
        supervisor = new(tmp_path)
        await agent.start(supervisor.run)
        with trio.fail_after(10):
            while not supervisor.running:
                await trio.sleep(0.01)
        assert supervisor.pid == pid
        assert supervisor.starts == 0
        assert not supervisor.fresh  # it serves what its last agent said
        await supervisor.configure(EMPTY)
        assert [path.name for path in supervisor._directory.sockets()] == ["1.sock"]
        await supervisor.stop(drain=True)
        await gone(pid)


async def test_worker_of_another_version_serves_until_there_is_one_of_ours_to_serve(
    tmp_path, nursery, reaper, monkeypatch
):
    address = loopback_address()
    config = Authority().two_hops(outbound_port=9191, inbound_port=21000, app_port=8080, address=address, version=0)
    async with trio.open_nursery() as agent:
        supervisor = new(tmp_path)
        await agent.start(supervisor.run)
        with trio.fail_after(15):
            await supervisor.configure(config)
        old = supervisor.pid
        reaper.append(old)
        agent.cancel_scope.cancel()
    monkeypatch.setattr(place_module, "VERSION", "9.9.9")
    supervisor = new(tmp_path)
    await nursery.start(supervisor.run)
    with trio.fail_after(15):
        while not supervisor.running:
            await trio.sleep(0.01)
        assert not supervisor.fresh  # so nobody hands over a part of the picture
        assert supervisor.pid == 0
        await (await trio.open_tcp_stream(address, 9191)).aclose()
        await supervisor.configure(config)
        reaper.append(supervisor.pid)
        assert supervisor.pid not in (0, old)
        await (await trio.open_tcp_stream(address, 9191)).aclose()
        await gone(old)
    await supervisor.configure(config)


async def test_worker_of_dev_mode_ends_with_its_agent(nursery, reaper):
    async with trio.open_nursery() as agent:
        supervisor = WorkerSupervisor(runtime=Runtime(seed=1), data_dir=None)
        await agent.start(supervisor.run)
        with trio.fail_after(15):
            await supervisor.configure(EMPTY)
        pid = supervisor.pid
        reaper.append(pid)
        await supervisor.stop(drain=False)
    assert not supervisor._directory.path.exists()
    await gone(pid)


async def test_hung_worker_is_killed_and_replaced(tmp_path, nursery, reaper, monkeypatch):
    monkeypatch.setattr(supervisor_module, "PING_INTERVAL_S", 0.1)
    monkeypatch.setattr(supervisor_module, "PING_TIMEOUT_S", 0.5)
    monkeypatch.setattr(place_module, "CALL_TIMEOUT_S", 0.5)
    supervisor = new(tmp_path)
    await nursery.start(supervisor.run)
    with trio.fail_after(15):
        await supervisor.configure(EMPTY)
    hung = supervisor.pid
    os.kill(hung, signal.SIGSTOP)
    with trio.fail_after(20):
        while supervisor.pid in (0, hung):
            await trio.sleep(0.02)
    reaper.append(supervisor.pid)
    assert not is_alive(hung)


async def test_worker_that_cannot_start_is_an_error_with_a_reason(tmp_path, nursery, monkeypatch, caplog):
    monkeypatch.setattr(sys, "executable", "/bin/false")
    monkeypatch.setattr(supervisor_module, "CONFIGURE_TIMEOUT_S", 0.5)
    supervisor = new(tmp_path)
    await nursery.start(supervisor.run)
    with pytest.raises(Unreachable, match="no worker was ready"):
        await supervisor.configure(EMPTY)
    assert any("ended with status 1 as it started" in record.message for record in caplog.records)


def test_directory_of_another_user_or_open_to_others_is_refused(tmp_path):
    (tmp_path / "workers").mkdir(mode=0o755)
    with pytest.raises(ConfigError, match="0700"):
        WorkerDirectory(tmp_path)


def test_long_data_directory_gets_a_short_socket_path_that_is_found_again(tmp_path):
    deep = tmp_path / ("d" * 100)
    directory = WorkerDirectory(deep)
    assert len(os.fsencode(directory.next_socket())) < 108
    assert WorkerDirectory(deep).path == directory.path
    directory.path.rmdir()


def test_sockets_are_numbered_newest_first(tmp_path):
    directory = WorkerDirectory(tmp_path)
    for number in (2, 10, 9):
        (directory.path / f"{number}.sock").touch()
    (directory.path / "x.sock").touch()
    assert [path.name for path in directory.sockets()] == ["10.sock", "9.sock", "2.sock"]
    assert directory.next_socket().name == "11.sock"


# --- the control connection -------------------------------------------------------------------------------------------


async def pair(tmp_path):
    """A client, and the stream of the worker that the test plays."""
    path = tmp_path / "control.sock"
    listener = trio.socket.socket(trio.socket.AF_UNIX, trio.socket.SOCK_STREAM)
    await listener.bind(str(path))
    listener.listen(1)
    client = await connect(path)
    accepted, _ = await listener.accept()
    listener.close()
    return client, trio.SocketStream(accepted)


async def test_call_after_a_cancelled_one_gets_its_own_reply(tmp_path, nursery):
    client, worker = await pair(tmp_path)
    nursery.start_soon(client.run)
    with trio.move_on_after(0.05):
        await client.call(Configure(EMPTY), timeout_s=5)
    replies = []

    async def ask():
        replies.append(await client.call(Drain(), timeout_s=5))

    nursery.start_soon(ask)
    await trio.testing.wait_all_tasks_blocked()
    await worker.send_all(frame(Ack(1)) + frame(Ack(2)))
    await trio.testing.wait_all_tasks_blocked()
    assert replies == [Ack(2)]


async def test_late_reply_ends_the_connection(tmp_path, nursery):
    client, _worker = await pair(tmp_path)
    nursery.start_soon(client.run)
    with pytest.raises(Unreachable, match="no answer"):
        await client.call(Ping(), timeout_s=0.05)
    assert client.over.is_set()
    with pytest.raises(Unreachable, match="has ended"):
        await client.call(Ping(), timeout_s=0.05)


@pytest.mark.parametrize("data", [b"\xff\xff\xff\xff", b"\0\0\0\1\xc1", frame(Ack(1)), b"\0\0\0\5\x01", b""])
async def test_bytes_that_are_no_reply_end_the_connection(tmp_path, nursery, data):
    client, worker = await pair(tmp_path)
    nursery.start_soon(client.run)
    await worker.send_all(data)
    await worker.aclose()
    with trio.fail_after(5):
        await client.over.wait()


async def test_calls_are_limited(tmp_path, nursery, monkeypatch):
    monkeypatch.setattr("agent.dataplane.control_client.CALLS_MAX", 2)
    client, _worker = await pair(tmp_path)
    assert isinstance(client, ControlClient)
    nursery.start_soon(client.run)
    for _ in range(2):
        with trio.move_on_after(0.01):
            await client.call(Ping(), timeout_s=5)
    with pytest.raises(Exception, match="more than 2 calls"):
        await client.call(Ping(), timeout_s=5)


class Bytes(trio.abc.ReceiveStream):
    """Gives out prepared chunks, then ends."""

    def __init__(self, chunks) -> None:
        self._chunks = list(chunks)

    async def receive_some(self, max_bytes=None):
        await trio.lowlevel.checkpoint()
        return self._chunks.pop(0) if self._chunks else b""

    async def aclose(self):
        self._chunks.clear()


def chunked(data: bytes, rng: random.Random) -> list[bytes]:
    cuts = sorted({0, len(data), *(rng.randrange(len(data) + 1) for _ in range(rng.randrange(8)))})
    return [data[a:b] for a, b in itertools.pairwise(cuts)]


REPLY_VALUES = [Ack(3), Nack(4, "port taken"), Pong(7, 1.5, 3, "1.0"), StatsReply("a 1\n", {"a": 1.0})]


@settings(max_examples=100)
@given(st.integers(0, 2**32))
def test_replies_arrive_whole_however_they_are_cut(seed):
    rng = random.Random(seed)
    values = [REPLY_VALUES[rng.randrange(4)] for _ in range(rng.randrange(1, 6))]

    async def read_all():
        reader = FrameReader(Bytes(chunked(b"".join(map(frame, values)), rng)))
        return [REPLIES.decode(data) for _ in values if (data := await reader.read()) is not None]

    assert trio.run(read_all) == values


@settings(max_examples=200)
@given(st.integers(0, 2**32))
def test_mutated_replies_are_protocol_errors_or_replies_and_never_anything_else(seed):
    rng = random.Random(seed)
    data = bytearray(b"".join(map(frame, REPLY_VALUES)))
    for _ in range(rng.randint(1, 4)):
        data[rng.randrange(len(data))] = rng.randrange(256)
    del data[rng.randrange(1, len(data) + 1) :]

    async def read_all():
        reader = FrameReader(Bytes(chunked(bytes(data), rng)))
        with contextlib.suppress(ProtocolError):
            while (payload := await reader.read()) is not None:
                REPLIES.decode(payload)

    trio.run(read_all)
