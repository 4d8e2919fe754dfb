"""`mesh intention create|delete|check|list|get|match`."""

import time

import click

from agent.cli.client import Api, Json, connect
from agent.cli.flags import GoGroup, api_flags, format_flag
from agent.cli.output import print_json, print_table

_CHECK_FAILED_STATUS = 2  # 1 means denied


@click.group(cls=GoGroup)
def intention() -> None:
    """Says which service may call which."""


def _action(rule: dict[str, Json]) -> str:
    permissions = rule.get("Permissions")
    if isinstance(permissions, list) and permissions:
        return f"{len(permissions)} permissions"
    return str(rule.get("Action") or "-")


def _print_rules(rules: Json, output_format: str) -> None:
    assert isinstance(rules, list)
    listed = [rule for rule in rules if isinstance(rule, dict)]
    if output_format == "json":
        print_json(listed)
        return
    print_table(
        ["ID", "Source", "Action", "Destination", "Precedence"],
        [
            [
                str(rule.get("ID") or ""),
                str(rule["SourceName"]),
                _action(rule),
                str(rule["DestinationName"]),
                str(rule["Precedence"]),
            ]
            for rule in listed
        ],
    )


@intention.command()
@click.argument("source")
@click.argument("destination")
@click.option("-allow", is_flag=True, help="The source may call the destination (the default).")
@click.option("-deny", is_flag=True, help="The source may not call the destination.")
@click.option("-replace", is_flag=True, help="Replace the intention of this pair if there is one.")
@click.option("-description", default="", help="What it is for.")
@click.option("-meta", multiple=True, metavar="KEY=VALUE", help="Metadata to keep with it.")
@api_flags
def create(
    *,
    source: str,
    destination: str,
    allow: bool,
    deny: bool,
    replace: bool,
    description: str,
    meta: tuple[str, ...],
    **_: object,
) -> None:
    """Allows or denies SOURCE to call DESTINATION; `*` is any service."""
    api = connect()
    if allow and deny:
        raise click.UsageError("-allow and -deny exclude each other")
    if not replace and _exact(api, source, destination) is not None:
        api.fail(f"there is an intention for {source} => {destination}; -replace replaces it")
    body: dict[str, Json] = {"SourceType": "consul", "Action": "deny" if deny else "allow", "Description": description}
    if meta:
        body["Meta"] = {key: value for key, _, value in (pair.partition("=") for pair in meta)}
    api.put("/v1/connect/intentions/exact", {"source": source, "destination": destination}, body=body)
    click.echo(f"Created: {source} => {destination} ({body['Action']})")


def _exact(api: Api, source: str, destination: str) -> Json:
    return api.get_or_none("/v1/connect/intentions/exact", {"source": source, "destination": destination})


@intention.command()
@click.argument("source")
@click.argument("destination")
@api_flags
def delete(*, source: str, destination: str, **_: object) -> None:
    """Deletes the intention of SOURCE and DESTINATION."""
    connect().delete("/v1/connect/intentions/exact", {"source": source, "destination": destination})
    click.echo("Intention deleted.")


@intention.command()
@click.argument("source")
@click.argument("destination")
@api_flags
def check(*, source: str, destination: str, **_: object) -> None:
    """Would a connection be allowed? Prints Allowed (status 0) or Denied (status 1); status 2 when it cannot tell."""
    params = {"source": source, "destination": destination}
    answer = connect(failure_status=_CHECK_FAILED_STATUS).get("/v1/connect/intentions/check", params)
    if isinstance(answer, dict) and answer.get("Allowed") is True:
        click.echo("Allowed")
        return
    click.echo("Denied")
    raise SystemExit(1)


@intention.command("list")
@api_flags
@format_flag
def list_(*, output_format: str, **_: object) -> None:
    """Lists the intentions, those that are decided first on top."""
    _print_rules(connect().get("/v1/connect/intentions"), output_format)


@intention.command()
@click.argument("source")
@click.argument("destination")
@api_flags
@format_flag
def get(*, source: str, destination: str, output_format: str, **_: object) -> None:
    """Shows the intention of SOURCE and DESTINATION."""
    api = connect()
    rule = _exact(api, source, destination)
    if not isinstance(rule, dict):
        api.fail(f"there is no intention for {source} => {destination}")
    if output_format == "json":
        print_json(rule)
        return
    lines = [("Source", str(rule["SourceName"])), ("Destination", str(rule["DestinationName"]))]
    lines.append(("Action", _action(rule)))
    if rule.get("Description"):
        lines.append(("Description", str(rule["Description"])))
    lines.append(("Precedence", str(rule["Precedence"])))
    lines.append(("Created At", _local_time(rule.get("CreatedAt"))))
    for name, value in lines:
        click.echo(f"{name + ':':<14}{value}")


def _local_time(text: Json) -> str:
    from datetime import datetime

    try:
        moment = datetime.fromisoformat(str(text).replace("Z", "+00:00"))
    except ValueError:
        return str(text)
    return time.strftime("%A, %d-%b-%y %H:%M:%S %Z", time.localtime(moment.timestamp()))


@intention.command()
@click.argument("name")
@click.option("-source", "by_source", is_flag=True, help="Match intentions with NAME as source.")
@click.option("-destination", "by_destination", is_flag=True, help="With NAME as destination (the default).")
@api_flags
@format_flag
def match(*, name: str, by_source: bool, by_destination: bool, output_format: str, **_: object) -> None:
    """Lists the intentions that bear on the service NAME, in the order they are decided."""
    api = connect()
    if by_source and by_destination:
        raise click.UsageError("-source and -destination exclude each other")
    params = {"by": "source" if by_source else "destination", "name": name}
    answer = api.get("/v1/connect/intentions/match", params)
    _print_rules(answer.get(name) or [] if isinstance(answer, dict) else [], output_format)
