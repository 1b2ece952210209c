"""`fedtune client key`: the key with which the site signs."""

import typer

from fedtune.commands.options import Format, OutputFormat, Verbose
from fedtune.commands.screen import quiet_libraries
from fedtune_client.commands.shared import KeyFile, Site, opened, show, site_disk

app = typer.Typer(help="The key with which the site signs.", no_args_is_help=True)


@app.callback()
def group() -> None:
    """Change the key with which the site signs."""


@app.command()
def rotate(
    *,
    site: Site = None,
    key_file: KeyFile = None,
    output: Format = OutputFormat.text,
    verbose: Verbose = False,
) -> None:
    """Sign with a new key from here on; the old one signs that it follows, and records stay what they are."""
    quiet_libraries(verbose=verbose)
    from fedtune_client import operator

    opened_site = opened(site, key_file)
    old = opened_site.journal.chain.public_key
    with site_disk(opened_site.folder.path):
        new = operator.rotate_key(opened_site)
    lines = [
        f"the site signs with {new}",
        f"until now it was {old}; any key that it ever had checks the whole journal",
        "tell the new key to whoever checks the journal, and export the vault anew: fedtune client vault export FILE",
    ]
    show(output, {"public_key": new, "before": old}, lines)
