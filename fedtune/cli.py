"""The command `fedtune`: finds its subcommands and turns every exception into one readable error.

A subcommand is an entry point of the group `fedtune.commands` that names a `typer.Typer`; it is imported when it is
called or listed, so `fedtune --version` loads nothing heavy. This module knows no subcommand by name.
"""

import platform
import sys
from collections.abc import Sequence
from difflib import get_close_matches
from importlib.metadata import EntryPoint, PackageNotFoundError, entry_points, version
from typing import Annotated

import click
import typer
from typer.core import TyperGroup

from fedtune import __version__
from fedtune.commands.failure import read_style, report
from fedtune.errors import FedtuneError

completion_options = {"install_completion", "show_completion"}  # typer's; they belong to `fedtune`, not to a subcommand


class CommandGroup(TyperGroup):
    """A group whose subcommands are entry points."""

    def list_commands(self, ctx: click.Context) -> list[str]:  # noqa: ARG002 - click's signature
        """Return the names of the installed subcommands."""
        return sorted(_installed())

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:  # noqa: ARG002 - click's signature
        """Import one subcommand; one that cannot be imported says so when it is called."""
        entry = _installed().get(cmd_name)
        return None if entry is None else _load(entry)

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        """Name the nearest subcommand when there is none of this name."""
        names = self.list_commands(ctx)
        if args and args[0] not in names and not args[0].startswith("-"):
            close = get_close_matches(args[0], names, n=1)
            also = f"; did you mean {close[0]}?" if close else f"; there are {', '.join(names)}"
            raise click.UsageError(f"no command {args[0]}{also}", ctx)
        return super().resolve_command(ctx, args)

    def invoke(self, ctx: click.Context) -> object:
        """Run the subcommand; Ctrl-C passes as an ordinary exception, because typer's own handling drops its hint."""
        try:
            return super().invoke(ctx)
        except KeyboardInterrupt as stop:
            raise click.Abort(*stop.args) from stop


app = typer.Typer(
    cls=CommandGroup,
    help="Fine-tune one language model across organisations with differential privacy; no record leaves its site.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


def _print_versions(wanted: bool) -> None:
    if not wanted:
        return
    click.echo(f"fedtune {__version__}")
    click.echo(f"Python {platform.python_version()}")
    for package in ("flwr", "torch"):
        click.echo(f"{package} {_version_of(package)}")
    raise typer.Exit


def _version_of(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "is not installed"


@app.callback()
def fedtune(
    *,
    show_version: Annotated[
        bool,
        typer.Option("--version", help="Print versions and exit.", is_eager=True, callback=_print_versions),
    ] = False,
    verbose: Annotated[bool, typer.Option("--verbose", help="Show tracebacks; also accepted after a command.")] = False,
) -> None:
    """Fine-tune one language model across organisations with differential privacy; no record leaves its site."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command line (default: this process's) and return its exit code."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    try:
        result = typer.main.get_command(app).main(given, prog_name="fedtune", standalone_mode=False)
    except click.exceptions.NoArgsIsHelpError as shown:  # the help is printed already
        return shown.exit_code
    except Exception as error:  # noqa: BLE001 - the one place where an exception becomes text
        return report(error, read_style(given))
    return result if isinstance(result, int) else 0  # click returns the code of `typer.Exit`


def _installed() -> dict[str, EntryPoint]:
    return {entry.name: entry for entry in entry_points(group="fedtune.commands")}


def _load(entry: EntryPoint) -> click.Command:
    try:
        loaded = entry.load()
        if not isinstance(loaded, typer.Typer):
            raise TypeError(f"{entry.value} is not a typer.Typer")  # noqa: TRY301 - same answer as a failed import
        command = typer.main.get_command(loaded)
    except Exception as error:  # noqa: BLE001 - whatever an installed module raises, the other commands still work
        return _broken(entry, error)
    command.name = entry.name
    command.params = [option for option in command.params if option.name not in completion_options]
    return command


def _broken(entry: EntryPoint, cause: Exception) -> click.Command:
    """Return a command that is listed, takes anything, and raises why it cannot run."""

    def explain(rest: tuple[str, ...]) -> None:  # noqa: ARG001 - whatever was typed after the command
        message = f"the command {entry.name} cannot be loaded from {entry.value}: {type(cause).__name__}: {cause}"
        raise FedtuneError("broken-command", message, hint="reinstall fedtune; --verbose shows where") from cause

    return click.Command(
        entry.name,
        callback=explain,
        params=[click.Argument(["rest"], nargs=-1, type=click.UNPROCESSED)],
        context_settings={"ignore_unknown_options": True},
        add_help_option=False,
        help=f"Cannot be loaded: {cause}",
    )


if __name__ == "__main__":
    raise SystemExit(main())
