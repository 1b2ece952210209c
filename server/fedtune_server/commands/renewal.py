"""`fedtune server renew`: the coordinator's own certificate is made anew, and the authority's."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Annotated, Any

import typer

from fedtune.commands.options import Format, OutputFormat, Verbose
from fedtune.commands.screen import quiet_libraries
from fedtune_server.commands.shared import Dir, Hosts, KeyFile, day_of, opened, show
from fedtune_server.commands.unlocking import unlock

if TYPE_CHECKING:
    from cryptography.x509 import Certificate

    from fedtune_server.certificate import Standing
    from fedtune_server.commands.shared import OpenCoordinator
    from fedtune_server.enrolment import Enrolment


@dataclass(frozen=True, slots=True)
class Due:
    """What a coordinator's certificates should be, and why each of the two is made anew (empty: it is not).

    `hosts` are all that it is to be certified for, `certified` those of them that every site's authority permits;
    `waiting` are the others, with the sites that have to renew first.
    """

    standing: "Standing"
    hosts: tuple[str, ...]
    certified: tuple[str, ...]
    waiting: Mapping[str, list[str]]
    certificate: str
    authority: str


def renew(
    *,
    host: Hosts = None,
    force: Annotated[
        bool, typer.Option("--force", help="Renew the certificate although it is good, as when its key was seen.")
    ] = False,
    folder: Dir = None,
    key_file: KeyFile = None,
    output: Format = OutputFormat.text,
    verbose: Verbose = False,
) -> None:
    """Make this coordinator's certificate anew where it is due, and the authority's; sites' certificates stay good.

    Due is what has less than a third of its life left, or lacks the address in coordinator.yaml or a --host. A host
    that the authority could not certify so far is certified once every site has renewed: until then they would refuse
    the certificate.
    """
    quiet_libraries(verbose=verbose)
    from fedtune.pki.authority import write_coordinator
    from fedtune_server.certificate import read_standing, renew_authority

    coordinator, now = opened(folder), datetime.now(UTC)
    at, due = coordinator.folder.authority, due_of(coordinator, now, host or ())
    if due.certificate or due.authority or force:
        authority = renew_authority(at, unlock(key_file), due.hosts, now)
        if due.certificate or force:
            write_coordinator(at, authority, due.certified, now)
    document = _document(due, read_standing(at))
    show(output, document, _lines(document))


def due_of(coordinator: "OpenCoordinator", now: datetime, more: Iterable[str] = ()) -> Due:
    """Compare a coordinator's certificates with its address, `more` hosts, the time, and what its sites trust."""
    from fedtune.pki.names import host
    from fedtune_server.certificate import agreed, read_standing

    standing = read_standing(coordinator.folder.authority)
    wanted = [*standing.hosts, coordinator.settings.host, *more]
    hosts = tuple(dict.fromkeys(str(host(text)) for text in wanted))
    trusted = _trusted(coordinator.enrolment)
    certified = agreed(hosts, trusted.values())
    waiting = {
        name: sorted(site for site, authority in trusted.items() if not agreed([name], [authority]))
        for name in hosts
        if name not in certified
    }
    reasons = (standing.coordinator_due(certified, now), standing.authority_due(hosts, now))
    return Due(standing, hosts, certified, waiting, *reasons)


def _trusted(enrolment: "Enrolment") -> "dict[str, Certificate]":
    """Return the authority's certificate that each site has, or will have by its invitation."""
    from fedtune.pki.certificates import read_pem

    invited = {offer.site: offer.authority for offer in enrolment.offers}
    enrolled = {member.site: member.grant.authority for member in enrolment.members if member.revoked is None}
    return {site: read_pem(text) for site, text in {**invited, **enrolled}.items()}


def _document(due: Due, now: "Standing") -> dict[str, Any]:
    return {
        "renewed": now.coordinator != due.standing.coordinator,
        "authority_renewed": now.authority != due.standing.authority,
        "because": {"certificate": due.certificate, "authority": due.authority},
        "hosts": list(now.certified),
        "waiting": dict(due.waiting),
        "certificate_expires": None if now.coordinator is None else day_of(now.coordinator),
        "authority_expires": day_of(now.authority),
    }


def _lines(found: dict[str, Any]) -> list[str]:
    because = {what: f" ({why})" if why else "" for what, why in found["because"].items()}
    own = f"the certificate of {', '.join(found['hosts'])} is good until {found['certificate_expires']}"
    authority = f"the authority is good until {found['authority_expires']}"
    lines = []
    if found["renewed"]:
        lines += [f"renewed{because['certificate']}: {own}"]
        lines += ["a coordinator that runs shows it after a restart: fedtune server up"]
    if found["authority_renewed"]:
        lines += [f"renewed{because['authority']}: {authority}, its key is the same"]
        lines += ["sites take it with their next grant: let each of them renew (fedtune client renew)"]
    for host, sites in found["waiting"].items():
        lines += [
            f"not certified yet: {host}, which {', '.join(sites)} would refuse; once they have renewed, do so again"
        ]
    return lines or [f"nothing is due: {own}; {authority}"]
