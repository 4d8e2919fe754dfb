"""`mesh members`, `join`, `leave`, `force-leave` and `info`."""

import re

import click

from agent.cli.client import Json, connect, segment
from agent.cli.flags import GoCommand, api_flags, format_flag
from agent.cli.output import print_json, print_table

_STATUS = {0: "none", 1: "alive", 2: "leaving", 3: "left", 4: "failed"}


def _type(tags: dict[str, str]) -> str:
    return {"consul": "server", "node": "client"}.get(tags.get("role", ""), "unknown")


def _address(member: dict[str, Json]) -> str:
    address, port = str(member["Addr"]), member["Port"]
    return f"[{address}]:{port}" if ":" in address else f"{address}:{port}"


@click.command(cls=GoCommand)
@click.option("-detailed", is_flag=True, help="Show every tag of each member.")
@click.option(
    "-status", "status_pattern", default=".*", help="Only members whose status matches this regular expression."
)
@click.option("-wan", is_flag=True, help="The WAN pool instead of the LAN pool (servers only).")
@api_flags
@format_flag
def members(*, detailed: bool, status_pattern: str, wan: bool, output_format: str, **_: object) -> None:
    """Lists the members of the cluster, servers first. Exits with 2 when none match."""
    try:
        wanted = re.compile(status_pattern)
    except re.error as error:
        raise click.BadParameter(f"{status_pattern!r}: {error}", param_hint="-status") from error
    found = connect().get("/v1/agent/members", {"wan": "1"} if wan else None)
    assert isinstance(found, list)
    listed = [m for m in found if isinstance(m, dict) and wanted.fullmatch(_STATUS.get(int(str(m["Status"])), ""))]
    if not listed:
        raise SystemExit(2)
    listed.sort(key=lambda m: (_type(_tags(m)) != "server", str(m["Name"])))
    if output_format == "json":
        print_json(listed)
        return
    rows: list[list[str]] = []
    for member in listed:
        tags = _tags(member)
        status = _STATUS[int(str(member["Status"]))]
        first = [str(member["Name"]), _address(member), status]
        if detailed:
            rows.append([*first, ",".join(f"{key}={value}" for key, value in sorted(tags.items()))])
        else:
            build = tags.get("build", "").partition(":")[0]
            datacenter = tags.get("dc", "")
            rows.append([*first, _type(tags), build, tags.get("vsn", ""), datacenter, "default", "<default>"])
    plain = ["Type", "Build", "Protocol", "DC", "Partition", "Segment"]
    print_table(["Node", "Address", "Status", *(["Tags"] if detailed else plain)], rows, dispensable=plain[-2:])


def _tags(member: dict[str, Json]) -> dict[str, str]:
    tags = member.get("Tags")
    return {key: str(value) for key, value in tags.items()} if isinstance(tags, dict) else {}


@click.command(cls=GoCommand)
@click.argument("addresses", nargs=-1, required=True, metavar="ADDRESS...")
@click.option("-wan", is_flag=True, help="Join the WAN pool.")
@api_flags
def join(*, addresses: tuple[str, ...], wan: bool, **_: object) -> None:
    """Makes the agent join a cluster through the address (host or host:port) of any member."""
    api = connect()
    for address in addresses:
        api.put(f"/v1/agent/join/{segment(address)}", {"wan": "1"} if wan else None)
    nodes = "node" if len(addresses) == 1 else "nodes"
    click.echo(f"Successfully joined cluster by contacting {len(addresses)} {nodes}.")


@click.command(cls=GoCommand)
@api_flags
def leave(**_: object) -> None:
    """Makes the agent leave the cluster gracefully and stop."""
    connect().put("/v1/agent/leave")
    click.echo("Graceful leave complete")


@click.command("force-leave", cls=GoCommand)
@click.argument("node")
@click.option("-prune", is_flag=True, help="Forget the member entirely instead of keeping it as left.")
@click.option("-wan", is_flag=True, help="Only in the WAN pool.")
@api_flags
def force_leave(*, node: str, prune: bool, wan: bool, **_: object) -> None:
    """Moves a failed member to the state left, so that nobody waits for its return."""
    params = {name: "1" for name, wanted in (("prune", prune), ("wan", wan)) if wanted}
    connect().put(f"/v1/agent/force-leave/{segment(node)}", params)


@click.command(cls=GoCommand)
@api_flags
@format_flag
def info(*, output_format: str, **_: object) -> None:
    """Shows an agent's internal state, section by section."""
    answer = connect().get("/v1/agent/self")
    assert isinstance(answer, dict)
    statistics = answer.get("Stats")
    assert isinstance(statistics, dict)
    if output_format == "json":
        print_json(statistics)
        return
    for section in sorted(statistics):
        click.echo(f"{section}:")
        values = statistics[section]
        assert isinstance(values, dict)
        for key in sorted(values):
            click.echo(f"\t{key} = {values[key]}")
