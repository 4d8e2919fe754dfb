"""Following one query: the newest answer, again and again, through every outage of the servers."""

import logging
import random
from collections.abc import Callable
from typing import NoReturn

import trio

from agent.backend import Backend
from agent.backoff import backoff_s
from mesh.errors import MeshError, NoLeader
from mesh.model.query import Answer, AnswerT, Asks, ReadOptions

_LOG = logging.getLogger("mesh.follow")

WAIT_S = 60.0  # of one blocking query: after so long without a change the path to the server is proven anew
BACKOFF_S_MIN = 0.2
BACKOFF_S_MAX = 10.0
_BUSY_S = 0.01  # least time between two answers with the same index, should a server not block


async def follow(
    backend: Backend,
    query: Asks[AnswerT],
    deliver: Callable[[Answer[AnswerT]], None],
    *,
    rng: random.Random,
) -> NoReturn:
    """Calls `deliver` with the first answer and after every change of it, until cancelled. It must not raise.

    While the servers are away nothing is delivered, so the receiver keeps what it knows; tries are spaced by a jittered
    back-off of at most BACKOFF_S_MAX. Where servers have no leader, a first answer may be a stale one: old news beats
    none.
    """
    index, failures = 0, 0
    stale = False
    while True:
        options = ReadOptions(min_index=index, wait_s=WAIT_S, consistency="stale" if stale else "default")
        started = trio.current_time()
        try:
            answer = await backend.read(query, options)
        except MeshError as error:
            failures += 1
            stale = index == 0 and isinstance(error, NoLeader)
            pause_s = backoff_s(failures, rng=rng, first_s=BACKOFF_S_MIN, last_s=BACKOFF_S_MAX)
            _LOG.log(
                logging.WARNING if failures == 3 else logging.DEBUG,
                "%s: %s; keeping the last answer, trying again in %.1f s",
                type(query).__name__,
                error,
                pause_s,
            )
            await trio.sleep(pause_s)
            continue
        failures, stale = 0, False
        if answer.meta.index < index:
            index = 0  # the state was replaced by an older one (a restored snapshot): what it says now is news
        if answer.meta.index != index:
            index = answer.meta.index
            deliver(answer)
        elif trio.current_time() - started < _BUSY_S:
            await trio.sleep(_BUSY_S)
