"""`fedtune client init`: a site begins, by itself or with a coordinator's invitation."""

from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from fedtune.commands.options import Format, OutputFormat, Verbose
from fedtune.commands.screen import quiet_libraries
from fedtune.errors import ConfigError
from fedtune_client.commands.papers import Out, place_for_request, read_paper, write_request
from fedtune_client.commands.shared import KeyFile, Yes, folder_of, opened, show, site_disk, tell
from fedtune_client.commands.unlocking import confirm, unlock

if TYPE_CHECKING:
    from fedtune.pki.invitations import Invitation
    from fedtune_client.folder import OpenSite, SiteFolder


def init(  # noqa: PLR0913 - a command's options
    name: Annotated[
        str | None,
        typer.Argument(
            metavar="[NAME]", help="What the site is called in every study; an invitation says it.", show_default=False
        ),
    ] = None,
    *,
    invitation: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="Answer a coordinator's invitation.", show_default=False),
    ] = None,
    out: Out = None,
    yes: Yes = False,
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
    """Make a site: a vault with its keys, a journal, and two files to edit; and answer an invitation.

    A site that is there is refused and left as it is; one whose making was interrupted is finished. With an invitation,
    a site that is there joins one more federation. No private key is in the request that is written.
    """
    quiet_libraries(verbose=verbose)
    from fedtune_client.folder import begun

    folder = folder_of(site)
    if invitation is None:
        made = _begun(folder, _given(name), key_file)
        show(output, _document(made), _lines(made, "edit site.yaml and policy.yaml, then: fedtune client policy check"))
        return
    raw = read_paper(invitation, "invitation")
    invited = _read(raw, name)
    path = place_for_request(out, invited.offer.site)
    tell(output, *_invited(invited))
    confirm("is that the fingerprint that the coordinator reads to you by telephone?", yes=yes)
    is_new = begun(folder) is None
    made = _begun(folder, invited.offer.site, key_file) if is_new else opened(folder.path, key_file)
    told = _answered(made, raw, invited, path)
    first = _lines(made, "edit site.yaml and policy.yaml while the coordinator decides") if is_new else []
    show(output, _document(made) | told, [*first, *_sent(told)])


def _given(name: str | None) -> str:
    if name is None:
        hint = "fedtune client init NAME, or --invitation FILE"
        raise ConfigError("missing-value", "the site needs a name, or an invitation that has one", hint=hint)
    return name


def _read(raw: bytes, name: str | None) -> "Invitation":
    from fedtune.pki.invitations import read_invitation

    invited = read_invitation(raw, datetime.now(UTC))
    if name not in {None, invited.offer.site}:
        message = f"the invitation is for {invited.offer.site}, not for {name}"
        raise ConfigError("other-name", message, hint="leave the name out, or ask for another invitation")
    return invited


def _answered(made: "OpenSite", raw: bytes, invited: "Invitation", path: Path) -> dict[str, Any]:
    from fedtune_client.enrolment import answer, request_fingerprint

    request = answer(made, raw, datetime.now(UTC))
    write_request(path, request)
    return {
        "federation": invited.offer.federation,
        "coordinator": invited.offer.address,
        "coordinator_fingerprint": invited.fingerprint,
        "request": str(path),
        "request_fingerprint": request_fingerprint(request),
    }


def _begun(folder: "SiteFolder", name: str, key_file: Path | None) -> "OpenSite":
    from fedtune_client.folder import begin, require_unused

    require_unused(folder, name)
    interrupted = (folder.vault / "vault.json").exists()  # then the passphrase of its vault is asked for once
    secret = unlock(key_file, new=not interrupted)
    with site_disk(folder.path):
        return begin(folder, name, secret)


def _document(made: "OpenSite") -> dict[str, Any]:
    return {
        "site": made.facts.name,
        "folder": str(made.folder.path.absolute()),
        "identity": made.journal.chain.site,
        "public_key": made.journal.chain.public_key,
    }


def _lines(made: "OpenSite", following: str) -> list[str]:
    name = made.facts.name
    return [
        f"the site {name} is made in {made.folder.path}:",
        "  site.yaml    where its data sets and base models are: edit it",
        "  policy.yaml  what it takes part in: edit it",
        f"  {name}.journal  what it decides and spends, signed; back it up after every study",
        "  vault/       its keys, encrypted; without the passphrase or key file nobody opens it",
        f"  public.key   {made.journal.chain.public_key}",
        "tell the public key to whoever is to check the journal, now and by another way than the journal",
        f"next: {following}",
    ]


def _invited(invited: "Invitation") -> list[str]:
    offer = invited.offer
    return [
        f"an invitation of {offer.site} to the federation {offer.federation}",
        f"  coordinator: {offer.address}",
        f"  fingerprint: {invited.fingerprint}",
        f"  answer it until {offer.expires[:16].replace('T', ' ')} UTC",
    ]


def _sent(told: dict[str, Any]) -> list[str]:
    return [
        f"{told['request']} answers the invitation; it holds no private key. Send it to the coordinator,",
        "  and read this fingerprint of it out by telephone:",
        f"  {told['request_fingerprint']}",
        "next, with the grant that comes back: fedtune client join GRANT",
    ]
