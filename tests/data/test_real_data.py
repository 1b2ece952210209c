"""The public data sets that the benchmarks use, where they are."""

import os
from pathlib import Path

import pytest

from fedtune.config.schema import DataSettings
from fedtune.data.loading import load
from fedtune.data.records import to_records

FOLDER = Path(os.environ.get("FEDTUNE_DATA", Path(__file__).parents[2].parent / "shared" / "data"))


def path_of(name: str) -> str:
    if not (FOLDER / name).is_file():
        pytest.skip(f"no file {name} in {FOLDER}; set FEDTUNE_DATA")
    return str(FOLDER / name)


@pytest.mark.parametrize(
    ("name", "style", "used", "rows", "labels"),
    [
        ("banking77/train.csv", "classification", ("text", "category"), 10_003, 77),
        ("clinc150/train.jsonl.gz", "classification", ("text", "intent"), 15_000, 150),
        ("medquad/medquad.jsonl.gz", "prompt", ("question", "answer"), 14_109, 0),
    ],
)
def test_a_public_data_set_needs_no_settings(
    name: str, style: str, used: tuple[str, ...], rows: int, labels: int
) -> None:
    table, task = load(path_of(name), DataSettings())
    assert (task.style, task.used, table.rows, len(task.labels)) == (style, used, rows, labels)
    assert len(to_records(table, task)) == rows


def test_the_natural_sites_of_a_public_data_set_come_along() -> None:
    table, _ = load(path_of("medquad/medquad.jsonl.gz"), DataSettings(), also=["site"])
    assert table.names == ("question", "answer", "site")
    assert len(set(table.columns["site"])) == 7
