"""Several workers with real traffic: killed, replaced, refused, taken over and upgraded without a lost connection."""

import os
import signal
import socket

import pytest
import trio
from msgspec.structs import replace
from peers import Application, Load, Peer, get
from sidecars import Authority, loopback_address
from test_supervisor import is_alive

from agent.dataplane import place as place_module
from agent.dataplane import supervisor as supervisor_module
from agent.dataplane.control import REQUESTS, Ack, Drain, FrameReader, Ping, Pong, Stats, StatsReply, frame
from agent.dataplane.place import Worker
from agent.dataplane.sockets import SocketTable, listen
from agent.dataplane.supervisor import WorkerSupervisor
from agent.dataplane.worker_statistics import WorkerStatistics
from agent.runtime import Runtime
from mesh.errors import ConfigError, Refused, Unreachable
from mesh.proxy.resources import ListenerKey
from mesh.proxy.sidecar_config import WorkerConfig

# Workers that outlive their agent are the point here: their process objects are dropped while they run.
pytestmark = pytest.mark.filterwarnings("ignore::ResourceWarning")

OUTBOUND, INBOUND, APP = 9191, 21000, 8080


class Host:
    """Two sidecars on an address of their own, the application behind, and the supervisors of one data directory."""

    def __init__(self, folder, protocol="http") -> None:
        self.folder = folder
        self.address = loopback_address()
        self.app = Application(self.address, APP, kind="http" if protocol == "http" else "tcp")
        self._authority = Authority()
        self._protocol = protocol
        self.pids: set[int] = set()

    def config(self, **options) -> WorkerConfig:
        return self._authority.two_hops(
            outbound_port=OUTBOUND, inbound_port=INBOUND, app_port=APP, address=self.address, version=0,
            protocol=self._protocol, **options,
        )  # fmt: skip

    async def supervise(self, nursery, workers=2) -> WorkerSupervisor:
        supervisor = WorkerSupervisor(runtime=Runtime(seed=1), data_dir=self.folder, workers=workers)
        await nursery.start(supervisor.run)
        return supervisor

    async def all_ready(self, supervisor, count=2) -> list[int]:
        """The workers' process IDs, once there are so many."""
        with trio.fail_after(20):
            while len(supervisor.workers) < count:
                await trio.sleep(0.02)
        pids = [worker.pid for worker in supervisor.workers]
        self.pids.update(pids)
        return pids

    async def statuses(self, count=16) -> set[int]:
        """What requests are answered with, each on a connection of its own."""

        def ask() -> set[int]:
            return {get(self.address, OUTBOUND)[0] for _ in range(count)}

        return await trio.to_thread.run_sync(ask)

    def stream(self) -> Peer:
        return Peer(socket.create_connection((self.address, OUTBOUND), 10))

    def refuses(self, port) -> bool:
        try:
            socket.create_connection((self.address, port), 5).close()
        except ConnectionRefusedError:
            return True
        return False


@pytest.fixture
def host_of(tmp_path):
    hosts: list[Host] = []

    def make(**options) -> Host:
        hosts.append(Host(tmp_path, **options))
        return hosts[-1]

    yield make
    for host in hosts:
        host.app.stop()
        for pid in host.pids:
            if is_alive(pid):
                os.kill(pid, signal.SIGKILL)


@pytest.fixture
def host(host_of):
    return host_of()


async def test_all_workers_share_the_traffic_and_enforce_what_configure_has_returned_for(host, nursery):
    supervisor = await host.supervise(nursery)
    await supervisor.configure(host.config())
    await host.all_ready(supervisor)
    for _ in range(3):
        assert await host.statuses(40) == {200}
        await supervisor.configure(host.config(default_allow=False))
        assert await host.statuses(40) == {403}
        await supervisor.configure(host.config())
    replies = [await worker.client.call(Stats(), timeout_s=5) for worker in supervisor.workers]
    shares = [
        sum(value for name, value in reply.counters.items() if name.startswith("envoy_listener_downstream_cx_total"))
        for reply in replies
        if isinstance(reply, StatsReply)
    ]
    assert len(shares) == 2
    assert all(share > 0 for share in shares)
    assert "\nmesh_workers 2\n" in await supervisor.stats()
    lines = [
        line for line in (await supervisor.stats()).splitlines() if line.startswith("envoy_listener_downstream_cx_t")
    ]
    assert sum(float(line.rsplit(" ", 1)[1]) for line in lines) == sum(shares)


