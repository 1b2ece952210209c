"""`fedtune server enrol list`: members, invitations and certificates, with the days that are left."""

from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any

from fedtune.commands.options import Format, OutputFormat, Verbose
from fedtune.commands.screen import quiet_libraries
from fedtune_server.commands.renewal import due_of
from fedtune_server.commands.shared import Dir, add, opened, show, table

if TYPE_CHECKING:
    from cryptography.x509 import Certificate

    from fedtune.pki.grants import Grant
    from fedtune.pki.invitations import Offer
    from fedtune_server.commands.shared import OpenCoordinator
    from fedtune_server.enrolment import Enrolment
    from fedtune_server.enrolment_state import Member


def list_members(*, folder: Dir = None, output: Format = OutputFormat.text, verbose: Verbose = False) -> None:
    """List the sites, the invitations that are open, every certificate in standing, and what is due to be renewed.

    The file that a running coordinator's listener reads revocations from is written again if it is not as it should be.
    """
    quiet_libraries(verbose=verbose)
    coordinator, now = opened(folder), datetime.now(UTC)
    enrolment = coordinator.enrolment
    document = {
        "federation": enrolment.federation,
        "members": [_member(enrolment, member, now) for member in enrolment.members],
        "invitations": [_invitation(offer, now) for offer in enrolment.offers],
        "own": _own(coordinator, now),
    }
    show(output, document, [*_tables(document), *_due(document)])


def _member(enrolment: "Enrolment", member: "Member", now: datetime) -> dict[str, Any]:
    certificates = [_certificate(enrolment, grant, now) for grant in member.grants]
    return {
        "site": member.site,
        "state": "member" if member.revoked is None else "revoked",
        "reason": member.revoked,
        "since": member.since,
        "identity": member.identity,
        "key": member.grant.key,
        "node_key": member.grant.node_key,
        "certificates": certificates,
        "renewal_due": member.revoked is None and (certificates[-1]["due"] or certificates[-1]["revoked"]),
    }


def _certificate(enrolment: "Enrolment", grant: "Grant", now: datetime) -> dict[str, Any]:
    from fedtune.pki.certificates import read_pem

    is_revoked = enrolment.revocations.is_revoked(serial=grant.serial)
    return {"serial": grant.serial, **_span(read_pem(grant.certificate), now), "revoked": is_revoked}


def _span(certificate: "Certificate", now: datetime) -> dict[str, Any]:
    from fedtune.pki.certificates import is_due

    until = certificate.not_valid_after_utc
    return {"expires": f"{until:%Y-%m-%d}", "days_left": (until - now).days, "due": is_due(certificate, now)}


def _invitation(offer: "Offer", now: datetime) -> dict[str, Any]:
    from fedtune.pki.documents import instant

    is_over = now > instant(offer.expires)
    return {"site": offer.site, "issued": offer.issued, "expires": offer.expires, "expired": is_over}


def _own(coordinator: "OpenCoordinator", now: datetime) -> dict[str, Any]:
    """Say the same of the coordinator's own two certificates; None for one that cannot be read."""
    due = due_of(coordinator, now)
    certificate = due.standing.coordinator
    return {
        "certificate": None if certificate is None else _span(certificate, now),
        "authority": _span(due.standing.authority, now),
        "renewal_due": bool(due.certificate or due.authority),
    }


def _tables(document: dict[str, Any]) -> list[object]:
    lines: list[object] = [f"the federation {document['federation']}"]
    if document["members"]:
        made = table("site", "state", "since", "certificate", "days left", numbers=("days left",))
        for member in document["members"]:
            _add_member(made, member)
        lines.append(made)
    else:
        lines.append("no site is enrolled: fedtune server enrol add SITE")
    for offer in document["invitations"]:
        until = f"{'expired' if offer['expired'] else 'open until'} {offer['expires'][:16]}Z"
        lines.append(f"invited and not enrolled: {offer['site']}, {until}")
    return lines


def _add_member(made: Any, member: dict[str, Any]) -> None:
    """Add a row for each certificate in standing, the newest first."""
    state = "member" if member["state"] == "member" else f"revoked: {member['reason']}"
    cells = (member["site"], state, member["since"][:10])
    for found in reversed(member["certificates"]):
        left = "revoked" if found["revoked"] else "expired" if found["days_left"] < 0 else found["days_left"]
        add(made, *cells, found["serial"], left)
        cells = ("", "", "")


def _due(document: dict[str, Any]) -> list[str]:
    own, due = document["own"], [member["site"] for member in document["members"] if member["renewal_due"]]
    certificate = own["certificate"]
    left = "none that can be read" if certificate is None else f"{certificate['days_left']} days left"
    lines = [f"this coordinator's certificate: {left}; the authority: {own['authority']['days_left']} days left"]
    if own["renewal_due"]:
        lines.append("due: this coordinator's own: fedtune server renew")
    if due:
        lines.append(f"due: {', '.join(due)}: let each of them renew (fedtune client renew)")
    return lines
