"""The accounts of policy stay bounded, whoever calls."""

import logging

from agent.dataplane.gate import AUDITED_SOURCES_MAX, Gate
from agent.dataplane.metrics import ListenerMetrics
from agent.dataplane.reactor import Reactor
from mesh.authz import Verdict

REFUSED = Verdict(allowed=True, rule="*=>api deny", audit_denied=True)


async def test_callers_in_audit_share_a_counter_beyond_a_limit_and_one_log_line(autojump_clock, caplog):
    reactor = Reactor()
    try:
        gate = Gate(reactor, ListenerMetrics({"direction": "inbound"}), http=True)
        with caplog.at_level(logging.WARNING, logger="mesh.dataplane"):
            for number in range(AUDITED_SOURCES_MAX + 50):
                gate.audited(f"s{number}", REFUSED, "GET /")
            gate.audited("", REFUSED, "GET /")
        counts = {labels["source"]: value for _, labels, value in gate.samples()}
        assert len(counts) == AUDITED_SOURCES_MAX + 1
        assert counts["other"] == 51
        assert counts["s0"] == 1
        assert len(caplog.messages) == 1
        assert "would have been refused by rule *=>api deny" in caplog.messages[0]
    finally:
        reactor.dispose()
