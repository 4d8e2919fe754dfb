"""What strangers can cause is logged once per kind and interval, with a count of the rest."""

import logging

import trio

from agent.repeats import AGAIN_S, KINDS_MAX, RepeatedLog


async def test_each_kind_is_logged_once_in_its_interval_and_the_rest_is_counted(autojump_clock, caplog):
    log = RepeatedLog(logging.getLogger("mesh.test"))
    for number in range(5):
        log.warning("cut", "cut %d", number)
    log.warning("large", "large")
    await trio.sleep(AGAIN_S)
    log.warning("cut", "cut %d", 5)
    log.warning("large", "large")
    assert [record.getMessage() for record in caplog.records] == [
        "cut 0",
        "large",
        "cut 5 (and 4 more like it)",
        "large",
    ]


async def test_kinds_beyond_the_limit_share_one_line(autojump_clock, caplog):
    log = RepeatedLog(logging.getLogger("mesh.test"))
    for number in range(KINDS_MAX + 10):
        log.warning(f"kind {number}", "%d", number)
    assert len(caplog.records) == KINDS_MAX + 1


async def test_what_the_logger_would_drop_is_not_counted(autojump_clock, caplog):
    log = RepeatedLog(logging.getLogger("mesh.test"))
    with caplog.at_level(logging.WARNING, "mesh.test"):
        log.log("quiet", logging.INFO, "quiet")
    with caplog.at_level(logging.INFO, "mesh.test"):
        log.log("quiet", logging.INFO, "quiet")
    assert [record.getMessage() for record in caplog.records] == ["quiet"]
