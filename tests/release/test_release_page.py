"""docs/release.md is one story: its commands run in their order, and its table of findings is the verifier's."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest

from tests.support.runs import ROOT, command, make_study, summary_of
from tests.support.tiny import bank_csv

PAGE = (ROOT / "docs" / "release.md").read_text(encoding="utf-8")


def test_its_commands_run_in_their_order(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    study = make_study(tmp_path)
    bank_csv(tmp_path / "bank.csv", rows=20)
    summary_of(*study.words("federation.rounds=1", f"run.dir={tmp_path / 'RUN'}"))
    monkeypatch.chdir(tmp_path)
    (block,) = re.findall(r"^```sh\n(.*?)^```", PAGE, re.MULTILINE | re.DOTALL)
    lines = [line.split("#", 1)[0].strip() for line in block.splitlines()]
    assert len(lines) >= 4
    for line in lines:
        done = command(*shlex.split(line)[1:])
        assert done.code == 0, (line, done.err)


def test_every_finding_that_there_is_is_explained() -> None:
    source = (ROOT / "fedtune" / "release" / "verify.py").read_text(encoding="utf-8")
    codes = set(re.findall(r"Finding\(\s*\"([a-z-]+)\"", source))
    rows = re.search(r"\| finding \|.*?\n\n", PAGE, re.DOTALL)
    assert rows is not None
    explained = " ".join(row.split("|")[1] for row in rows[0].splitlines() if row.startswith("|"))
    assert codes == set(re.findall(r"`([a-z-]+)`", explained))
