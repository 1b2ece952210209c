"""A site: its authority, its workspace, its records, opened from a Flower context and machine facts.

A simulated site has a share of the study's one file; a real one has a folder of its own, named by FEDTUNE_SITE. What
they do with a message is the same. Records are read by `data`, which asks the authority first.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache, partial
from pathlib import Path

from flwr.app import Context

from fedtune.config.machine import Machine, current
from fedtune.config.plan import PLAN_KEY, StudyPlan
from fedtune.errors import MessageError
from fedtune.journal.witness import Receipt
from fedtune.model.workspace import Workspace
from fedtune.privacy.plan import public_count
from fedtune.simulation.sites import SiteData, dealt
from fedtune.simulation.workspace import open_workspace
from fedtune_client.authority import Authority
from fedtune_client.folder import ENVIRONMENT_VARIABLE, SiteFolder, open_site_folder
from fedtune_client.memory import OptimizerMemory
from fedtune_client.policy.plans import read_plan
from fedtune_client.records import SiteRecords
from fedtune_client.simulated import open_simulated
from fedtune_client.vault import unlock_from


@dataclass(frozen=True, slots=True)
class Site:
    """Everything a site needs to answer a message; `load` reads its records, or refuses to."""

    plan: StudyPlan
    name: str
    workspace: Workspace
    authority: Authority
    memory: OptimizerMemory
    load: Callable[[], SiteData]

    @property
    def data(self) -> SiteData:
        """The site's records for the plan, if consent still allows them."""
        return self.load()

    @property
    def units(self) -> int:
        """The number of privacy units a site tells: rounded, because the exact number is private."""
        return public_count(self.data.units.count)


def plan_of(context: Context) -> StudyPlan:
    """Read the plan that a context carries."""
    return _read_once(str(context.run_config.get(PLAN_KEY, "")))


def open_site(context: Context, plan: StudyPlan, receipt: Receipt | None) -> Site:
    """Open the site that a context belongs to; one that does not take part in the plan is not opened.

    A journal that does not extend the coordinator's receipt is refused before anything is written to it.
    """
    machine = current()
    folder = os.environ.get(ENVIRONMENT_VARIABLE)
    if folder:
        return _real_site(plan, machine, SiteFolder(Path(folder)), receipt)
    index = context.node_config.get("partition-id")
    if not isinstance(index, int):
        raise MessageError("no-site", "the node has no partition-id", hint="start it with fedtune simulate")
    return _simulated_site(plan, machine, index, receipt)


def _simulated_site(plan: StudyPlan, machine: Machine, index: int, receipt: Receipt | None) -> Site:
    workspace = open_workspace(plan, machine)
    data = dealt(plan.json_text, machine, workspace.tokenizer).site(index)
    folder = machine.run / "sites" / data.name
    authority = open_simulated(folder, plan, data)
    authority.witness(receipt)
    authority.admit(plan)
    return Site(plan, data.name, workspace, authority, OptimizerMemory(folder), lambda: data)


def _real_site(plan: StudyPlan, machine: Machine, folder: SiteFolder, receipt: Receipt | None) -> Site:
    name, authority, records = _opened(folder, os.getpid())
    authority.witness(receipt)
    authority.permit(plan)
    workspace = open_workspace(plan, machine)
    load = partial(_permitted, plan, authority, records, workspace)
    return Site(plan, name, workspace, authority, OptimizerMemory(folder.study(plan.sha256)), load)


def _permitted(plan: StudyPlan, authority: Authority, records: SiteRecords, workspace: Workspace) -> SiteData:
    allowed, policy = authority.permit(plan)
    return records.load(plan, allowed, policy, workspace.tokenizer)


@lru_cache(maxsize=8)
def _opened(folder: SiteFolder, _process: int) -> tuple[str, Authority, SiteRecords]:
    site = open_site_folder(folder, unlock_from(os.environ))
    return site.facts.name, Authority(site.journal, site.vault, folder.heads_file), SiteRecords(site)


_read_once = lru_cache(maxsize=4)(read_plan)
