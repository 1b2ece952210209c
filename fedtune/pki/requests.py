"""A site's request: its public keys and a proof that it holds each private one. Pure; the keys stay where they are.

The *claims* say which keys, for which name, and on what occasion: an invitation, or the certificate that is to be
replaced. Every key signs the claims (`proofs`: ECDSA by the TLS key and the node key), the invitation's token proves
claims and proofs, and the signing key that the lineage ends with signs all of it. So no part of one request is any use
in another.
"""

from __future__ import annotations

import hmac
from dataclasses import dataclass
from typing import Annotated, ClassVar, Self

import rfc8785
from cryptography import x509
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.serialization import Encoding
from pydantic import Field, model_validator

from fedtune.errors import EnrolmentError
from fedtune.journal.entries import Hash, SiteName
from fedtune.pki.certificates import UNREADABLE
from fedtune.pki.documents import Document, Id, Instant, Pem, Serial, Sign, Strict, malformed, read, write
from fedtune.pki.invitations import token_proof
from fedtune.pki.keys import MOST_PROOF, is_proved, key_name, prove, read_node_key
from fedtune.pki.lineage import MOST_ROTATIONS, Lineage
from fedtune.pki.names import Federation

Proof = Annotated[str, Field(pattern=rf"^[0-9a-f]{{16,{MOST_PROOF}}}$")]
_CLAIMS = b"fedtune request claims v1\n"
_TOKEN = b"fedtune request token v1\n"


class Claims(Strict):
    """What a site asks for; exactly one of `invitation` and `replaces` (a serial number) says why it may."""

    federation: Federation
    site: SiteName
    invitation: Id | None
    replaces: Serial | None
    lineage: Annotated[tuple[Annotated[str, Field(max_length=2048)], ...], Field(max_length=MOST_ROTATIONS + 1)]
    certificate_request: Pem
    node_key: Annotated[str, Field(max_length=512)]
    issued: Instant

    @model_validator(mode="after")
    def _one_occasion(self) -> Self:
        if (self.invitation is None) == (self.replaces is None):
            raise ValueError("it answers an invitation or replaces a certificate")
        return self

    @property
    def statement(self) -> bytes:
        """What the TLS key and the node key sign."""
        return _CLAIMS + rfc8785.dumps(self.model_dump(mode="json"))


class Proofs(Strict):
    """Signatures of the claims."""

    tls: Proof
    node: Proof


class Request(Document):
    """Claims, proofs and, for an invitation, the token's HMAC over both; signed by the site's key in force."""

    kind: ClassVar[str] = "request"
    claims: Claims
    proofs: Proofs
    token: Hash | None

    @model_validator(mode="after")
    def _token_for_an_invitation(self) -> Self:
        if (self.claims.invitation is None) != (self.token is None):
            raise ValueError("a token belongs to an invitation")
        return self

    def has_token(self, token: str) -> bool:
        """Whether it was made with this token; compared in constant time."""
        return hmac.compare_digest(self.token or "", token_proof(token, _token_statement(self.claims, self.proofs)))


@dataclass(frozen=True, slots=True)
class Applicant:
    """A site whose request holds: every key in it was proved."""

    lineage: Lineage
    tls_key: ec.EllipticCurvePublicKey
    node_key: ec.EllipticCurvePublicKey

    @property
    def key_names(self) -> frozenset[str]:
        """All its public keys: signing keys as such, the others by their SHA-256."""
        return frozenset({*self.lineage.keys, key_name(self.tls_key), key_name(self.node_key)})


@dataclass(frozen=True, slots=True)
class Keys:
    """The private keys that a request is about."""

    tls: ec.EllipticCurvePrivateKey
    node: ec.EllipticCurvePrivateKey


def certificate_request(key: ec.EllipticCurvePrivateKey) -> str:
    """Return a PKCS #10 request (RFC 2986) without a name: names are the coordinator's to give."""
    builder = x509.CertificateSigningRequestBuilder().subject_name(x509.Name([]))
    return builder.sign(key, SHA256()).public_bytes(Encoding.PEM).decode()


def write_request(claims: Claims, keys: Keys, token: str | None, sign: Sign) -> bytes:
    """Return the file of a request; `sign` uses the key that the lineage ends with."""
    proofs = Proofs(tls=prove(keys.tls, claims.statement), node=prove(keys.node, claims.statement))
    proof = None if token is None else token_proof(token, _token_statement(claims, proofs))
    return write(Request(claims=claims, proofs=proofs, token=proof), sign)


def read_request(raw: bytes) -> tuple[Request, Lineage]:
    """Read a request that the key in force of its own lineage has signed; its other proofs are not checked yet.

    Errors: those of `documents.read`, `enrolment.bad-lineage`.
    """
    found: list[Lineage] = []

    def signer(body: dict[str, object]) -> str:
        claims = body.get("claims")
        lines = claims.get("lineage") if isinstance(claims, dict) else None
        if not isinstance(lines, list) or not all(isinstance(line, str) for line in lines):
            raise malformed("request", "it has no lineage")
        found.append(Lineage.of(tuple(lines)))
        return found[0].key

    return read(Request, raw, signer), found[0]


def check_request(request: Request, lineage: Lineage) -> Applicant:
    """Check that the site holds its TLS key and its node key.

    Errors: `enrolment.other-site` when its journal has another name than it asks for, `enrolment.bad-key`,
    `enrolment.no-proof`.
    """
    claims, proofs = request.claims, request.proofs
    if lineage.site != claims.site:
        message = f"the request for {claims.site} comes from a site whose journal calls it {lineage.site}"
        raise EnrolmentError("other-site", message, hint="invite it by the name that its journal has")
    applicant = Applicant(lineage, _tls_key(claims.certificate_request), read_node_key(claims.node_key))
    for what, key, proof in [("TLS", applicant.tls_key, proofs.tls), ("node", applicant.node_key, proofs.node)]:
        if not is_proved(key, claims.statement, proof):
            hint = "let the site write its request again: fedtune client init --invitation FILE"
            raise EnrolmentError("no-proof", f"{claims.site} does not show that it holds its {what} key", hint=hint)
    return applicant


def _tls_key(text: str) -> ec.EllipticCurvePublicKey:
    """Return the key of a certificate request; nothing else in it is used."""
    try:
        request = x509.load_pem_x509_csr(text.encode())
        key, is_good = request.public_key(), request.is_signature_valid
        spelled = request.public_bytes(Encoding.PEM).decode()
    except UNREADABLE as error:
        raise _bad_certificate_request() from error
    if not (
        is_good and spelled == text and isinstance(key, ec.EllipticCurvePublicKey) and key.curve.name == "secp256r1"
    ):
        raise _bad_certificate_request()
    return key


def _bad_certificate_request() -> EnrolmentError:
    hint = "let the site write its request again: fedtune client init --invitation FILE"
    return EnrolmentError("bad-key", "the certificate request does not prove an ECDSA P-256 key", hint=hint)


def _token_statement(claims: Claims, proofs: Proofs) -> bytes:
    return _TOKEN + rfc8785.dumps({"claims": claims.model_dump(mode="json"), "proofs": proofs.model_dump(mode="json")})
