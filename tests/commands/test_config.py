from __future__ import annotations

import json
from typing import TYPE_CHECKING

import pytest
import yaml

from fedtune.cli import main
from fedtune.config.compose import compose

if TYPE_CHECKING:
    from pathlib import Path


def test_ls_describes_groups_options_and_experiments(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["config", "ls"]) == 0
    text = capsys.readouterr().out
    for line in ("experiment=banking77", "privacy=off", "NOT PRIVATE", "aggregation=fedsvd"):
        assert line in text
    assert main(["config", "ls", "--format", "json"]) == 0
    assert set(json.loads(capsys.readouterr().out)["privacy"]) == {"dp", "off"}


@pytest.mark.parametrize(("output", "read"), [("yaml", yaml.safe_load), ("json", json.loads)])
def test_show_prints_what_a_run_would_use(capsys: pytest.CaptureFixture[str], output: str, read: type) -> None:
    assert main(["config", "show", "privacy=off", "data.path=été 1.csv", "--format", output]) == 0
    shown = capsys.readouterr().out
    assert "été 1.csv" in shown
    assert read(shown) == compose(["privacy=off", "data.path=été 1.csv"]).model_dump(mode="json")


def test_what_show_prints_can_be_given_back(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    arguments = ["experiment=medquad", "privacy=off", "seed=3"]
    assert main(["config", "show", *arguments]) == 0
    shown = capsys.readouterr().out
    (tmp_path / "my study.yaml").write_text(shown, "utf-8")
    assert main(["config", "show", "--config", str(tmp_path / "my study.yaml")]) == 0
    assert capsys.readouterr().out == shown


def test_show_validates(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["config", "show", "privacy.epslon=3"]) == 2
    assert capsys.readouterr().err.splitlines() == [
        "error[config.unknown-key]: privacy.epslon (command line) is not a key",
        "hint: did you mean privacy.epsilon?",
    ]
    assert main(["config", "show", "--config", "nowhere.yaml"]) == 2
    assert "no configuration file nowhere.yaml" in capsys.readouterr().err


def test_without_a_subcommand_the_help_is_printed(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["config"]) == 2
    assert "show" in capsys.readouterr().out
