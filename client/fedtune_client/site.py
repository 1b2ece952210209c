"""A site: its records, its workspace and what it keeps on disk, opened from a Flower context and machine facts."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

from flwr.app import Context

from fedtune.config.machine import Machine, current
from fedtune.config.plan import PLAN_KEY, StudyPlan
from fedtune.errors import MessageError, PrivacyError
from fedtune.model.workspace import Workspace
from fedtune.privacy.plan import public_count
from fedtune.simulation.sites import SiteData, dealt
from fedtune.simulation.workspace import open_workspace
from fedtune_client.memory import OptimizerMemory
from fedtune_client.spending import SpendingLog


@dataclass(frozen=True, slots=True)
class Site:
    """Everything a site needs to answer a message."""

    plan: StudyPlan
    workspace: Workspace
    data: SiteData
    spending: SpendingLog
    memory: OptimizerMemory

    @property
    def units(self) -> int:
        """The number of privacy units a site tells: rounded, because the exact number is private."""
        return public_count(self.data.units.count)


def open_site(context: Context) -> Site:
    """Open the site that a context belongs to."""
    plan = _plan(str(context.run_config.get(PLAN_KEY, "")))
    machine = current()
    workspace = open_workspace(plan, machine)
    index = context.node_config.get("partition-id")
    if not isinstance(index, int):
        raise MessageError("no-site", "the node has no partition-id", hint="start it with fedtune simulate")
    data = _site_data(plan.json_text, machine, index)
    folder = machine.run / "sites" / data.name
    return Site(plan, workspace, data, SpendingLog(folder / "events.jsonl"), OptimizerMemory(folder))


@lru_cache(maxsize=4)
def _plan(text: str) -> StudyPlan:
    """Read a plan, and keep none whose noise does not keep its promise over all its steps, whoever wrote it."""
    plan = StudyPlan.from_json(text)
    plan.promise.check()
    if plan.total_steps > plan.promise.max_steps:
        raise PrivacyError(
            "overspends", f"the plan takes {plan.total_steps} steps, its promise covers {plan.promise.max_steps}"
        )
    return plan


def _site_data(plan_json: str, machine: Machine, index: int) -> SiteData:
    plan = _plan(plan_json)
    return dealt(plan_json, machine, open_workspace(plan, machine).tokenizer).site(index)
