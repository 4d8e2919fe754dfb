"""Every command of the CLI against a real agent in dev mode."""

import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from processes import AgentProcess, wait_until

pytestmark = pytest.mark.e2e

_ROOT = Path(__file__).parents[2]

Run = Callable[..., subprocess.CompletedProcess[str]]


@pytest.fixture(scope="module")
def address(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The HTTP address of a dev agent."""
    agent = AgentProcess("dev", tmp_path_factory.mktemp("cli"), "-dev")
    agent.start()
    try:
        wait_until(lambda: agent.get("/v1/catalog/nodes") not in (b"", b"[]"), why=agent.log.read_text)
        yield f"{agent.address}:{agent.http}"
    finally:
        agent.stop()


@pytest.fixture
def mesh(address: str) -> Run:
    """Runs a command against the agent, in a pipe as a script would."""

    def run(*args: str, status: int = 0, stdin: str = "") -> subprocess.CompletedProcess[str]:
        result = subprocess.run(
            [sys.executable, "-m", "agent", *args],
            env={**os.environ, "MESH_HTTP_ADDR": address},
            input=stdin,
            capture_output=True,
            text=True,
            timeout=30,
            cwd=_ROOT,
        )
        assert result.returncode == status, result.stdout + result.stderr
        return result

    return run


def test_members_are_listed_in_plain_columns(mesh: Run) -> None:
    heading, row = mesh("members").stdout.splitlines()
    assert heading.split() == ["Node", "Address", "Status", "Type", "Build", "Protocol", "DC", "Partition", "Segment"]
    assert row.split()[0] == "dev"
    assert row.split()[2:5] == ["alive", "server", "1.22.0"]


def test_members_as_json_carry_their_tags(mesh: Run) -> None:
    (member,) = json.loads(mesh("members", "-format=json").stdout)
    assert member["Tags"]["role"] == "consul"


def test_members_that_match_nothing_are_status_two(mesh: Run) -> None:
    assert mesh("members", "-status=left", status=2).stdout == ""


def test_a_value_comes_back_exactly(mesh: Run, tmp_path: Path) -> None:
    file = tmp_path / "value"
    file.write_text("from a file")
    assert mesh("kv", "put", "cli/a", "one").stdout == "Success! Data written to: cli/a\n"
    assert mesh("kv", "get", "cli/a").stdout == "one\n"
    mesh("kv", "put", "cli/a", "-", stdin="from stdin")
    assert mesh("kv", "get", "cli/a").stdout == "from stdin\n"
    mesh("kv", "put", "cli/a", f"@{file}")
    assert mesh("kv", "get", "cli/a").stdout == "from a file\n"


def test_compare_and_set_refuses_a_stale_index(mesh: Run) -> None:
    mesh("kv", "put", "-cas", "-modify-index=0", "cli/cas", "one")
    refused = mesh("kv", "put", "-cas", "-modify-index=0", "cli/cas", "two", status=1)
    assert "did not write to cli/cas" in refused.stderr
    assert mesh("kv", "get", "cli/cas").stdout == "one\n"


def test_keys_are_listed_and_deleted_by_prefix(mesh: Run) -> None:
    for key in ("cli/tree/a", "cli/tree/b/c"):
        mesh("kv", "put", key, key)
    assert mesh("kv", "get", "-keys", "cli/tree/").stdout.split() == ["cli/tree/a", "cli/tree/b/"]
    assert mesh("kv", "get", "-recurse", "cli/tree/").stdout.splitlines()[0] == "cli/tree/a:cli/tree/a"
    mesh("kv", "delete", "-recurse", "cli/tree/")
    assert mesh("kv", "get", "cli/tree/a", status=1).stderr == "Error: no key exists at: cli/tree/a\n"


def test_a_service_is_registered_shown_and_deregistered(mesh: Run, tmp_path: Path) -> None:
    file = tmp_path / "db.json"
    file.write_text(json.dumps({"service": {"name": "db", "port": 5432, "tags": ["primary"]}}))
    assert mesh("services", "register", str(file)).stdout == "Registered service: db\n"
    mesh("services", "register", "-name=cache", "-id=cache-1", "-port=6379", "-tag=v1")
    listed = mesh("catalog", "services", "-tags").stdout.splitlines()
    assert [line.split() for line in listed if line.startswith(("db", "cache"))] == [["cache", "v1"], ["db", "primary"]]
    assert mesh("services", "deregister", str(file)).stdout == "Deregistered service: db\n"
    mesh("services", "deregister", "-id=cache-1")
    assert mesh("services", "deregister", "-id=cache-1", status=1).stderr


def test_the_catalog_knows_its_node_and_datacenter(mesh: Run) -> None:
    assert mesh("catalog", "datacenters").stdout == "dc1\n"
    heading, row = mesh("catalog", "nodes").stdout.splitlines()
    assert heading.split() == ["Node", "ID", "Address", "DC"]
    assert row.split()[0] == "dev"
    assert json.loads(mesh("catalog", "nodes", "-format=json").stdout)[0]["Node"] == "dev"


def test_an_intention_decides_until_it_is_deleted(mesh: Run) -> None:
    assert mesh("intention", "check", "web", "api").stdout == "Allowed\n"
    assert mesh("intention", "create", "-deny", "web", "api").stdout == "Created: web => api (deny)\n"
    assert mesh("intention", "check", "web", "api", status=1).stdout == "Denied\n"
    assert "-replace" in mesh("intention", "create", "web", "api", status=1).stderr
    mesh("intention", "create", "-replace", "web", "api")
    assert mesh("intention", "list").stdout.splitlines()[1].split() == ["web", "allow", "api", "9"]
    assert "Precedence:   9" in mesh("intention", "get", "web", "api").stdout
    assert len(json.loads(mesh("intention", "match", "-format=json", "api").stdout)) == 1
    mesh("intention", "create", "-replace", "-deny", "-audit", "web", "api")
    assert mesh("intention", "list").stdout.splitlines()[1].split() == ["web", "deny", "(audit)", "api", "9"]
    assert mesh("intention", "delete", "web", "api").stdout == "Intention deleted.\n"
    assert mesh("intention", "get", "web", "api", status=1).stderr


def test_a_config_entry_is_written_read_and_deleted(mesh: Run) -> None:
    entry = json.dumps({"Kind": "service-defaults", "Name": "api", "Protocol": "http"})
    assert mesh("config", "write", "-", stdin=entry).stdout == "Config entry written: service-defaults/api\n"
    assert json.loads(mesh("config", "read", "-kind=service-defaults", "-name=api").stdout)["Protocol"] == "http"
    assert mesh("config", "list", "-kind", "service-defaults").stdout == "api\n"
    mesh("config", "delete", "-kind=service-defaults", "-name=api")
    assert mesh("config", "read", "-kind=service-defaults", "-name=api", status=1).stderr


def test_a_config_entry_that_makes_no_sense_is_refused_in_words(mesh: Run) -> None:
    error = mesh("config", "write", "-", stdin='{"Kind": "no-such-kind", "Name": "x"}', status=1).stderr
    assert "no-such-kind" in error


def test_info_shows_raft_and_gossip(mesh: Run) -> None:
    lines = mesh("info").stdout.splitlines()
    assert "raft:" in lines
    assert "serf_lan:" in lines
    assert "\tstate = Leader" in lines


def test_joining_nobody_says_why(mesh: Run) -> None:
    assert "127.0.0.1:1" in mesh("join", "127.0.0.1:1", status=1).stderr


def test_force_leave_of_a_stranger_is_refused_by_name(mesh: Run) -> None:
    assert "nobody" in mesh("force-leave", "nobody", status=1).stderr
