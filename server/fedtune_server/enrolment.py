"""A coordinator's enrolment: it invites, judges requests, grants and revokes, and every paper can be written again.

    enrolment.log   every decision; all else follows from it
    token-secret    32 random bytes that invitations' tokens are derived from
    revoked.txt     serial numbers and keys that the gate refuses; it is read again whenever it changes
    lock            empty; one process decides at a time

A kill at any moment leaves the log with a decision or without it. With it, the same call gives the same paper; without
it, nothing has happened. `revoked.txt` is written anew when it does not say what the log says. Unlocking the authority
is the caller's; nothing here keeps its key.
"""

from __future__ import annotations

import hashlib
import secrets
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import datetime, timedelta
from pathlib import Path
from typing import Self

from cryptography import x509
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from fedtune.envelopes.peers import PeerKey
from fedtune.errors import EnrolmentError
from fedtune.journal.chain import moment, public_hex
from fedtune.journal.journal import Clock, utc_now
from fedtune.pki import documents
from fedtune.pki.authority import Authority
from fedtune.pki.certificates import bad_certificate, check_authority, pem, read_pem, serial_of
from fedtune.pki.documents import fingerprint
from fedtune.pki.files import locked, make_private_folder, read_private, write_private
from fedtune.pki.grants import Grant
from fedtune.pki.invitations import LIFE, Invitation, Offer, token_of
from fedtune.pki.keys import node_text
from fedtune.pki.names import check_site_name, split_address
from fedtune.pki.requests import read_request
from fedtune.pki.revocation import Revocations
from fedtune_server.enrolment_log import (
    CertificateRevoked,
    Enrolled,
    Entry,
    Founded,
    Invited,
    Log,
    SiteRevoked,
    Withdrawn,
)
from fedtune_server.enrolment_state import Member, Occasion, State, Verdict

REVOKED_FILE = "revoked.txt"
_SECRET_BYTES = 32


@dataclass(frozen=True, slots=True)
class Candidate:
    """A request that may be approved, as a person should see it: compare `fingerprint` with what the site says."""

    site: str
    identity: str
    key: str
    node_key: str
    occasion: Occasion
    fingerprint: str


