"""A site's journal without a file: the same chain, signed, for tests of what sees only its heads."""

from __future__ import annotations

from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Self

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from fedtune.journal.chain import Chain, moment, public_hex, rotation_statement
from fedtune.journal.entries import Entry, KeyRotated, PlanApproved, SiteCreated

_NOW = moment(datetime(2026, 1, 1, tzinfo=UTC))


@dataclass
class MemoryJournal:
    """A journal in memory; `chain` is where it stands, `digests` the hashes of its records."""

    signer: Ed25519PrivateKey
    chain: Chain = field(default_factory=Chain)
    digests: list[str] = field(default_factory=list)

    @classmethod
    def create(cls, site: str) -> Self:
        """Begin the journal of a site, with a key of its own."""
        journal = cls(Ed25519PrivateKey.generate())
        journal._append(SiteCreated(site=site, public_key=public_hex(journal.signer)))
        return journal

    def write(self, what: str = "something", times: int = 1) -> Self:
        """Append so many records."""
        for _ in range(times):
            self._append(PlanApproved(plan="a" * 64, by=what))
        return self

    def rotate(self) -> Self:
        """Put a new key in force."""
        signer = Ed25519PrivateKey.generate()
        proof = signer.sign(rotation_statement(self.chain.public_key)).hex()
        self._append(KeyRotated(public_key=public_hex(signer), proof=proof))
        self.signer = signer
        return self

    def snapshot(self) -> Self:
        """Return a copy that goes its own way."""
        return type(self)(self.signer, self.chain, list(self.digests))

    def digest_at(self, sequence: int) -> str | None:
        """Return the hash of a record, None beyond the last."""
        return self.digests[sequence] if sequence < len(self.digests) else None

    def sign(self, statement: bytes) -> str:
        """Sign a statement about this journal."""
        return self.signer.sign(statement).hex()

    def _append(self, entry: Entry) -> None:
        self.chain, record = self.chain.accept(self.chain.extend(entry, _NOW, self.signer))
        self.digests.append(record.digest)