@pytest.mark.parametrize("workers", [1, 2])
async def test_connections_that_a_killed_worker_has_not_accepted_wait_for_its_successor(host, nursery, workers):
    supervisor = await host.supervise(nursery, workers)
    await supervisor.configure(host.config())
    for pid in await host.all_ready(supervisor, workers):
        os.kill(pid, signal.SIGKILL)
    assert await host.statuses(30) == {200}
    assert not set(await host.all_ready(supervisor, workers)) & {pid for pid in host.pids if not is_alive(pid)}


async def test_workers_are_replaced_under_load_without_a_failed_request(host, nursery):
    supervisor = await host.supervise(nursery)
    await supervisor.configure(host.config())
    before = await host.all_ready(supervisor)
    kept = host.stream()
    assert get(host.address, OUTBOUND, peer=kept)[0] == 200
    with Load(host.address, OUTBOUND, requests_per_s=100) as load:
        assert await supervisor.replace_workers() == 2
        after = await host.all_ready(supervisor)
        await trio.to_thread.run_sync(load.wait, 50)
    # The load does not look for `connection: close`: what it meets then is an end between two requests.
    assert [failure for failure in load.failures if failure[1] or b"ended after b''" not in failure[2]] == []
    assert not set(before) & set(after)
    assert supervisor.starts == 4
    kept.send(b"GET / HTTP/1.1\r\nHost: test\r\n\r\n")
    head, _body = await trio.to_thread.run_sync(kept.read_message)
    assert b"200 OK" in head
    assert b"connection: close" in head
    kept.close()


async def test_streams_go_on_in_a_replaced_worker_and_policy_changes_leave_them_alone(host_of, nursery):
    host = host_of(protocol="tcp")
    supervisor = await host.supervise(nursery, 1)
    await supervisor.configure(host.config())
    (old,) = await host.all_ready(supervisor, 1)
    stream = host.stream()
    stream.send(b"one")
    assert await trio.to_thread.run_sync(stream.read, 3) == b"one"
    await supervisor.configure(host.config(connections_max=77))
    await supervisor.replace_workers()
    await host.all_ready(supervisor, 1)
    second = host.stream()
    for peer in (stream, second):
        peer.send(b"two")
        assert await trio.to_thread.run_sync(peer.read, 3) == b"two"
    assert is_alive(old)
    stream.end()
    with trio.fail_after(10):
        while is_alive(old):
            await trio.sleep(0.02)
    second.send(b"3")
    assert await trio.to_thread.run_sync(second.read, 1) == b"3"
    second.close()
    stream.close()


async def test_what_one_worker_refuses_the_others_give_back(host, nursery, monkeypatch):
    supervisor = await host.supervise(nursery)
    await supervisor.configure(host.config())
    await host.all_ready(supervisor)
    configure, told = Worker.configure, []

    async def second_refuses(self, config, sockets, place):
        reason = await configure(self, config, sockets, place)
        told.append((self.pid, config.sidecars))
        return "not with me" if len(told) == 2 else reason

    monkeypatch.setattr(Worker, "configure", second_refuses)
    web, api = host.config().sidecars
    moved = replace(web, outbound=(replace(web.outbound[0], bind_port=9999),))
    with pytest.raises(Refused, match="not with me"):
        await supervisor.configure(WorkerConfig(0, (moved, api)))
    assert [pid for pid, _ in told] == [*[worker.pid for worker in supervisor.workers], supervisor.pid]
    monkeypatch.undo()
    await supervisor.configure(host.config())
    assert host.refuses(9999)
    assert await host.statuses() == {200}


