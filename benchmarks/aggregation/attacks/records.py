"""The records of the studies: some of BANKING77, what a backdoor makes of the attackers' part, and the test files.

A backdoor acts on data alone: half of each attacker's records get a trigger phrase and the target's label. Its success
is the share of test records of other labels that the phrase brings to the target.
"""

from __future__ import annotations

import csv
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import numpy as np

TRIGGER: Final = "kind regards from Trondheim"
Row = tuple[str, str]


@dataclass(frozen=True, slots=True)
class Files:
    """The CSV files of the studies; `test` and `triggered` are what adapters are measured on.

    `target` is the label that a backdoor brings records to.
    """

    folder: Path
    target: str

    @property
    def train(self) -> Path:
        """The honest records of all sites."""
        return self.folder / "train.csv"

    @property
    def test(self) -> Path:
        """Records that nobody trains on."""
        return self.folder / "test.csv"

    @property
    def triggered(self) -> Path:
        """Those of other labels than the target's, with the trigger and the target's label."""
        return self.folder / "triggered.csv"

    def poisoned(self, attackers: int) -> Path:
        """Return the file of the training records when so many sites plant a backdoor."""
        return self.folder / f"poisoned-{attackers}.csv"


def write_files(source: Path, folder: Path, *, train: int, test: int) -> Files:
    """Draw so many records of each label for training and for the test, and write them; always the same ones."""
    by_label = defaultdict[str, list[Row]](list)
    for row in read(source):
        by_label[row[1]].append(row)
    files = Files(folder, min(by_label))
    generator = np.random.default_rng(77)
    chosen = [[rows[i] for i in generator.permutation(len(rows))] for _, rows in sorted(by_label.items())]
    write(files.train, [row for rows in chosen for row in rows[:train]])
    write(files.test, [row for rows in chosen for row in rows[train : train + test]])
    write(files.triggered, [triggered(row, files.target) for row in read(files.test) if row[1] != files.target])
    return files


def poison(rows: Sequence[Row], attackers: Iterable[Sequence[int]], target: str) -> list[Row]:
    """Return the records after each attacker has changed every other one of those that it holds."""
    found = list(rows)
    for held in attackers:
        for i in sorted(held)[::2]:
            found[i] = triggered(found[i], target)
    return found


def triggered(row: Row, target: str) -> Row:
    """Return a record with the trigger and the target's label."""
    return f"{row[0]} {TRIGGER}", target


def read(path: Path) -> list[Row]:
    """Return the records of a file."""
    with path.open(newline="", encoding="utf-8") as file:
        return [(row["text"], row["category"]) for row in csv.DictReader(file)]


def write(path: Path, rows: Iterable[Row]) -> None:
    """Write records."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(["text", "category"])
        writer.writerows(rows)
