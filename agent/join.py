"""Finding the others: the addresses given at start, and those of the last run."""

import logging
from collections.abc import Sequence

import trio

from agent.gossip_driver import GossipDriver, split_address
from mesh.errors import ConfigError, Unreachable

_LOG = logging.getLogger("mesh.agent")


def without_own(addresses: Sequence[str], own: Sequence[tuple[str, int]], *, default_port: int) -> tuple[str, ...]:
    """The addresses that are not this agent's: everyone may be given the same list, and reaching oneself is no join."""
    kept = []
    for address in addresses:
        try:
            endpoint = split_address(address, default_port=default_port)
        except Unreachable:  # `join` says what is wrong with it
            endpoint = None
        if endpoint not in own:
            kept.append(address)
    return tuple(kept)


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
    attempts = 0
    while True:
        attempts += 1
        try:
            count = await gossip.join(addresses)
        except Unreachable as error:
            if attempts_max and attempts >= attempts_max:
                raise ConfigError(f"retry_join: nobody answered in {attempts} attempts, the last: {error}") from error
            _LOG.warning("join failed, trying again in %g s: %s", interval_s, error)
            await trio.sleep(interval_s)
        else:
            _LOG.info("joined the cluster through %d of %d addresses", count, len(addresses))
            return
