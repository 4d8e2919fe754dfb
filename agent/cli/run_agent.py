"""`mesh agent`: from flags and files to a running agent."""

import sys
from collections.abc import Callable
from pathlib import Path

import click

from agent.cli.flags import GoCommand
from agent.config import FLAGS, KEYS, Flag


def _option(flag: Flag) -> click.Option:
    kind = KEYS[flag.key].kind
    types: dict[str, dict[str, object]] = {
        "boolean": {"is_flag": True, "default": None},
        "integer": {"type": click.INT},
        "texts": {"multiple": True},
        "text_map": {"multiple": True, "metavar": "KEY:VALUE"},
    }
    return click.Option([f"-{flag.name}", flag.name.replace("-", "_")], help=flag.help, **types.get(kind, {}))  # type: ignore[arg-type]


def _files(*, name: str, help: str, folder: bool) -> click.Option:
    path = click.Path(path_type=Path, dir_okay=folder, file_okay=not folder)
    return click.Option([f"-{name}", name.replace("-", "_")], help=help, multiple=True, type=path)


def _run(config_file: tuple[Path, ...], config_dir: tuple[Path, ...], **flags: object) -> None:
    # Imported here: `mesh agent -help` and a refused flag need no event loop.
    import trio

    from agent.app import run_agent
    from agent.config import load
    from agent.runtime import Runtime
    from mesh.errors import ConfigError

    try:
        config = load(flags, config_file, config_dir)
        status = trio.run(run_agent, config, Runtime())
    except ConfigError as error:
        click.echo(f"mesh agent: {error}", err=True)
        status = 1
    sys.exit(status)


def _command(run: Callable[..., None]) -> click.Command:
    return GoCommand(
        "agent",
        callback=run,
        params=[
            _files(name="config-file", help="JSON file to read; may be repeated, later ones win.", folder=False),
            _files(name="config-dir", help="Folder whose .json files are read in order; may be repeated.", folder=True),
            *(_option(flag) for flag in FLAGS),
        ],
        help="Runs an agent: with -server it keeps the state and votes, without it forwards to servers. Both serve the "
        "HTTP API and run the sidecars of their host's services. Every key of the configuration files is Consul's.",
    )


agent = _command(_run)
