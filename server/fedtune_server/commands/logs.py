"""`fedtune server logs`: what the processes of a coordinator say, as one log in the order of time."""

from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING, Annotated

import click
import typer

from fedtune.commands.options import Format, OutputFormat, Verbose
from fedtune.errors import ConfigError
from fedtune_server.commands.shared import Dir, folder_of, settings_of

if TYPE_CHECKING:
    from fedtune.processes.log_lines import Line

units = {"s": 1, "m": 60, "h": 3600, "d": 86400}


def logs(
    *,
    follow: Annotated[bool, typer.Option("--follow", help="Go on with what is written from now on.")] = False,
    role: Annotated[
        list[str] | None,
        typer.Option(metavar="ROLE", help="link, executor or supervisor; repeat it.", show_default=False),
    ] = None,
    since: Annotated[str, typer.Option(metavar="SPAN", help="As 90s, 10m, 2h or 3d.", show_default=False)] = "",
    folder: Dir = None,
    output: Format = OutputFormat.text,
    verbose: Verbose = False,  # noqa: ARG001 - read where errors are printed
) -> None:
    """Show the log of every process, also while the coordinator is down; with --format json one object a line."""
    from fedtune.processes.logs import read

    place, start = folder_of(folder), _start(since)
    settings_of(place)  # a folder that is no coordinator's is said so
    _print(read(place.logs, follow=follow, since=start, roles=role), output)


def _print(lines: "Iterator[Line]", output: OutputFormat) -> None:
    from fedtune.processes.log_lines import to_json, to_text

    spelled = to_json if output is OutputFormat.json else to_text
    try:
        for line in lines:
            click.echo(spelled(line))
    except KeyboardInterrupt:
        return


def _start(since: str) -> datetime | None:
    if not since:
        return None
    number, unit = since[:-1], since[-1]
    if unit not in units or not number.isdecimal() or len(number) > 6:  # noqa: PLR2004 - six digits are years
        message = f"--since {since} is no span of time"
        raise ConfigError("bad-value", message, hint="a whole number and s, m, h or d: --since 10m")
    return datetime.now(UTC) - timedelta(seconds=int(number) * units[unit])
