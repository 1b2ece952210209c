"""`fedtune server enrol`: who takes part; invited, written again, withdrawn, revoked.

Requests are judged in `approval`, lists made in `members`. No private key of a site is ever in a file that travels.
"""

from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from fedtune.commands.asking import confirm
from fedtune.commands.options import Format, OutputFormat, Verbose
from fedtune.commands.screen import quiet_libraries
from fedtune.errors import ConfigError, EnrolmentError
from fedtune_server.commands import approval, members
from fedtune_server.commands.shared import Dir, Yes, opened, place_for, show, write_paper

if TYPE_CHECKING:
    from fedtune.pki.invitations import Offer
    from fedtune_server.enrolment import Enrolment

app = typer.Typer(
    help="Who takes part in the federation.",
    epilog="A site enrols by three files: the invitation that `add` writes, the request that the site answers it with, "
    "and the grant that `approve` writes. Only the invitation is a secret.",
    no_args_is_help=True,
)
longest_reason = 1000  # characters that the enrolment's log holds

SiteName = Annotated[str, typer.Argument(metavar="SITE", help="A site's name.")]
Reason = Annotated[str, typer.Option(metavar="TEXT", help="Why; it stands in the log.", show_default=False)]


@app.callback()
def group() -> None:
    """Say who takes part in the federation."""


@app.command()
def add(  # noqa: PLR0913 - a command's options
    site: Annotated[str, typer.Argument(metavar="SITE", help="The name that the site's journal has, or will have.")],
    *,
    out: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="The file to write; else SITE.invitation here.", show_default=False),
    ] = None,
    days: Annotated[int, typer.Option(min=1, max=365, metavar="N", help="How long it may be answered.")] = 14,
    yes: Yes = False,
    folder: Dir = None,
    output: Format = OutputFormat.text,
    verbose: Verbose = False,
) -> None:
    """Invite a site: write the file that it begins with, and say the fingerprint to read out to it by telephone.

    An earlier invitation that is open is withdrawn, after a question; `enrol invitation` writes that one again instead.
    """
    quiet_libraries(verbose=verbose)
    from fedtune.pki.authority import read_authority

    coordinator = opened(folder)
    _require_usable(site)
    enrolment, path = coordinator.enrolment, place_for(out, site, "invitation")
    earlier = _open_offer(enrolment, site)
    if earlier is not None:
        confirm(f"{site} has an invitation that is open until {earlier.expires[:10]}: withdraw it?", yes=yes)
    authority = read_authority(coordinator.folder.authority)
    raw = enrolment.invite(site, coordinator.settings.address, authority, timedelta(days=days))
    _write_invitation(output, path, raw, withdrawn=earlier is not None)


@app.command()
def invitation(
    site: SiteName,
    *,
    out: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="The file to write; else SITE.invitation here.", show_default=False),
    ] = None,
    folder: Dir = None,
    output: Format = OutputFormat.text,
    verbose: Verbose = False,
) -> None:
    """Write the open invitation of a site again, the same bytes."""
    quiet_libraries(verbose=verbose)
    raw = opened(folder).enrolment.invitation(site)
    _write_invitation(output, place_for(out, site, "invitation"), raw, withdrawn=False)


@app.command()
def withdraw(
    site: SiteName, *, folder: Dir = None, output: Format = OutputFormat.text, verbose: Verbose = False
) -> None:
    """Withdraw the open invitation of a site: an answer to it is refused from now on."""
    quiet_libraries(verbose=verbose)
    opened(folder).enrolment.withdraw(site)
    show(output, {"site": site, "withdrawn": True}, [f"the invitation of {site} is withdrawn"])


@app.command()
def grant(
    site: SiteName,
    *,
    out: Annotated[
        Path | None, typer.Option(metavar="FILE", help="The file to write; else SITE.grant here.", show_default=False)
    ] = None,
    folder: Dir = None,
    output: Format = OutputFormat.text,
    verbose: Verbose = False,
) -> None:
    """Write the newest grant of a site again, the same bytes."""
    quiet_libraries(verbose=verbose)
    enrolment, path = opened(folder).enrolment, place_for(out, site, "grant")
    write_paper(path, enrolment.grant(site), f"fedtune server enrol grant {site}")
    show(output, {"site": site, "file": str(path)}, [f"{path}: the grant of {site}; it holds no secret"])


