"""Metrics of an adapter on held-out records, from counts that add up across sites.

A site reduces its held-out records to a `Tally`; the federation's tally is the sum of the sites', so the global metrics
are those of all held-out records together and not a mean of means. Knows no model, no batch and no message.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from fedtune.errors import MessageError

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence

Counts = NDArray[np.int64]


@dataclass(frozen=True, slots=True, eq=False)
class Confusion:
    """Records counted by true class (rows) and predicted class (columns): (classes, classes) int64."""

    counts: Counts

    @classmethod
    def of(cls, truth: Sequence[int] | Counts, prediction: Sequence[int] | Counts, classes: int) -> Confusion:
        """Count pairs of class indices, each in [0, classes); any other is a ValueError."""
        pairs = np.array([truth, prediction], np.int64).reshape(2, -1)
        if ((pairs < 0) | (pairs >= classes)).any():
            raise ValueError("a class index is out of range")  # it would be counted in another cell
        cells = pairs[0] * classes + pairs[1]
        return cls(np.bincount(cells, minlength=classes**2).reshape(classes, classes).astype(np.int64))

    @property
    def records(self) -> int:
        """How many records were counted."""
        return int(self.counts.sum())

    def __add__(self, other: Confusion) -> Confusion:
        return Confusion(self.counts + other.counts)


def classification_metrics(confusion: Confusion, loss_sum: float, records: int) -> dict[str, float]:
    """Return accuracy, macro_precision, macro_recall, macro_f1 and loss (mean per record); empty for no record.

    scikit-learn's conventions: macro means average over the classes that occur as truth or as prediction, and a ratio
    without a denominator is 0 (`zero_division=0`).
    """
    if not records:
        return {}
    hits = np.diag(confusion.counts).astype(np.float64)
    true, predicted = confusion.counts.sum(axis=1), confusion.counts.sum(axis=0)
    seen = (true + predicted) > 0
    return {
        "accuracy": float(hits.sum() / records),
        "macro_precision": float(_ratio(hits, predicted)[seen].mean()),
        "macro_recall": float(_ratio(hits, true)[seen].mean()),
        "macro_f1": float(_ratio(2 * hits, true + predicted)[seen].mean()),
        "loss": loss_sum / records,
    }


def language_metrics(loss_sum: float, tokens: int) -> dict[str, float]:
    """Return loss (mean per token, in nats) and perplexity = exp(loss); empty for no token.

    `loss_sum` is over tokens, so long records count by their length. A loss beyond float64's exponential (about 709)
    has no perplexity, and the key is left out.
    """
    if not tokens:
        return {}
    loss = loss_sum / tokens
    try:
        return {"loss": loss, "perplexity": math.exp(loss)}
    except OverflowError:
        return {"loss": loss}


def _ratio(part: NDArray[np.float64], whole: Counts) -> NDArray[np.float64]:
    return np.divide(part, whole, out=np.zeros_like(part), where=whole > 0)


@dataclass(frozen=True, slots=True, eq=False)
class Tally:
    """What one site's held-out records add up to.

    `loss_sum` is over records for classification (`confusion` is set) and over tokens for language modelling (it is
    None). `tokens` counts the tokens that carry loss; it is 0 for classification.
    """

    loss_sum: float
    records: int
    tokens: int = 0
    confusion: Confusion | None = None

    def __add__(self, other: Tally) -> Tally:
        return total([self, other])

    def metrics(self) -> dict[str, float]:
        """Return the task's metrics; empty when nothing was held out."""
        if self.confusion is None:
            return language_metrics(self.loss_sum, self.tokens)
        return classification_metrics(self.confusion, self.loss_sum, self.records)

    def to_arrays(self) -> dict[str, NDArray[Any]]:
        """Return the tally as `loss_sum` (1,) float64, `counts` (2,) int64 and, for classes, `confusion`."""
        arrays: dict[str, NDArray[Any]] = {
            "loss_sum": np.array([self.loss_sum], np.float64),
            "counts": np.array([self.records, self.tokens], np.int64),
        }
        return arrays if self.confusion is None else {**arrays, "confusion": self.confusion.counts}

    @classmethod
    def from_arrays(cls, arrays: Mapping[str, NDArray[Any]], classes: int | None) -> Tally:
        """Read a tally that came from another machine; `classes` is None for language modelling.

        Error: `broken-tally` for other tensors, shapes or types than `to_arrays` writes, a loss that is not finite, a
        negative count, or a confusion matrix that does not add up to the records: one such tally would spoil the sum.
        """
        shapes: dict[str, tuple[tuple[int, ...], type]] = {"loss_sum": ((1,), np.float64), "counts": ((2,), np.int64)}
        if classes is not None:
            shapes["confusion"] = ((classes, classes), np.int64)
        if {name: (array.shape, array.dtype.type) for name, array in arrays.items()} != shapes:
            raise MessageError("broken-tally", "a tally's arrays are not those of this task")
        confusion = None if classes is None else Confusion(arrays["confusion"])
        records, tokens = (int(count) for count in arrays["counts"])
        tally = cls(float(arrays["loss_sum"][0]), records, tokens, confusion)
        tally._check()
        return tally

    def _check(self) -> None:
        """Refuse numbers that no records can have."""
        negative = self.records < 0 or self.tokens < 0
        if self.confusion is not None:
            negative = negative or bool((self.confusion.counts < 0).any())
        if negative or not math.isfinite(self.loss_sum):
            raise MessageError("broken-tally", "a tally has a negative count or a loss that is not finite")
        if self.confusion is not None and self.confusion.records != self.records:
            raise MessageError("broken-tally", "a tally's confusion matrix does not add up to its records")


def total(tallies: Iterable[Tally]) -> Tally:
    """Return the sum of tallies of one task, the same bits in every order; an empty tally for none."""
    parts = list(tallies)
    confusions = [part.confusion.counts for part in parts if part.confusion is not None]
    return Tally(
        loss_sum=math.fsum(part.loss_sum for part in parts),
        records=sum(part.records for part in parts),
        tokens=sum(part.tokens for part in parts),
        confusion=Confusion(np.sum(confusions, axis=0, dtype=np.int64)) if confusions else None,
    )
