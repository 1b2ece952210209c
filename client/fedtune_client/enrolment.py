"""A site's half of enrolment: it answers an invitation, renews, and keeps what it was granted; its keys stay here.

One item of the vault for each federation, `federation-NAME`, replaced whole: whom the site trusts there, what it has
asked for with the keys of that request, and what it was granted last with the keys of that. So a kill leaves the
membership before or after a step, and a step that is done again gives the same file. Knows no command and no Flower.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, field
from datetime import datetime
from typing import Annotated

import rfc8785
from pydantic import Field, ValidationError

from fedtune.errors import EnrolmentError
from fedtune.journal.chain import moment
from fedtune.journal.journal import Journal
from fedtune.pki.certificates import is_due, read_pem
from fedtune.pki.documents import Id, Strict, fingerprint
from fedtune.pki.grants import Grant, check_grant, read_grant
from fedtune.pki.invitations import Invitation, Offer, read_invitation
from fedtune.pki.keys import (
    new_node_key,
    new_tls_key,
    node_file,
    node_text,
    pem_key,
    private_text,
    read_private_text,
)
from fedtune.pki.lineage import lineage_lines
from fedtune.pki.requests import Claims, Keys, certificate_request, check_request, read_request, write_request
from fedtune_client.folder import OpenSite
from fedtune_client.vault import Vault

_PREFIX = "federation-"
_HexKey = Annotated[str, Field(pattern=r"^[0-9a-f]{64,1024}$", repr=False)]


class Pending(Strict):
    """A request that was made and not yet granted."""

    request: str
    tls_key: _HexKey
    node_key: _HexKey

    @property
    def keys(self) -> Keys:
        """Its private keys."""
        return Keys(read_private_text(self.tls_key), read_private_text(self.node_key))


class Granted(Strict):
    """What was granted last, and the invitation that the site has joined with."""

    invitation: Id
    grant: Grant
    tls_key: _HexKey
    node_key: _HexKey


class Membership(Strict):
    """A site in one federation; `offer` is the invitation that it answered last, without its token."""

    offer: Offer
    pending: Pending | None = None
    granted: Granted | None = None


@dataclass(frozen=True, slots=True)
class Credentials:
    """What a site needs to take part; `repr` shows no private key.

    `certificate` and `authority` are PEM, `tls_key` is PKCS8 in PEM, `node_key` is the OpenSSH file of a SuperNode.
    """

    federation: str
    site: str
    address: str
    coordinator: str
    authority: str
    certificate: str
    tls_key: bytes = field(repr=False)
    node_key: bytes = field(repr=False)


def answer(site: OpenSite, raw: bytes, now: datetime) -> bytes:
    """Return the request that answers an invitation; asked again, the same bytes unless the signing key was rotated.

    The caller has shown `Invitation.fingerprint` to a person. Errors: those of `read_invitation`,
    `enrolment.other-site`, `enrolment.invitation-used`, `enrolment.other-coordinator` where the federation was
    another's.
    """
    invitation = read_invitation(raw, now)
    offer = invitation.offer
    if offer.site != site.facts.name:
        message = f"the invitation is for {offer.site}, and this site is {site.facts.name}"
        raise EnrolmentError("other-site", message, hint="take the invitation to the site that it is for")
    known = find(site.vault, offer.federation) or Membership(offer=offer)
    _require_new(known, offer)
    with site.journal as journal:
        if (earlier := _still_good(known, journal)) and _claims(earlier).invitation == offer.id:
            return earlier
        keys = Keys(new_tls_key(), new_node_key())
        request = _request(journal, offer, keys, now, invitation=invitation)
    _keep(site.vault, Membership(offer=offer, pending=_pending(request, keys), granted=known.granted))
    return request


def renew(site: OpenSite, federation: str, now: datetime, *, new_node: bool = False) -> bytes:
    """Return a request for a new certificate, for a new TLS key and the signing key that is in force by now.

    The node's key stays unless `new_node`: another one is another node to Flower. A renewal that was not granted yet is
    returned again. Error: `enrolment.not-enrolled`.
    """
    known = membership(site.vault, federation)
    granted = _granted(known)
    with site.journal as journal:
        if (
            (earlier := _still_good(known, journal))
            and not new_node
            and _claims(earlier).replaces == granted.grant.serial
        ):
            return earlier
        keys = Keys(new_tls_key(), new_node_key() if new_node else read_private_text(granted.node_key))
        request = _request(journal, known.offer, keys, now, replaces=granted.grant.serial)
    _keep(site.vault, known.model_copy(update={"pending": _pending(request, keys)}))
    return request


def accept(site: OpenSite, raw: bytes, federation: str, now: datetime) -> Grant:
    """Keep a grant that answers the request made last; one that is kept already is returned.

    Errors: those of `read_grant` and `check_grant`, `enrolment.other-request` for the answer to another request.
    """
    known = membership(site.vault, federation)
    grant = read_grant(raw, known.offer.coordinator)
    if known.granted is not None and known.granted.grant == grant:
        return grant
    pending = known.pending
    if pending is None or hashlib.sha256(pending.request.encode()).hexdigest() != grant.request:
        hint = "send the coordinator the request that was written last, and take the grant for that"
        raise EnrolmentError("other-request", "the grant answers a request that this site does not wait for", hint=hint)
    request, lineage = read_request(pending.request.encode())
    applicant = check_request(request, lineage)
    found = (grant.federation, grant.site, grant.node_key)
    if found != (federation, site.facts.name, node_text(pending.keys.node.public_key())):
        raise EnrolmentError("other-site", "the grant is not for this site", hint="ask for this site's own")
    check_grant(grant, applicant, read_pem(known.offer.authority), now)
    invitation = request.claims.invitation or _granted(known).invitation
    granted = Granted(invitation=invitation, grant=grant, tls_key=pending.tls_key, node_key=pending.node_key)
    _keep(site.vault, Membership(offer=known.offer, granted=granted))
    return grant


def credentials(vault: Vault, federation: str) -> Credentials:
    """Return what a site takes part with. Error: `enrolment.not-enrolled`."""
    known = membership(vault, federation)
    granted = _granted(known)
    grant = granted.grant
    return Credentials(
        federation=grant.federation,
        site=grant.site,
        address=grant.address,
        coordinator=known.offer.coordinator,
        authority=grant.authority,
        certificate=grant.certificate,
        tls_key=pem_key(read_private_text(granted.tls_key)),
        node_key=node_file(read_private_text(granted.node_key)),
    )


def is_due_for_renewal(vault: Vault, federation: str, signing_key: str, now: datetime) -> bool:
    """Whether to renew: little of the certificate's life is left, or the signing key was rotated since the grant."""
    grant = _granted(membership(vault, federation)).grant
    return grant.key != signing_key or is_due(read_pem(grant.certificate), now)