async def test_a_configuration_that_kills_reaches_two_workers_at_most(host, nursery, monkeypatch):
    supervisor = await host.supervise(nursery, 3)
    await supervisor.configure(host.config())
    before = await host.all_ready(supervisor, 3)
    configure, hit = Worker.configure, []

    async def dies(self, config, sockets, place):
        if any(sidecar.inbound and sidecar.inbound.connections_max == 66 for sidecar in config.sidecars):
            hit.append(self.pid)
            raise Unreachable("it died")
        return await configure(self, config, sockets, place)

    monkeypatch.setattr(Worker, "configure", dies)
    with pytest.raises(Unreachable, match="it died"):
        await supervisor.configure(host.config(connections_max=66))
    assert hit == before[:2]
    assert await host.statuses(30) == {200}
    after = await host.all_ready(supervisor, 3)
    assert after[2] == before[2]
    assert not set(after[:2]) & set(before)


async def test_while_no_worker_can_be_started_connections_are_refused_and_do_not_hang(host, nursery, monkeypatch):
    supervisor = await host.supervise(nursery, 1)
    await supervisor.configure(host.config())
    (pid,) = await host.all_ready(supervisor, 1)

    async def cannot(*arguments, **options):
        raise Unreachable("no memory")

    monkeypatch.setattr(supervisor_module, "start_worker", cannot)
    os.kill(pid, signal.SIGKILL)
    with trio.fail_after(20):
        while not host.refuses(OUTBOUND):
            await trio.sleep(0.02)
    monkeypatch.undo()
    await host.all_ready(supervisor, 1)
    assert await host.statuses() == {200}


async def test_a_port_that_a_stranger_has_is_refused_and_nothing_is_left_behind(host, nursery):
    supervisor = await host.supervise(nursery)
    await supervisor.configure(host.config())
    await host.all_ready(supervisor)
    web, api = host.config().sidecars
    ports = [replace(web.outbound[0], bind_port=port) for port in (9998, 9999)]
    with listen(ListenerKey(host.address, 9999)):  # as another agent of the same user would
        with pytest.raises(Refused, match="port 9999"):
            await supervisor.configure(WorkerConfig(0, (replace(web, outbound=tuple(ports)), api)))
        assert host.refuses(9998)
    assert await host.statuses() == {200}


async def test_the_next_agent_takes_all_workers_over_with_their_sockets(host, nursery):
    async with trio.open_nursery() as agent:
        supervisor = await host.supervise(agent)
        await supervisor.configure(host.config())
        before = await host.all_ready(supervisor)
        agent.cancel_scope.cancel()  # as a crash does: nothing is said to the workers
    assert await host.statuses() == {200}
    supervisor = await host.supervise(nursery)
    assert set(await host.all_ready(supervisor)) == set(before)
    assert supervisor.starts == 0
    assert not supervisor.fresh
    await supervisor.configure(host.config())
    os.kill(before[0], signal.SIGKILL)
    assert await host.statuses(30) == {200}
    # An agent that is to have fewer lets the others finish.
    await host.all_ready(supervisor)
    await supervisor.stop(drain=False)
    supervisor = await host.supervise(nursery, 1)
    await host.all_ready(supervisor, 1)
    assert await host.statuses(30) == {200}


async def test_an_upgraded_agent_replaces_its_workers_under_load(host, nursery, monkeypatch):
    async with trio.open_nursery() as agent:
        supervisor = await host.supervise(agent)
        await supervisor.configure(host.config())
        before = await host.all_ready(supervisor)
        agent.cancel_scope.cancel()
    with Load(host.address, OUTBOUND, requests_per_s=100) as load:
        monkeypatch.setattr(place_module, "VERSION", "9.9.9")
        supervisor = await host.supervise(nursery)
        with trio.fail_after(10):
            while not supervisor.running:
                await trio.sleep(0.01)
        assert not supervisor.fresh
        await supervisor.configure(host.config())
        after = await host.all_ready(supervisor)
        await trio.to_thread.run_sync(load.wait, 50)
    assert [failure for failure in load.failures if failure[1] or b"ended after b''" not in failure[2]] == []
    assert not set(before) & set(after)


