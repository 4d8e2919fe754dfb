"""The worker: a process of its own that carries traffic. `python -m agent.dataplane.worker --control <socket path>`.

It listens on the control socket (see `control.py`), serves what it was last told to, and outlives its agent. With
`--exit-with-agent` it drains and exits soon after its agent's connection is lost.
"""

import gc
import itertools
import logging
import os
import random
import resource
import secrets
import signal
import socket
import stat
import sys
import time
from collections.abc import AsyncIterator
from pathlib import Path

import trio

from agent.dataplane.control import (
    PROTOCOL,
    REQUESTS,
    Ack,
    Adopt,
    Configure,
    Describe,
    DescribeReply,
    Drain,
    EndTap,
    FrameReader,
    Handover,
    HandoverReply,
    Nack,
    Observed,
    ObservedReply,
    Ping,
    Pong,
    Reply,
    Stats,
    StatsReply,
    Tap,
    TapReply,
    frame,
)
from agent.dataplane.descriptors import SOCKETS_PER_FRAME_MAX, DescriptorStream
from agent.dataplane.exposition import Exposition
from agent.dataplane.metrics import Sample
from agent.dataplane.otlp_metrics import MetricsExport, interval_from_environment
from agent.dataplane.reactor import Reactor
from agent.dataplane.tables import Tables
from agent.version import VERSION
from mesh.errors import ConfigError, LimitExceeded, MeshError
from mesh.proxy.description import Refusal
from mesh.proxy.resources import ListenerKey
from mesh.proxy.sidecar_config import WorkerConfig

_LOG = logging.getLogger("mesh.dataplane")

AGENT_GRACE_S = 2.0  # --exit-with-agent: a new agent may take over within this time
DRAIN_TIMEOUT_S = 10.0  # when a signal, or the loss of its agent, ends it
DRAIN_IDLE_S = 1.0
OUTBOUND_LAST_S = 2.0  # before the drain's end, outbound requests have to finish too
REPLY_TIMEOUT_S = 10.0  # an agent that does not read its replies is gone
LOG_FLUSH_INTERVAL_S = 1.0
SAMPLES_AT_ONCE = 500  # some 2 ms of work
DRAIN_CHECK_INTERVAL_S = 0.02
FREEZE_INTERVAL_S = 60.0  # between full collections: one may take long when many connections are open


