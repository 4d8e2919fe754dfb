"""Deadlines of connections: what is overdue is cancelled in time, what has moved on is not."""

import pytest
import trio

from agent.http.deadlines import Deadline, Deadlines


async def wait_from(deadlines: Deadlines, at: float) -> Deadline:
    """Waits for ever under that deadline; returns it once it has cancelled the wait."""
    with deadlines.watch() as deadline:
        deadline.set(at)
        await trio.sleep_forever()
    return deadline


async def test_overdue_wait_is_cancelled_and_no_other(autojump_clock, nursery):
    deadlines, ended = Deadlines(), []
    nursery.start_soon(deadlines.run)

    async def waiter(at: float) -> None:
        assert (await wait_from(deadlines, at)).is_overdue
        ended.append((at, trio.current_time()))

    start = trio.current_time()
    async with trio.open_nursery() as waiters:
        for at in (start + 300, start + 1, start + 60):  # each is set while the watcher sleeps until the one before
            waiters.start_soon(waiter, at)
    assert [at for at, _ in ended] == [start + 1, start + 60, start + 300]
    for at, when in ended:
        assert at <= when <= at + 0.1


async def test_deadline_that_was_put_off_does_not_strike(autojump_clock, nursery):
    deadlines = Deadlines()
    nursery.start_soon(deadlines.run)
    start = trio.current_time()
    with deadlines.watch() as deadline:
        deadline.set(start + 1)
        await trio.sleep(0.9)
        deadline.set(start + 50)
        await trio.sleep(40)
        deadline.set(trio.current_time() + 2)
        await trio.sleep_forever()
    assert deadline.is_overdue
    assert trio.current_time() - start == pytest.approx(42.9, abs=0.2)


async def test_scope_cancelled_by_someone_else_is_not_overdue(autojump_clock, nursery):
    deadlines = Deadlines()
    nursery.start_soon(deadlines.run)
    with deadlines.watch() as deadline:
        deadline.set(trio.current_time() + 5)
        deadline.scope.cancel()
        await trio.sleep_forever()
    assert deadline.scope.cancelled_caught
    assert not deadline.is_overdue
    await trio.sleep(10)
    assert not deadline.is_overdue  # it is not watched any more


async def test_watcher_sleeps_while_every_deadline_is_far_away(autojump_clock, nursery):
    looks = 0

    class Counting(Deadlines):
        def __setattr__(self, name: str, value: object) -> None:
            nonlocal looks
            looks += name == "next_look"
            super().__setattr__(name, value)

    deadlines = Counting()
    nursery.start_soon(deadlines.run)
    with deadlines.watch() as deadline:
        deadline.set(trio.current_time() + 300)
        await trio.sleep(1)
        before = looks
        for _ in range(1000):  # a busy connection: each request moves its deadline on
            deadline.set(trio.current_time() + 300)
            await trio.sleep(0.01)
    assert looks == before
