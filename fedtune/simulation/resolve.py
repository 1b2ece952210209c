"""From settings and records to a study plan: everything that can be refused is refused here.

Reads the records, to find the task, the labels and the sites' sizes. Nothing is trained and nothing is written.
"""

from __future__ import annotations

from fedtune.aggregation.weights import site_weights
from fedtune.config.schema import Settings
from fedtune.data.formats import read_table
from fedtune.data.loading import labelled, load
from fedtune.data.records import to_records
from fedtune.data.table import Table
from fedtune.data.tasks import Task, find_task
from fedtune.errors import ConfigError
from fedtune.model.base import find_base
from fedtune.model.build import check_length
from fedtune.privacy.plan import public_count
from fedtune.simulation.dealing import Deal, Dealing
from fedtune.simulation.planning import Resolved, SiteSize, complete
from fedtune.simulation.refusals import refuse_early, refuse_told_unit
from fedtune.simulation.sites import bank_messages

__all__ = ["Resolved", "check_records", "read_records", "read_test", "resolve", "sizes"]


def resolve(settings: Settings) -> Resolved:
    """Return the study that settings describe, or refuse it with the reason."""
    refuse_early(settings)
    base = find_base(settings.model)
    check_length(base, settings.data.max_tokens)
    table, task = read_records(settings)
    check_records(settings, table, task)
    refuse_told_unit(settings, task)
    deal = Dealing.of_settings(settings).deal(table, task)
    sites = sizes(deal)
    site_weights(settings.aggregation, [site.name for site in sites])
    return complete(settings, task, base, sites, deal.scattered)


def read_records(settings: Settings) -> tuple[Table, Task]:
    """Return the study's records and task: the user's file, or the synthetic bank messages."""
    data = settings.data
    if data.source == "bank-messages":
        table = bank_messages(settings.federation.sites, data.limit)
        return table, labelled(table, find_task(data, list(table.columns)), data)
    if data.path is None:
        raise ConfigError("no-data", "the study has no records: data.path is not set", hint="data.path=FILE")
    also = Dealing.of_settings(settings).columns
    return load(data.path, data, also=also, allow_download=settings.model.allow_download)


def check_records(settings: Settings, table: Table, task: Task) -> None:
    """Read every record and the test file's, so that a mistake in them stops the study before anything is written."""
    to_records(table, task)
    test = read_test(settings, task)
    if test is not None:
        to_records(test, task)


def read_test(settings: Settings, task: Task) -> Table | None:
    """Return the coordinator's own test file, where there is one."""
    path, downloads = settings.data.test, settings.model.allow_download
    return None if path is None else read_table(path, "auto", columns=task.used, allow_download=downloads)


def sizes(deal: Deal) -> tuple[SiteSize, ...]:
    """Return what the sites of a deal are called and how large they are."""
    counts = [deal.units.take(site.train).count for site in deal.sites]
    pairs = zip(deal.sites, counts, strict=True)
    return tuple(SiteSize(site.name, public_count(count), len(site.held_out)) for site, count in pairs)
