"""Who has signed a release: its coordinator, and any of its sites.

Ed25519 (RFC 8032) over a context label and the manifest: the coordinator signs the bytes of `release.json`, a site
their SHA-256 with its name and its journal's identity, so that its signature holds for no other site and no other
release. `release.signatures.json` holds them; it is outside the manifest, since sites sign later. Knows no journal.
"""

from __future__ import annotations

import hashlib
from pathlib import Path

import rfc8785
from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from fedtune.errors import ReleaseError
from fedtune.journal.canonical import read_canonical
from fedtune.journal.chain import public_hex
from fedtune.journal.entries import Hash, Signature, SiteName
from fedtune.release.files import SIGNATURES_FILE
from fedtune.release.manifest import read_bounded
from fedtune.run.files import write_whole

RELEASE = b"fedtune release v1\n"
COUNTERSIGNATURE = b"fedtune release countersignature v1\n"


class SiteSignature(BaseModel):
    """A site's countersignature: `site` is its journal's identity, `key` the journal's key in force."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)
    name: SiteName
    site: Hash
    key: Hash
    signature: Signature

    def holds(self, raw: bytes) -> bool:
        """Whether it is this key's signature under a manifest's bytes."""
        return _verifies(self.key, self.signature, countersigned(raw, self.name, self.site))


class Signatures(BaseModel):
    """The coordinator's signature and the sites', one a site."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)
    coordinator: Hash
    signature: Signature
    sites: tuple[SiteSignature, ...] = Field((), strict=False)

    def holds(self, raw: bytes) -> bool:
        """Whether the coordinator's key that is named has signed a manifest's bytes."""
        return _verifies(self.coordinator, self.signature, RELEASE + raw)

    def with_site(self, signature: SiteSignature) -> Signatures:
        """Return the signatures with a site's, in place of an earlier one of the same site."""
        others = (one for one in self.sites if one.site != signature.site)
        return self.model_copy(update={"sites": tuple(sorted([*others, signature], key=lambda one: one.name))})


def sign(raw: bytes, key: Ed25519PrivateKey) -> Signatures:
    """Return the coordinator's signature under a manifest."""
    return Signatures(coordinator=public_hex(key), signature=key.sign(RELEASE + raw).hex())


def countersigned(raw: bytes, name: str, site: str) -> bytes:
    """Return what a site signs."""
    statement = {"manifest": hashlib.sha256(raw).hexdigest(), "name": name, "site": site}
    return COUNTERSIGNATURE + rfc8785.dumps(statement)


def write_signatures(folder: Path, signatures: Signatures) -> None:
    """Write them, whole or not at all."""
    write_whole(folder / SIGNATURES_FILE, rfc8785.dumps(signatures.model_dump(mode="json")))


def read_signatures(folder: Path) -> Signatures:
    """Read them. Errors: `release.no-manifest` where there are none, `release.damaged`."""
    path = folder / SIGNATURES_FILE
    raw = read_bounded(path, "fetch the release again: nobody has signed this one")
    try:
        return Signatures.model_validate(read_canonical(raw))
    except (ValidationError, ValueError, RecursionError) as error:
        message = f"{path} does not hold signatures of a release"
        raise ReleaseError("damaged", message, hint="fetch the release again") from error


def _verifies(key: str, signature: str, statement: bytes) -> bool:
    try:
        Ed25519PublicKey.from_public_bytes(bytes.fromhex(key)).verify(bytes.fromhex(signature), statement)
    except (InvalidSignature, ValueError):
        return False
    return True