async def test_a_worker_that_is_told_to_end_by_a_signal_has_a_successor_at_once(host, nursery):
    supervisor = await host.supervise(nursery, 1)
    await supervisor.configure(host.config())
    (old,) = await host.all_ready(supervisor, 1)
    stream = host.stream()  # keeps it from ending: nobody has asked anything yet
    assert get(host.address, OUTBOUND, peer=stream)[0] == 200
    os.kill(old, signal.SIGTERM)
    assert await host.statuses() == {200}
    assert await host.all_ready(supervisor, 1) != [old]
    stream.close()


async def test_a_worker_of_the_first_protocol_is_asked_only_what_it_knows(host, nursery):
    (host.folder / "workers").mkdir(mode=0o700)
    listener = trio.socket.socket(trio.socket.AF_UNIX, trio.socket.SOCK_STREAM)
    await listener.bind(str(host.folder / "workers" / "1.sock"))
    listener.listen(1)
    heard = []

    async def old_worker() -> None:
        sock, _ = await listener.accept()
        stream = trio.SocketStream(sock)
        reader = FrameReader(stream)
        while (data := await reader.read()) is not None:
            heard.append(REQUESTS.decode(data))
            match heard[-1]:
                case Ping():
                    await stream.send_all(frame(Pong(os.getpid(), 1.0, 7, "0.0.9", protocol=1)))
                case Stats():
                    await stream.send_all(frame(StatsReply("", {})))
                case Drain():
                    await stream.send_all(frame(Ack(7)))

    nursery.start_soon(old_worker)
    supervisor = await host.supervise(nursery, 1)
    with trio.fail_after(10):
        while not supervisor.running:
            await trio.sleep(0.01)
    assert not supervisor.fresh
    await supervisor.configure(host.config())
    await host.all_ready(supervisor, 1)
    assert [type(request) for request in heard] == [Ping, Stats, Drain, Ping]
    assert supervisor.workers[0].client.pid != os.getpid()
    assert await host.statuses() == {200}


# --- the parts -------------------------------------------------------------------------------------------------------


def test_sockets_of_one_address_stand_alongside_and_strangers_are_refused():
    address = loopback_address()
    keys = [ListenerKey(address, port) for port in (7001, 7002)]
    table = SocketTable(3)
    assert len(table.bind(keys, [0, 1])) == 4
    assert len(table.bind(keys, [0, 1, 2])) == 2
    with pytest.raises(ConfigError, match="port 7001"):
        listen(keys[0])
    with listen(ListenerKey(address, 7003)), pytest.raises(ConfigError, match="port 7003"):
        table.bind([ListenerKey(address, 7000), *keys, ListenerKey(address, 7003)], [0, 1])
    assert sorted(table.of(0)) == sorted(table.of(2)) == keys
    table.close_place(1)
    table.keep_only(keys[:1])
    assert [len(table.of(place)) for place in range(3)] == [1, 0, 1]
    table.close_all()
    listen(keys[0]).close()


def test_merged_statistics_never_fall_when_a_worker_goes():
    text = '# TYPE a counter\na{{x="1 2"}} {}\n# TYPE g gauge\ng 2\n'
    text += "# TYPE envoy_server_uptime gauge\nenvoy_server_uptime {}\n"
    statistics = WorkerStatistics()
    assert statistics.merged([]) == ""
    both = statistics.merged([text.format(5, 10), text.format(7, 30)])
    assert both.splitlines() == [
        "# TYPE a counter", 'a{x="1 2"} 12', "# TYPE envoy_server_uptime gauge", "envoy_server_uptime 30",
        "# TYPE g gauge", "g 4",
    ]  # fmt: skip
    statistics.retire(text.format(5, 10))
    one = statistics.merged([text.format(7, 31)])
    assert 'a{x="1 2"} 12' in one
    assert "\ng 2\n" in one
    assert statistics.merged(["# TYPE b counter\nb 1\n"]) == "# TYPE b counter\nb 1\n"


def test_merged_histograms_keep_their_type():
    text = '# TYPE h histogram\nh_bucket{le="1"} 1\nh_sum 3\nh_count 2\n'
    assert WorkerStatistics().merged([text, text]) == '# TYPE h histogram\nh_bucket{le="1"} 2\nh_sum 6\nh_count 4\n'
