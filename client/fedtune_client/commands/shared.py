"""What the operator's commands share: their options, how a site is found, and how a result is shown.

Modules here do not postpone annotations: typer reads them when a command is built.
"""

import json
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import click
import typer

from fedtune.commands.options import OutputFormat
from fedtune.errors import ConfigError, RunError
from fedtune_client.commands.unlocking import unlock

if TYPE_CHECKING:
    from fedtune_client.folder import OpenSite, SiteFolder
    from fedtune_client.view import SiteView

unbroken = {"plan", "δ", "time (UTC)"}  # columns whose text is as short as it can be
outside = 7  # the exit code for a plan that the site would refuse

Site = Annotated[
    Path | None,
    typer.Option(
        "--site", metavar="DIR", help="The site's folder; else FEDTUNE_SITE, else ./site.", show_default=False
    ),
]
KeyFile = Annotated[
    Path | None,
    typer.Option("--key-file", metavar="FILE", help="The vault's key, instead of a passphrase.", show_default=False),
]
Yes = Annotated[bool, typer.Option("--yes", help="Do not ask.")]


def folder_of(site: Path | None) -> "SiteFolder":
    """Return the site's folder, which need not exist."""
    from fedtune_client.folder import find_folder

    return find_folder(site)


def viewed(site: Path | None) -> "SiteView":
    """Read the site's journal, without a secret."""
    from fedtune_client.view import view

    return view(folder_of(site))


def opened(site: Path | None, key_file: Path | None) -> "OpenSite":
    """Open a site to write; a journal that is older than the site's own receipts is refused, as a client refuses it."""
    from fedtune.journal.witness import Receipt, require_extends
    from fedtune.run.files import read_lines
    from fedtune_client.folder import open_site_folder

    folder = folder_of(site)
    folder.facts()  # a folder that is no site's is said before a passphrase is asked for
    found = open_site_folder(folder, unlock(key_file))
    receipts = read_lines(folder.heads_file)
    if receipts:
        with found.journal as journal:
            require_extends(journal, Receipt.from_dict(receipts[-1]))
    return found


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


def table(*columns: str, numbers: tuple[str, ...] = ()) -> Any:
    """Return a table for foreign text, its columns of `numbers` to the right; cells are given to `add` as text."""
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


def number(value: float | None) -> float | str | None:
    """Return a number for JSON, which has no ∞: `inf`, as `fedtune audit verify` writes it."""
    return "inf" if value is not None and value == float("inf") else value


@contextmanager
def site_disk(path: Path) -> Iterator[None]:
    """Say of a folder that cannot be written that it is the site's, not a run's."""
    try:
        yield
    except RunError as error:
        hint = "the site's folder must be this user's, on a disk with space; --site DIR names another"
        raise ConfigError(error.code.removeprefix("run."), error.message, hint=hint) from error
    except OSError as error:
        hint = "the site's folder must be this user's, on a disk with space; --site DIR names another"
        raise ConfigError("unwritable", f"{path} cannot be written ({error.strerror or error})", hint=hint) from error
