"""The manifest of a release: what its files are, which study they come from, and what each site spent on it.

`release.json` is one JSON object in canonical form (RFC 8785), so that equal manifests are equal bytes; what is signed
is these bytes. The study plan stands in it as its own canonical text, whose SHA-256 is the plan's identity. Knows no
key and no journal.
"""

from __future__ import annotations

import math
import os
from collections.abc import Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated, Any, Literal

import rfc8785
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from fedtune import __version__
from fedtune.config.plan import StudyPlan
from fedtune.errors import ReleaseError
from fedtune.journal.canonical import read_canonical
from fedtune.journal.entries import Hash
from fedtune.journal.witness import Receipt
from fedtune.privacy.accounting import Event
from fedtune.release.files import MANIFEST_FILE, UNSIGNED, file_sha256, walk

Kind = Literal["peft", "merged", "gguf", "ollama"]
Epsilon = Annotated[float, Field(ge=0)] | Literal["inf"] | None
_LONGEST = 1 << 26  # bytes of a manifest: a million labels in the plan, thousands of sites


class _Exact(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False)


class FileFacts(_Exact):
    """One file by its content; `size` is in bytes."""

    sha256: Hash
    size: int = Field(ge=0)


class BaseFacts(_Exact):
    """The base model by its content, as `fedtune.model.base.content_hash` finds it."""

    name: str
    sha256: Hash
    architecture: str


class SiteFacts(_Exact):
    """What one site spent on the study, and the newest head of its journal that the coordinator has countersigned.

    `epsilon` at `delta` is that of `events`; None in a study without privacy, `inf` where a round had none.
    """

    name: str
    units: int | None
    rounds: int | None
    epsilon: Epsilon
    delta: float | None
    events: tuple[dict[str, Any], ...] = Field(strict=False)
    receipt: dict[str, Any] | None

    def history(self) -> tuple[Event, ...]:
        """Return the mechanism events; JSON has one kind of number, so their floats are made floats again."""
        return tuple(Event.from_dict({**event, **_floats(event)}) for event in self.events)

    def witnessed(self) -> Receipt | None:
        """Return the receipt. Error: `journal.forged-head` for one that has not its fields."""
        return None if self.receipt is None else Receipt.from_dict(self.receipt)

    @property
    def spent(self) -> float | None:
        """ε as a number."""
        return None if self.epsilon is None else float(self.epsilon)


class Manifest(_Exact):
    """All of it; `coordinator` is the public key that signs, `created` the time in UTC."""

    format: Literal["fedtune release 1"] = "fedtune release 1"
    kind: Kind
    study: str
    created: str
    fedtune: str
    plan: str
    plan_sha256: Hash
    base: BaseFacts
    privacy: dict[str, Any]
    metrics: dict[str, Any]
    sites: tuple[SiteFacts, ...] = Field(strict=False)
    files: dict[str, FileFacts]
    coordinator: Hash

    @property
    def raw(self) -> bytes:
        """The bytes of `release.json`."""
        return rfc8785.dumps(self.model_dump(mode="json"))

    def site(self, name: str) -> SiteFacts | None:
        """Return the facts of a site by its name."""
        return next((site for site in self.sites if site.name == name), None)


def make_manifest(
    folder: Path,
    kind: Kind,
    plan: StudyPlan,
    summary: Mapping[str, Any],
    heads: Mapping[str, Receipt],
    coordinator: str,
) -> Manifest:
    """Return the manifest of a folder whose files are complete."""
    return Manifest(
        kind=kind,
        study=plan.name,
        created=datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ"),
        fedtune=__version__,
        plan=plan.json_text,
        plan_sha256=plan.sha256,
        base=BaseFacts(name=plan.model.name, sha256=plan.model.sha256, architecture=plan.model.architecture),
        privacy=dict(summary["privacy"]),
        metrics=dict(summary["metrics"]),
        sites=tuple(_site(plan, site, heads.get(site["name"])) for site in summary["sites"]),
        files=describe(folder),
        coordinator=coordinator,
    )


def describe(folder: Path) -> dict[str, FileFacts]:
    """Return the facts of every file in a folder, the manifest and its signatures left out."""
    found = {name: path for name, path in walk(folder).items() if name not in UNSIGNED}
    return {name: FileFacts(sha256=file_sha256(path), size=path.stat().st_size) for name, path in found.items()}


def read_manifest(folder: Path) -> tuple[Manifest, bytes]:
    """Read `release.json` and return it with its bytes.

    Errors: `release.no-manifest` where there is none, `release.unreadable`, `release.damaged` for anything but the
    canonical form of a manifest.
    """
    path = folder / MANIFEST_FILE
    raw = read_bounded(path, "fedtune release RUN --to peft --out DIR writes one")
    try:
        return Manifest.model_validate(read_canonical(raw)), raw
    except ValidationError as error:
        where = ".".join(str(part) for part in error.errors()[0]["loc"]) or "it"
        message = f"{path} is no manifest of a release: {where} is not as it should be"
        raise ReleaseError("damaged", message, hint="fetch the release again") from error
    except (ValueError, RecursionError) as error:
        message = f"{path} is not JSON in canonical form"
        raise ReleaseError("damaged", message, hint="fetch the release again") from error


def read_bounded(path: Path, hint: str) -> bytes:
    """Return the content of one of a release's own files; a missing or huge one is an error."""
    try:
        with path.open("rb") as file:
            if os.fstat(file.fileno()).st_size > _LONGEST:
                raise ReleaseError("damaged", f"{path} is larger than any manifest", hint="fetch the release again")
            return file.read()
    except (FileNotFoundError, NotADirectoryError) as error:
        raise ReleaseError("no-manifest", f"{path.parent} is no release: it has no {path.name}", hint=hint) from error
    except OSError as error:
        raise ReleaseError("unreadable", f"{path} cannot be read ({error.strerror or error})", hint=hint) from error


def _site(plan: StudyPlan, site: Mapping[str, Any], receipt: Receipt | None) -> SiteFacts:
    spent = site.get("epsilon")
    return SiteFacts(
        name=site["name"],
        units=site.get("units"),
        rounds=site.get("rounds"),
        epsilon="inf" if spent is not None and math.isinf(float(spent)) else spent,
        delta=plan.promise.delta if plan.promise.mode == "dp" else None,
        events=tuple(site.get("events", ())),
        receipt=None if receipt is None else receipt.to_dict(),
    )


def _floats(event: Mapping[str, Any]) -> dict[str, float]:
    names = ("noise_multiplier", "sampling_rate", "clip_norm")
    return {name: float(event[name]) for name in names if isinstance(event.get(name), int)}
