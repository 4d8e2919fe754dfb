"""`mesh proxy-config listeners|routes|targets|endpoints|certs`: what the local agent's proxy workers hold."""

import time
from collections.abc import Callable, Sequence

import click

from agent.cli.client import Json, connect
from agent.cli.flags import GoGroup, api_flags, format_flag
from agent.cli.output import print_json, print_table, printable

Row = dict[str, Json]
Cells = Callable[[Row], Sequence[str]]


@click.group("proxy-config", cls=GoGroup)
def proxy_config() -> None:
    """Shows what the local agent's proxies hold: not what was asked for, but what is in force."""


def _rows(workers: Sequence[Row], section: str, key: Sequence[str], counts: Sequence[str]) -> list[Row]:
    """One row for what is the same in several workers: its counts added up, of differing states each with its share."""
    merged: dict[tuple[str, ...], Row] = {}
    states: dict[tuple[str, ...], list[str]] = {}
    for worker in workers:
        listed = worker.get(section)
        for row in listed if isinstance(listed, list) else ():
            if not isinstance(row, dict):
                continue
            name = tuple(str(row.get(field)) for field in key)
            states.setdefault(name, []).append(str(row.get("State", "")))
            if name not in merged:
                merged[name] = dict(row)
                continue
            for field in counts:
                mine, more = merged[name].get(field), row.get(field)
                if isinstance(mine, int | float) and isinstance(more, int | float):
                    merged[name][field] = mine + more
    for name, row in merged.items():
        found = states[name]
        if len(set(found)) > 1:
            row["State"] = ", ".join(f"{state} {found.count(state)}/{len(found)}" for state in sorted(set(found)))
    return list(merged.values())


def _show(
    section: str, *, key: Sequence[str], counts: Sequence[str], headings: Sequence[str], cells: Cells, service: str,
    output_format: str,
) -> None:  # fmt: skip
    api = connect()
    answer = api.get("/v1/agent/proxy/config", {"service": service} if service else None)
    if not isinstance(answer, dict) or not isinstance(answer.get("Workers"), list):
        api.fail("the agent's answer is not a description of its proxies")
    listed = answer["Workers"]
    assert isinstance(listed, list)
    workers = [worker for worker in listed if isinstance(worker, dict)]
    rows = _rows(workers, section, key, counts)
    if output_format == "json":
        state = [{name: worker.get(name) for name in ("Pid", "Version", "Refused")} for worker in workers]
        print_json({section: rows, "Workers": state, "Problems": answer.get("Problems")})
        return
    print_table(headings, [[str(cell) for cell in cells(row)] for row in rows])
    for line in _remarks(workers, answer.get("Problems")):
        click.echo(printable(line), err=True)


def _remarks(workers: Sequence[Row], problems: Json) -> list[str]:
    """What is not in force, and why."""
    said: dict[str, None] = {}
    for worker in workers:
        refused = worker.get("Refused")
        if isinstance(refused, dict):
            at_s = refused.get("AtS")
            when = _local(at_s) if isinstance(at_s, int | float) else "?"
            said[
                f"Worker {worker.get('Pid')} serves version {worker.get('Version')}; the last it refused was version "
                f"{refused.get('Version')}, {when}: {refused.get('Reason')}"
            ] = None
    for problem in problems if isinstance(problems, list) else ():
        if isinstance(problem, dict):
            said[f"{problem.get('ProxyId')}: {problem.get('Reason')}"] = None
    return list(said)


def _local(unix_s: float) -> str:
    return time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(unix_s))


def _joined(value: Json, otherwise: str = "-") -> str:
    return ", ".join(map(str, value)) if isinstance(value, list) and value else otherwise


def _of(row: Row, name: str) -> str:
    """A count and its limit; an application behind its own sidecar has none."""
    limit = row[f"{name}Max"]
    bounded = isinstance(limit, int | float) and limit < 2**31
    return f"{row[name]} of {limit}" if bounded else str(row[name])


_SERVICE = click.option("-service", default="", help="Only this service's sidecars, or the one with this proxy ID.")


@proxy_config.command()
@_SERVICE
@api_flags
@format_flag
def listeners(*, service: str, output_format: str, **_: object) -> None:
    """Lists listeners, with the connections that are open and the requests since the start."""

    def cells(row: Row) -> Sequence[str]:
        address = str(row["Address"])
        return [
            str(row["ProxyId"]), str(row["Direction"]), f"[{address}]:{row['Port']}" if ":" in address else
            f"{address}:{row['Port']}", str(row["Protocol"]), str(row["Target"]), str(row["Rules"]),
            str(row["Intentions"]) if row["Direction"] == "inbound" else "-", str(row["Mtls"] or "-"),
            str(row["Connections"]), str(row["Requests"]), str(row["Denied"]),
        ]  # fmt: skip

    _show(
        "Listeners", key=("ProxyId", "Direction", "Address", "Port", "Protocol"),
        counts=("Connections", "Requests", "Denied"),
        headings=["Proxy", "Direction", "Address", "Protocol", "Target", "Rules", "Intentions", "mTLS", "Open",
                  "Requests", "Denied"],
        cells=cells, service=service, output_format=output_format,
    )  # fmt: skip


