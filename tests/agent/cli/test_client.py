import click
import pytest
from click.testing import CliRunner

from agent.cli.main import cli
from agent.cli.output import print_table


def test_a_refused_connection_says_what_was_tried_and_what_to_do() -> None:
    result = CliRunner().invoke(cli, ["members", "-http-addr=127.0.0.1:1"])
    assert result.exit_code == 1
    assert "cannot connect to the agent at 127.0.0.1:1: connection refused" in result.output
    assert "mesh agent -dev" in result.output


@pytest.mark.parametrize("variable", ["MESH_HTTP_ADDR", "CONSUL_HTTP_ADDR"])
def test_the_environment_names_the_agent(variable: str) -> None:
    result = CliRunner().invoke(cli, ["kv", "get", "a"], env={variable: "http://127.0.0.1:2"})
    assert "cannot connect to the agent at http://127.0.0.1:2" in result.output


def test_the_mesh_variable_wins_over_consul_s_and_the_flag_over_both() -> None:
    env = {"MESH_HTTP_ADDR": "127.0.0.1:2", "CONSUL_HTTP_ADDR": "127.0.0.1:3"}
    assert "127.0.0.1:2" in CliRunner().invoke(cli, ["leave"], env=env).output
    assert "127.0.0.1:4" in CliRunner().invoke(cli, ["leave", "-http-addr", "127.0.0.1:4"], env=env).output


def test_a_missing_unix_socket_is_named() -> None:
    result = CliRunner().invoke(cli, ["info", "-http-addr=unix:///nowhere/mesh.sock"])
    assert result.exit_code == 1
    assert "unix:///nowhere/mesh.sock: no such file or directory" in result.output


def test_intention_check_cannot_tell_with_status_two() -> None:
    assert CliRunner().invoke(cli, ["intention", "check", "-http-addr=127.0.0.1:1", "a", "b"]).exit_code == 2


def test_an_address_that_is_none_is_wrong_usage() -> None:
    result = CliRunner().invoke(cli, ["members", "-http-addr=http://[::"])
    assert result.exit_code == 2
    assert "is no address" in result.output


@pytest.mark.parametrize("address", ["ftp://127.0.0.1:8500", "mesh://a"])
def test_an_address_of_another_protocol_is_wrong_usage(address: str) -> None:
    result = CliRunner().invoke(cli, ["members", f"-http-addr={address}"])
    assert result.exit_code == 2
    assert f"'{address}' is neither" in result.output


def test_a_port_alone_means_this_host() -> None:
    result = CliRunner().invoke(cli, ["members", "-http-addr=:1"])
    assert "cannot connect to the agent at :1: connection refused" in result.output


def test_a_config_file_that_is_missing_is_named_without_python_words() -> None:
    result = CliRunner().invoke(cli, ["config", "write", "nowhere.json"])
    assert "Error: cannot read nowhere.json: No such file or directory\n" in result.output


def test_a_table_in_a_pipe_is_plain_columns(capsys: pytest.CaptureFixture[str]) -> None:
    print_table(["Node", "DC"], [["a", "dc1"], ["longer", "dc2"]])
    assert capsys.readouterr().out == "Node    DC\na       dc1\nlonger  dc2\n"


def test_control_characters_of_other_hosts_do_not_reach_the_terminal(capsys: pytest.CaptureFixture[str]) -> None:
    print_table(["Node"], [["a\x1b[2J\nb"]])
    assert capsys.readouterr().out == "Node\na\N{REPLACEMENT CHARACTER}[2J\N{REPLACEMENT CHARACTER}b\n"


def _on_a_terminal(monkeypatch: pytest.MonkeyPatch, columns: int) -> None:
    monkeypatch.setattr("sys.stdout.isatty", lambda: True, raising=False)
    monkeypatch.setenv("COLUMNS", str(columns))
    monkeypatch.setenv("TERM", "xterm")


def test_a_narrow_terminal_gets_no_column_it_can_do_without(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    _on_a_terminal(monkeypatch, 14)
    print_table(["Node", "Address", "Segment"], [["a", "10.0.0.1", "-"]], dispensable=["Segment"])
    lines = click.unstyle(capsys.readouterr().out).splitlines()
    assert [line.rstrip() for line in lines] == ["Node  Address", "a     10.0.0.1"]


def test_what_does_not_fit_on_a_terminal_is_never_broken_in_two(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    _on_a_terminal(monkeypatch, 12)
    print_table(["Node", "Address"], [["a", "10.0.0.1:8301"]])
    assert capsys.readouterr().out == "Node  Address\na     10.0.0.1:8301\n"
