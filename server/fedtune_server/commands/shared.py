"""What the coordinator's commands share: their options, how a coordinator is found and opened, and papers on disk.

Modules here do not postpone annotations: typer reads them when a command is built.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from fedtune.commands.results import add, show, table, tell
from fedtune.errors import ConfigError, EnrolmentError

if TYPE_CHECKING:
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
    from cryptography.x509 import Certificate

    from fedtune_server.enrolment import Enrolment
    from fedtune_server.folder import CoordinatorFolder
    from fedtune_server.settings import CoordinatorSettings

Dir = Annotated[
    Path | None,
    typer.Option(
        "--dir",
        metavar="DIR",
        help="The coordinator's folder; else FEDTUNE_COORDINATOR, else ./coordinator.",
        show_default=False,
    ),
]
KeyFile = Annotated[
    Path | None,
    typer.Option(
        "--key-file", metavar="FILE", help="The authority's key, instead of a passphrase.", show_default=False
    ),
]
Hosts = Annotated[
    list[str] | None,
    typer.Option(
        "--host",
        metavar="HOST",
        help="One more name or IP address that sites may reach it at; a name stands for those below it. Repeat it.",
        show_default=False,
    ),
]
Yes = Annotated[bool, typer.Option("--yes", help="Do not ask.")]


@dataclass(frozen=True, slots=True)
class OpenCoordinator:
    """A coordinator's folder, its settings, its signing key and its enrolment; the authority is locked."""

    folder: "CoordinatorFolder"
    settings: "CoordinatorSettings"
    key: "Ed25519PrivateKey"
    enrolment: "Enrolment"


def folder_of(folder: Path | None) -> "CoordinatorFolder":
    """Return the coordinator's folder, which need not exist."""
    from fedtune_server.folder import find_coordinator

    return find_coordinator(folder)


def settings_of(folder: "CoordinatorFolder") -> "CoordinatorSettings":
    """Read `coordinator.yaml`. Errors: those of `read_settings`, `config.file-missing` where no coordinator is."""
    from fedtune_server.settings import read_settings

    return read_settings(folder.facts_file)


def opened(given: Path | None) -> OpenCoordinator:
    """Open a coordinator; it needs no secret but to be its user.

    Errors: those of `read_settings` and of `Enrolment.open`, `enrolment.incomplete` without its signing key,
    `config.other-federation` where `coordinator.yaml` names another than the enrolment.
    """
    from fedtune_server.enrolment import Enrolment

    folder = folder_of(given)
    settings = settings_of(folder)
    key = signing_key(folder)
    enrolment = Enrolment.open(folder.enrolment, key)
    if settings.federation != enrolment.federation:
        message = f"{folder.facts_file} names the federation {settings.federation}, and this is {enrolment.federation}"
        raise ConfigError("other-federation", message, hint=f"write federation: {enrolment.federation}")
    return OpenCoordinator(folder, settings, key, enrolment)


def signing_key(folder: "CoordinatorFolder") -> "Ed25519PrivateKey":
    """Return the coordinator's key; one that is lost is not made anew, because nobody would know it.

    Errors: `enrolment.incomplete`, `enrolment.permissions`, `witness.damaged-key`.
    """
    from fedtune.pki.files import read_private
    from fedtune_server.coordinator_key import coordinator_key

    if read_private(folder.key_file) is None:
        hint = "restore it from a backup: sites believe no other"
        raise EnrolmentError("incomplete", f"the coordinator's signing key {folder.key_file} is missing", hint=hint)
    return coordinator_key(folder.key_file)


def read_paper(path: Path, kind: str) -> bytes:
    """Return the bytes of a paper that somebody has sent; they are not believed yet.

    Errors: `enrolment.no-paper`, `enrolment.too-large`.
    """
    from fedtune.pki.documents import MOST_BYTES

    hint = f"name the {kind} that the site has sent"
    raw = _start_of(path)
    if raw is None:
        raise EnrolmentError("no-paper", f"{path} is no file that can be read", hint=hint)
    if len(raw) > MOST_BYTES:
        raise EnrolmentError("too-large", f"{path} has more than the {MOST_BYTES} bytes of a {kind}", hint=hint)
    return raw


def place_for(out: Path | None, site: str, kind: str) -> Path:
    """Return where a paper is to be written, before anything is decided.

    An older paper of the kind is replaced, anything else refused: `enrolment.exists`, `enrolment.unwritable`.
    """
    path = out or Path(f"{site}.{kind}")
    if path.exists() and f'"kind":"{kind}"'.encode() not in (_start_of(path) or b""):
        hint = "name another place with --out"
        raise EnrolmentError("exists", f"{path} is there and is no {kind}; it is left as it is", hint=hint)
    if not path.parent.is_dir():
        hint = "make it, or name another place with --out"
        raise EnrolmentError("unwritable", f"{path.parent} is no folder to write {path.name} into", hint=hint)
    return path


def write_paper(path: Path, raw: bytes, again: str) -> None:
    """Write a paper that only this user can read; what was decided stands, so `again` is the command to repeat.

    Errors: `enrolment.disk-full`, `enrolment.unwritable`.
    """
    from fedtune.pki.files import write_private

    try:
        write_private(path, [raw])
    except EnrolmentError as error:
        slug, hint = error.code.removeprefix("enrolment."), f"what was decided is kept; write it again: {again}"
        raise EnrolmentError(slug, error.message, hint=hint) from error


def day_of(certificate: "Certificate") -> str:
    """Return the last day of a certificate."""
    return f"{certificate.not_valid_after_utc:%Y-%m-%d}"


def _start_of(path: Path) -> bytes | None:
    """Return as much of a file as a paper can have and one byte more, None for what is no file to read."""
    from fedtune.pki.documents import MOST_BYTES

    if not path.is_file():
        return None
    try:
        with path.open("rb") as file:
            return file.read(MOST_BYTES + 1)
    except OSError:
        return None


__all__ = [
    "Dir",
    "Hosts",
    "KeyFile",
    "OpenCoordinator",
    "Yes",
    "add",
    "day_of",
    "folder_of",
    "opened",
    "place_for",
    "read_paper",
    "settings_of",
    "show",
    "signing_key",
    "table",
    "tell",
    "write_paper",
]
