"""How commands print: a table on a terminal, plain columns in a pipe, JSON when asked."""

import json
import sys
from collections.abc import Sequence

import click

_COLUMN_GAP = "  "


def print_json(value: object) -> None:
    """The value as indented JSON."""
    click.echo(json.dumps(value, indent=4))


def print_table(headings: Sequence[str], rows: Sequence[Sequence[str]], *, dispensable: Sequence[str] = ()) -> None:
    """Rows under headings; a rich table on a terminal, aligned plain columns otherwise.

    On a terminal that is too narrow, the `dispensable` columns are left out; what still does not fit is printed as in a
    pipe, so that an address or an ID can be copied whole.
    """
    lines = [list(headings), *([printable(cell) for cell in row] for row in rows)]
    if sys.stdout.isatty():
        from rich.console import Console
        from rich.table import Table

        console = Console(highlight=False, markup=False)
        if _width(lines) > console.width:
            kept = [column for column, heading in enumerate(headings) if heading not in dispensable]
            lines = [[line[column] for column in kept] for line in lines]
        if _width(lines) <= console.width:
            table = Table(*lines[0], box=None, header_style="bold", pad_edge=False, padding=(0, len(_COLUMN_GAP), 0, 0))
            for line in lines[1:]:
                table.add_row(*line)
            console.print(table)
            return
    widths = _widths(lines)
    for line in lines:
        padded = (cell.ljust(width) for cell, width in zip(line, widths, strict=True))
        click.echo(_COLUMN_GAP.join(padded).rstrip())


def _widths(lines: Sequence[Sequence[str]]) -> list[int]:
    return [max(len(line[column]) for line in lines) for column in range(len(lines[0]))]


def _width(lines: Sequence[Sequence[str]]) -> int:
    widths = _widths(lines)
    return sum(widths) + len(_COLUMN_GAP) * (len(widths) - 1)


def printable(text: str) -> str:
    """The text with nothing in it that a terminal would obey: names and paths come from other hosts."""
    return "".join(character if character.isprintable() else "\N{REPLACEMENT CHARACTER}" for character in text)
