"""The sites of a simulation: one data set, dealt out by the plan's partition.

Every process of a simulation deals the same records to the same site, because the partition depends on the plan alone.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

from fedtune.config.machine import Machine
from fedtune.config.plan import StudyPlan
from fedtune.data.bank_messages import generate
from fedtune.data.fingerprint import fingerprint
from fedtune.data.formats import read_table
from fedtune.data.records import to_records
from fedtune.data.table import Table
from fedtune.data.templates import Example, render_all
from fedtune.data.units import Units
from fedtune.errors import RunError
from fedtune.simulation.dealing import Deal, Dealing

MESSAGES_A_BANK = 400


@dataclass(frozen=True, slots=True)
class SiteData:
    """One site's examples and which of them are one unit; `data_sha256` identifies the whole data set by content."""

    name: str
    train: Sequence[Example]
    held_out: Sequence[Example]
    units: Units
    held_out_units: Units
    data_sha256: str


@dataclass(frozen=True, slots=True)
class DealtData:
    """All sites' examples and which rows each site holds for training and for measuring."""

    examples: Sequence[Example]
    deal: Deal
    sha256: str

    def site(self, index: int) -> SiteData:
        """Return one site's share."""
        name, train, held_out = self.deal.sites[index]
        chosen = [self.examples[i] for i in train], [self.examples[i] for i in held_out]
        return SiteData(name, *chosen, self.deal.units.take(train), self.deal.units.take(held_out), self.sha256)


def bank_messages(banks: int, limit: int | None) -> Table:
    """Return the synthetic messages of so many banks; with a limit, as many of each bank as fit in it."""
    each = MESSAGES_A_BANK if limit is None else max(2, min(MESSAGES_A_BANK, limit // banks))
    return generate(seed=0, banks=banks, per_bank=each)


def _read(plan: StudyPlan, machine: Machine, columns: Sequence[str]) -> Table:
    if plan.data.source == "bank-messages":
        return bank_messages(plan.federation.sites, plan.data.limit)
    if machine.data_path is None:
        raise RunError(
            "no-data", "the run's machine.json names no data file", hint="start a new run with data.path=FILE"
        )
    return read_table(
        machine.data_path,
        machine.data_format,
        columns=columns,
        limit=plan.data.limit,
        allow_download=machine.allow_download,
    )


@lru_cache(maxsize=2)
def dealt(plan_json: str, machine: Machine, tokenizer: Any) -> DealtData:
    """Read, render and deal the data of a simulation, once a process."""
    plan = StudyPlan.from_json(plan_json)
    dealing = Dealing.of_plan(plan)
    columns = dealing.columns_with(plan.task)
    table = _read(plan, machine, columns)
    examples = render_all(to_records(table, plan.task), tokenizer, plan.task, plan.data.max_tokens)
    return DealtData(examples, dealing.deal(table, plan.task), fingerprint(table, columns))


def test_examples(plan: StudyPlan, machine: Machine, tokenizer: Any) -> list[Example]:
    """Return the examples of the coordinator's own test file; a label that training never saw is an error."""
    return file_examples(plan, str(machine.test_path), tokenizer, allow_download=machine.allow_download)


def file_examples(plan: StudyPlan, path: str, tokenizer: Any, *, allow_download: bool = False) -> list[Example]:
    """Return the examples of any file that has the plan's columns."""
    table = read_table(path, "auto", columns=plan.task.used, allow_download=allow_download)
    return render_all(to_records(table, plan.task), tokenizer, plan.task, plan.data.max_tokens)
