"""`fedtune pull`: fetch a release from the Hugging Face Hub and verify it."""

from pathlib import Path
from typing import Annotated

import click
import typer

from fedtune.commands.options import Format, OutputFormat, Verbose
from fedtune.commands.results import show
from fedtune.commands.screen import quiet_libraries

app = typer.Typer(help="Fetch a release from the Hugging Face Hub and verify it.")


@app.command()
def pull(
    repo: Annotated[str, typer.Argument(metavar="REPO", help="OWNER/NAME.")],
    *,
    out: Annotated[Path, typer.Option("--out", metavar="DIR", help="A folder that is not there yet.")],
    revision: Annotated[
        str | None,
        typer.Option(metavar="SHA", help="The commit, all 40 digits; a branch can move.", show_default=False),
    ] = None,
    coordinator_key: Annotated[
        str | None,
        typer.Option(metavar="HEX|FILE", help="The coordinator's public key, as you were told it.", show_default=False),
    ] = None,
    output: Format = OutputFormat.text,
    verbose: Verbose = False,
) -> None:
    """Fetch one commit of a release; the folder is there only once it verifies."""
    quiet_libraries(verbose=verbose)
    from fedtune.commands.audit import read_key
    from fedtune.display import bytes_text
    from fedtune.release.hub_pull import pull as fetch
    from fedtune.release.hub_push import require_repository

    def say(name: str, size: int) -> None:
        if output is OutputFormat.text:
            click.echo(f"  {name}  {bytes_text(size)}", err=True)

    require_repository(repo)
    pulled = fetch(repo, out, revision, coordinator_key=read_key(coordinator_key), tell=say)
    manifest = pulled.verdict.manifest
    signer = manifest.coordinator if manifest is not None else ""
    believed = "" if pulled.verdict.key_checked else "; nobody has checked that key: --coordinator-key HEX does"
    document = {
        "folder": str(out),
        "repository": repo,
        "commit": pulled.commit,
        "files": pulled.files,
        "bytes": pulled.size,
        "coordinator": signer,
        "coordinator_checked": pulled.verdict.key_checked,
    }
    lines = [
        f"{out} holds {repo} at {pulled.commit}: {pulled.files} files, {bytes_text(pulled.size)}, verified",
        f"signed by the coordinator {signer}{believed}",
        f"check it with your own papers: fedtune release verify {out}",
    ]
    show(output, document, lines)
