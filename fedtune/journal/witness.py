"""Heads and their witnesses: what shows that a journal was not put back to an earlier state.

A chain that ends early is a valid chain, so a site signs its *head* (number and hash of its last record) each round,
the coordinator countersigns it, and both keep the *receipt*. A site whose journal does not extend the newest receipt
was rolled back; two heads of one number with different hashes are a fork. Knows no file and no message.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Any, ClassVar, Self

import rfc8785
from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey
from pydantic import ConfigDict, Field, TypeAdapter, ValidationError

from fedtune.errors import JournalError
from fedtune.journal.chain import public_hex
from fedtune.journal.entries import Hash, HeadWitnessed, Sequence, Signature
from fedtune.journal.journal import Journal

HEAD = b"fedtune journal head v1\n"
RECEIPT = b"fedtune journal receipt v1\n"
_EXACT = ConfigDict(extra="forbid")


@dataclass(frozen=True, slots=True)
class Head:
    """The last record of a journal: `site` is the hash of its first, which identifies the site; signed by the site."""

    __pydantic_config__: ClassVar = _EXACT
    site: Hash
    sequence: Annotated[Sequence, Field(strict=True)]
    digest: Hash
    public_key: Hash
    signature: Signature

    @classmethod
    def of(cls, journal: Journal) -> Self:
        """Sign where a journal stands now."""
        chain = journal.chain
        signature = journal.sign(_statement(HEAD, chain.site, chain.length - 1, chain.digest))
        return cls(chain.site, chain.length - 1, chain.digest, chain.public_key, signature)

    def check(self) -> None:
        """Refuse a head that its key has not signed: `journal.forged-head`."""
        _verify(self.public_key, self.signature, _statement(HEAD, self.site, self.sequence, self.digest), "head")

    def to_dict(self) -> dict[str, Any]:
        """Return plain JSON values."""
        return {
            "digest": self.digest,
            "public_key": self.public_key,
            "sequence": self.sequence,
            "signature": self.signature,
            "site": self.site,
        }

    @classmethod
    def from_dict(cls, value: object) -> Head:
        """Read what `to_dict` wrote; anything else is `journal.forged-head`."""
        head: Head = _read(_HEADS, value)
        return head


@dataclass(frozen=True, slots=True)
class Receipt:
    """A head, countersigned by the coordinator whose key is `witness`."""

    __pydantic_config__: ClassVar = _EXACT
    head: Head
    witness: Hash
    signature: Signature

    @classmethod
    def of(cls, head: Head, witness: Ed25519PrivateKey) -> Self:
        """Countersign a head that was checked."""
        return cls(head, public_hex(witness), witness.sign(RECEIPT + rfc8785.dumps(head.to_dict())).hex())

    def check(self) -> None:
        """Refuse a receipt that either side has not signed: `journal.forged-head`."""
        self.head.check()
        _verify(self.witness, self.signature, RECEIPT + rfc8785.dumps(self.head.to_dict()), "receipt")

    def to_dict(self) -> dict[str, Any]:
        """Return plain JSON values."""
        return {"head": self.head.to_dict(), "signature": self.signature, "witness": self.witness}

    @classmethod
    def from_dict(cls, value: object) -> Receipt:
        """Read what `to_dict` wrote; anything else is `journal.forged-head`."""
        receipt: Receipt = _read(_RECEIPTS, value)
        return receipt

    def entry(self) -> HeadWitnessed:
        """Return what the site writes down about it."""
        head = self.head
        return HeadWitnessed(
            sequence=head.sequence,
            digest=head.digest,
            head_signature=head.signature,
            witness=self.witness,
            signature=self.signature,
        )


def require_extends(journal: Journal, receipt: Receipt) -> None:
    """Refuse to go on with a journal that was put back to before a witnessed head, or replaced by another.

    Errors: `journal.rolled-back` when it is shorter or differs at that record; `journal.other-site` when the receipt is
    for another site; `journal.forged-head`.
    """
    receipt.check()
    head, chain = receipt.head, journal.chain
    if head.site != chain.site:
        raise JournalError("other-site", "the receipt is for another site's journal", hint="check federation and site")
    if journal.digest_at(head.sequence) != head.digest:
        raise rolled_back(chain.length, head)


def rolled_back(length: int, head: Head) -> JournalError:
    """Return the error for a journal of `length` records that does not extend a witnessed head."""
    return JournalError(
        "rolled-back",
        f"the journal has {length} records and does not contain record {head.sequence} as it was witnessed",
        hint="restore the newest copy of the journal; what was spent since an old copy would be forgotten",
    )


def _statement(context: bytes, site: str, sequence: int, digest: str) -> bytes:
    return context + rfc8785.dumps({"digest": digest, "sequence": sequence, "site": site})


def _verify(public_key: str, signature: str, statement: bytes, what: str) -> None:
    try:
        Ed25519PublicKey.from_public_bytes(bytes.fromhex(public_key)).verify(bytes.fromhex(signature), statement)
    except (InvalidSignature, ValueError) as error:
        raise JournalError("forged-head", f"a {what} is not signed by the key that it names") from error


def _read(model: TypeAdapter[Any], value: object) -> Any:
    try:
        return model.validate_python(value)
    except ValidationError as error:
        raise JournalError("forged-head", "a head or receipt does not have its fields") from error


_HEADS = TypeAdapter(Head)
_RECEIPTS = TypeAdapter(Receipt)
