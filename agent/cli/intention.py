"""`mesh intention create|delete|check|list|get|match`."""

import time

import click

from agent.cli.client import Api, Json, connect
from agent.cli.flags import GoGroup, api_flags, format_flag
from agent.cli.json_file import read_json
from agent.cli.output import print_json, print_table

_CHECK_FAILED_STATUS = 2  # 1 means denied


@click.group(cls=GoGroup)
def intention() -> None:
    """Says which service may call which."""


def _action(rule: dict[str, Json]) -> str:
    permissions, meta = rule.get("Permissions"), rule.get("Meta")
    audit = " (audit)" if isinstance(meta, dict) and meta.get("mesh-intentions") == "audit" else ""
    if isinstance(permissions, list) and permissions:
        return f"{len(permissions)} permissions{audit}"
    return f"{rule.get('Action') or '-'}{audit}"


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
@click.option("-audit", is_flag=True, help="Only count and log what the rule would refuse; let it in.")
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
    audit: bool,
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
    if audit:
        meta += ("mesh-intentions=audit",)
    if meta:
        body["Meta"] = {key: value for key, _, value in (pair.partition("=") for pair in meta)}
    api.put("/v1/connect/intentions/exact", {"source": source, "destination": destination}, body=body)
    click.echo(f"Created: {source} => {destination} ({body['Action']}{', in audit mode' if audit else ''})")


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


_CHANGES = {
    "cut": "CUT",
    "may-cut": "may be cut",
    "opened": "opened",
    "may-open": "may open",
    "audited": "audited",
    "none": "-",
}
_CUTS = ("cut", "may-cut")
_CUT_STATUS = 2


@intention.command("dry-run")
@click.option("-file", "file", required=True, help="The proposed service-intentions (JSON); `-` is standard input.")
@click.option("-since", default="15m", show_default=True, help="How far back to look; at most 60m.")
@click.option("-all", "show_all", is_flag=True, help="Show the traffic that would not change, too.")
@api_flags
@format_flag
def dry_run(*, file: str, since: str, show_all: bool, output_format: str, **_: object) -> None:
    """What would proposed intentions cut, of the traffic that was really seen? Nothing is written.

    FILE holds a service-intentions entry or a list of them; each replaces all rules of its destination, one without
    Sources removes them. Exits 2 when something would, or may, be cut; 0 when nothing would.
    """
    api = connect()
    report = api.put("/v1/connect/intentions/dry-run", {"since": since}, body=read_json(api, file))
    if not isinstance(report, dict):
        api.fail("the agent's answer is no report; is it older than this command?")
    edges = _objects(report.get("Edges"))
    if output_format == "json":
        print_json(report)
    else:
        _print_report(report, edges, since, show_all=show_all)
    if any(edge.get("Change") in _CUTS for edge in edges):
        raise SystemExit(_CUT_STATUS)


def _objects(value: Json) -> list[dict[str, Json]]:
    return [item for item in value if isinstance(item, dict)] if isinstance(value, list) else []


def _count(edge: dict[str, Json]) -> int:
    return sum(number for name in ("Allowed", "Denied") if isinstance(number := edge.get(name), int))


def _print_report(report: dict[str, Json], edges: list[dict[str, Json]], since: str, *, show_all: bool) -> None:
    shown = edges if show_all else [edge for edge in edges if edge.get("Change") != "none"]
    if shown:
        print_table(
            ["Change", "Source", "Destination", "Request", "Seen", "Refused", "Decided by"],
            [_report_row(edge) for edge in shown],
        )
        click.echo()
    totals = {change: sum(_count(edge) for edge in edges if edge.get("Change") == change) for change in _CHANGES}
    kinds = {change: sum(edge.get("Change") == change for edge in edges) for change in _CHANGES}
    parts = [
        f"{_counted(kinds[change], 'edge')} {text} ({_counted(totals[change], 'request')})"
        for change, text in (
            ("cut", "would be cut"),
            ("may-cut", "may be cut, depending on headers or paths"),
            ("opened", "would be opened"),
            ("may-open", "may be opened"),
            ("audited", "would be let in by audit only"),
        )
        if kinds[change]
    ]
    click.echo(f"In the last {since}: {'; '.join(parts) or 'nothing that was seen would change'}.")
    click.echo(f"Unchanged: {_counted(kinds['none'], 'edge')} ({_counted(totals['none'], 'request')}).")
    _print_coverage(report)


def _counted(count: int, noun: str) -> str:
    return f"{count} {noun}{'' if count == 1 else 's'}"


def _report_row(edge: dict[str, Json]) -> list[str]:
    samples = edge.get("Samples")
    path = str(edge.get("Path") or "")
    if isinstance(samples, list) and samples and samples != [path]:
        path += f" ({samples[0]})"
    rules = edge.get("Rules")
    rule = ", ".join(str(one) or "default" for one in rules) if isinstance(rules, list) else ""
    return [
        _CHANGES.get(str(edge.get("Change")), str(edge.get("Change"))),
        str(edge.get("Source") or "(plaintext)"),
        str(edge.get("Destination")),
        f"{edge['Method']} {path}" if edge.get("Method") else "tcp",
        str(_count(edge)),
        str(edge.get("Denied")),
        rule,
    ]


def _print_coverage(report: dict[str, Json]) -> None:
    """How far the answer can be trusted."""
    answered, missing = report.get("Answered"), report.get("Missing")
    count = len(answered) if isinstance(answered, list) else 0
    click.echo(f"Asked {_counted(count, 'agent')}.")
    if isinstance(missing, list) and missing:
        names = ", ".join(map(str, missing))
        click.echo(f"Warning: no answer from {names}: what their services were asked is not in this report.", err=True)
    wanted, short = report.get("Since"), []
    for one in _objects(report.get("Observed")):
        seconds, left_out = one.get("Seconds"), one.get("LeftOut")
        if isinstance(seconds, int | float) and isinstance(wanted, int | float) and seconds < wanted:
            short.append(f"{one.get('Service')} for {seconds:.0f} s")
        if left_out:
            click.echo(f"Warning: {left_out} requests to {one.get('Service')} are not in this report.", err=True)
    if short:
        click.echo(f"Note: watched for less than that: {', '.join(short)}.", err=True)
