"""A grant: what a coordinator answers to a request it approves. It carries a certificate and nothing secret."""

from __future__ import annotations

from datetime import datetime
from typing import Annotated, ClassVar

from cryptography import x509
from cryptography.hazmat.primitives.asymmetric import ec
from pydantic import Field

from fedtune.errors import EnrolmentError
from fedtune.journal.entries import Hash, SiteName
from fedtune.pki.certificates import bad_certificate, check_authority, check_site, read_pem, serial_of
from fedtune.pki.documents import Document, Instant, Pem, Serial, read
from fedtune.pki.keys import key_name
from fedtune.pki.names import Address, Federation
from fedtune.pki.requests import Applicant


class Grant(Document):
    """A site is enrolled with these keys; `request` is the SHA-256 of the file that asked for it.

    `node_key` is what the coordinator registers with Flower, `key` the signing key that it checks envelopes with.
    """

    kind: ClassVar[str] = "grant"
    federation: Federation
    site: SiteName
    identity: Hash
    key: Hash
    node_key: Annotated[str, Field(max_length=512)]
    request: Hash
    certificate: Pem
    serial: Serial
    authority: Pem
    address: Address
    issued: Instant

    @property
    def tls_key_name(self) -> str:
        """The SHA-256 of the certified key."""
        key = read_pem(self.certificate).public_key()
        if not isinstance(key, ec.EllipticCurvePublicKey):
            raise bad_certificate("its key is of another kind")
        return key_name(key)


def read_grant(raw: bytes, coordinator: str) -> Grant:
    """Read a grant that this coordinator has signed, its certificates not checked yet. Errors: of `documents.read`."""
    return read(Grant, raw, coordinator)


def check_grant(grant: Grant, applicant: Applicant, authority: x509.Certificate, now: datetime) -> None:
    """Refuse a grant that is not for this applicant, or not by the authority that its site has trusted so far.

    The authority may have a newer certificate, for the same key. Errors: `enrolment.other-site`,
    `enrolment.bad-certificate`, `enrolment.certificate-expired`.
    """
    renewed, certificate = read_pem(grant.authority), read_pem(grant.certificate)
    found = (grant.identity, grant.key, certificate.public_key())
    if found != (applicant.lineage.identity, applicant.lineage.key, applicant.tls_key):
        raise _other("its keys are not this site's")
    if renewed.public_key() != authority.public_key():
        raise EnrolmentError("bad-certificate", "the grant comes with another authority", hint=_AUTHORITY)
    check_authority(renewed, grant.federation, now)
    check_site(certificate, renewed, grant.site, now)
    if serial_of(certificate) != grant.serial:
        raise _other("its serial number is another certificate's")


def _other(problem: str) -> EnrolmentError:
    return EnrolmentError("other-site", f"the grant is not for this site: {problem}", hint="ask for this site's own")


_AUTHORITY = "ask the coordinator; a federation with another authority invites its sites anew"
