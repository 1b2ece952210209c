"""`fedtune client doctor`: whether a site is ready to take part, and what to do where it is not."""

from collections import Counter
from collections.abc import Iterator
from dataclasses import asdict
from datetime import UTC, datetime
from typing import TYPE_CHECKING

import typer

from fedtune.commands.options import Format, OutputFormat, Verbose
from fedtune.commands.screen import quiet_libraries
from fedtune_client.commands.papers import Federation
from fedtune_client.commands.shared import KeyFile, Site, folder_of, show
from fedtune_client.commands.unlocking import unlock

if TYPE_CHECKING:
    from fedtune_client.doctor.finding import Finding


def doctor(
    *,
    federation: Federation = None,
    site: Site = None,
    key_file: KeyFile = None,
    output: Format = OutputFormat.text,
    verbose: Verbose = False,
) -> None:
    """Check vault, journal, certificate, the way to the coordinator, clock, disk, models, data, policy and budget.

    Nothing is changed and nobody but the coordinator is asked. Of the data, the number of records is all that is shown.
    """
    quiet_libraries(verbose=verbose)
    from fedtune_client.doctor.examination import examine

    found = list(examine(folder_of(site), lambda: unlock(key_file), federation, datetime.now(UTC)))
    levels = Counter(finding.level for finding in found)
    document = {"ready": not levels["fail"], "findings": [asdict(one) for one in found]}
    verdict = f"{levels['ok']} ok, {levels['warn']} to look at, {levels['fail']} to mend"
    show(output, document, [*_lines(found), verdict])
    if levels["fail"]:
        raise typer.Exit(1)


def _lines(found: list["Finding"]) -> Iterator[str]:
    """Yield a line a finding, and one more that says what to do."""
    width = max(len(one.check) for one in found)
    for one in found:
        code = f" [{one.code}]" if one.code else ""
        yield f"{one.level:<5} {one.check:<{width}}  {one.text}{code}"
        if one.hint:
            yield f"{'':<5} {'':<{width}}    → {one.hint}"
