"""Checks a release as a stranger can: with public keys, and with what sites hand out. Nothing is written.

Every rule that does not hold is one finding; one does not hide another.

1. `release.json` is a manifest, and the coordinator's key that it names has signed its bytes: `signature`. It is the
   key asked for: `other-coordinator`.
2. The folder holds the files of the manifest and no others: `missing-file`, `tampered-file`, `extra-file`.
3. The plan in it has the hash that it is said to have and rests on the base that is named: `plan`; a base model that is
   given has that hash: `wrong-base`.
4. Every site has a head of its journal, signed by the site and countersigned by this coordinator, and no two have the
   same journal: `missing-head`, `forged-head`.
5. Each site's ε is that of the mechanism events that are listed: `epsilon`; and the card says the same: `card`.
6. A journal that is given is one of the sites' and whole, contains the head, and was not charged more for this study
   than is said: `journal`, `head`, `epsilon`.
7. Countersignatures are of sites of this release, by their keys: `countersignature`.

Without a journal a site's ε is the word of coordinator and site; without the coordinator's key, the key is believed.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from fedtune.config.canonical import sha256_hex
from fedtune.config.plan import StudyPlan
from fedtune.errors import FedtuneError, JournalError, ReleaseError
from fedtune.journal.witness import Receipt
from fedtune.model.base import content_hash
from fedtune.privacy.accounting import epsilon
from fedtune.release.card_check import card_problems
from fedtune.release.files import CARD_FILE, UNSIGNED, file_sha256, walk
from fedtune.release.journals import TOLERANCE, Opened, lacks_head, open_journal, unsupported
from fedtune.release.manifest import Manifest, SiteFacts, read_manifest
from fedtune.release.signatures import Signatures, read_signatures


@dataclass(frozen=True, slots=True)
class Finding:
    """One rule that does not hold: its code, what it is about, and what was found, in words."""

    code: str
    subject: str
    text: str


@dataclass(frozen=True, slots=True)
class Verdict:
    """What was found, and what was checked: sites whose journal was read, sites that have countersigned.

    `manifest` is None where there is none that can be read; `key_checked` is False where the coordinator's key was
    believed because none was asked for.
    """

    manifest: Manifest | None
    findings: tuple[Finding, ...]
    key_checked: bool
    base_checked: bool
    journals: tuple[str, ...] = ()
    countersigned: tuple[str, ...] = ()

    @property
    def holds(self) -> bool:
        """Whether nothing was found."""
        return not self.findings


def verify_release(
    folder: Path, *, coordinator_key: str | None = None, base: Path | None = None, journals: Iterable[Path] = ()
) -> Verdict:
    """Check a release. Errors: `release.no-manifest`, `release.unreadable`, `release.no-base`, those of journals."""
    try:
        manifest, raw = read_manifest(folder)
    except ReleaseError as error:
        if error.code != "release.damaged":
            raise
        return Verdict(
            None, (Finding("manifest", "release.json", error.message),), key_checked=False, base_checked=False
        )
    plan = _plan(manifest)
    opened = [open_journal(path) for path in journals]
    of_site = {site.name: journal for site in manifest.sites for journal in opened if _is_of(journal, site)}
    signatures, unreadable = _signatures(folder)
    findings = [
        *unreadable,
        *(_signed(manifest, signatures, raw, coordinator_key) if signatures is not None else ()),
        *_files(folder, manifest),
        *_study(manifest, plan, base),
        *_heads(manifest),
        *(_epsilons(manifest, plan) if plan is not None else ()),
        *(_card(folder, manifest, plan) if plan is not None else ()),
        *_journals(manifest, opened, of_site),
        *(_countersigned(manifest, signatures, raw, of_site) if signatures is not None else ()),
    ]
    return Verdict(
        manifest,
        tuple(findings),
        key_checked=coordinator_key is not None,
        base_checked=base is not None,
        journals=tuple(of_site),
        countersigned=tuple(one.name for one in signatures.sites) if signatures is not None else (),
    )


def _signatures(folder: Path) -> tuple[Signatures | None, list[Finding]]:
    try:
        return read_signatures(folder), []
    except ReleaseError as error:
        return None, [Finding("signature", "release.signatures.json", error.message)]


def _signed(manifest: Manifest, signatures: Signatures, raw: bytes, wanted: str | None) -> Iterator[Finding]:
    if signatures.coordinator != manifest.coordinator or not signatures.holds(raw):
        text = f"the key {manifest.coordinator[:16]}… has not signed this manifest"
        yield Finding("signature", "release.json", text)
    if wanted not in {None, manifest.coordinator}:
        text = f"it is signed by {manifest.coordinator[:16]}…, not by the key {str(wanted)[:16]}… that was asked for"
        yield Finding("other-coordinator", "release.json", text)


def _files(folder: Path, manifest: Manifest) -> Iterator[Finding]:
    found = {name: path for name, path in walk(folder).items() if name not in UNSIGNED}
    for name, facts in manifest.files.items():
        path = found.pop(name, None)
        if path is None:
            yield Finding("missing-file", name, "the manifest lists it, and it is not there")
        elif not path.is_file() or path.stat().st_size != facts.size or file_sha256(path) != facts.sha256:
            yield Finding("tampered-file", name, "its content is not the one that was signed")
    for name in found:
        yield Finding("extra-file", name, "the manifest does not list it")


def _plan(manifest: Manifest) -> StudyPlan | None:
    try:
        return StudyPlan.from_json(manifest.plan)
    except FedtuneError:
        return None


def _study(manifest: Manifest, plan: StudyPlan | None, base: Path | None) -> Iterator[Finding]:
    if plan is None or sha256_hex(manifest.plan) != manifest.plan_sha256:
        yield Finding("plan", "release.json", "the plan in it is not the one that its hash names")
    elif (plan.model.name, plan.model.sha256) != (manifest.base.name, manifest.base.sha256):
        yield Finding("plan", "release.json", "the plan rests on another base model than the manifest names")
    if base is None:
        return
    if not base.is_dir():
        raise ReleaseError("no-base", f"{base} is not a folder", hint="name the base model's folder: --base FOLDER")
    if (found := content_hash(base)) != manifest.base.sha256:
        wanted = manifest.base
        text = f"its content has the hash {found[:16]}…, and the release is for {wanted.name}, {wanted.sha256[:16]}…"
        yield Finding("wrong-base", str(base), text)


def _heads(manifest: Manifest) -> Iterator[Finding]:
    seen: dict[str, str] = {}
    for site in manifest.sites:
        try:
            receipt = site.witnessed()
            if receipt is None:
                yield Finding("missing-head", site.name, "no head of its journal was countersigned")
                continue
            receipt.check()
        except JournalError as error:
            yield Finding("forged-head", site.name, error.message)
            continue
        if receipt.witness != manifest.coordinator:
            yield Finding("forged-head", site.name, "its head was countersigned by another key than the coordinator's")
        if (other := seen.setdefault(receipt.head.site, site.name)) != site.name:
            yield Finding("forged-head", site.name, f"its head is of the journal of {other}")
    if not manifest.sites:
        yield Finding("missing-head", "release.json", "the manifest names no site")


def _epsilons(manifest: Manifest, plan: StudyPlan) -> Iterator[Finding]:
    private = plan.promise.mode == "dp"
    for site in manifest.sites:
        if not private:
            continue
        if site.delta != plan.promise.delta or site.spent is None:
            yield Finding("epsilon", site.name, f"its ε is not said at the plan's δ = {plan.promise.delta:g}")
        elif site.events and (problem := _other_epsilon(site, plan.promise.delta)):
            yield Finding("epsilon", site.name, problem)
    most = max((site.spent or 0.0 for site in manifest.sites), default=0.0)
    said = manifest.privacy.get("max_epsilon")
    if private and (not isinstance(said, int | float) or said * (1 + TOLERANCE) < most):
        yield Finding("epsilon", "release.json", f"the largest ε is said to be {said}, and a site has spent {most:.4g}")


def _other_epsilon(site: SiteFacts, delta: float) -> str:
    """Return why the ε of a site is not that of its events."""
    try:
        found = epsilon(site.history(), delta)
    except FedtuneError as error:
        return error.message
    said = site.spent or 0.0
    if abs(found - said) <= TOLERANCE * max(1.0, found) or found == said:
        return ""
    return f"ε = {said:.4g} is said, and its events compose to {found:.4g} at δ = {delta:g}"


def _card(folder: Path, manifest: Manifest, plan: StudyPlan) -> Iterator[Finding]:
    try:
        card = (folder / CARD_FILE).read_text(encoding="utf-8", errors="replace")
    except OSError:
        yield Finding("card", CARD_FILE, "there is no card")
        return
    for problem in card_problems(card, manifest, plan):
        yield Finding("card", CARD_FILE, problem)


def _is_of(journal: Opened, site: SiteFacts) -> bool:
    receipt = _receipt(site)
    return receipt is not None and receipt.head.site == journal.verdict.site


def _receipt(site: SiteFacts) -> Receipt | None:
    try:
        return site.witnessed()
    except JournalError:
        return None


def _journals(manifest: Manifest, opened: list[Opened], of_site: dict[str, Opened]) -> Iterator[Finding]:
    for journal in opened:
        if journal not in of_site.values():
            yield Finding("journal", str(journal.path), "it is the journal of no site of this release")
    for site in manifest.sites:
        own, receipt = of_site.get(site.name), _receipt(site)
        if own is None or receipt is None:
            continue
        verdict = own.verdict
        if verdict.outcome not in {"intact", "torn"}:
            yield Finding("journal", site.name, f"{own.path}: {verdict.reason}")
            continue
        if lacking := lacks_head(own, receipt):
            yield Finding("head", site.name, f"{own.path}: {lacking}")
        if problem := unsupported(verdict.state.spending, manifest.plan_sha256, site):
            yield Finding("epsilon", site.name, problem)


def _countersigned(
    manifest: Manifest, signatures: Signatures, raw: bytes, of_site: dict[str, Opened]
) -> Iterator[Finding]:
    for one in signatures.sites:
        site = manifest.site(one.name)
        receipt = None if site is None else _receipt(site)
        if receipt is None or receipt.head.site != one.site:
            yield Finding("countersignature", one.name, "it is of no site of this release")
            continue
        own = of_site.get(one.name)
        keys = {receipt.head.public_key} | (own.keys if own is not None else set())
        if one.key not in keys:
            text = f"it is by the key {one.key[:16]}…; if the site has changed its key, give its --journal"
            yield Finding("countersignature", one.name, text)
        elif not one.holds(raw):
            yield Finding("countersignature", one.name, "the site's key has not signed this manifest")
