"""What `fedtune data check` finds in a file. Knows no model beyond its tokenizer, and prints nothing."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from fedtune.data.loading import load
from fedtune.data.records import LabelledText, to_records
from fedtune.data.templates import IGNORED, render_all, segments_of
from fedtune.data.units import RECORD, units_of

if TYPE_CHECKING:
    from collections.abc import Sequence

    from fedtune.config.schema import DataSettings
    from fedtune.data.records import Record
    from fedtune.data.table import Table
    from fedtune.data.tasks import Task
    from fedtune.data.templates import Example

_SHOWN = 2
_MANY_TRUNCATED = 0.1


@dataclass(frozen=True, slots=True)
class TokenLengths:
    """Percentiles of the records' lengths in tokens, before truncation."""

    p50: int
    p90: int
    p95: int
    p99: int
    longest: int


@dataclass(frozen=True, slots=True)
class UnitSizes:
    """The privacy units that a column makes: their number, and how many records the middle and the largest have."""

    column: str
    count: int
    median: float
    largest: int


@dataclass(frozen=True, slots=True)
class Sample:
    """One record as the model sees it, in pieces: tokens (text without a tokenizer), and whether each is trained.

    A classification record has `label`, and no piece of it counts: the loss is on the label.
    """

    pieces: tuple[tuple[str, bool], ...]
    label: str | None = None


@dataclass(frozen=True, slots=True)
class DataReport:
    """What was found. `lengths` and `truncated` (share of records in [0, 1]) need a tokenizer and are None without.

    `duplicates` counts the records that repeat an earlier one exactly. `labels` maps each label to its records, the
    most frequent first; empty for causal language modelling. `units` is None where each record is a unit.
    """

    source: str
    format: str
    task: Task
    rows: int
    labels: dict[str, int]
    duplicates: int
    units: UnitSizes | None
    lengths: TokenLengths | None
    truncated: float | None
    samples: tuple[Sample, ...]
    warnings: tuple[str, ...]


def check(
    path: str,
    settings: DataSettings,
    tokenizer: Any | None = None,
    *,
    unit: str = RECORD,
    allow_download: bool = False,
) -> DataReport:
    """Read every record of a file as a study would, and report; raises what reading raises.

    `unit` is the plan's privacy unit: `record`, or the column whose equal values make one.
    """
    table, task = load(path, settings, also=[] if unit == RECORD else [unit], allow_download=allow_download)
    records = to_records(table, task)
    examples = render_all(records, tokenizer, task, settings.max_tokens) if tokenizer is not None else None
    labels = _label_counts(records, task)
    duplicates = len(records) - len(set(records))
    truncated = None if examples is None else float(np.mean([example.truncated for example in examples]))
    return DataReport(
        source=table.source,
        format=table.format,
        task=task,
        rows=table.rows,
        labels=labels,
        duplicates=duplicates,
        units=None if unit == RECORD else _unit_sizes(table, unit),
        lengths=None if examples is None else _token_lengths(examples),
        truncated=truncated,
        samples=_samples(records, examples, task, tokenizer),
        warnings=tuple(_warnings(settings, labels, duplicates, truncated, examples)),
    )


def _label_counts(records: Sequence[Record], task: Task) -> dict[str, int]:
    """Count the records of each label, those of the settings without a record included."""
    counts = Counter(task.labels[record.label] for record in records if isinstance(record, LabelledText))
    return dict(sorted(((label, counts[label]) for label in task.labels), key=lambda item: (-item[1], item[0])))


def _unit_sizes(table: Table, column: str) -> UnitSizes:
    sizes = units_of(table, column).sizes
    return UnitSizes(column, len(sizes), float(np.median(sizes)), int(sizes.max()))


def _token_lengths(examples: Sequence[Example]) -> TokenLengths:
    lengths = np.array([example.length for example in examples])
    p50, p90, p95, p99 = (int(np.percentile(lengths, share, method="higher")) for share in (50, 90, 95, 99))
    return TokenLengths(p50, p90, p95, p99, int(lengths.max()))


def _samples(
    records: Sequence[Record], examples: Sequence[Example] | None, task: Task, tokenizer: Any | None
) -> tuple[Sample, ...]:
    samples = []
    for at, record in enumerate(records[:_SHOWN]):
        label = task.labels[record.label] if isinstance(record, LabelledText) else None
        if examples is None:
            pieces = tuple((part.text, part.trained) for part in segments_of(record, tokenizer))
        else:
            pieces = _tokens(examples[at], tokenizer)
        samples.append(Sample(pieces, label))
    return tuple(samples)


def _tokens(example: Example, tokenizer: Any) -> tuple[tuple[str, bool], ...]:
    tokens = tokenizer.convert_ids_to_tokens(example.input_ids.tolist())
    counted = [False] * len(tokens) if example.labels is None else (example.labels != IGNORED).tolist()
    return tuple(zip(tokens, counted, strict=True))


def _warnings(
    settings: DataSettings,
    labels: dict[str, int],
    duplicates: int,
    truncated: float | None,
    examples: Sequence[Example] | None,
) -> list[str]:
    found = []
    if duplicates:
        found.append(
            f"{duplicates} records repeat another one exactly; unless privacy.unit puts them into one unit, each copy "
            "counts as a record of its own for privacy, and copies on both sides of the held-out split flatter the "
            "metrics"
        )
    rare = [label for label, count in labels.items() if count <= 1]
    if rare:
        found.append(f"labels with at most one record: {', '.join(rare)}")
    if truncated is not None and truncated > _MANY_TRUNCATED:
        found.append(f"{truncated:.0%} of the records are longer than data.max_tokens={settings.max_tokens}")
    silent = sum(example.labels is not None and example.trained_tokens == 0 for example in examples or ())
    if silent:
        found.append(f"{silent} records have no token that counts in the loss and teach nothing")
    return found
