"""`mesh services register|deregister`."""

import json
import sys
from pathlib import Path

import click

from agent.cli.client import Api, Json, connect, segment
from agent.cli.flags import GoGroup, api_flags


@click.group(cls=GoGroup)
def services() -> None:
    """Registers and deregisters services with the local agent."""


def _definitions(api: Api, file: str) -> list[dict[str, Json]]:
    """The services in a file: an object with `service`, with `services`, or the definition itself."""
    try:
        text = sys.stdin.read() if file == "-" else Path(file).read_text()
        content = json.loads(text)
    except OSError as error:
        api.fail(f"cannot read {file}: {error.strerror}")
    except ValueError as error:
        api.fail(f"{file} is not JSON: {error}")
    if not isinstance(content, dict):
        api.fail(f"{file} must hold a JSON object")
    lowered = {key.lower(): value for key, value in content.items()}
    if "services" in lowered:
        found = lowered["services"]
    else:
        found = [lowered.get("service", content)]
    if not isinstance(found, list) or not all(isinstance(one, dict) for one in found):
        api.fail(f"{file}: `services` must be a list of service definitions")
    return found


@services.command()
@click.argument("files", nargs=-1, metavar="[FILE]...")
@click.option("-name", help="The service's name (without FILE).")
@click.option("-id", "service_id", default="", help="Its ID. [default: the name]")
@click.option("-address", default="", help="Its address. [default: the node's]")
@click.option("-port", type=click.IntRange(0, 65535), default=0, help="Its port.")
@click.option("-tag", "tags", multiple=True, help="A tag; may be repeated.")
@click.option("-meta", multiple=True, metavar="KEY=VALUE", help="Metadata; may be repeated.")
@api_flags
def register(
    *,
    files: tuple[str, ...],
    name: str | None,
    service_id: str,
    address: str,
    port: int,
    tags: tuple[str, ...],
    meta: tuple[str, ...],
    **_: object,
) -> None:
    """Registers the services in each FILE (JSON; `-` is standard input), or the one the flags describe."""
    api = connect()
    if bool(files) == bool(name):
        raise click.UsageError("name either files with service definitions, or a service with -name")
    definitions = [definition for file in files for definition in _definitions(api, file)]
    if name:
        definitions.append(
            {
                "Name": name,
                "ID": service_id,
                "Address": address,
                "Port": port,
                "Tags": list(tags),
                "Meta": {key: value for key, _, value in (pair.partition("=") for pair in meta)},
            }
        )
    for definition in definitions:
        api.put("/v1/agent/service/register", body=definition)
        click.echo(f"Registered service: {_field(definition, 'name')}")


def _field(definition: dict[str, Json], name: str) -> str:
    return next((str(value) for key, value in definition.items() if key.lower() == name and value), "")


@services.command()
@click.argument("files", nargs=-1, metavar="[FILE]...")
@click.option("-id", "service_id", help="The ID to deregister (without FILE).")
@api_flags
def deregister(*, files: tuple[str, ...], service_id: str | None, **_: object) -> None:
    """Deregisters the services in each FILE, or the one with -id."""
    api = connect()
    if bool(files) == bool(service_id):
        raise click.UsageError("name either files with service definitions, or a service with -id")
    ids = [_field(one, "id") or _field(one, "name") for file in files for one in _definitions(api, file)]
    for each in [*ids, *([service_id] if service_id else [])]:
        api.put(f"/v1/agent/service/deregister/{segment(each)}")
        click.echo(f"Deregistered service: {each}")
