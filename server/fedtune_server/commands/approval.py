"""`fedtune server enrol show` and `approve`: a person compares a fingerprint, and a site takes part."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from fedtune.commands.asking import confirm
from fedtune.commands.options import Format, OutputFormat, Verbose
from fedtune.commands.screen import quiet_libraries
from fedtune_server.commands.shared import Dir, KeyFile, Yes, opened, place_for, read_paper, show, tell, write_paper
from fedtune_server.commands.unlocking import unlock

if TYPE_CHECKING:
    from fedtune_server.enrolment import Candidate, Enrolment

Request = Annotated[Path, typer.Argument(metavar="REQUEST", help="The file that the site has sent.")]
occasions = {
    "new": "it enrols for the first time, with its invitation",
    "return": "it was revoked, and comes back with a new invitation",
    "renewal": "it is enrolled, and asks for its next certificate",
    "again": "this request was approved before; its grant is written again",
}


def show_request(
    request: Request, *, folder: Dir = None, output: Format = OutputFormat.text, verbose: Verbose = False
) -> None:
    """Judge a request by every rule and show whose it is; nothing is decided."""
    quiet_libraries(verbose=verbose)
    enrolment = opened(folder).enrolment
    candidate = enrolment.examine(read_paper(request, "request"))
    next_step = f"next: fedtune server enrol approve {request}"
    show(output, _document(enrolment, candidate), [*_lines(enrolment, candidate), next_step])


def approve(  # noqa: PLR0913 - a command's options
    request: Request,
    *,
    out: Annotated[
        Path | None, typer.Option(metavar="GRANT", help="The file to write; else SITE.grant here.", show_default=False)
    ] = None,
    yes: Yes = False,
    folder: Dir = None,
    key_file: KeyFile = None,
    output: Format = OutputFormat.text,
    verbose: Verbose = False,
) -> None:
    """Show whose request it is, ask, and enrol the site or renew it: write the grant that it takes part with.

    The authority is unlocked after the question. The same request gets the same grant again, which needs neither.
    """
    quiet_libraries(verbose=verbose)
    from fedtune.pki.authority import Authority

    coordinator, raw = opened(folder), read_paper(request, "request")
    enrolment = coordinator.enrolment
    candidate = enrolment.examine(raw)
    document = _document(enrolment, candidate)
    path = place_for(out, candidate.site, "grant")
    tell(output, *_lines(enrolment, candidate))
    if candidate.occasion == "again":
        written = enrolment.grant(candidate.site)
    else:
        confirm(_question(candidate), yes=yes)
        authority = Authority.load(coordinator.folder.authority, unlock(key_file))
        written = enrolment.approve(raw, authority, coordinator.settings.address)
    write_paper(path, written, f"fedtune server enrol grant {candidate.site}")
    more = _granted(enrolment, candidate.site)
    lines = [
        f"{path}: the grant of {candidate.site}, certificate {more['serial']}, good until {more['expires']}",
        f"send it to {candidate.site}; it holds no secret. Back up enrolment/: it has one more line",
    ]
    show(output, document | more | {"file": str(path)}, lines)


def _document(enrolment: "Enrolment", candidate: "Candidate") -> dict[str, Any]:
    return {
        "site": candidate.site,
        "occasion": candidate.occasion,
        "fingerprint": candidate.fingerprint,
        "identity": candidate.identity,
        "key": candidate.key,
        "node_key": candidate.node_key,
        "changes": _changes(enrolment, candidate),
    }


def _changes(enrolment: "Enrolment", candidate: "Candidate") -> list[str]:
    """Say which keys are others than the site was enrolled with last; its TLS key is a new one each time."""
    known = next((member.grant for member in enrolment.members if member.site == candidate.site), None)
    if known is None or candidate.occasion == "again":
        return []
    found = {"signing key": (known.key, candidate.key), "node key": (known.node_key, candidate.node_key)}
    return [what for what, (before, now) in found.items() if before != now]


def _lines(enrolment: "Enrolment", candidate: "Candidate") -> list[str]:
    changes = _changes(enrolment, candidate)
    return [
        f"the site {candidate.site}: {occasions[candidate.occasion]}",
        f"  fingerprint  {candidate.fingerprint}",
        f"  journal      {candidate.identity}",
        f"  signs with   {candidate.key}",
        *([f"  changed since it was enrolled last: {' and '.join(changes)}"] if changes else []),
    ]


def _question(candidate: "Candidate") -> str:
    """Ask for the comparison that a first enrolment rests on; a renewal is signed by the site that is known."""
    if candidate.occasion == "renewal":
        return f"renew {candidate.site}, request {candidate.fingerprint}?"
    return f"has {candidate.site} said by telephone that its request is {candidate.fingerprint}?"


def _granted(enrolment: "Enrolment", site: str) -> dict[str, Any]:
    from fedtune.pki.certificates import read_pem

    given = next(member.grant for member in enrolment.members if member.site == site)
    until = read_pem(given.certificate).not_valid_after_utc
    return {"serial": given.serial, "expires": f"{until:%Y-%m-%d}", "address": given.address}