def federations(vault: Vault) -> tuple[str, ...]:
    """Return every federation that the site has answered, by name."""
    return tuple(name.removeprefix(_PREFIX) for name in vault.names() if name.startswith(_PREFIX))


def membership(vault: Vault, federation: str) -> Membership:
    """Return what the site knows of a federation. Error: `enrolment.not-enrolled`."""
    known = find(vault, federation)
    if known is None:
        hint = "answer its invitation: fedtune client init --invitation FILE"
        raise EnrolmentError("not-enrolled", f"this site knows no federation {federation[:80]!r}", hint=hint)
    return known


def find(vault: Vault, federation: str) -> Membership | None:
    """Return what the site knows of a federation, None where it knows nothing. Error: `enrolment.damaged`."""
    if federation not in federations(vault):
        return None
    try:
        return Membership.model_validate_json(vault.get(_PREFIX + federation))
    except ValidationError:
        hint = "restore the vault from an export or a backup"
        raise EnrolmentError("damaged", f"what the vault holds of {federation} cannot be read", hint=hint) from None


def request_fingerprint(request: bytes) -> str:
    """Return what a site's operator tells the coordinator's by telephone, to compare with `Candidate.fingerprint`."""
    return fingerprint(request)


def _request(
    journal: Journal,
    offer: Offer,
    keys: Keys,
    now: datetime,
    *,
    invitation: Invitation | None = None,
    replaces: str | None = None,
) -> bytes:
    claims = Claims(
        federation=offer.federation,
        site=offer.site,
        invitation=offer.id if invitation else None,
        replaces=replaces,
        lineage=lineage_lines(journal.lines()),
        certificate_request=certificate_request(keys.tls),
        node_key=node_text(keys.node.public_key()),
        issued=moment(now),
    )
    return write_request(claims, keys, invitation.token if invitation else None, journal.sign)


def _pending(request: bytes, keys: Keys) -> Pending:
    return Pending(request=request.decode(), tls_key=private_text(keys.tls), node_key=private_text(keys.node))


def _still_good(known: Membership, journal: Journal) -> bytes | None:
    """Return the request that is waiting, unless the signing key was rotated since."""
    if known.pending is None:
        return None
    raw = known.pending.request.encode()
    return raw if read_request(raw)[1].key == journal.chain.public_key else None


def _claims(request: bytes) -> Claims:
    return read_request(request)[0].claims


def _granted(known: Membership) -> Granted:
    if known.granted is None:
        hint = "send the coordinator the request, and take the grant that comes back"
        raise EnrolmentError("not-enrolled", f"{known.offer.federation} has not enrolled this site yet", hint=hint)
    return known.granted


def _require_new(known: Membership, offer: Offer) -> None:
    """Refuse an invitation that has led to a grant, and one of another coordinator than the site knows there."""
    if known.granted is not None and known.granted.invitation == offer.id:
        hint = "renew instead: fedtune client renew; or ask for a new invitation"
        raise EnrolmentError("invitation-used", f"{offer.federation} has enrolled this site with it", hint=hint)
    trusted = (known.offer.coordinator, read_pem(known.offer.authority).public_key())
    if trusted != (offer.coordinator, read_pem(offer.authority).public_key()):
        message = f"the federation {offer.federation} had another coordinator when this site joined it"
        raise EnrolmentError("other-coordinator", message, hint="telephone the coordinator before anything else")


def _keep(vault: Vault, known: Membership) -> None:
    vault.put(_PREFIX + known.offer.federation, rfc8785.dumps(known.model_dump(mode="json")))
