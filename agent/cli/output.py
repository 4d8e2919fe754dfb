"""How commands print: a table on a terminal, plain columns in a pipe, JSON when asked."""

import json
import sys
from collections.abc import Sequence

import click

_COLUMN_GAP = "  "


def print_json(value: object) -> None:
    """The value as indented JSON."""
    click.echo(json.dumps(value, indent=4))


def print_table(headings: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """Rows under headings; a rich table on a terminal, aligned plain columns otherwise."""
    if sys.stdout.isatty():
        from rich.console import Console
        from rich.table import Table

        table = Table(box=None, header_style="bold", pad_edge=False, padding=(0, 2, 0, 0))
        for heading in headings:
            table.add_column(heading, overflow="fold")
        for row in rows:
            table.add_row(*(_safe(cell) for cell in row))
        Console(highlight=False, markup=False).print(table)
        return
    lines = [list(headings), *([_safe(cell) for cell in row] for row in rows)]
    widths = [max(len(line[column]) for line in lines) for column in range(len(headings))]
    for line in lines:
        click.echo(_COLUMN_GAP.join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip())


def _safe(text: str) -> str:
    # Names come from other hosts: no control character of theirs may reach the terminal.
    return "".join(character if character.isprintable() else "\N{REPLACEMENT CHARACTER}" for character in text)
