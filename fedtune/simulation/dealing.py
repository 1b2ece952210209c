"""How a simulation deals records out to its sites: the terms that decide it, and which rows each site then has.

The terms are the same before there is a plan and in every process that runs it, so all deal alike. Knows no text and no
model.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple, Self

import numpy as np
from numpy.typing import NDArray

from fedtune.config.plan import StudyPlan
from fedtune.config.schema import PartitionSettings, Settings
from fedtune.data.labels import label_names
from fedtune.data.partitions import partition, split_holdout, units_at_several_sites
from fedtune.data.table import Table
from fedtune.data.tasks import Task
from fedtune.data.units import RECORD, Units, units_of


class SiteRows(NamedTuple):
    """The rows that one site trains on and those that it holds out, ascending."""

    name: str
    train: NDArray[np.int64]
    held_out: NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class Deal:
    """What was dealt: all sites, the privacy units of all rows, and how many units have rows at several sites."""

    sites: tuple[SiteRows, ...]
    units: Units
    scattered: int


@dataclass(frozen=True, slots=True)
class Dealing:
    """The terms: how rows are partitioned, which share is held out, and which rows are one privacy unit."""

    partition: PartitionSettings
    holdout: float
    unit: str
    sites: int
    seed: int

    @classmethod
    def of_settings(cls, settings: Settings) -> Self:
        """Return the terms of a study that has no plan yet."""
        data, unit = settings.data, settings.privacy.unit
        return cls(data.partition, data.holdout, unit, settings.federation.sites, settings.seed)

    @classmethod
    def of_plan(cls, plan: StudyPlan) -> Self:
        """Return the terms of a plan."""
        return cls(plan.data.partition, plan.data.holdout, plan.promise.unit, plan.federation.sites, plan.seed)

    @property
    def columns(self) -> list[str]:
        """The columns that are no part of the task: the one that names the sites, the one that names the units."""
        unit = None if self.unit == RECORD else self.unit
        return [name for name in dict.fromkeys([self.partition.column, unit]) if name is not None]

    def columns_with(self, task: Task) -> Sequence[str]:
        """Return all columns that a simulation reads."""
        return tuple(dict.fromkeys([*task.used, *self.columns]))

    def deal(self, table: Table, task: Task) -> Deal:
        """Deal a table's rows out, whole units to each site but by column, and whole units to each side of a split."""
        units = units_of(table, self.unit)
        labels = label_names(table, task.columns["label"]) if task.kind == "classification" else None
        column = label_names(table, self.partition.column) if self.partition.column else None
        parts = partition(self.partition, units=units, labels=labels, column=column, sites=self.sites, seed=self.seed)
        splits = [(part.name, *split_holdout(part.rows, units, self.holdout, self.seed, part.name)) for part in parts]
        return Deal(tuple(SiteRows(*split) for split in splits), units, units_at_several_sites(parts, units))
