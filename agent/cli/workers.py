"""`mesh workers`."""

import click

from agent.cli.client import connect
from agent.cli.flags import GoCommand, api_flags, format_flag
from agent.cli.output import print_json, print_table


@click.command(cls=GoCommand)
@click.option("-replace", is_flag=True, help="Put a new process in the place of each, without a lost connection.")
@api_flags
@format_flag
def workers(*, replace: bool, output_format: str, **_: object) -> None:
    """Lists the processes that carry the local agent's sidecar traffic."""
    api = connect()
    if replace:
        answer = api.put("/v1/agent/proxy/replace-workers")
        if output_format == "json":
            print_json(answer)
            return
        assert isinstance(answer, dict)
        click.echo(f"Replaced {answer['Replaced']} workers; the former ones finish what they have.")
        return
    found = api.get("/v1/agent/proxy/workers")
    if output_format == "json":
        print_json(found)
        return
    assert isinstance(found, list)
    rows = [[str(one["Pid"]), str(one["Listeners"])] for one in found if isinstance(one, dict)]
    print_table(["PID", "Listeners"], rows)
