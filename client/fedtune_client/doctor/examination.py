"""All checks in the order in which a person would mend what they find."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from datetime import datetime

from fedtune.errors import FedtuneError
from fedtune_client.channel import federation_of
from fedtune_client.doctor import decisions, hardware, holdings, membership, network, site
from fedtune_client.doctor.finding import Check, Finding, Subject, failure
from fedtune_client.enrolment import credentials
from fedtune_client.folder import SiteFolder, open_site_folder
from fedtune_client.vault import Unlock
from fedtune_client.view import view

CHECKS: tuple[Check, ...] = (
    site.journal,
    site.messages,
    membership.member,
    membership.certificate,
    network.resolution,
    network.coordinator,
    network.ways_out,
    hardware.disk,
    hardware.device,
    holdings.models,
    holdings.data_sets,
    decisions.policy,
    decisions.budget,
    decisions.plans,
    site.client,
)


def examine(
    folder: SiteFolder, unlock: Callable[[], Unlock], federation: str | None, now: datetime
) -> Iterator[Finding]:
    """Yield what every check finds. Errors: those of `site.yaml`, without which there is nothing to look at."""
    subject = Subject(folder, folder.facts(), now)
    try:
        subject = replace(subject, seen=view(folder))
    except FedtuneError as error:
        yield failure("journal", error)
    try:
        subject = replace(subject, site=open_site_folder(folder, unlock()))
        yield Finding("vault", "ok", "it opens")
    except FedtuneError as error:
        yield failure("vault", error)
    try:
        if subject.site is not None:
            vault = subject.site.vault
            subject = replace(subject, taken=credentials(vault, federation_of(vault, federation)))
    except FedtuneError as error:
        yield failure("membership", error)
    for check in CHECKS:
        yield from check(subject)
