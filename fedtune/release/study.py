"""A study that has ended, as whoever releases it finds it: plan, adapter, summary, heads and the coordinator's key.

In a simulation all of it is in the run folder; between machines key and heads are the coordinator's, two folders above
(`COORDINATOR/studies/STUDY`). Opening refuses what cannot be released before anything is written.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.serialization import load_pem_private_key

from fedtune.aggregation.assembly import assemble
from fedtune.config.plan import StudyPlan
from fedtune.errors import FedtuneError, ReleaseError
from fedtune.journal.chain import public_hex
from fedtune.journal.witness import Receipt
from fedtune.model.base import BaseModel, open_base
from fedtune.release.canonical import require_canonical
from fedtune.release.files import ABOUT_FILE, CONFIG_FILE
from fedtune.run.files import read_lines
from fedtune.run.folder import RunFolder

_KEY = "coordinator.key"
_HEADS = "heads.jsonl"


@dataclass(frozen=True, slots=True)
class EndedStudy:
    """What a release is made of; `adapter` is the folder that the study ended with, `key` signs."""

    run: RunFolder
    plan: StudyPlan
    summary: Mapping[str, Any]
    base: BaseModel
    heads: Mapping[str, Receipt]
    key: Ed25519PrivateKey

    @property
    def adapter(self) -> Path:
        """The canonical PEFT folder."""
        return self.run.adapter

    @property
    def coordinator(self) -> str:
        """The public key that signs, 64 hexadecimal digits."""
        return public_hex(self.key)

    @property
    def missing_heads(self) -> list[str]:
        """The sites without a countersigned head, of which a verification will complain."""
        return [site["name"] for site in self.summary["sites"] if site["name"] not in self.heads]


def open_ended(path: Path, key_file: Path | None = None) -> EndedStudy:
    """Open a run folder for release.

    Errors: `run.no-run`, `release.unfinished`, `release.personal`, `release.no-adapter`, `release.other-adapter`,
    `release.not-canonical`, `release.no-key`, `release.damaged-heads`, `release.other-base` where this machine's base
    is not the plan's.
    """
    run = RunFolder(path)
    plan, summary = run.plan(), run.summary()
    if summary is None:
        hint = f"finish it first: fedtune simulate --resume {path}"
        raise ReleaseError("unfinished", f"the study in {path} has not ended", hint=hint)
    require_common(plan)
    _check_adapter(run, plan)
    key, heads = _key(run, key_file), _heads(run)
    named = {site["name"] for site in summary["sites"]}
    base = _base(run, plan)
    return EndedStudy(run, plan, summary, base, {name: head for name, head in heads.items() if name in named}, key)


def require_common(plan: StudyPlan) -> None:
    """Refuse a study that ends with an adapter at each site and none for all: `release.personal`."""
    if assemble(plan.aggregation, plan.training, plan.lora, plan.seed).traits.releases:
        return
    kept = "its own head" if plan.aggregation.local_head else "an adapter of its own"
    message = f"the study {plan.name} leaves each site {kept}, so there is no adapter that all could use"
    hint = "train with aggregation=fedit and aggregation.local_head=false for one that is released"
    raise ReleaseError("personal", message, hint=hint)


def _check_adapter(run: RunFolder, plan: StudyPlan) -> None:
    """Refuse an adapter that is not the plan's, or that another version has written in another form."""
    again = f"move {run.adapter} and summary.json away, then write it anew: fedtune simulate --resume {run.path}"
    try:
        about = json.loads((run.adapter / ABOUT_FILE).read_text(encoding="utf-8"))
        config = json.loads((run.adapter / CONFIG_FILE).read_text(encoding="utf-8"))
        of_plan = about["plan_sha256"] == plan.sha256
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ReleaseError("no-adapter", f"{run.adapter} holds no adapter", hint=again) from error
    if not of_plan:
        raise ReleaseError("other-adapter", f"{run.adapter} is the adapter of another study", hint=again)
    require_canonical(config)


def _base(run: RunFolder, plan: StudyPlan) -> BaseModel:
    base = open_base(Path(run.machine().model_folder))
    if base.sha256 != plan.model.sha256:
        message = f"{base.folder} is not the plan's base model {plan.model.name}"
        raise ReleaseError("other-base", message, hint="restore the base model that the study was trained on")
    return base


def _places(run: RunFolder, name: str, below: str) -> tuple[Path, Path]:
    """Return where a file is in a simulation, and where in a coordinator's folder."""
    return run.path / name, run.path.resolve().parents[1] / below / name


def _key(run: RunFolder, given: Path | None) -> Ed25519PrivateKey:
    places = (given,) if given is not None else _places(run, _KEY, "")
    found = next((path for path in places if path.exists()), None)
    if found is None:
        message = f"no {_KEY} belongs to {run.path}" if given is None else f"there is no key {given}"
        raise ReleaseError("no-key", message, hint="name the coordinator's key: --key FILE")
    try:
        key = load_pem_private_key(found.read_bytes(), password=None)
    except (OSError, ValueError, TypeError, UnsupportedAlgorithm) as error:
        raise _no_key(found) from error
    if not isinstance(key, Ed25519PrivateKey):
        raise _no_key(found)
    return key


def _no_key(path: Path) -> ReleaseError:
    hint = "restore it from a backup, or name the coordinator's key: --key FILE"
    return ReleaseError("no-key", f"{path} cannot be read as an Ed25519 key", hint=hint)


def _heads(run: RunFolder) -> dict[str, Receipt]:
    """Return the newest receipt of each site."""
    found = next((path for path in _places(run, _HEADS, "witness") if path.exists()), None)
    if found is None:
        return {}
    try:
        newest = {line["name"]: line["receipt"] for line in read_lines(found)}
        return {name: Receipt.from_dict(receipt) for name, receipt in newest.items()}
    except (FedtuneError, KeyError, TypeError) as error:
        message = f"{found} holds a line that is not a receipt"
        raise ReleaseError("damaged-heads", message, hint="restore it from a backup") from error