@proxy_config.command()
@_SERVICE
@api_flags
@format_flag
def routes(*, service: str, output_format: str, **_: object) -> None:
    """Lists the rules of HTTP listeners, in the order in which they are tried."""

    def cells(row: Row) -> Sequence[str]:
        matches = row["Matches"]
        shown = " | ".join(map(str, matches)) if isinstance(matches, list) and matches else "every request"
        return [
            str(row["ProxyId"]), str(row["Listener"]), _joined(row["Domains"]), str(row["Rule"] or "-"), shown,
            str(row["Action"]), _joined(row["Extras"]),
        ]  # fmt: skip

    _show(
        "Routes", key=("ProxyId", "Listener", "Host", "Domains", "Rule", "Matches", "Action"), counts=(),
        headings=["Proxy", "Listener", "Domains", "Rule", "Match", "Action", "Also"],
        cells=cells, service=service, output_format=output_format,
    )  # fmt: skip


@proxy_config.command()
@_SERVICE
@api_flags
@format_flag
def targets(*, service: str, output_format: str, **_: object) -> None:
    """Lists targets, with what is under way and how much of it is allowed, per worker."""

    def cells(row: Row) -> Sequence[str]:
        return [
            str(row["ProxyId"]), str(row["Listener"]), str(row["Target"]), str(row["Balancer"]),
            f"{row['Usable']}/{row['Endpoints']}", str(row["Ejected"]), _of(row, "Requests"),
            _of(row, "Pending"), _of(row, "Connections"),
            _joined(row["Policies"]),
        ]  # fmt: skip

    _show(
        "Targets", key=("ProxyId", "Listener", "Target"),
        counts=("Requests", "Pending", "Retries", "Connections", "RequestsMax", "PendingMax", "ConnectionsMax"),
        headings=["Proxy", "Listener", "Target", "Balancer", "Usable", "Ejected", "Requests", "Pending", "Connections",
                  "Policies"],
        cells=cells, service=service, output_format=output_format,
    )  # fmt: skip


@proxy_config.command()
@_SERVICE
@api_flags
@format_flag
def endpoints(*, service: str, output_format: str, **_: object) -> None:
    """Lists endpoints: whether they get requests, and why not."""

    def cells(row: Row) -> Sequence[str]:
        state = str(row["State"])
        ejected_s = row["EjectedS"]
        if isinstance(ejected_s, int | float) and ejected_s:
            state += f" ({row['Ejection']}, {ejected_s:.0f} s ago)"
        return [
            str(row["Target"]), str(row["Endpoint"]), str(row["Address"]), state, str(row["Weight"]),
            str(row["Priority"]), str(row["Locality"] or "-"), str(row["Active"]), str(row["Connections"]),
            str(row["Idle"]), str(row["Waiting"]), str(row["Ejections"]),
        ]  # fmt: skip

    _show(
        "Endpoints", key=("ProxyId", "Listener", "Target", "Endpoint", "Address"),
        counts=("Active", "Connections", "Idle", "Waiting", "Ejections"),
        headings=["Target", "Endpoint", "Address", "State", "Weight", "Priority", "Locality", "Active", "Connections",
                  "Idle", "Waiting", "Ejections"],
        cells=cells, service=service, output_format=output_format,
    )  # fmt: skip


@proxy_config.command()
@_SERVICE
@api_flags
@format_flag
def certs(*, service: str, output_format: str, **_: object) -> None:
    """Lists certificates: the sidecars' own with their chain, and the roots that they trust. Never a key."""

    def cells(row: Row) -> Sequence[str]:
        until = row["ValidBeforeS"]
        left_s = until - time.time() if isinstance(until, int | float) else 0.0
        state = f"{_local(time.time() + left_s)} ({_span(left_s)})" if left_s > 0 else "expired"
        return [str(row["ProxyId"]), str(row["Kind"]), str(row["SpiffeId"] or row["Subject"] or "-"),
                str(row["SerialNumber"]), state]  # fmt: skip

    _show(
        "Certificates", key=("ProxyId", "Kind", "Sha256"), counts=(),
        headings=["Proxy", "Kind", "Identity", "Serial", "Valid until"],
        cells=cells, service=service, output_format=output_format,
    )  # fmt: skip


def _span(seconds: float) -> str:
    if seconds >= 2 * 86400:
        return f"{seconds / 86400:.0f} d"
    return f"{seconds / 3600:.0f} h" if seconds >= 2 * 3600 else f"{seconds / 60:.0f} min"
