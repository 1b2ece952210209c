"""From a study that has ended to a release: the files of one kind, the card, the manifest and its signature.

What cannot be written is refused first; what is written appears as a whole, signed, or not at all.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fedtune.release.card import render_card
from fedtune.release.files import (
    ABOUT_FILE,
    CARD_FILE,
    MANIFEST_FILE,
    release_disk,
    require_free,
    size_of,
    walk,
    whole_folder,
)
from fedtune.release.kinds import WRITERS, Request, Tell
from fedtune.release.manifest import Kind, make_manifest
from fedtune.release.signatures import sign, write_signatures
from fedtune.release.study import EndedStudy
from fedtune.run.files import write_whole


@dataclass(frozen=True, slots=True)
class Exported:
    """A release that was written: its manifest's SHA-256, bytes by file, and what was found out while writing it."""

    folder: Path
    manifest_sha256: str
    sizes: dict[str, int]
    details: dict[str, Any]

    @property
    def size(self) -> int:
        """Bytes in all."""
        return sum(self.sizes.values())


def export(study: EndedStudy, request: Request, tell: Tell) -> Exported:
    """Write and sign a release; nothing of it is left when it fails.

    Errors: `release.exists`, `release.unwritable`, `release.disk-full`, those of the writer.
    """
    require_free(request.out)
    with release_disk(request.out), whole_folder(request.out) as made:
        written = WRITERS[request.kind](study, request, made, tell)
        write_whole(made / CARD_FILE, _card(study, request.kind, written.use).encode())
        tell(f"signing {len(walk(made))} files, {size_of(made):,} bytes")
        digest = _seal(study, request.kind, made)
        sizes = {name: path.stat().st_size for name, path in walk(made).items()}
    return Exported(request.out, digest, sizes, written.details)


def _seal(study: EndedStudy, kind: Kind, folder: Path) -> str:
    """Write the manifest of a complete folder and the coordinator's signature; return the manifest's hash."""
    manifest = make_manifest(folder, kind, study.plan, study.summary, study.heads, study.coordinator)
    write_whole(folder / MANIFEST_FILE, manifest.raw)
    write_signatures(folder, sign(manifest.raw, study.key))
    return hashlib.sha256(manifest.raw).hexdigest()


def _card(study: EndedStudy, kind: Kind, use: str) -> str:
    pad_id = _pad_id(study)
    return render_card(study.plan, study.summary, kind=kind, use=use, heads=study.heads, pad_id=pad_id)


def _pad_id(study: EndedStudy) -> int | None:
    about = json.loads((study.adapter / ABOUT_FILE).read_text(encoding="utf-8"))
    found = about.get("pad_id")
    return found if isinstance(found, int) else None
