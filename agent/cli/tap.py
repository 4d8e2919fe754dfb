"""`mesh tap`: the requests of the local agent's sidecars, as they end."""

import json
import time

import click

from agent.cli.client import Json, connect
from agent.cli.flags import GoCommand, api_flags, format_flag
from agent.cli.output import printable

_COLUMNS = (
    ("TIME", 12), ("DIRECTION", 9), ("SOURCE", 14), ("TARGET", 14), ("METHOD", 7), ("STATUS", 6), ("FLAGS", 7),
    ("MS", 8), ("ENDPOINT", 21),
)  # fmt: skip


@click.command(cls=GoCommand)
@click.option("-service", default="", help="Only the sidecars of this service.")
@click.option("-direction", type=click.Choice(["inbound", "outbound"]), help="Only one way.")
@click.option("-method", default="", help="Only this method.")
@click.option("-path-prefix", default="", help="Only paths that begin so.")
@click.option("-status", default="", help="Only this status (503) or class (5xx); 0 is no answer.")
@click.option("-source", default="", help="Only from this service (inbound).")
@click.option("-target", default="", help="Only to this target (outbound).")
@click.option("-max", "count_max", type=click.IntRange(0), default=0, help="End after so many. [default: go on]")
@click.option("-headers", is_flag=True, help="Show headers and queries too; credentials stay hidden.")
@api_flags
@format_flag
def tap(
    *,
    service: str,
    direction: str | None,
    method: str,
    path_prefix: str,
    status: str,
    source: str,
    target: str,
    count_max: int,
    headers: bool,
    output_format: str,
    **_: object,
) -> None:
    """Prints a line for each request that ends from now on, until Ctrl-C. With -format json, a JSON object a line."""
    params: dict[str, str | int] = {
        "service": service, "direction": direction or "", "method": method, "path-prefix": path_prefix,
        "status": status, "source": source, "target": target, "max": count_max,
    }  # fmt: skip
    params = {name: value for name, value in params.items() if value}
    if headers:
        params["headers"] = "true"
    api = connect()
    as_json = output_format == "json"
    if not as_json:
        click.echo("  ".join(name.ljust(width) for name, width in _COLUMNS) + "  PATH")
    try:
        for line in api.lines("/v1/agent/proxy/tap", params):
            record: Json = json.loads(line)
            if not isinstance(record, dict):
                api.fail(f"the agent sent something else than a request: {line[:80]!r}")
            if "Error" in record:
                api.fail(str(record["Error"]))
            if as_json:
                click.echo(line)
            elif "Dropped" in record:
                click.echo(
                    f"({record['Dropped']} requests more than could be shown; a narrower filter helps)", err=True
                )
            else:
                click.echo(_row(record))
    except KeyboardInterrupt:
        return


def _row(record: dict[str, Json]) -> str:
    at_s, took_s = record.get("AtS"), record.get("DurationS")
    moment = at_s if isinstance(at_s, int | float) else 0.0
    cells = (
        f"{time.strftime('%H:%M:%S', time.localtime(moment))}.{int(moment % 1 * 1000):03d}",
        record.get("Direction"),
        record.get("Source") or "-",
        record.get("Target") or "-",
        record.get("Method"),
        record.get("Status"),
        record.get("Flags") or "-",
        f"{took_s * 1000:.1f}" if isinstance(took_s, int | float) else "-",
        record.get("Endpoint") or "-",
    )
    shown = [printable(str(cell)).ljust(width) for cell, (_, width) in zip(cells, _COLUMNS, strict=True)]
    lines = ["  ".join((*shown, printable(f"{record.get('Authority')}{record.get('Path')}")))]
    for sign, name in ((">", "RequestHeaders"), ("<", "ResponseHeaders")):
        pairs = record.get(name)
        for pair in pairs if isinstance(pairs, list) else ():
            if isinstance(pair, list) and len(pair) == 2:
                lines.append(f"    {sign} {printable(str(pair[0]))}: {printable(str(pair[1]))}")
    return "\n".join(lines)
