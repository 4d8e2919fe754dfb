"""`mesh intention dry-run` on a real cluster of three agents, from traffic that really flowed."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from meshed import TO_API, Meshed, meshed
from peers import get
from processes import wait_until

pytestmark = pytest.mark.e2e

REPOSITORY = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def running(tmp_path_factory):
    with meshed(tmp_path_factory.mktemp("cluster"), servers=1, clients=2) as made:
        yield made


def dry_run(made: Meshed, proposal: object, *flags: str, agent=None) -> subprocess.CompletedProcess[str]:
    agent = agent or made.cluster.servers[0]
    return subprocess.run(
        [sys.executable, "-m", "agent", "intention", "dry-run", "-file=-", f"-http-addr={agent.url}", *flags],
        input=json.dumps(proposal),
        capture_output=True,
        text=True,
        cwd=REPOSITORY,
        env=dict(os.environ),
        timeout=30,
        check=False,
    )


def entry(name: str, *sources: dict, **more: object) -> dict:
    return {"Kind": "service-intentions", "Name": name, "Sources": list(sources), **more}


def permit(action: str, **http: object) -> dict:
    return {"Action": action, "HTTP": http}


def judged(result: subprocess.CompletedProcess[str]) -> dict[tuple[str, str, str], str]:
    report = json.loads(result.stdout)
    assert report["Missing"] == []
    assert len(report["Answered"]) == 3
    return {(one["Source"], one["Destination"], one["Path"]): one["Change"] for one in report["Edges"]}


def test_what_was_seen_decides_what_a_proposal_would_cut(running):
    web = running.web
    for path in ("/orders/1", "/orders/2", "/admin"):
        for _ in range(6):  # both instances of api, on both clients
            assert get(web.address, TO_API, path=path)[0] == 200
    get_only = permit("allow", PathPrefix="/orders", Methods=["GET"])
    tight = entry("api", {"Name": "web", "Permissions": [get_only, permit("deny", PathPrefix="/")]})

    result = dry_run(running, tight, "-format=json", "-since=5m")
    assert result.returncode == 2, result.stderr
    changes = judged(result)
    assert changes["web", "api", "/orders/*"] == "none"
    assert changes["web", "api", "/admin"] == "cut"

    result = dry_run(running, [tight, entry("echo", {"Name": "*", "Action": "deny"})], agent=running.web)
    assert result.returncode == 2
    assert "would be cut" in result.stdout
    assert "GET /admin" in result.stdout
    assert "Asked 3 agents." in result.stdout
    assert "Note: watched for less than that: api for" in result.stderr

    audited = dry_run(running, {**tight, "Meta": {"mesh-intentions": "audit"}}, "-format=json")
    assert audited.returncode == 0, audited.stdout
    assert judged(audited)["web", "api", "/orders/*"] in ("none", "audited")

    harmless = dry_run(running, entry("api", {"Name": "web", "Action": "allow"}))
    assert harmless.returncode == 0, harmless.stdout
    assert "nothing that was seen would change" in harmless.stdout
    assert get(web.address, TO_API, path="/admin")[0] == 200  # nothing was written


def test_denied_traffic_would_be_opened(running):
    web = running.web
    web.intend("web", "api", "deny")
    wait_until(lambda: get(web.address, TO_API, path="/wanted")[0] == 403)
    result = dry_run(running, entry("api"), "-format=json")
    assert judged(result)["web", "api", "/wanted"] == "opened"
    assert result.returncode == 0
    web.intend("web", "api", "allow")
    wait_until(lambda: get(web.address, TO_API)[0] == 200)


def test_an_agent_that_does_not_answer_is_named(running):
    agent = running.cluster.clients[1]
    agent.running.send_signal(19)  # SIGSTOP
    try:
        result = dry_run(running, entry("api", {"Name": "web", "Action": "allow"}), "-all")
    finally:
        agent.running.send_signal(18)
    assert result.returncode == 0, result.stderr
    assert "no answer from c2" in result.stderr


def test_a_proposal_that_is_none_says_why_and_exits_1(running):
    result = dry_run(running, entry("api"), "-since=3h")
    assert result.returncode == 1
    assert "at most 60m" in result.stderr
