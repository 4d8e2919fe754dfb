"""`mesh config read|write|list|delete`."""

import click

from agent.cli.client import Api, Json, connect, segment
from agent.cli.flags import GoGroup, api_flags, format_flag
from agent.cli.json_file import read_json
from agent.cli.output import print_json


@click.group(cls=GoGroup)
def config() -> None:
    """Reads, writes, lists and deletes central config entries."""


_kind = click.option("-kind", required=True, help="The entry's kind, e.g. service-defaults.")
_name = click.option("-name", required=True, help="The entry's name.")


@config.command()
@_kind
@_name
@api_flags
def read(*, kind: str, name: str, **_: object) -> None:
    """Prints an entry as JSON."""
    print_json(connect().get(f"/v1/config/{segment(kind)}/{segment(name)}"))


@config.command()
@click.argument("file")
@click.option("-cas", is_flag=True, help="Only if the entry's ModifyIndex equals -modify-index (0: only if it is new).")
@click.option("-modify-index", type=click.IntRange(min=0), help="The index for -cas.")
@api_flags
def write(*, file: str, cas: bool, modify_index: int | None, **_: object) -> None:
    """Writes the entry in FILE (JSON; `-` is standard input)."""
    api = connect()
    entry = _read_entry(api, file)
    params: dict[str, str | int] = {}
    if cas:
        if modify_index is None:
            raise click.UsageError("-cas needs -modify-index (0 to create the entry only if it is new)")
        params["cas"] = modify_index
    if api.put("/v1/config", params, body=entry) is not True:
        api.fail(f"did not write the entry: its ModifyIndex is no longer {modify_index}")
    lowered = {key.lower(): value for key, value in entry.items()}
    click.echo(f"Config entry written: {lowered.get('kind')}/{lowered.get('name')}")


def _read_entry(api: Api, file: str) -> dict[str, Json]:
    entry = read_json(api, file)
    if not isinstance(entry, dict):
        api.fail(f"{file} must hold one JSON object with Kind and Name")
    return entry


@config.command("list")
@_kind
@api_flags
@format_flag
def list_(*, kind: str, output_format: str, **_: object) -> None:
    """Lists the names of a kind's entries."""
    entries = connect().get(f"/v1/config/{segment(kind)}")
    assert isinstance(entries, list)
    if output_format == "json":
        print_json(entries)
        return
    for entry in entries:
        assert isinstance(entry, dict)
        click.echo(str(entry["Name"]))


@config.command()
@_kind
@_name
@api_flags
def delete(*, kind: str, name: str, **_: object) -> None:
    """Deletes an entry."""
    connect().delete(f"/v1/config/{segment(kind)}/{segment(name)}")
    click.echo(f"Config entry deleted: {kind}/{name}")
