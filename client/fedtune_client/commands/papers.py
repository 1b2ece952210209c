"""The papers of enrolment on disk: what a site was sent, and what it sends back."""

from pathlib import Path
from typing import Annotated

import typer

from fedtune.errors import EnrolmentError

Federation = Annotated[
    str | None,
    typer.Option(
        "--federation",
        metavar="NAME",
        envvar="FEDTUNE_FEDERATION",
        help="Which, where the site knows several.",
        show_default=False,
        show_envvar=False,
    ),
]
Out = Annotated[
    Path | None,
    typer.Option("--out", metavar="FILE", help="Where to write the request; else SITE.request.", show_default=False),
]


def read_paper(path: Path, kind: str) -> bytes:
    """Return the bytes of a paper, not believed yet; of a file that is too large as many as show it.

    Error: `enrolment.no-paper`.
    """
    from fedtune.pki.documents import MOST_BYTES

    try:
        with path.open("rb") as file:
            return file.read(MOST_BYTES + 1)
    except OSError as error:
        hint = f"name the {kind} that the coordinator has sent"
        raise EnrolmentError("no-paper", f"{path} cannot be read ({error.strerror or error})", hint=hint) from error


def place_for_request(out: Path | None, site: str) -> Path:
    """Return where a request is to be written. Error: `enrolment.exists` for a file that is no request."""
    path = out or Path(f"{site}.request")
    if path.exists() and b'"kind":"request"' not in read_paper(path, "request"):
        hint = "name another place with --out"
        raise EnrolmentError("exists", f"{path} is there and is no request; it is left as it is", hint=hint)
    return path


def write_request(path: Path, request: bytes) -> None:
    """Write a request; it holds no secret. The vault keeps it, so that the same command writes it again."""
    from fedtune.pki.files import write_private

    write_private(path, [request])
