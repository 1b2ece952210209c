"""A site's records for a plan: the registered file, without the records that did not opt in, as examples.

A file is opened only after policy, consent and budget have said yes. What was read is kept while file, rule and policy
stay as they were; a file that has changed is read again, and refused unless a grant covers what it holds now.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from fedtune.config.plan import StudyPlan
from fedtune.data.fingerprint import fingerprint
from fedtune.data.opt_in import Allowed, ByColumn, ByList, OptIn, allowed_rows
from fedtune.data.partitions import split_holdout
from fedtune.data.records import to_records
from fedtune.data.table import Table
from fedtune.data.templates import render_all
from fedtune.data.units import RECORD, Units, units_of
from fedtune.errors import ConsentError, PolicyError
from fedtune.journal.entries import RecordsConsented
from fedtune.privacy.plan import public_count
from fedtune.simulation.sites import SiteData
from fedtune_client.admission import Permit
from fedtune_client.facts import Stamp, changed_since, open_table
from fedtune_client.folder import OpenSite
from fedtune_client.policy.schema import DataPolicy, OptOut, Policy


@dataclass(slots=True)
class _Loaded:
    """What was read, and what it depends on."""

    data: SiteData
    stamp: Stamp
    of: tuple[str, int, str, tuple[int, ...] | None]


class SiteRecords:
    """Reads the records of one site, and keeps those of the newest plan."""

    def __init__(self, site: OpenSite) -> None:
        self._site = site
        self._loaded: _Loaded | None = None

    def load(self, plan: StudyPlan, permit: Permit, policy: Policy, tokenizer: Any) -> SiteData:
        """Return the plan's records at this site.

        Errors: `consent.other-data` when the file is not the one that was granted, `policy.few-units` when too few of
        its units are left by the rule and the plan's limit, those of reading and of the rule.
        """
        name = plan.data.name
        rule = rule_of(policy.data[name], self._site.folder.path)
        of = (plan.sha256, permit.data, policy.sha256, _changed(rule))
        known = self._loaded
        if known is not None and known.of == of and not changed_since(self._site.facts, name, known.stamp):
            return known.data
        opened = open_table(self._site.facts, name)
        self._refuse_other(opened.table, permit)
        table = _used(self._consented(opened.table, rule, plan, permit), plan)
        units = units_of(table, plan.promise.unit)
        _require_enough(units, policy.data[name])
        data = _site_data(self._site.facts.name, table, units, plan, tokenizer, self._sha256(permit))
        self._loaded = _Loaded(data, opened.stamp, of)
        return data

    def _sha256(self, permit: Permit) -> str:
        return self._site.journal.state.spending.data[permit.data].fingerprint

    def _refuse_other(self, table: Table, permit: Permit) -> None:
        if fingerprint(table, table.names) != self._sha256(permit):
            name = self._site.journal.state.spending.data[permit.data].name
            raise ConsentError(
                "other-data",
                f"the file of {name} no longer holds what was granted",
                hint=f"grant what it holds now: fedtune client consent grant {name}; its budget goes on",
            )

    def _consented(self, table: Table, rule: OptIn | None, plan: StudyPlan, permit: Permit) -> Table:
        """Return the rows that may be used, and write down which rule has chosen them."""
        if rule is None:
            return table
        allowed = allowed_rows(table, rule)
        taken = table.take([int(row) for row in allowed.rows])
        self._note(allowed, public_count(units_of(taken, plan.promise.unit).count), permit)
        return taken

    def _note(self, allowed: Allowed, units: int, permit: Permit) -> None:
        entry = RecordsConsented(data=permit.data, source=allowed.source_sha256, units=units)
        with self._site.journal as journal:
            if journal.state.records.get(permit.data) != entry:
                journal.append(entry)


def rule_of(data: DataPolicy, folder: Path) -> OptIn | None:
    """Return the consent rule of a data set's policy; a relative file starts at the site's folder."""
    if data.consent == "none":
        return None
    if isinstance(data.consent, OptOut):
        chosen = data.consent.opt_out
        return ByList(chosen.column, folder / chosen.file, "out")
    wanted = data.consent.opt_in
    if hasattr(wanted, "values"):
        return ByColumn(wanted.column, wanted.values)
    return ByList(wanted.column, folder / wanted.file, "in")


def _changed(rule: OptIn | None) -> tuple[int, ...] | None:
    """Return what the file system says of a rule's list; None where there is no list, which reading it will say.

    The time of change, which nobody sets, tells a list that was put in place with an older one's time of modification.
    """
    if isinstance(rule, ByList) and rule.file.exists():
        found = rule.file.stat()
        return found.st_size, found.st_mtime_ns, found.st_ctime_ns, found.st_ino
    return None


def _used(table: Table, plan: StudyPlan) -> Table:
    """Return the columns and rows of a table that the plan uses."""
    unit = plan.promise.unit
    table = table.select(dict.fromkeys([*plan.task.used, *([] if unit == RECORD else [unit])]))
    return table if plan.data.limit is None else table.take(range(min(plan.data.limit, table.rows)))


def _require_enough(units: Units, data: DataPolicy) -> None:
    """Refuse records of too few units for one to disappear among them; admission knew those of the whole file only."""
    found, wanted = public_count(units.count), max(1, data.min_units)
    if found < wanted:
        text = f"of the units that may take part {found} are left, and at least {wanted} are wanted"
        raise PolicyError("few-units", text, hint="min_units in policy.yaml")


def _site_data(name: str, table: Table, units: Units, plan: StudyPlan, tokenizer: Any, sha256: str) -> SiteData:
    examples = render_all(to_records(table, plan.task), tokenizer, plan.task, plan.data.max_tokens)
    train, held_out = split_holdout(np.arange(table.rows), units, plan.data.holdout, plan.seed, name)
    return SiteData(
        name,
        [examples[row] for row in train],
        [examples[row] for row in held_out],
        units.take(train),
        units.take(held_out),
        sha256,
    )
