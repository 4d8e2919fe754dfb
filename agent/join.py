"""Finding the others: the addresses given at start, and those of the last run."""

import json
import logging
import os
from collections.abc import Iterator, Sequence
from itertools import repeat
from pathlib import Path

import trio

from agent.addresses import join_address, split_address
from agent.gossip_driver import GossipDriver
from mesh.errors import ConfigError, Unreachable
from mesh.gossip.events import GossipEvent

_LOG = logging.getLogger("mesh.agent")

FIRST_PAUSE_S = 1.0  # doubles with each attempt until it reaches the configured interval
PEERS_MAX = 256  # kept for the next start: more than enough that one of them answers
PEERS_WRITE_S = 5.0  # a storm of changes is one write


def without_own(addresses: Sequence[str], own: Sequence[tuple[str, int]], *, default_port: int) -> tuple[str, ...]:
    """The addresses that are not this agent's: everyone may be given the same list, and reaching oneself is no join."""
    # What is no address at all is kept: `join` says what is wrong with it.
    return tuple(address for address in addresses if split_address(address, default_port=default_port) not in own)


def pauses(interval_s: float) -> Iterator[float]:
    """Seconds between attempts: short ones at first, as agents are often started together; then `interval_s` each."""
    pause_s = FIRST_PAUSE_S
    while pause_s < interval_s:
        yield pause_s
        pause_s *= 2
    while True:
        yield interval_s


async def join_at_start(gossip: GossipDriver, addresses: Sequence[str]) -> None:
    """Joins once. Raises ConfigError when nobody answered."""
    if not addresses:
        return
    try:
        count = await gossip.join(addresses)
    except Unreachable as error:
        raise ConfigError(f"start_join: {error}") from error
    _LOG.info("joined %d of %d initial addresses", count, len(addresses))


async def retry_join(gossip: GossipDriver, addresses: Sequence[str], *, interval_s: float, attempts_max: int) -> None:
    """Joins, trying again until somebody answers. `attempts_max` 0: for ever. Raises ConfigError after the last."""
    if not addresses:
        return
    # With a number of attempts, `interval_s` says how patient the agent is in all: no short pauses then.
    waits = repeat(interval_s) if attempts_max else pauses(interval_s)
    for attempts, wait_s in enumerate(waits, start=1):
        try:
            count = await gossip.join(addresses)
        except Unreachable as error:
            if attempts_max and attempts >= attempts_max:
                raise ConfigError(f"retry_join: nobody answered in {attempts} attempts, the last: {error}") from error
            _LOG.warning("join failed, trying again in %g s: %s", wait_s, error)
            await trio.sleep(wait_s)
        else:
            _LOG.info("joined the cluster through %d of %d addresses", count, len(addresses))
            return


class KnownPeers:
    """The living members of the last run, in a file: where a restarted agent finds its cluster again by itself.

    What Serf's snapshot file is for. An agent that left forgets them, as it must not come back on its own.
    """

    def __init__(self, gossip: GossipDriver, data_dir: str, own: Sequence[tuple[str, int]]) -> None:
        self._gossip = gossip
        self._path = Path(data_dir) / "serf" / "peers.json" if data_dir else None
        self._own = own
        self._changed = trio.Event()

    def handle_event(self, event: GossipEvent) -> None:
        """Any change of the members is worth a write."""
        self._changed.set()

    def load(self) -> tuple[str, ...]:
        """Their addresses; none when there is no file, or none that can be understood."""
        if self._path is None:
            return ()
        try:
            peers = json.loads(self._path.read_bytes())
        except FileNotFoundError:
            return ()
        except (OSError, ValueError) as error:
            _LOG.warning("%s cannot be read, so the last run's peers are not known: %s", self._path, error)
            return ()
        if not isinstance(peers, list):
            return ()
        return tuple(peer for peer in peers[:PEERS_MAX] if isinstance(peer, str))

    async def rejoin(self, peers: Sequence[str], *, interval_s: float) -> None:
        """Joins the peers of the last run; until one answers or another way has found company."""
        waits = pauses(interval_s)
        while peers and len(self._gossip.members()) < 2:
            try:
                await self._gossip.join(peers)
            except Unreachable as error:
                wait_s = next(waits)
                _LOG.debug("no peer of the last run answers, trying again in %g s: %s", wait_s, error)
                await trio.sleep(wait_s)
            else:
                _LOG.info("joined the peers of the last run again")

    async def run(self, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Keeps the file up to date until cancelled."""
        task_status.started()
        while self._path is not None:
            await self._changed.wait()
            await trio.sleep(PEERS_WRITE_S)
            self._changed = trio.Event()
            peers = [
                join_address((member.address, member.port))
                for member in self._gossip.members()
                if member.status == "alive" and (member.address, member.port) not in self._own
            ]
            if peers:  # alone: what was known last is still the best guess
                await trio.to_thread.run_sync(self._write, peers[:PEERS_MAX])

    def _write(self, peers: list[str]) -> None:
        assert self._path is not None, "without a data directory nothing is written"
        temporary = self._path.with_suffix(".tmp")
        try:
            self._path.parent.mkdir(mode=0o700, exist_ok=True)
            temporary.write_text(json.dumps(peers))
            os.replace(temporary, self._path)
        except OSError as error:
            _LOG.warning("%s cannot be written; this agent will not find its peers by itself: %s", self._path, error)

    def forget(self) -> None:
        """This agent leaves for good."""
        if self._path is not None:
            self._path.unlink(missing_ok=True)
