"""A site's own adapter of a study that keeps a part of each at its site: kept sealed, and written out on request.

The newest is kept at each evaluation, which is when the coordinator's part comes: such a study measures at its sites.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import load, save

from fedtune.config.plan import StudyPlan
from fedtune.errors import ReleaseError
from fedtune.model.layout import AdapterState
from fedtune.privacy.accounting import epsilon
from fedtune.release.adapter import save_adapter
from fedtune.release.statement import privacy_facts
from fedtune.simulation.workspace import open_workspace
from fedtune_client.folder import OpenSite
from fedtune_client.machine import machine_of
from fedtune_client.vault import Vault

_PREFIX = "personal-"
_PLAN = "plan"


@dataclass(frozen=True, slots=True)
class PersonalAdapter:
    """A study and this site's whole adapter of it."""

    plan: StudyPlan
    adapter: AdapterState


def keep_personal(vault: Vault, plan: StudyPlan, adapter: AdapterState) -> None:
    """Keep the newest adapter of a study, sealed."""
    arrays: dict[str, Any] = {name: np.ascontiguousarray(array) for name, array in adapter.items()}
    vault.put(_item(plan.sha256), save({**arrays, _PLAN: np.frombuffer(plan.json_text.encode(), np.uint8)}))


def find_personal(vault: Vault, study: str) -> PersonalAdapter:
    """Return the adapter of the study of this name or hash. Error: `release.no-personal-adapter`."""
    found = [_read(vault, name) for name in vault.names() if name.startswith(_PREFIX)]
    meant = [one for one in found if study == one.plan.name or one.plan.sha256.startswith(study)]
    if len(meant) == 1:
        return meant[0]
    known = ", ".join(f"{one.plan.name} ({one.plan.sha256[:12]})" for one in found) or "none"
    which = "several adapters" if meant else "no adapter"
    raise ReleaseError(
        "no-personal-adapter",
        f"this site keeps {which} of its own of {study!r:.80}; it has {known}",
        hint="name the study by its hash; only studies with aggregation.algorithm=fedsa or aggregation.local_head "
        "leave a site one",
    )


def export_personal(site: OpenSite, study: str, folder: Path) -> PersonalAdapter:
    """Write the adapter as a PEFT folder with a card that states this site's own ε; the errors of `save_adapter`."""
    found = find_personal(site.vault, study)
    plan = found.plan
    workspace = open_workspace(plan, machine_of(plan, site.folder))
    save_adapter(folder, workspace, found.adapter, plan, _summary(site, plan))
    return found


def _summary(site: OpenSite, plan: StudyPlan) -> dict[str, Any]:
    with site.journal as journal:
        data = journal.state.spending.latest(plan.data.name)
        events = () if data is None else journal.state.spending.spent(data, plan=plan.sha256).events
    private = plan.promise.mode == "dp"
    spent = epsilon(events, plan.promise.delta) if private else None
    name = site.facts.name
    return {
        "personal": name,
        "sites": [{"name": name, "epsilon": spent, "delta": plan.promise.delta if private else None}],
        "metrics": {"initial": {}, "final": {}},
        "privacy": privacy_facts(plan.promise, spent),
    }


def _read(vault: Vault, name: str) -> PersonalAdapter:
    arrays = load(vault.get(name))
    plan = StudyPlan.from_json(arrays.pop(_PLAN).tobytes().decode())
    return PersonalAdapter(plan, arrays)


def _item(plan_sha256: str) -> str:
    return f"{_PREFIX}{plan_sha256[:16]}"
