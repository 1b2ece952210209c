"""The site's place in its federation: the papers fit together, and the certificate is good for a while."""

from __future__ import annotations

from collections.abc import Iterator
from datetime import datetime

from fedtune.pki.certificates import check_authority, check_site, is_due, read_pem
from fedtune_client.doctor.finding import Level, Subject, checked
from fedtune_client.enrolment import membership
from fedtune_client.vault import signing_key

_RENEW = "fedtune client renew"


@checked("membership")
def member(subject: Subject) -> Iterator[tuple[Level, str, str]]:
    """Whether the coordinator knows the key that the site signs with."""
    taken, site = subject.taken, subject.site
    if taken is None or site is None:
        return
    granted = membership(site.vault, taken.federation).granted
    key = granted.grant.key if granted else ""
    signing_key(site.vault, key)
    yield "ok", f"{taken.site} is enrolled in {taken.federation}", ""
    if key != site.journal.chain.public_key:
        text = "the signing key was rotated, and the coordinator knows the old one; messages are signed with that"
        yield "warn", text, _RENEW


@checked("certificate")
def certificate(subject: Subject) -> Iterator[tuple[Level, str, str]]:
    """Whether the certificate is this site's, by the federation's authority, and how long it is good."""
    taken, now = subject.taken, subject.now
    if taken is None:
        return
    own, authority = read_pem(taken.certificate), read_pem(taken.authority)
    check_authority(authority, taken.federation, now)
    check_site(own, authority, taken.site, now)
    until = f"good until {own.not_valid_after_utc:%Y-%m-%d}, {_days(own.not_valid_after_utc, now)}"
    yield ("warn", f"{until}: it is due", _RENEW) if is_due(own, now) else ("ok", until, "")
    if is_due(authority, now):
        text = f"the federation's authority ends on {authority.not_valid_after_utc:%Y-%m-%d}"
        yield "warn", text, "ask the coordinator to renew it (fedtune server renew), then renew here"


def _days(end: datetime, now: datetime) -> str:
    days = (end - now).days
    return "1 day" if days == 1 else f"{days} days"
