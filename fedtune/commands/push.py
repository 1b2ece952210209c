"""`fedtune push`: put a verified release on the Hugging Face Hub."""

from pathlib import Path
from typing import Annotated

import click
import typer

from fedtune.commands.options import Format, OutputFormat, Verbose
from fedtune.commands.results import show
from fedtune.commands.screen import quiet_libraries

app = typer.Typer(help="Put a release on the Hugging Face Hub, private unless you say otherwise.")


@app.command()
def push(  # noqa: PLR0913 - one argument an option
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="A release, as fedtune release writes it.")],
    repo: Annotated[str, typer.Argument(metavar="REPO", help="OWNER/NAME; made if it is not there.")],
    *,
    branch: Annotated[str, typer.Option("--branch", "--revision", help="The branch that gets the commit.")] = "main",
    public: Annotated[bool, typer.Option("--public", help="Everybody may read it.")] = False,
    message: Annotated[str | None, typer.Option(help="What the commit says.", show_default=False)] = None,
    not_private: Annotated[
        bool, typer.Option("--not-private", help="Publish a study without privacy, or with seeded noise, knowingly.")
    ] = False,
    output: Format = OutputFormat.text,
    verbose: Verbose = False,
) -> None:
    """Verify a release, put it on the Hub in one commit, and print the commit to pin.

    The token is the one of `hf auth login` or HF_TOKEN; it is never shown. HF_ENDPOINT names another Hub.
    """
    quiet_libraries(verbose=verbose)
    from fedtune.display import bytes_text
    from fedtune.release.hub_push import prepare, require_repository
    from fedtune.release.hub_push import push as put

    require_repository(repo)
    upload = prepare(folder, not_private=not_private)
    if output is OutputFormat.text:
        click.echo(f"{folder} verifies; sending {len(upload.files)} files, {bytes_text(upload.size)} …", err=True)
    pushed = put(upload, repo, branch=branch, public=public, message=message)
    fetch = f"fedtune pull {pushed.repo} --out DIR --revision {pushed.commit}"
    document = {
        "repository": pushed.repo,
        "commit": pushed.commit,
        "branch": pushed.branch,
        "private": pushed.private,
        "files": pushed.files,
        "bytes": pushed.size,
        "fetch": fetch,
    }
    seen = "only those whom you let may read it" if pushed.private else "everybody may read it"
    show(output, document, [f"{pushed.repo} is at the commit {pushed.commit}; {seen}", f"fetch it with  {fetch}"])
