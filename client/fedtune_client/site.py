"""A site: its authority, its workspace, its records, opened from a Flower context and machine facts.

A simulated site has a share of the study's one file; a real one has a folder of its own, named by FEDTUNE_SITE, and
finds the plan's base model among its own unless FEDTUNE_MACHINE says where it is. What they do with a message is the
same. Records are read by `data`, which asks the authority first.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache, partial
from pathlib import Path

from flwr.app import Context

from fedtune.config.canonical import sha256_hex
from fedtune.config.machine import ENVIRONMENT_VARIABLE as MACHINE
from fedtune.config.machine import Machine, current
from fedtune.config.plan import PLAN_KEY, StudyPlan
from fedtune.errors import (
    ConsentError,
    LedgerError,
    MessageError,
    ModelError,
    PolicyError,
    PrivacyError,
    RunError,
)
from fedtune.journal.witness import Receipt
from fedtune.model.workspace import Workspace
from fedtune.privacy.plan import public_count
from fedtune.simulation.sites import SiteData, dealt
from fedtune.simulation.workspace import open_workspace
from fedtune_client import asked
from fedtune_client.authority import Authority
from fedtune_client.folder import ENVIRONMENT_VARIABLE, OpenSite, SiteFolder, open_site_folder
from fedtune_client.machine import machine_of
from fedtune_client.memory import KeptTensors, OptimizerMemory, ReceivedStates, most_rank
from fedtune_client.policy.plans import read_plan
from fedtune_client.records import SiteRecords
from fedtune_client.simulated import open_simulated
from fedtune_client.vault import unlock_from

logger = logging.getLogger("fedtune.site")
_AGAINST_A_PLAN = (ConsentError, LedgerError, ModelError, PolicyError, PrivacyError)


@dataclass(frozen=True, slots=True)
class Resident:
    """A real site as one process holds it open, from its first message to its end."""

    site: OpenSite
    authority: Authority
    records: SiteRecords


@dataclass(frozen=True, slots=True)
class Site:
    """Everything a site needs to answer a message; `load` reads its records, or refuses to.

    `workspace` is at the plan's rank, `open_workspace` gives those of others; `most_rank` is the largest that the
    machine holds, 0 where the plan does not leave the rank to the sites.
    """

    plan: StudyPlan
    name: str
    workspace: Workspace
    authority: Authority
    memory: OptimizerMemory
    kept: KeptTensors
    received: ReceivedStates
    open_workspace: Callable[[int], Workspace]
    load: Callable[[], SiteData]
    most_rank: int = 0

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
    return _read_once(_text(context))


def study_of(context: Context) -> str:
    """Return the hash of the plan that a context carries, which is not read for that."""
    return sha256_hex(_text(context))


def open_site(context: Context, plan: StudyPlan, receipt: Receipt | None) -> Site:
    """Open the site that a context belongs to; one that does not take part in the plan is not opened.

    A journal that does not extend the coordinator's receipt is refused before anything is written to it.
    """
    if os.environ.get(ENVIRONMENT_VARIABLE):
        return _real_site(plan, open_resident(), receipt)
    index = context.node_config.get("partition-id")
    if not isinstance(index, int):
        raise MessageError("no-site", "the node has no partition-id", hint="start it with fedtune simulate")
    return _simulated_site(plan, current(), index, receipt)


def open_resident() -> Resident:
    """Return the site whose folder FEDTUNE_SITE names, opened once a process.

    Errors: those of `open_site_folder`, and `journal.rolled-back` by the receipts beside the journal.
    """
    return _opened(SiteFolder(Path(os.environ[ENVIRONMENT_VARIABLE])), os.getpid())


def _simulated_site(plan: StudyPlan, machine: Machine, index: int, receipt: Receipt | None) -> Site:
    workspace = open_workspace(plan, machine)
    data = dealt(plan.json_text, machine, workspace.tokenizer).site(index)
    folder = machine.run / "sites" / data.name
    authority = open_simulated(folder, plan, data)
    authority.witness(receipt)
    authority.admit(plan)
    return _site(plan, machine, data.name, authority, folder, lambda: data)


def _real_site(plan: StudyPlan, resident: Resident, receipt: Receipt | None) -> Site:
    folder, authority = resident.site.folder, resident.authority
    authority.witness(receipt)
    machine = _admitted(plan, folder, authority)
    workspace = open_workspace(plan, machine)
    load = partial(_permitted, plan, authority, resident.records, workspace)
    return _site(plan, machine, resident.site.facts.name, authority, folder.study(plan.sha256), load)


def _site(
    plan: StudyPlan,
    machine: Machine,
    name: str,
    authority: Authority,
    folder: Path,
    load: Callable[[], SiteData],
) -> Site:
    return Site(
        plan,
        name,
        open_workspace(plan, machine),
        authority,
        OptimizerMemory(folder),
        KeptTensors(authority.vault, plan.sha256),
        ReceivedStates(folder),
        partial(open_workspace, plan, machine),
        load,
        most_rank(plan, machine, folder) if plan.lora.ranks == "hardware" else 0,
    )


def _admitted(plan: StudyPlan, folder: SiteFolder, authority: Authority) -> Machine:
    """Return what the plan's model is opened with; a plan that is refused is kept for the operator to read."""
    try:
        authority.permit(plan)
        machine = current() if MACHINE in os.environ else machine_of(plan, folder)
    except _AGAINST_A_PLAN:
        _note(asked.keep, folder, plan)
        raise
    _note(asked.forget, folder, plan)
    return machine


def _note(note: Callable[[SiteFolder, StudyPlan], None], folder: SiteFolder, plan: StudyPlan) -> None:
    """Keep the list of plans; that it cannot be written is no reason to answer otherwise."""
    try:
        note(folder, plan)
    except RunError as error:
        logger.warning("the list of plans cannot be written", extra={"code": error.code, "hint": error.hint})


def _permitted(plan: StudyPlan, authority: Authority, records: SiteRecords, workspace: Workspace) -> SiteData:
    allowed, policy = authority.permit(plan)
    return records.load(plan, allowed, policy, workspace.tokenizer)


@lru_cache(maxsize=8)
def _opened(folder: SiteFolder, _process: int) -> Resident:
    site = open_site_folder(folder, unlock_from(os.environ))
    return Resident(site, Authority(site.journal, site.vault, folder.heads_file), SiteRecords(site))


def _text(context: Context) -> str:
    return str(context.run_config.get(PLAN_KEY, ""))


_read_once = lru_cache(maxsize=4)(read_plan)
