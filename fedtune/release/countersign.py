"""A site puts its name under a release, after its own journal has borne out what is said of it.

The journal gets one record with the manifest's hash, on disk before the signature exists. Knows no vault and no folder
of a site: whoever calls holds the journal open.
"""

from __future__ import annotations

import hashlib
from pathlib import Path

from fedtune.errors import ReleaseError
from fedtune.journal.entries import Released
from fedtune.journal.journal import Journal
from fedtune.release.journals import unsupported
from fedtune.release.manifest import Manifest, SiteFacts, read_manifest
from fedtune.release.signatures import SiteSignature, countersigned, read_signatures, write_signatures
from fedtune.release.verify import verify_release

_ASK = "ask the coordinator: fedtune release verify DIR --journal FILE names what does not hold"


def countersign(folder: Path, journal: Journal, coordinator_key: str | None = None) -> SiteSignature:
    """Check a release against a site's own journal, and add the site's signature to it.

    Errors: `release.does-not-hold` where the release is not what its coordinator has signed, `release.other-site` for
    one that no head of this journal is in, `release.not-own-head` for a head that the journal does not contain,
    `release.unsupported-epsilon` where the journal was charged more than is said. Nothing is signed then.
    """
    verdict = verify_release(folder, coordinator_key=coordinator_key)
    if verdict.manifest is None or not verdict.holds:
        found = verdict.findings[0]
        raise ReleaseError("does-not-hold", f"{found.subject}: {found.text} ({found.code})", hint=_ASK)
    manifest, raw = read_manifest(folder)
    with journal:
        site = require_supported(manifest, journal)
        sha256 = hashlib.sha256(raw).hexdigest()
        if journal.state.released.get(manifest.plan_sha256) != sha256:
            journal.append(Released(plan=manifest.plan_sha256, manifest=sha256))
        chain = journal.chain
        signature = journal.sign(countersigned(raw, site.name, chain.site))
        signed = SiteSignature(name=site.name, site=chain.site, key=chain.public_key, signature=signature)
    write_signatures(folder, read_signatures(folder).with_site(signed))
    return signed


def require_supported(manifest: Manifest, journal: Journal) -> SiteFacts:
    """Return what a release says of this journal's site, if the open journal bears it out. Errors: as `countersign`."""
    for site in manifest.sites:
        receipt = site.witnessed()
        if receipt is None or receipt.head.site != journal.chain.site:
            continue
        if journal.digest_at(receipt.head.sequence) != receipt.head.digest:
            message = f"the journal does not contain record {receipt.head.sequence} as the release says of {site.name}"
            raise ReleaseError("not-own-head", message, hint=_ASK)
        if problem := unsupported(journal.state.spending, manifest.plan_sha256, site):
            raise ReleaseError("unsupported-epsilon", problem, hint=_ASK)
        return site
    message = f"no site of the release {manifest.study} has the journal of {journal.state.site}"
    raise ReleaseError("other-site", message, hint="name the release of a study that the site took part in")
