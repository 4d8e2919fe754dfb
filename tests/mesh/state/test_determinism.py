"""Two processes whose sets and dicts hash differently hold the same state after the same entries."""

import os
import subprocess
import sys
from pathlib import Path

HISTORY = """
from mesh.model.catalog import Node, Service
from mesh.model.check import Check
from mesh.model.command import COMMAND_CODEC, ConfigEntrySet, Deregister, KvDelete, KvSet, Register
from mesh.model.config_entry import ConfigEntry
from mesh.state.fsm import Fsm
from mesh.state.store import Store

fsm = Fsm(Store())
history = []
for number in range(40):
    node, other = f"n{number % 7}", f"n{number * 3 % 7}"
    service = Service(f"s{number % 5}", f"s{number % 9}", tags=(str(number % 3),), connect_native=number % 2 == 0)
    checks = (Check(node, f"c{number % 4}", "c", service_id=service.service_id), Check(node, "serfHealth", "s"))
    sources = [{"Name": f"s{one}", "Action": "allow"} for one in range(number % 6 + 1)]
    history += [
        Register(Node(node, "10.0.0.1", node_id=f"u{number % 8}"), service, checks),
        KvSet(f"a/{number % 11}/{number}", str(number).encode()),
        ConfigEntrySet(ConfigEntry("service-intentions", f"s{number % 3}", {"Sources": sources}), at_s=float(number)),
        KvDelete(f"a/{number % 4}/", recurse=True),
        Deregister(other, service_id=f"s{number % 4}"),
        Deregister(other) if number % 10 == 0 else KvSet("same", b"same"),
    ]
results = [fsm.apply(index, COMMAND_CODEC.encode(command)) for index, command in enumerate(history, start=1)]
print(fsm.state_hash(), results, fsm.take_changes())
"""


def test_state_does_not_depend_on_the_hash_seed():
    root = Path(__file__).parents[3]
    outputs = {
        subprocess.run(
            [sys.executable, "-c", HISTORY],
            env={**os.environ, "PYTHONHASHSEED": seed, "PYTHONPATH": str(root)},
            capture_output=True,
            text=True,
            check=True,
            timeout=60,
        ).stdout
        for seed in ("1", "2", "3")
    }
    assert len(outputs) == 1
    assert "Applied" in outputs.pop()
