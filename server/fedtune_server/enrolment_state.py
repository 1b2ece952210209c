"""Who is invited, enrolled and revoked, as the lines of the log add up, and the rules by which a request is judged.

    nothing --invited--> open --enrolled--> member --site-revoked--> revoked --invited--> open …
                          |                 ^    |
                          +--withdrawn      +----+ enrolled (renewal)

The rules:

1. a name has one open invitation, and none while it is a member's; an invitation enrols once, in its time, its name;
2. a name belongs to the journal that was first enrolled under it for good, and a journal's first record says its name;
3. a journal's keys only grow: a request whose lineage does not begin with the keys known so far is of another branch;
4. a TLS key is certified once; no key is another site's or was revoked;
5. a renewal replaces the newest certificate; the one before it stays good until the renewal after, so that a site is
   never without, and what was granted before these two is revoked.

No I/O; the time is given.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from datetime import datetime
from typing import Literal

from fedtune.errors import EnrolmentError
from fedtune.pki.documents import instant
from fedtune.pki.grants import Grant
from fedtune.pki.invitations import Offer, require_open
from fedtune.pki.keys import key_name, read_node_key
from fedtune.pki.lineage import Lineage
from fedtune.pki.requests import Applicant, Request, check_request
from fedtune.pki.revocation import Revocations
from fedtune_server.enrolment_log import (
    CertificateRevoked,
    Enrolled,
    Entry,
    Founded,
    Invited,
    Line,
    SiteRevoked,
    Withdrawn,
)

Occasion = Literal["new", "return", "renewal", "again"]
TokenOf = Callable[[Offer], str]


@dataclass(frozen=True, slots=True)
class SigningKey:
    """A signing key that was enrolled, and when its site replaced it (None: in force, or revoked before that)."""

    key: str
    until: datetime | None = None


@dataclass(frozen=True, slots=True)
class Member:
    """A site: its journal, the lineage of its keys, those that it was enrolled with, and its grants in standing.

    The newest grant is the last; `serials` and `key_names` are all it ever had. `revoked` is why, None for a member.
    """

    site: str
    identity: str
    lineage: tuple[str, ...]
    signing_keys: tuple[SigningKey, ...]
    grants: tuple[Grant, ...]
    serials: frozenset[str]
    key_names: frozenset[str]
    since: str
    revoked: str | None = None

    @property
    def grant(self) -> Grant:
        """The newest grant."""
        return self.grants[-1]


@dataclass(frozen=True, slots=True)
class Verdict:
    """A request that may be approved: by whom, on what occasion, and under which invitation."""

    site: str
    applicant: Applicant
    occasion: Occasion
    offer: Offer | None


@dataclass(slots=True)
class State:
    """Views of the log; nothing is in them that the lines do not say."""

    federation: str = ""
    coordinator: str = ""
    offers: dict[str, Offer] = field(default_factory=dict)
    closed: dict[str, Literal["used", "withdrawn"]] = field(default_factory=dict)
    members: dict[str, Member] = field(default_factory=dict)
    granted: dict[str, Grant] = field(default_factory=dict)
    revocations: Revocations = field(default_factory=Revocations)

    def apply(self, line: Line) -> None:
        """Take one more line."""
        entry: Entry = line.entry
        if isinstance(entry, Founded):
            self.federation, self.coordinator = entry.federation, entry.coordinator
        elif isinstance(entry, Invited):
            self.offers[entry.offer.id] = entry.offer
        elif isinstance(entry, Withdrawn):
            self.closed[entry.invitation] = "withdrawn"
        elif isinstance(entry, Enrolled):
            self._enrol(entry, line.time)
        elif isinstance(entry, CertificateRevoked):
            self._revoke_certificate(entry.serial)
        elif isinstance(entry, SiteRevoked):
            self._revoke_site(entry)

    def open_offer(self, site: str) -> Offer | None:
        """Return the invitation of a site that was neither used nor withdrawn; its time may be over."""
        return next((o for o in self.offers.values() if o.site == site and o.id not in self.closed), None)

    def member(self, site: str) -> Member:
        """Return a site that takes part. Error: `enrolment.not-enrolled`."""
        found = self.members.get(site)
        if found is None or found.revoked is not None:
            problem = "is not enrolled" if found is None else "was revoked"
            hint = f"invite it: fedtune server enrol add {site}"
            raise EnrolmentError("not-enrolled", f"the site {site} {problem}", hint=hint)
        return found

    def require_free(self, site: str) -> None:
        """Refuse to invite a name that is a member's, or differs from another name by case alone: `.name-taken`."""
        for known in {*self.members, *(offer.site for offer in self.offers.values())}:
            is_member = known == site and known in self.members and self.members[known].revoked is None
            if is_member or (known != site and known.casefold() == site.casefold()):
                hint = "choose another name; a member renews, and comes back after: fedtune server enrol revoke"
                raise EnrolmentError("name-taken", f"the name {site} is taken by the site {known}", hint=hint)

    def judge(self, request: Request, lineage: Lineage, token_of: TokenOf, now: datetime) -> Verdict:
        """Return what a request comes to, after every rule; its own signature was checked when it was read.

        Errors: `enrolment.other-federation`, `.unknown-invitation`, `.other-site`, `.wrong-token`, `.invitation-used`,
        `.invitation-withdrawn`, `.expired-invitation`, `.not-enrolled`, `.stale-request`, `.bad-key`, `.no-proof`,
        `.other-journal`, `.bad-lineage`, `.revoked-key`, `.key-taken`.
        """
        claims = request.claims
        if claims.federation != self.federation:
            message = f"the request is for the federation {claims.federation}"
            raise EnrolmentError("other-federation", message, hint=f"this is the federation {self.federation}")
        offer = None if claims.invitation is None else self._offer(request, claims.invitation, token_of, now)
        if offer is None and (serial := self.member(claims.site).grant.serial) != claims.replaces:
            hint = f"let {claims.site} write a new request: fedtune client renew"
            raise EnrolmentError("stale-request", f"the request does not replace certificate {serial}", hint=hint)
        applicant = check_request(request, lineage)
        self._check_journal(claims.site, lineage)
        self._check_keys(claims.site, applicant)
        occasion: Occasion = "renewal" if offer is None else "return" if claims.site in self.members else "new"
        return Verdict(claims.site, applicant, occasion, offer)

    def _offer(self, request: Request, invitation: str, token_of: TokenOf, now: datetime) -> Offer:
        offer, site = self.offers.get(invitation), request.claims.site
        if offer is None:
            raise EnrolmentError("unknown-invitation", f"{site} answers an invitation that was never made", hint=_ANEW)
        if offer.site != site:
            raise EnrolmentError("other-site", f"{site} answers the invitation of {offer.site}", hint=_ANEW)
        if not request.has_token(token_of(offer)):
            message = f"the request was not made with the invitation of {site}"
            raise EnrolmentError("wrong-token", message, hint="somebody may try to enrol in its place: ask the site")
        if closed := self.closed.get(invitation):
            raise EnrolmentError(f"invitation-{closed}", f"the invitation of {site} was {closed} before", hint=_ANEW)
        require_open(offer, now)
        return offer

    def _check_journal(self, site: str, lineage: Lineage) -> None:
        known = self.members.get(site)
        if known is not None and known.identity != lineage.identity:
            hint = "restore the site's own journal; a site that begins anew needs another name"
            raise EnrolmentError("other-journal", f"the name {site} belongs to another site's journal", hint=hint)
        if known is not None and not lineage.extends(known.lineage):
            hint = "restore the site's newest journal and vault"
            raise EnrolmentError("bad-lineage", f"the keys of {site} do not follow from those known", hint=hint)

    def _check_keys(self, site: str, applicant: Applicant) -> None:
        tls, used = key_name(applicant.tls_key), {applicant.lineage.key, key_name(applicant.node_key)}
        if any(self.revocations.is_revoked(key=key) for key in {tls, *used}):
            hint = "let the site make a new key (fedtune client key rotate) and answer again"
            raise EnrolmentError("revoked-key", f"{site} comes with a key that was revoked", hint=hint)
        for member in self.members.values():
            taken = member.key_names & ({tls} if member.site == site else applicant.key_names)
            if taken:
                message = f"{site} comes with a key of the site {member.site}"
                raise EnrolmentError("key-taken", message, hint="let the site make keys of its own, and answer again")

    def _enrol(self, entry: Enrolled, time: str) -> None:
        grant, known = entry.grant, self.members.get(entry.grant.site)
        if entry.invitation is not None:
            self.closed[entry.invitation] = "used"
        self.granted[grant.request] = grant
        standing = (grant,) if known is None or known.revoked is not None else (*known.grants, grant)
        self.members[grant.site] = Member(
            site=grant.site,
            identity=grant.identity,
            lineage=entry.keys,
            signing_keys=_signing_keys(known, entry, instant(time)),
            grants=standing[-2:],
            serials=(known.serials if known else frozenset()) | {grant.serial},
            key_names=(known.key_names if known else frozenset()) | {*entry.keys, *key_names(grant)},
            since=known.since if known else time,
        )
        self.revocations = self.revocations.without_name(grant.site)
        for old in standing[:-2]:
            self._refuse(old, standing[-2:])

    def _revoke_certificate(self, serial: str) -> None:
        for member in self.members.values():
            for grant in member.grants:
                if grant.serial == serial:
                    self._refuse(grant, (grant,))

    def _refuse(self, old: Grant, standing: tuple[Grant, ...]) -> None:
        """Revoke a grant's certificate and keys, but for a node key that stays in use."""
        tls, node = key_names(old)
        revocations = self.revocations.with_certificate(old.serial, old.site, tls)
        if all(grant.node_key != old.node_key for grant in standing):
            revocations = replace(revocations, keys={**revocations.keys, node: old.site})
        self.revocations = revocations

    def _revoke_site(self, entry: SiteRevoked) -> None:
        member = self.members[entry.site]
        self.members[entry.site] = replace(member, revoked=entry.reason)
        self.revocations = self.revocations.with_site(entry.site, member.serials, member.key_names)


def key_names(grant: Grant) -> tuple[str, str]:
    """Return the SHA-256 of a grant's TLS key and of its node key."""
    return grant.tls_key_name, key_name(read_node_key(grant.node_key))


def _signing_keys(known: Member | None, entry: Enrolled, now: datetime) -> tuple[SigningKey, ...]:
    """Return the keys that sign, or signed while they were enrolled; one that was replaced before is not among them."""
    before = known.signing_keys if known else ()
    if before and before[-1].key == entry.keys[-1]:
        return before
    if before and before[-1].key in entry.keys[:-1]:
        end = min(instant(entry.ends[entry.keys.index(before[-1].key)]), now)
        before = (*before[:-1], replace(before[-1], until=end))
    return (*before, SigningKey(entry.keys[-1]))


_ANEW = "make it a new invitation: fedtune server enrol add"