class Enrolment:
    """The enrolment of one federation in a folder; `key` is the coordinator's signing key.

    What it tells is what the log says now, whichever process has written it.
    """

    def __init__(self, folder: Path, key: Ed25519PrivateKey, clock: Clock = utc_now) -> None:
        self.folder, self._key, self._clock = folder, key, clock
        self._log = Log(folder / "enrolment.log")
        self._stamp: tuple[int, int, int] | None = None
        self._read = State()

    @classmethod
    def found(cls, folder: Path, federation: str, key: Ed25519PrivateKey, clock: Clock = utc_now) -> Self:
        """Begin a federation, or go on with a beginning that was killed.

        Error: `enrolment.exists` where another federation, or another key's, is.
        """
        enrolment = cls(folder, key, clock)
        make_private_folder(folder)
        with locked(folder / "lock", alone=True):
            if read_private(enrolment._secret_file) is None:
                write_private(enrolment._secret_file, [secrets.token_bytes(_SECRET_BYTES)])
            enrolment._log.mend()
            if not enrolment._log.read()[0]:
                enrolment._log.append([Founded(federation=federation, coordinator=public_hex(key))], clock())
            state = enrolment._state
            if (state.federation, state.coordinator) != (federation, public_hex(key)):
                hint = "go on with that one, or choose another folder"
                raise EnrolmentError("exists", f"{folder} holds the federation {state.federation}", hint=hint)
            enrolment._write_revoked()
        return enrolment

    @classmethod
    def open(cls, folder: Path, key: Ed25519PrivateKey, clock: Clock = utc_now) -> Self:
        """Open what `found` has made, and write `revoked.txt` again where a kill has kept it from being written.

        Errors: `enrolment.missing`, `enrolment.damaged`, `enrolment.other-coordinator` for another key.
        """
        enrolment = cls(folder, key, clock)
        enrolment._log.stamp()
        with enrolment._deciding():
            pass
        return enrolment

    @property
    def federation(self) -> str:
        """The federation's name."""
        return self._state.federation

    @property
    def members(self) -> tuple[Member, ...]:
        """Every site that was ever enrolled, by name."""
        return tuple(member for _, member in sorted(self._state.members.items()))

    @property
    def offers(self) -> tuple[Offer, ...]:
        """The invitations that were neither used nor withdrawn, by name; their time may be over."""
        state = self._state
        return tuple(sorted((o for o in state.offers.values() if o.id not in state.closed), key=lambda o: o.site))

    @property
    def revocations(self) -> Revocations:
        """What is refused."""
        return self._state.revocations

    def known(self) -> dict[str, tuple[PeerKey, ...]]:
        """Return the signing keys of all sites, as `fedtune.envelopes.peers.Peers` asks for them at each message."""
        state = self._state
        return {
            name: tuple(
                PeerKey(
                    signing.key,
                    None if signing.until is None else int(signing.until.timestamp() * 1000),
                    state.revocations.is_revoked(key=signing.key),
                )
                for signing in member.signing_keys
            )
            for name, member in state.members.items()
        }

    def invite(self, site: str, address: str, authority: x509.Certificate, life: timedelta = LIFE) -> bytes:
        """Return an invitation for a name; an earlier one that is open is withdrawn.

        Errors: `enrolment.bad-name`, `enrolment.bad-host`, `enrolment.name-taken`, `enrolment.bad-certificate`.
        """
        check_site_name(site)
        split_address(address)
        with self._deciding() as state:
            now = self._clock()
            check_authority(authority, state.federation, now)
            state.require_free(site)
            offer = Offer(
                id=secrets.token_hex(16),
                federation=state.federation,
                site=site,
                address=address,
                authority=pem(authority),
                coordinator=state.coordinator,
                issued=moment(now),
                expires=moment(now + life),
            )
            earlier = state.open_offer(site)
            self._decide([*([Withdrawn(invitation=earlier.id)] if earlier else []), Invited(offer=offer)])
            return self._invitation(offer)

    def invitation(self, site: str) -> bytes:
        """Return the open invitation of a site again, the same bytes. Error: `enrolment.unknown-invitation`."""
        return self._invitation(self._open_offer(site))

    def withdraw(self, site: str) -> None:
        """Withdraw the open invitation of a site. Error: `enrolment.unknown-invitation`."""
        with self._deciding():
            self._decide([Withdrawn(invitation=self._open_offer(site).id)])

    def examine(self, raw: bytes) -> Candidate:
        """Judge a request and decide nothing. Errors: those of `read_request` and `State.judge`."""
        verdict = self._judge(raw)
        if isinstance(verdict, Grant):
            found = (verdict.site, verdict.identity, verdict.key, verdict.node_key)
            return Candidate(*found, occasion="again", fingerprint=fingerprint(raw))
        applicant = verdict.applicant
        found = (verdict.site, applicant.lineage.identity, applicant.lineage.key, node_text(applicant.node_key))
        return Candidate(*found, occasion=verdict.occasion, fingerprint=fingerprint(raw))

    def approve(self, raw: bytes, authority: Authority, address: str = "") -> bytes:
        """Enrol a site, or renew it, and return the grant; the same request gets the same grant again.

        `address` is where the site reaches the coordinator from now on, if that has changed. Errors: as `examine`, and
        `enrolment.authority-expired`, `enrolment.bad-certificate` for another federation's authority.
        """
        with self._deciding() as state:
            now, verdict = self._clock(), self._judge(raw)
            if isinstance(verdict, Grant):
                return self._grant(verdict)
            first = verdict.offer or state.member(verdict.site).grant
            _require_same(read_pem(first.authority), authority.certificate)
            check_authority(authority.certificate, state.federation, now)
            where = address or first.address
            split_address(where)
            grant = self._granted(verdict, authority, raw, where, now)
            lineage = verdict.applicant.lineage
            invitation = verdict.offer.id if verdict.offer else None
            self._decide([Enrolled(invitation=invitation, keys=lineage.keys, ends=lineage.ends, grant=grant)])
            return self._grant(grant)

    def grant(self, site: str) -> bytes:
        """Return the newest grant of a site again, the same bytes. Error: `enrolment.not-enrolled`."""
        return self._grant(self._state.member(site).grant)

    def revoke(self, site: str, reason: str) -> None:
        """Refuse a site from now on, with every certificate and key that it had.

        To come back it needs an invitation and new keys; its name and journal stay its own. Error:
        `enrolment.not-enrolled`.
        """
        with self._deciding() as state:
            state.member(site)
            self._decide([SiteRevoked(site=site, reason=reason)])

    def revoke_certificate(self, serial: str, reason: str) -> None:
        """Refuse one certificate of a site, and its key, from now on; the site can still ask for another.

        Error: `enrolment.unknown-certificate`.
        """
        with self._deciding() as state:
            if not any(serial in {grant.serial for grant in member.grants} for member in state.members.values()):
                hint = "fedtune server enrol list"
                raise EnrolmentError("unknown-certificate", f"no certificate {serial[:40]} is in use", hint=hint)
            self._decide([CertificateRevoked(serial=serial, reason=reason)])

    @property
    def _secret_file(self) -> Path:
        return self.folder / "token-secret"

    @property
    def _state(self) -> State:
        """What the log says now; it is read again once it has changed."""
        stamp = self._log.stamp()
        if stamp != self._stamp:
            state = State()
            for line in self._log.read()[0]:
                state.apply(line)
            self._read, self._stamp = state, stamp
        return self._read

    @contextmanager
    def _deciding(self) -> Iterator[State]:
        """Hold the lock, with a log that ends with a whole line and a `revoked.txt` that says the same."""
        with locked(self.folder / "lock", alone=True):
            self._log.mend()
            if self._state.coordinator != public_hex(self._key):
                hint = "restore the coordinator's signing key that belongs to it"
                raise EnrolmentError("other-coordinator", f"{self.folder} is another coordinator's", hint=hint)
            self._write_revoked()
            yield self._state

    def _decide(self, entries: Sequence[Entry]) -> None:
        self._log.append(entries, self._clock())
        self._write_revoked()

    def _write_revoked(self) -> None:
        path, text = self.folder / REVOKED_FILE, self._state.revocations.to_text().encode()
        if read_private(path) != text:
            write_private(path, [text])

    def _judge(self, raw: bytes) -> Verdict | Grant:
        """Return what a request comes to: the grant that it already has, if that is its site's newest."""
        request, lineage = read_request(raw)
        state = self._state
        earlier = state.granted.get(hashlib.sha256(raw).hexdigest())
        if earlier is not None and earlier == state.member(earlier.site).grant and not self._is_refused(earlier):
            return earlier
        return state.judge(request, lineage, self._token_of, self._clock())

    def _is_refused(self, grant: Grant) -> bool:
        return self._state.revocations.is_revoked(serial=grant.serial)

    def _granted(self, verdict: Verdict, authority: Authority, raw: bytes, address: str, now: datetime) -> Grant:
        applicant = verdict.applicant
        certificate = authority.certify_site(verdict.site, applicant.tls_key, now)
        return Grant(
            federation=self.federation,
            site=verdict.site,
            identity=applicant.lineage.identity,
            key=applicant.lineage.key,
            node_key=node_text(applicant.node_key),
            request=hashlib.sha256(raw).hexdigest(),
            certificate=pem(certificate),
            serial=serial_of(certificate),
            authority=pem(authority.certificate),
            address=address,
            issued=moment(now),
        )

    def _open_offer(self, site: str) -> Offer:
        offer = self._state.open_offer(site)
        if offer is None:
            hint = f"make one: fedtune server enrol add {site}"
            raise EnrolmentError("unknown-invitation", f"the site {site} has no open invitation", hint=hint)
        return offer

    def _invitation(self, offer: Offer) -> bytes:
        return documents.write(Invitation(offer=offer, token=self._token_of(offer)), self._sign)

    def _grant(self, grant: Grant) -> bytes:
        return documents.write(grant, self._sign)

    def _token_of(self, offer: Offer) -> str:
        secret = read_private(self._secret_file)
        if secret is None or len(secret) != _SECRET_BYTES:
            hint = "restore it from a backup; or remove it, found anew, and invite again who has not answered"
            raise EnrolmentError("damaged", f"{self._secret_file} does not hold {_SECRET_BYTES} bytes", hint=hint)
        return token_of(secret, offer)

    def _sign(self, statement: bytes) -> str:
        return self._key.sign(statement).hex()


def _require_same(trusted: x509.Certificate, given: x509.Certificate) -> None:
    """Refuse an authority that the site would refuse: it trusts the key that it was invited with."""
    if trusted.public_key() != given.public_key():
        raise bad_certificate("the authority is another than the one that the site was invited with")