@app.command()
def revoke(
    site: Annotated[str, typer.Argument(metavar="[SITE]", help="A site, with every key it ever had.")] = "",
    *,
    serial: Annotated[
        str, typer.Option(metavar="HEX", help="One certificate instead, by its serial number.", show_default=False)
    ] = "",
    reason: Reason,
    folder: Dir = None,
    output: Format = OutputFormat.text,
    verbose: Verbose = False,
) -> None:
    """Refuse a site, or one certificate of a site, from now on; a coordinator that runs need not be restarted.

    Its listener and its envelopes look at each request, also on connections that are open. A revoked site comes back
    with an invitation and new keys; one whose certificate alone was revoked asks for another with `client renew`.
    """
    quiet_libraries(verbose=verbose)
    if bool(site) == bool(serial):
        hint = "fedtune server enrol revoke SITE --reason TEXT, or: --serial HEX --reason TEXT"
        raise ConfigError("bad-arguments", "name either a site or one certificate", hint=hint)
    _require_reason(reason)
    enrolment = opened(folder).enrolment
    number = serial.replace(":", "").lower().rjust(40, "0") if serial else None
    if number is None:
        enrolment.revoke(site, reason)
    else:
        enrolment.revoke_certificate(number, reason)
        site = enrolment.revocations.serials[number]
    lines = [
        f"certificate {number} of {site} is revoked" if number else f"the site {site} is revoked, with all its keys",
        "it holds at once, also in a coordinator that runs: nothing has to be restarted",
        f"to let it come back: {'fedtune client renew, at the site' if number else f'fedtune server enrol add {site}'}",
    ]
    show(output, {"site": site, "serial": number, "reason": reason, "revoked": True}, lines)


app.command("show")(approval.show_request)
app.command("approve")(approval.approve)
app.command("list")(members.list_members)


def _require_usable(site: str) -> None:
    """Refuse a name that no site can have, `enrolment.bad-name`, and one that has a meaning, `.reserved-name`."""
    from fedtune.pki.names import check_site_name
    from fedtune_server.initial import RESERVED

    check_site_name(site)
    if site.casefold() in RESERVED:
        hint = "let the site begin under another name: fedtune client init NAME"
        raise EnrolmentError("reserved-name", f"no site can be called {site}", hint=hint)


def _open_offer(enrolment: "Enrolment", site: str) -> "Offer | None":
    """Return the invitation of a site that can still be answered."""
    from fedtune.pki.documents import instant

    now = datetime.now(UTC)
    return next((o for o in enrolment.offers if o.site == site and now <= instant(o.expires)), None)


def _write_invitation(output: OutputFormat, path: Path, raw: bytes, *, withdrawn: bool) -> None:
    from fedtune.pki.invitations import read_invitation

    made = read_invitation(raw, datetime.now(UTC))
    offer = made.offer
    write_paper(path, raw, f"fedtune server enrol invitation {offer.site}")
    document = {
        "site": offer.site,
        "file": str(path),
        "fingerprint": made.fingerprint,
        "federation": offer.federation,
        "address": offer.address,
        "expires": offer.expires,
        "withdrawn_earlier": withdrawn,
    }
    lines = [
        f"{path}: the invitation of {offer.site}, to be answered until {offer.expires[:16]}Z",
        f"hand it to {offer.site} by a way that others do not read: it holds a token that is good once",
        "then read this fingerprint out to it by telephone, which must be what it sees:",
        f"  {made.fingerprint}",
        f"the site answers it: fedtune client init --invitation {path.name}",
        "next, with the request that comes back: fedtune server enrol approve REQUEST",
    ]
    show(output, document, lines)


def _require_reason(reason: str) -> None:
    if not reason.strip() or len(reason) > longest_reason or not reason.isprintable():
        message = f"--reason must be one line of text, at most {longest_reason} characters"
        raise ConfigError("bad-reason", message, hint="--reason 'left the federation'")
