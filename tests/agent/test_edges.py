"""Who calls whom, asked of every agent: open calls at the leader, one question at a time, and who does not answer."""

import random
from functools import partial

import pytest
import trio
import trio.testing
from msgspec.structs import replace

from agent.dataplane.control import Observed, ObservedReply
from agent.edge_board import GATHER_S, GATHERS_MAX, POLL_S, EdgeBoard
from agent.edges import EdgeReporter, TrafficMemory
from agent.rpc.calls import CALLS, EDGES_GATHERED, EdgesAsked, EdgesGathered, EdgesPollCall
from agent.rpc.frames import CALL_BYTES_MAX
from mesh.authz.observed import Edge, ObservedListener
from mesh.errors import LimitExceeded, NotLeader, Unreachable


def saw(service: str, count: int) -> tuple[ObservedListener, ...]:
    return (ObservedListener(service, True, 60.0, (Edge("web", "GET", "/", count, 0, ("/",)),)),)


async def agent(board: EdgeBoard, node: str, seen: tuple[ObservedListener, ...], asked: list[float]) -> None:
    """Answers every question."""
    call = EdgesPollCall(node)
    while True:
        question = await board.poll(call)
        asked.append(question.since_s)
        call = EdgesPollCall(node, question.question, seen if question.question else ())


async def test_every_agent_is_asked_and_instances_count_together(autojump_clock, nursery):
    board, asked = EdgeBoard(), []
    for node, seen in (("c1", saw("api", 1)), ("c2", saw("api", 2)), ("s1", ())):
        nursery.start_soon(agent, board, node, seen, asked)
    for since_s in (60.0, 900.0):
        await trio.testing.wait_all_tasks_blocked()
        started = trio.current_time()
        gathered = await board.gather(since_s, lambda: ["c1", "c2", "s1"])
        assert trio.current_time() == started  # nobody waits for a deadline
        assert gathered == EdgesGathered(saw("api", 3), ("c1", "c2", "s1"), ())
    assert asked == [60.0] * 3 + [900.0] * 3


async def test_who_does_not_answer_in_time_is_named(autojump_clock, nursery):
    board = EdgeBoard()
    nursery.start_soon(agent, board, "c1", saw("api", 1), [])
    await trio.testing.wait_all_tasks_blocked()
    started = trio.current_time()
    gathered = await board.gather(60.0, lambda: ["c1", "gone"])
    assert trio.current_time() == started + GATHER_S
    assert gathered == EdgesGathered(saw("api", 1), ("c1",), ("gone",))


async def test_an_agent_that_fails_meanwhile_is_no_longer_waited_for(autojump_clock):
    started = trio.current_time()
    expected = lambda: ["dying"] if trio.current_time() < started + 1.0 else []  # noqa: E731
    assert await EdgeBoard().gather(60.0, expected) == EdgesGathered((), (), ())
    assert trio.current_time() < started + 1.2


async def test_an_agent_that_comes_during_the_question_is_asked_too(autojump_clock, nursery):
    board = EdgeBoard()
    results = []

    async def gather():
        results.append(await board.gather(60.0, lambda: ["late"]))

    nursery.start_soon(gather)
    await trio.sleep(1.0)
    nursery.start_soon(agent, board, "late", saw("api", 5), [])
    await trio.testing.wait_all_tasks_blocked()
    assert results == [EdgesGathered(saw("api", 5), ("late",), ())]


async def test_a_late_answer_to_an_old_question_is_none_to_the_next(autojump_clock, nursery):
    board = EdgeBoard()
    await board.gather(60.0, lambda: ["c1"])  # nobody answers
    nursery.start_soon(partial(board.poll, EdgesPollCall("c1", 1, saw("api", 99))))
    await trio.testing.wait_all_tasks_blocked()
    gathered = await board.gather(60.0, lambda: ["c1"])
    assert gathered == EdgesGathered((), (), ("c1",))


async def test_an_open_call_ends_by_itself_with_no_question(autojump_clock):
    started = trio.current_time()
    assert await EdgeBoard().poll(EdgesPollCall("c1")) == EdgesAsked(0, 0.0)
    assert trio.current_time() == started + POLL_S


async def test_a_server_that_no_longer_leads_sends_everybody_away(autojump_clock):
    board = EdgeBoard()
    failures = []

    async def poll():
        try:
            await board.poll(EdgesPollCall("c1"))
        except NotLeader as error:
            failures.append(error)

    async with trio.open_nursery() as nursery:
        nursery.start_soon(poll)
        await trio.testing.wait_all_tasks_blocked()
        board.abandon()
    assert len(failures) == 1


