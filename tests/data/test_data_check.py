import csv
import json
from pathlib import Path
from typing import Any

import pytest

from fedtune.config.schema import DataSettings
from fedtune.data.check import Sample, UnitSizes, check
from fedtune.errors import DataError


def write_csv(path: Path, *rows: tuple[str, str]) -> str:
    with path.open("w", encoding="utf-8", newline="") as stream:
        csv.writer(stream).writerows([("text", "category"), *rows])
    return str(path)


def test_a_report_counts_labels_duplicates_and_lengths(tmp_path: Path, minilm: Any) -> None:
    path = write_csv(tmp_path / "a.csv", ("my card", "b"), ("my card", "b"), ("hello you there", "a"), ("my card", "a"))
    report = check(path, DataSettings(max_tokens=4), minilm)
    assert (report.format, report.rows, report.task.labels) == ("csv", 4, ("a", "b"))
    assert report.labels == {"a": 2, "b": 2}
    assert report.duplicates == 1
    assert report.lengths is not None
    assert (report.lengths.p50, report.lengths.longest) == (4, 5)
    assert report.truncated == 0.25
    assert report.samples == (Sample(tuple((token, False) for token in ("[CLS]", "my", "card", "[SEP]")), "b"),) * 2
    assert any("1 records repeat" in warning for warning in report.warnings)
    assert any("25% of the records" in warning for warning in report.warnings)


def test_the_loss_mask_of_two_examples_is_shown(tmp_path: Path, make_tokenizer: Any) -> None:
    rows = [{"prompt": "Q", "completion": answer} for answer in "ABC"]
    (tmp_path / "a.jsonl").write_text("\n".join(map(json.dumps, rows)), "utf-8")
    report = check(str(tmp_path / "a.jsonl"), DataSettings(), make_tokenizer(eos="</s>"))
    assert report.samples == (
        Sample((("Q", False), ("Ċ", False), ("A", True), ("</s>", True))),
        Sample((("Q", False), ("Ċ", False), ("B", True), ("</s>", True))),
    )
    assert report.labels == {}
    assert report.warnings == ()


@pytest.mark.parametrize("messages", [False, True])
def test_without_a_tokenizer_the_text_is_shown_and_no_length(tmp_path: Path, messages: bool) -> None:
    turns = [{"role": "user", "content": "Q"}, {"role": "assistant", "content": "A"}]
    row = {"messages": turns} if messages else {"prompt": "Q", "completion": "A"}
    (tmp_path / "a.jsonl").write_text(json.dumps(row), "utf-8")
    report = check(str(tmp_path / "a.jsonl"), DataSettings())
    assert (report.lengths, report.truncated) == (None, None)
    shown = "".join(text for text, trained in report.samples[0].pieces if trained)
    assert shown.strip() == "A"


def test_rare_labels_are_named_those_without_a_record_included(tmp_path: Path) -> None:
    path = write_csv(tmp_path / "a.csv", ("one", "x"), ("two", "x"), ("three", "y"))
    report = check(path, DataSettings(labels=("x", "y", "z")))
    assert report.labels == {"x": 2, "y": 1, "z": 0}
    assert any("y, z" in warning for warning in report.warnings)


def test_a_text_that_teaches_nothing_is_counted(tmp_path: Path, make_tokenizer: Any) -> None:
    (tmp_path / "a.jsonl").write_text('{"text": "x"}\n{"text": "xy"}\n', "utf-8")
    report = check(str(tmp_path / "a.jsonl"), DataSettings(), make_tokenizer())
    assert any(warning.startswith("1 records have no token") for warning in report.warnings)


def test_units_of_a_column_are_counted_with_their_sizes(tmp_path: Path) -> None:
    path = tmp_path / "a.csv"
    owners = ["p1"] * 7 + ["p2", "p3", "p3"]
    path.write_text("patient,text,category\n" + "".join(f"{one},t{at},{at % 2}\n" for at, one in enumerate(owners)))
    assert check(str(path), DataSettings(), unit="patient").units == UnitSizes("patient", 3, 2.0, 7)
    assert check(str(path), DataSettings()).units is None
    with pytest.raises(DataError, match="no column 'account'"):
        check(str(path), DataSettings(), unit="account")
