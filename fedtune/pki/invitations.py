"""An invitation: what a coordinator hands to one site, by a way that others do not read, to begin with.

It carries a token that the coordinator accepts once, for one name and for some days. The site never sends the token,
only HMACs of its request under it. The coordinator derives tokens from one secret of its own, so it stores none, and
can write an invitation again, byte for byte.
"""

from __future__ import annotations

import hashlib
import hmac
from datetime import datetime, timedelta
from typing import ClassVar

from fedtune.errors import EnrolmentError
from fedtune.journal.entries import Hash, SiteName
from fedtune.pki.certificates import SKEW, check_authority, read_pem
from fedtune.pki.documents import Document, Id, Instant, Pem, Strict, fingerprint, instant, read
from fedtune.pki.names import Address, Federation

LIFE = timedelta(days=14)
_TOKEN = b"fedtune invitation token v1\n"
_PROOF = b"fedtune invitation proof v1\n"


class Offer(Strict):
    """An invitation without its secret: who is invited, where to, by whom and until when."""

    id: Id
    federation: Federation
    site: SiteName
    address: Address
    authority: Pem
    coordinator: Hash
    issued: Instant
    expires: Instant


class Invitation(Document):
    """An offer and its token; signed by the coordinator key that the offer names."""

    kind: ClassVar[str] = "invitation"
    offer: Offer
    token: Hash

    @property
    def fingerprint(self) -> str:
        """What the site's operator compares with what the coordinator's says by telephone: its public key's."""
        return key_fingerprint(self.offer.coordinator)


def key_fingerprint(public_key: str) -> str:
    """Return a public key's fingerprint for people."""
    return fingerprint(bytes.fromhex(public_key))


def token_of(secret: bytes, offer: Offer) -> str:
    """Return the token of an offer: HMAC-SHA256 (RFC 2104) of its id under the coordinator's secret."""
    return hmac.new(secret, _TOKEN + bytes.fromhex(offer.id), hashlib.sha256).hexdigest()


def token_proof(token: str, statement: bytes) -> str:
    """Return what shows that whoever made a statement had the token."""
    return hmac.new(bytes.fromhex(token), _PROOF + statement, hashlib.sha256).hexdigest()


def read_invitation(raw: bytes, now: datetime) -> Invitation:
    """Read an invitation as a site does; it says who signed it, so a person has to compare the fingerprint.

    Errors: those of `documents.read`, `enrolment.expired-invitation` (an hour late, for clocks differ),
    `enrolment.bad-certificate` and `enrolment.certificate-expired` for its authority.
    """
    invitation = read(Invitation, raw, _signer)
    offer = invitation.offer
    check_authority(read_pem(offer.authority), offer.federation, now)
    require_open(offer, now, SKEW)
    return invitation


def require_open(offer: Offer, now: datetime, skew: timedelta = timedelta()) -> None:
    """Refuse an offer whose time is over: `enrolment.expired-invitation`."""
    if now > instant(offer.expires) + skew:
        message = f"the invitation of {offer.site} expired at {offer.expires}"
        raise EnrolmentError(
            "expired-invitation", message, hint="the coordinator makes another: fedtune server enrol add"
        )


def _signer(body: dict[str, object]) -> str:
    offer = body.get("offer")
    key = offer.get("coordinator") if isinstance(offer, dict) else None
    return key if isinstance(key, str) else ""