async def test_questions_wait_for_each_other_up_to_a_limit(autojump_clock):
    board, refused = EdgeBoard(), []

    async def gather():
        try:
            await board.gather(60.0, lambda: ["gone"])
        except LimitExceeded:
            refused.append(1)

    started = trio.current_time()
    async with trio.open_nursery() as nursery:
        for _ in range(GATHERS_MAX + 3):
            nursery.start_soon(gather)
    assert len(refused) == 3
    assert trio.current_time() == started + GATHERS_MAX * GATHER_S


class Polls:
    """A backend whose leader asks, fails, and asks again."""

    def __init__(self) -> None:
        self.calls: list[EdgesPollCall] = []
        self.script = [EdgesAsked(0, 0.0), Unreachable("gone"), EdgesAsked(3, 60.0)]

    async def poll_edges(self, call: EdgesPollCall) -> EdgesAsked:
        self.calls.append(call)
        if not self.script:
            await trio.sleep_forever()
        step = self.script.pop(0)
        if isinstance(step, Exception):
            raise step
        return step


class Worker:
    """Answers with what it saw; None: it does not answer."""

    protocol = 3

    def __init__(self, pid: int, seen: tuple[ObservedListener, ...] | None) -> None:
        self.pid, self.seen, self.client = pid, seen, self

    async def call(self, request: Observed, *, timeout_s: float) -> ObservedReply:
        await trio.lowlevel.checkpoint()
        if self.seen is None:
            raise Unreachable("no answer")
        return ObservedReply(self.seen)


class Supervisor:
    def __init__(self, *workers: Worker) -> None:
        self.workers = workers


async def test_what_several_workers_saw_is_one_answer(autojump_clock):
    memory = TrafficMemory(Supervisor(Worker(1, saw("api", 1)), Worker(2, saw("api", 2)), Worker(3, None)))
    assert await memory.observed(60.0) == saw("api", 3)
    with pytest.raises(Unreachable):
        await TrafficMemory(Supervisor(Worker(3, None))).observed(60.0)
    old = Worker(4, saw("api", 1))
    old.protocol = 2
    assert await TrafficMemory(Supervisor(old)).observed(60.0) == ()


async def test_what_a_worker_saw_outlives_it_for_as_long_as_it_matters(autojump_clock, nursery):
    supervisor = Supervisor(Worker(1, saw("api", 5)))
    memory = TrafficMemory(supervisor)
    nursery.start_soon(memory.run)
    await trio.sleep(90.0)
    supervisor.workers = (Worker(2, (replace(saw("api", 1)[0], observed_s=1.0),)),)
    await trio.sleep(10.0)
    assert await memory.observed(900.0) == (replace(saw("api", 6)[0], observed_s=60.0 + 40.0),)
    assert (await memory.observed(30.0))[0].edges == saw("api", 1)[0].edges  # it was gone by then
    await trio.sleep(3600.0)
    assert (await memory.observed(3600.0))[0].edges == saw("api", 1)[0].edges


async def test_an_answer_is_bounded_and_says_what_it_leaves_out(autojump_clock):
    edges = tuple(Edge("web", "GET", f"/{number}", number + 1, 0) for number in range(15_000))
    seen = tuple(ObservedListener(name, True, 60.0, edges) for name in ("a", "b"))
    answer = await TrafficMemory(Supervisor(Worker(1, seen))).observed(60.0)
    assert [len(one.edges) for one in answer] == [10_000, 10_000]
    assert answer[0].left_out == sum(range(1, 5001))
    assert len(CALLS.encode(EdgesPollCall("c1", 1, answer))) < CALL_BYTES_MAX


async def test_an_agent_answers_what_it_was_asked_and_outlives_failures(autojump_clock, nursery):
    polls = Polls()
    reporter = EdgeReporter(polls, TrafficMemory(Supervisor()), random.Random(1), node="c1")
    nursery.start_soon(reporter.run)
    await trio.sleep(5.0)
    assert polls.calls == [EdgesPollCall("c1")] * 3 + [EdgesPollCall("c1", 3, ())]


@pytest.mark.parametrize("seed", range(3))
def test_calls_and_answers_survive_the_wire(seed):
    call = EdgesPollCall("c1", seed, saw("api", seed), forwarded=bool(seed))
    assert CALLS.decode(CALLS.encode(call)) == call
    gathered = EdgesGathered(saw("api", seed), ("a",), ("b",))
    assert EDGES_GATHERED.decode(EDGES_GATHERED.encode(gathered)) == gathered
