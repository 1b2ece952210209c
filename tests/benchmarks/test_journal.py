from __future__ import annotations

import json
from pathlib import Path

import pytest

from benchmarks.journal.__main__ import main
from benchmarks.journal.records import write_journal
from fedtune.journal.verify import verify


def test_a_tiny_run_gives_every_figure(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    words = ["--records", "60", "--turns", "2", "--batch", "2", "--folder", str(tmp_path)]
    main([*words, "--format", "json"])
    result = json.loads(capsys.readouterr().out)
    assert len(result["charges"]) == 6
    assert all(rate["median"] > 0 for rate in result["charges"].values())
    assert result["reading"]["records"] == 60
    assert set(result["reading"]["sizes"]) == {
        "site-created", "data-registered", "consent-given", "reserve", "commit", "update-sent"
    }  # fmt: skip
    main(words)
    text = capsys.readouterr().out
    assert "| fedtune: RESERVE |" in text
    assert "| records | 60 |" in text


def test_the_journal_that_is_checked_holds_whole_rounds(tmp_path: Path) -> None:
    key = write_journal(tmp_path / "a.journal", 33)
    verdict = verify(tmp_path / "a.journal", public_key=key)
    assert (verdict.outcome, verdict.records, len(verdict.state.sent)) == ("intact", 33, 10)
