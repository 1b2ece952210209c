"""`fedtune client adapter`: the site's own adapter of a study that keeps a part of each at its site."""

from pathlib import Path
from typing import Annotated

import typer

from fedtune.commands.options import Format, OutputFormat, Verbose
from fedtune.commands.screen import quiet_libraries
from fedtune_client.commands.shared import KeyFile, Site, opened, show


def adapter(
    study: Annotated[str, typer.Argument(metavar="STUDY", help="The study's name, or the beginning of its hash.")],
    *,
    out: Annotated[Path, typer.Option(metavar="DIR", help="The folder to write.")],
    site: Site = None,
    key_file: KeyFile = None,
    output: Format = OutputFormat.text,
    verbose: Verbose = False,
) -> None:
    """Write this site's own adapter as a PEFT folder with a card.

    For studies with aggregation.algorithm=fedsa or aggregation.local_head=true: a part of the adapter was trained here
    and never left. The folder is not sealed; who gets it is the site's decision.
    """
    quiet_libraries(verbose=verbose)
    from fedtune_client.personal import export_personal

    found = export_personal(opened(site, key_file), study, out)
    document = {"adapter": str(out), "study": found.plan.name, "plan_sha256": found.plan.sha256}
    show(output, document, [f"{out} holds this site's adapter of {found.plan.name}; it loads with peft"])
