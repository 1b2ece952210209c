"""`fedtune client logs`: what the site's processes say."""

from collections import deque
from contextlib import suppress
from datetime import UTC, datetime
from typing import Annotated

import typer

from fedtune.commands.options import Format, OutputFormat, Verbose
from fedtune.commands.screen import quiet_libraries
from fedtune_client.commands.shared import Site, folder_of


def logs(
    *,
    follow: Annotated[bool, typer.Option("--follow", "-f", help="Go on with what is written, until Ctrl-C.")] = False,
    last: Annotated[int, typer.Option("--last", "-n", metavar="N", min=0, help="Only the last N lines.")] = 100,
    process: Annotated[
        list[str] | None,
        typer.Option(metavar="NAME", help="client, node or executor; repeat it.", show_default=False),
    ] = None,
    site: Site = None,
    output: Format = OutputFormat.text,
    verbose: Verbose = False,
) -> None:
    """Show what `fedtune client up` and its two processes have logged, oldest first; as JSON one line each.

    Logs hold codes, counts and hashes of plans, no content of records.
    """
    quiet_libraries(verbose=verbose)
    import click

    from fedtune.processes.log_lines import moment, to_json, to_text
    from fedtune.processes.log_reader import read

    folder = folder_of(site)
    folder.facts()  # a folder that is no site's is said to be none
    write = to_json if output is OutputFormat.json else to_text
    lines = deque(read(folder.logs, roles=process), maxlen=last)
    if not follow:
        for line in lines:
            click.echo(write(line))
        return
    since = moment(lines[0]) if lines else datetime.now(UTC)
    with suppress(KeyboardInterrupt):
        for line in read(folder.logs, roles=process, follow=True, since=since):
            click.echo(write(line))
