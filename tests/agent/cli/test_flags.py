import pytest
from click.testing import CliRunner

from agent.cli.flags import GoCommand
from agent.cli.kv import put
from agent.cli.main import cli
from agent.cli.run_agent import agent
from agent.config import FLAGS


@pytest.mark.parametrize(
    "args",
    [
        ["-cas", "-modify-index", "7", "key", "value"],
        ["--cas", "--modify-index=7", "key", "value"],
        ["-cas=true", "-modify-index=7", "key", "value"],
        ["-cas=1", "-flags", "3", "-modify-index=7", "--", "key", "value"],
    ],
)
def test_flags_take_one_dash_or_two_and_values_with_or_without_equals(args: list[str]) -> None:
    params = put.make_context("put", args).params
    assert (params["cas"], params["modify_index"], params["key"], params["data"]) == (True, 7, "key", "value")


def test_a_switch_can_be_turned_off() -> None:
    assert put.make_context("put", ["-cas=false", "key"]).params["cas"] is False


def test_a_switch_turned_off_differs_from_one_not_given() -> None:
    assert agent.make_context("agent", ["-server=false"]).params["server"] is False


def test_the_first_argument_ends_the_flags() -> None:
    params = put.make_context("put", ["key", "-5"]).params
    assert (params["key"], params["data"]) == ("key", "-5")


def test_a_flag_s_value_may_begin_with_a_dash() -> None:
    assert put.make_context("put", ["-http-addr", "-odd-", "key"]).params["http_addr"] == "-odd-"


def test_an_unknown_flag_is_named_with_the_nearest_one() -> None:
    result = CliRunner().invoke(cli, ["kv", "put", "-flgas=1", "key"])
    assert result.exit_code == 2
    assert "there is no flag -flgas. Did you mean -flags?" in result.output


def test_a_switch_given_something_else_is_refused() -> None:
    result = CliRunner().invoke(cli, ["kv", "put", "-cas=perhaps", "key"])
    assert result.exit_code == 2
    assert "'perhaps' is not true or false" in result.output


def test_an_unknown_command_is_named_with_the_nearest_one() -> None:
    result = CliRunner().invoke(cli, ["membres"])
    assert result.exit_code == 2
    assert "there is no command 'membres'. Did you mean `mesh members`?" in result.output


def test_a_flag_before_the_command_is_told_where_it_belongs() -> None:
    result = CliRunner().invoke(cli, ["-http-addr", "x", "members"])
    assert result.exit_code == 2
    assert "`mesh members -http-addr ...`" in result.output


def test_the_agent_takes_every_flag_of_the_configuration() -> None:
    assert isinstance(agent, GoCommand)
    taken = {name for param in agent.params for name in param.opts}
    assert {f"-{flag.name}" for flag in FLAGS} <= taken


def test_repeated_flags_add_up() -> None:
    params = agent.make_context(
        "agent", ["-retry-join=a", "--retry-join", "b", "-server", "-bootstrap-expect=3"]
    ).params
    assert params["retry_join"] == ("a", "b")
    assert params["server"] is True
    assert params["bootstrap_expect"] == 3


def test_flags_not_given_are_none_so_that_files_decide() -> None:
    params = agent.make_context("agent", []).params
    assert params["server"] is None
    assert params["http_port"] is None
