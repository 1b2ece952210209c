"""`fedtune client vault`: the site's keys and stored updates; copied, put back, locked with something else."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from fedtune.commands.options import Format, OutputFormat, Verbose
from fedtune.commands.screen import quiet_libraries
from fedtune.errors import VaultError
from fedtune_client.commands.shared import KeyFile, Site, folder_of, show
from fedtune_client.commands.unlocking import unlock

if TYPE_CHECKING:
    from fedtune_client.folder import SiteFolder
    from fedtune_client.vault import Vault

app = typer.Typer(help="The site's keys and stored updates, encrypted.", no_args_is_help=True)

ExportKeyFile = Annotated[
    Path | None,
    typer.Option(metavar="FILE", help="The export's key; else FEDTUNE_EXPORT_KEY_FILE, _KEY, _PASSPHRASE, or asked."),
]
NewKeyFile = Annotated[
    Path | None,
    typer.Option(metavar="FILE", help="The new key; else FEDTUNE_NEW_KEY_FILE, _KEY, _PASSPHRASE, or asked twice."),
]


@app.command()
def export(
    file: Annotated[Path, typer.Argument(metavar="FILE", help="The file to write.")],
    *,
    export_key_file: ExportKeyFile = None,
    site: Site = None,
    key_file: KeyFile = None,
    output: Format = OutputFormat.text,
    verbose: Verbose = False,
) -> None:
    """Write all keys and stored updates to one encrypted file, with a passphrase or key of its own."""
    quiet_libraries(verbose=verbose)
    opened = _opened(site, key_file)
    opened.export(file, unlock(export_key_file, "FEDTUNE_EXPORT", "passphrase of the export", new=True))
    items = len(opened.names())
    lines = [
        f"{file}: {items} items",
        "keep it, and apart from it what unlocks it; the journal is not in it: back that up too",
    ]
    show(output, {"path": str(file), "items": items}, lines)


@app.command()
def restore(
    file: Annotated[Path, typer.Argument(metavar="FILE", help="What `vault export` wrote.")],
    *,
    export_key_file: ExportKeyFile = None,
    site: Site = None,
    key_file: KeyFile = None,
    output: Format = OutputFormat.text,
    verbose: Verbose = False,
) -> None:
    """Make the site's vault of an export, where there is none; it gets the passphrase or key that is given for it."""
    quiet_libraries(verbose=verbose)
    from fedtune_client.vault import Vault

    folder = folder_of(site)
    if folder.vault.exists() and any(path.name != "lock" for path in folder.vault.iterdir()):
        hint = "move it away first; nothing was changed"
        raise VaultError("exists", f"{folder.vault} holds a vault already", hint=hint)
    in_force = _key_in_force(folder)
    sealed = unlock(export_key_file, "FEDTUNE_EXPORT", "passphrase of the export")
    restored = Vault.restore(file, sealed, folder.vault, unlock(key_file, new=True))
    _require_key(restored, in_force)
    items = len(restored.names())
    show(output, {"path": str(restored.folder), "items": items}, [f"{restored.folder}: {items} items are back"])


@app.command()
def passphrase(
    *,
    new_key_file: NewKeyFile = None,
    site: Site = None,
    key_file: KeyFile = None,
    output: Format = OutputFormat.text,
    verbose: Verbose = False,
) -> None:
    """Lock the vault with another passphrase or key; a client that runs has to be started again."""
    quiet_libraries(verbose=verbose)
    opened = _opened(site, key_file)
    opened.rewrap(unlock(new_key_file, "FEDTUNE_NEW", "new passphrase of the vault", new=True))
    hint = (
        "older copies of the vault still open with the old one; if that was seen by others: fedtune client vault rotate"
    )
    show(output, {"vault": str(opened.folder)}, ["the vault is locked with the new one", hint])


@app.command()
def rotate(
    *,
    site: Site = None,
    key_file: KeyFile = None,
    output: Format = OutputFormat.text,
    verbose: Verbose = False,
) -> None:
    """Encrypt everything anew, under a new data key; passphrase and signing key stay."""
    quiet_libraries(verbose=verbose)
    opened = _opened(site, key_file)
    opened.rotate()
    document = {"vault": str(opened.folder), "generation": opened.generation, "items": len(opened.names())}
    show(output, document, [f"{document['items']} items are encrypted anew (data key {opened.generation})"])


def _opened(site: Path | None, key_file: Path | None) -> "Vault":
    from fedtune_client.vault import Vault
    from fedtune_client.vault.layout import read_header

    folder = folder_of(site)
    read_header(folder.vault)  # what is not there is said before a passphrase is asked for
    return Vault.open(folder.vault, unlock(key_file))


def _key_in_force(folder: "SiteFolder") -> str | None:
    from fedtune_client.view import view

    return view(folder).chain.public_key if any(folder.path.glob("*.journal")) else None


def _require_key(restored: "Vault", in_force: str | None) -> None:
    """Say when an export was made before the key was rotated: its site could not sign."""
    from fedtune_client.vault import signing_key

    if in_force is None:
        return
    try:
        signing_key(restored, in_force)
    except VaultError as error:
        hint = f"move {restored.folder} away, and restore a newer export"
        message = f"the export is of another site, or older than the key in force ({in_force[:16]}…)"
        raise VaultError("older-export", message, hint=hint) from error