class Worker:
    """One worker process, inside a Trio run."""

    def __init__(self, *, exit_with_agent: bool) -> None:
        self._exit_with_agent = exit_with_agent
        self._reactor = Reactor()
        self._tables = Tables(
            self._reactor,
            random.Random(secrets.randbits(64)),
            tracing_endpoint=os.environ.get("OTEL_EXPORTER_OTLP_ENDPOINT", ""),
        )
        self._started_at = trio.current_time()
        self._current: trio.CancelScope | None = None  # the connection of the agent that counts
        self._draining = False
        self._frozen_at = float("-inf")
        self._metrics_export = MetricsExport(socket.gethostname(), interval_from_environment())
        self._refused: Refusal | None = None  # the last configuration that was
        self._drain = Drain(DRAIN_TIMEOUT_S, DRAIN_IDLE_S)
        self._drain_asked = trio.Event()
        self._drain_changed = trio.Event()
        self._agent_lost_at = float("inf")

    async def run(self, listener: trio.SocketListener) -> None:
        """Serves until told to drain, by the agent or by SIGTERM."""
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self._reactor.run)
            nursery.start_soon(self._tables.names.run)
            nursery.start_soon(self._wait_signals)
            nursery.start_soon(self._flush_logs)
            if self._exit_with_agent:
                nursery.start_soon(self._watch_agent)
            nursery.start_soon(self._accept_agents, listener, nursery)
            await self._drain_asked.wait()
            await self._finish_all()
            self._tables.close()
            self._reactor.turn()  # closes what has just been closed
            nursery.cancel_scope.cancel()
        self._reactor.dispose()

    async def _finish_all(self) -> None:
        """Inbound first: callers have been told to go elsewhere, while the application may still call others. Returns
        when nothing is open, or at the deadline. A drain that is asked for anew, more urgently, ends the one before.
        """
        began = trio.current_time()
        self._draining = True
        while True:
            self._drain_changed = trio.Event()
            drain = self._drain
            deadline = began + drain.deadline_s
            self._tables.drain(idle_s=drain.idle_s, inbound_only=drain.outbound_s > 0)
            with trio.move_on_at(deadline):
                if drain.outbound_s > 0:
                    with trio.move_on_at(deadline - OUTBOUND_LAST_S):
                        await self._wait_inbound_over(began + drain.outbound_s)
                    self._tables.drain(idle_s=drain.idle_s)
                await self._wait_over()
            if not self._drain_changed.is_set():
                return

    async def _wait_over(self) -> None:
        while True:
            if not self._tables.open_connections or self._drain_changed.is_set():
                return
            await trio.sleep(DRAIN_CHECK_INTERVAL_S)

    async def _wait_inbound_over(self, earliest: float) -> None:
        while self._tables.has_outbound and not self._drain_changed.is_set():
            if trio.current_time() >= earliest and not self._tables.open_inbound:
                return
            await trio.sleep(DRAIN_CHECK_INTERVAL_S)

    async def _wait_signals(self) -> None:
        with trio.open_signal_receiver(signal.SIGTERM, signal.SIGINT, signal.SIGUSR1) as received:
            async for number in received:
                if number == signal.SIGUSR1:
                    self._tables.reopen_logs()
                    continue
                _LOG.info("signal %d: draining", number)
                self._drain_asked.set()
                if self._current is not None:
                    self._current.cancel()  # its agent is to notice at once that it needs another worker

    async def _flush_logs(self) -> None:
        while True:
            await trio.sleep(LOG_FLUSH_INTERVAL_S)
            self._tables.flush_logs()
            self._tables.taps.expire()
            if self._metrics_export.is_due(self._tables.otlp_endpoint, trio.current_time()):
                self._metrics_export.send([sample async for batch in self._sample_batches() for sample in batch])

    async def _watch_agent(self) -> None:
        self._agent_lost_at = trio.current_time()
        while True:
            await trio.sleep(AGENT_GRACE_S / 10)
            if trio.current_time() - self._agent_lost_at > AGENT_GRACE_S:
                break
        _LOG.info("the agent is gone: draining")
        self._drain_asked.set()

    async def _accept_agents(self, listener: trio.SocketListener, nursery: trio.Nursery) -> None:
        while True:
            try:
                stream = await listener.accept()
            except OSError as error:
                _LOG.warning("the control socket cannot accept: %s", error.strerror)
                await trio.sleep(0.1)
                continue
            nursery.start_soon(self._serve_agent, stream)

    async def _serve_agent(self, stream: trio.SocketStream) -> None:
        with trio.CancelScope() as scope:
            async with stream:
                try:
                    await self._answer_all(stream, scope)
                except MeshError as error:
                    self._reactor.repeats.warning("control", "a control connection was closed: %s", error)
                except trio.BrokenResourceError:
                    _LOG.info("the agent's control connection broke")
                except trio.TooSlowError:
                    _LOG.warning("the agent does not read its replies; its control connection was closed")
        if self._current is scope:
            self._current = None
            self._agent_lost_at = trio.current_time()

    def _take_over(self, scope: trio.CancelScope) -> None:
        """The newest agent wins: one that has said something sensible, not one that only looks whether we are here."""
        if self._current is not scope:
            if self._current is not None:
                self._current.cancel()
            self._current = scope
            self._agent_lost_at = float("inf")

    async def _answer_all(self, stream: trio.SocketStream, scope: trio.CancelScope) -> None:
        frames = DescriptorStream(stream)
        reader = FrameReader(frames)
        try:
            while (data := await reader.read()) is not None:
                request = REQUESTS.decode(data)
                self._take_over(scope)
                sockets: tuple[socket.socket, ...] = ()
                match request:
                    case Adopt(keys=keys):
                        reply = self._adopt(keys, frames.take(len(keys)))
                    case Handover(offset=offset):
                        reply, sockets = self._hand_over(offset)
                    case Stats():
                        reply = await self._statistics()
                    case _:
                        reply = self._answer(request)
                with trio.fail_after(REPLY_TIMEOUT_S):
                    await frames.send(frame(reply), sockets)
        finally:
            frames.discard()

    def _adopt(self, keys: tuple[ListenerKey, ...], sockets: tuple[socket.socket, ...]) -> Reply:
        self._tables.adopt(dict(zip(keys, sockets, strict=True)))
        return Ack(self._tables.config.version)

    def _hand_over(self, offset: int) -> tuple[Reply, tuple[socket.socket, ...]]:
        listening = self._tables.listening()
        given = listening[offset : offset + SOCKETS_PER_FRAME_MAX]
        remaining = max(0, len(listening) - offset - len(given))
        return HandoverReply(tuple(key for key, _ in given), remaining), tuple(sock for _, sock in given)

    def _configure(self, config: WorkerConfig) -> Ack | Nack:
        if self._draining:
            return Nack(config.version, "the worker is draining")
        try:
            self._reactor.refresh()
            self._tables.apply(config)
        except ConfigError as error:
            _LOG.error("configuration %d was refused: %s", config.version, error)
            return self._refuse(config.version, str(error))
        except Exception as error:
            # A fault of ours. Dying of it would cut all traffic, again after each restart.
            _LOG.exception("configuration %d could not be applied", config.version)
            return self._refuse(config.version, f"internal error: {error!r}; see the worker's log")
        self._freeze()
        return Ack(config.version)

    def _refuse(self, version: int, reason: str) -> Nack:
        self._refused = Refusal(version, reason, time.time())
        return Nack(version, reason)

    def _answer(self, request: Configure | Ping | Observed | Describe | Tap | EndTap | Drain) -> Reply:
        match request:
            case Configure(config=config):
                return self._configure(config)
            case Ping():
                return self._pong()
            case Observed(since_s=since_s):
                return ObservedReply(self._tables.observed(since_s))
            case Describe(service=service):
                return DescribeReply(self._tables.describe(service, self._refused))
            case Tap(key=key, wanted=wanted):
                try:
                    return TapReply(*self._tables.taps.take(key, wanted))
                except (ConfigError, LimitExceeded) as error:
                    return Nack(self._tables.config.version, str(error))
            case EndTap(key=key):
                self._tables.taps.end(key)
                return Ack(self._tables.config.version)
            case Drain():
                self._drain = request
                self._drain_asked.set()
                self._drain_changed.set()
                return Ack(self._tables.config.version)

    async def _statistics(self) -> StatsReply:
        """All counters. Traffic goes on meanwhile: of thousands of targets there are too many for one turn."""
        exposition = Exposition()
        async for batch in self._sample_batches():
            exposition.add(batch)
        return StatsReply(exposition.text(), exposition.counters)

    async def _sample_batches(self) -> AsyncIterator[tuple[Sample, ...]]:
        yield tuple(self._own_samples())
        samples = self._tables.samples()
        while batch := tuple(itertools.islice(samples, SAMPLES_AT_ONCE)):
            yield batch
            await trio.lowlevel.checkpoint()

    def _freeze(self) -> None:
        """What lives as long as the configuration is not worth looking at in every collection."""
        now = trio.current_time()
        if now - self._frozen_at >= FREEZE_INTERVAL_S:
            self._frozen_at = now
            gc.unfreeze()
            gc.collect()
            gc.freeze()

    def _pong(self) -> Pong:
        return Pong(
            pid=os.getpid(),
            uptime_s=trio.current_time() - self._started_at,
            config_version=self._tables.config.version,
            package_version=VERSION,
            draining=self._draining,
            protocol=PROTOCOL,
        )

    def _own_samples(self) -> list[Sample]:
        return [
            ("envoy_server_live", {}, 0.0 if self._draining else 1.0),
            ("envoy_server_uptime", {}, trio.current_time() - self._started_at),
            ("mesh_worker_handler_faults", {}, self._reactor.faults),
            ("mesh_worker_connections_open", {}, self._tables.open_connections),
        ]


