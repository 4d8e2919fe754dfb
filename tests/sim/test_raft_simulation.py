"""Random faults against the raft core: whatever happens, nothing unsafe does, and afterwards it works again."""

from __future__ import annotations

import pytest
from sim.raft_world import World

SEEDS = 40


@pytest.mark.parametrize("seed", range(SEEDS))
def test_nothing_acknowledged_is_lost_and_the_cluster_recovers(seed: int) -> None:
    names = ("abc", "abcde", "abcdefg")[seed % 3]
    # Odd seeds start with fewer voters, so that servers join and leave while faults go on.
    world = World(seed, names, bootstrap=names[: -2 if seed % 2 and len(names) > 3 else None])
    try:
        world.chaos(25.0)
        world.recover()
    except AssertionError as error:
        pytest.fail(f"seed {seed}: {error}\n{world.describe()}")
