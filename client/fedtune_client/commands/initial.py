"""`fedtune client init`: a site begins."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from fedtune.commands.options import Format, OutputFormat, Verbose
from fedtune.commands.screen import quiet_libraries
from fedtune_client.commands.shared import KeyFile, folder_of, show, site_disk
from fedtune_client.commands.unlocking import unlock

if TYPE_CHECKING:
    from fedtune_client.folder import SiteFolder


def init(
    name: Annotated[str, typer.Argument(metavar="NAME", help="What the site is called in every study.")],
    *,
    site: Annotated[
        Path | None,
        typer.Option(
            "--site",
            "--dir",
            metavar="DIR",
            help="The folder to make; else FEDTUNE_SITE, else ./site.",
            show_default=False,
        ),
    ] = None,
    key_file: KeyFile = None,
    output: Format = OutputFormat.text,
    verbose: Verbose = False,
) -> None:
    """Make a site: a vault with its keys, a journal, and two files to edit.

    A site that is there is refused and left as it is; one whose making was interrupted is finished.
    """
    quiet_libraries(verbose=verbose)
    from fedtune_client.folder import begin, require_unused

    folder = folder_of(site)
    require_unused(folder, name)
    interrupted = (folder.vault / "vault.json").exists()  # then the passphrase of its vault is asked for once
    secret = unlock(key_file, new=not interrupted)
    with site_disk(folder.path):
        made = begin(folder, name, secret)
    document = {
        "site": name,
        "folder": str(folder.path.absolute()),
        "identity": made.journal.chain.site,
        "public_key": made.journal.chain.public_key,
    }
    show(output, document, _lines(folder, name, made.journal.chain.public_key))


def _lines(folder: "SiteFolder", name: str, public_key: str) -> list[str]:
    return [
        f"the site {name} is made in {folder.path}:",
        "  site.yaml    where its data sets are: edit it",
        "  policy.yaml  what it takes part in: edit it",
        f"  {name}.journal  what it decides and spends, signed; back it up after every study",
        "  vault/       its keys, encrypted; without the passphrase or key file nobody opens it",
        f"  public.key   {public_key}",
        "tell the public key to whoever is to check the journal, now and by another way than the journal",
        "next: edit site.yaml and policy.yaml, then: fedtune client policy check",
    ]