def _control_listener(path: Path) -> trio.SocketListener:
    """Binds the control socket, mode 0600. A file that a dead worker left behind is replaced.

    Raises ConfigError when a live worker has it, or it cannot be bound.
    """
    probe = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        probe.settimeout(1.0)
        probe.connect(str(path))
    except (FileNotFoundError, ConnectionRefusedError):
        pass
    except OSError as error:
        raise ConfigError(f"the control socket {path} cannot be used: {error.strerror or error}") from error
    else:
        raise ConfigError(f"another worker already listens on {path}")
    finally:
        probe.close()
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    before = os.umask(0o177)
    try:
        if path.exists() and stat.S_ISSOCK(path.stat().st_mode):
            path.unlink()
        sock.bind(str(path))
        sock.listen(8)
    except OSError as error:
        sock.close()
        raise ConfigError(f"the control socket {path} cannot be bound: {error.strerror or error}") from error
    finally:
        os.umask(before)
    sock.settimeout(0)
    return trio.SocketListener(trio.socket.from_stdlib_socket(sock))


def _raise_descriptor_limit() -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft < hard:
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))


async def _run(path: Path, *, exit_with_agent: bool) -> None:
    await Worker(exit_with_agent=exit_with_agent).run(_control_listener(path))


def main(arguments: list[str]) -> int:
    """Runs a worker; the exit status."""
    control: Path | None = None
    exit_with_agent = False
    rest = list(arguments)
    while rest:
        match rest.pop(0):
            case "--control" if rest:
                control = Path(rest.pop(0))
            case "--exit-with-agent":
                exit_with_agent = True
            case unknown:
                print(f"unknown or incomplete option {unknown}", file=sys.stderr)
                return 1
    if control is None:
        print("--control <socket path> is required", file=sys.stderr)
        return 1
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(name)s: %(message)s")
    _raise_descriptor_limit()
    try:
        trio.run(lambda: _run(control, exit_with_agent=exit_with_agent))
    except ConfigError as error:
        print(error, file=sys.stderr)
        return 1
    control.unlink(missing_ok=True)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
