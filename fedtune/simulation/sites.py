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
from fedtune.config.schema import PartitionSettings
from fedtune.data.bank_messages import generate
from fedtune.data.fingerprint import fingerprint
from fedtune.data.formats import read_table
from fedtune.data.labels import label_names
from fedtune.data.partitions import Partition, partition, split_holdout
from fedtune.data.records import to_records
from fedtune.data.table import Table
from fedtune.data.tasks import Task
from fedtune.data.templates import Example, render_all
from fedtune.errors import RunError

MESSAGES_A_BANK = 400


@dataclass(frozen=True, slots=True)
class SiteData:
    """One site's examples; `data_sha256` identifies the whole data set by content."""

    name: str
    train: Sequence[Example]
    held_out: Sequence[Example]
    data_sha256: str


@dataclass(frozen=True, slots=True)
class DealtData:
    """All sites' examples and which rows each site holds for training and for measuring."""

    examples: Sequence[Example]
    rows: tuple[tuple[str, Any, Any], ...]
    sha256: str

    def site(self, index: int) -> SiteData:
        """Return one site's share."""
        name, train, held_out = self.rows[index]
        return SiteData(name, [self.examples[i] for i in train], [self.examples[i] for i in held_out], self.sha256)


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


def deal(plan: StudyPlan, table: Table) -> tuple[Partition, ...]:
    """Deal the rows of a table to the plan's sites."""
    return deal_rows(plan.data.partition, plan.task, table, plan.federation.sites, plan.seed)


def deal_rows(settings: PartitionSettings, task: Task, table: Table, sites: int, seed: int) -> tuple[Partition, ...]:
    """Deal the rows of a table to sites before there is a plan."""
    labels = label_names(table, task.columns["label"]) if task.kind == "classification" else None
    column = label_names(table, settings.column) if settings.column else None
    return partition(settings, rows=table.rows, labels=labels, column=column, sites=sites, seed=seed)


def needed_columns(task: Task, partition_column: str | None) -> list[str]:
    """Return the columns a simulation reads: the task's and the one that names the sites."""
    return [*task.used, *([partition_column] if partition_column and partition_column not in task.used else [])]


@lru_cache(maxsize=2)
def dealt(plan_json: str, machine: Machine, tokenizer: Any) -> DealtData:
    """Read, render and deal the data of a simulation, once a process."""
    plan = StudyPlan.from_json(plan_json)
    columns = needed_columns(plan.task, plan.data.partition.column)
    table = _read(plan, machine, columns)
    examples = render_all(to_records(table, plan.task), tokenizer, plan.task, plan.data.max_tokens)
    rows = []
    for part in deal(plan, table):
        train, held_out = split_holdout(part.rows, plan.data.holdout, plan.seed, part.name)
        rows.append((part.name, train, held_out))
    return DealtData(examples, tuple(rows), fingerprint(table, columns))


def test_examples(plan: StudyPlan, machine: Machine, tokenizer: Any) -> list[Example]:
    """Return the examples of the coordinator's own test file; a label that training never saw is an error."""
    return file_examples(plan, str(machine.test_path), tokenizer, allow_download=machine.allow_download)


def file_examples(plan: StudyPlan, path: str, tokenizer: Any, *, allow_download: bool = False) -> list[Example]:
    """Return the examples of any file that has the plan's columns."""
    table = read_table(path, "auto", columns=plan.task.used, allow_download=allow_download)
    return render_all(to_records(table, plan.task), tokenizer, plan.task, plan.data.max_tokens)
