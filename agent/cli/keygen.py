"""`mesh keygen`."""

import base64
import secrets

import click

from agent.cli.flags import GoCommand

_KEY_BYTES = 32  # AES-256


@click.command(cls=GoCommand)
def keygen() -> None:
    """Prints a new gossip key, as `-encrypt` and the key `encrypt` take it."""
    click.echo(base64.b64encode(secrets.token_bytes(_KEY_BYTES)).decode())
