"""How a command's result is shown: one document for programs, or lines and tables for people.

Modules of commands do not postpone annotations: typer reads them when a command is built.
"""

import json
from collections.abc import Collection, Iterable
from typing import Any

import click

from fedtune.commands.options import OutputFormat


def show(output: OutputFormat, document: Any, lines: Iterable[object]) -> None:
    """Print a result: the document as JSON, or the lines; text is escaped, tables are printed as they are."""
    from fedtune.commands.screen import screen
    from fedtune.display import printable

    if output is OutputFormat.json:
        click.echo(json.dumps(document, ensure_ascii=False))
        return
    console = screen()
    for line in lines:
        if isinstance(line, str):
            console.print(printable(line), markup=False, soft_wrap=True)
        else:
            console.print(line)


def tell(output: OutputFormat, *lines: str) -> None:
    """Print what a person should read before a question; for programs it is part of the document."""
    if output is OutputFormat.text:
        show(output, None, lines)


def table(*columns: str, numbers: Collection[str] = (), unbroken: Collection[str] = ()) -> Any:
    """Return a table for foreign text; columns of `numbers` stand to the right, `unbroken` ones are never folded."""
    from rich import box
    from rich.table import Table

    made = Table(box=box.SIMPLE, show_header=any(columns))
    for name in columns:
        made.add_column(name, justify="right" if name in numbers else "left", overflow="fold", no_wrap=name in unbroken)
    return made


def add(made: Any, *cells: object) -> None:
    """Add a row whose cells are shown as they are written."""
    from rich.text import Text

    from fedtune.display import printable

    made.add_row(*(Text(printable(cell)) for cell in cells))
