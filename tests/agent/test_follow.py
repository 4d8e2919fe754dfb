"""Following a query: every change once, through errors, restored snapshots and servers that do not block."""

import random

import trio
import trio.testing
from certificates import NOW_S
from state_backend import StateBackend, WallClock

from agent import follow as follow_module
from agent.follow import follow
from mesh.errors import NoLeader, Unreachable
from mesh.model.command import KvSet
from mesh.model.query import Answer, GetKv, ReadMeta


class Script:
    """A backend that answers from a list: an index, or an error to raise; the last one for ever."""

    def __init__(self, *steps) -> None:
        self.steps = list(steps)
        self.asked = []

    async def read(self, query, options):
        await trio.lowlevel.checkpoint()
        self.asked.append((options.min_index, options.consistency))
        step = self.steps.pop(0) if len(self.steps) > 1 else self.steps[0]
        if isinstance(step, Exception):
            raise step
        return Answer(None, ReadMeta(index=step))


async def heard_from(backend, *, seconds: float):
    indexes = []
    with trio.move_on_after(seconds):
        await follow(backend, GetKv("a"), lambda answer: indexes.append(answer.meta.index), rng=random.Random(1))
    return indexes


async def test_each_change_is_delivered_once(autojump_clock, nursery):
    backend = StateBackend(WallClock(NOW_S))
    values = []
    nursery.start_soon(
        lambda: follow(
            backend,
            GetKv("a"),
            lambda answer: values.append(answer.value and answer.value.value),
            rng=random.Random(1),
        )
    )
    await trio.testing.wait_all_tasks_blocked()
    for value in (b"1", b"2"):
        await backend.apply(KvSet("a", value))
        await trio.testing.wait_all_tasks_blocked()
    await backend.apply(KvSet("unrelated", b"x"))
    await trio.sleep(1000)
    assert values == [None, b"1", b"2"]
    assert len(backend.options) < 30


async def test_errors_are_retried_with_back_off_and_nothing_is_delivered_twice(autojump_clock):
    backend = Script(5, Unreachable("x"), Unreachable("x"), Unreachable("x"), 5, 6)
    assert await heard_from(backend, seconds=3) == [5, 6]
    endless = Script(Unreachable("x"))
    assert await heard_from(endless, seconds=1000) == []
    assert 100 < len(endless.asked) < 220


async def test_first_answer_may_be_stale_where_there_is_no_leader(autojump_clock):
    backend = Script(NoLeader("x"), 5, NoLeader("x"), 6)
    assert await heard_from(backend, seconds=5) == [5, 6]
    assert backend.asked[:4] == [(0, "default"), (0, "stale"), (5, "default"), (5, "default")]


async def test_index_that_goes_backwards_is_news(autojump_clock):
    assert await heard_from(Script(50, 7, 8), seconds=5) == [50, 7, 8]


async def test_server_that_does_not_block_is_not_hammered(autojump_clock):
    backend = Script(5)
    await heard_from(backend, seconds=10)
    assert len(backend.asked) <= 10 / follow_module._BUSY_S + 2
