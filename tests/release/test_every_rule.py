"""What any aggregation rule ends with is measured, released and merged as it was trained."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.support.runs import Study, command, make_study
from tests.support.tiny import bank_csv

RULES = ("fedit", "ffa", "rolora", "fedsvd", "flora", "fedex", "flexlora", "hetlora", "fedsb", "fedask")
STACKING = {"flora", "fedex"}


@pytest.fixture(scope="module")
def study(tmp_path_factory: pytest.TempPathFactory) -> Study:
    return make_study(tmp_path_factory.mktemp("rules"))


def words(study: Study, rule: str, run: Path, *more: str) -> list[str]:
    test = bank_csv(study.folder / "test.csv", rows=20, seed=9)
    given = [f"data.test={test}", "data.holdout=0", "privacy=off", "training.learning_rate=0.1"]
    return study.words(*given, f"aggregation={rule}", "federation.rounds=3", f"run.dir={run}", *more)


@pytest.mark.slow
@pytest.mark.parametrize("head", ["pooled", "architecture"])
@pytest.mark.parametrize("rule", RULES)
def test_a_rule_ends_with_an_adapter_that_is_what_was_trained(
    study: Study, tmp_path: Path, rule: str, head: str
) -> None:
    run = tmp_path / "run"
    done = command("simulate", *words(study, rule, run, f"model.head={head}"), "--format", "json")
    assert done.code == 0, done.err
    measured = command("evaluate", str(run), str(study.folder / "test.csv"), "--format", "json").json["metrics"]
    assert measured == pytest.approx(done.json["metrics"]["final"], abs=1e-6)
    config = json.loads((run / "adapter" / "adapter_config.json").read_text())
    assert (config["r"] > 2) == (rule in STACKING)
    assert config["lora_alpha"] == 2 * config["r"]
    for kind in ("peft", "merged"):
        assert command("release", str(run), "--to", kind, "--out", str(tmp_path / kind)).code == 0
        assert command("release", "verify", str(tmp_path / kind)).code == 0


@pytest.mark.parametrize("more", [["aggregation=fedsa"], ["aggregation.local_head=true"]])
def test_where_each_site_keeps_its_own_there_is_nothing_to_release(
    study: Study, tmp_path: Path, more: list[str]
) -> None:
    run = tmp_path / "run"
    assert command("simulate", *words(study, "fedit", run, *more, "federation.rounds=1")).code == 0
    for done in (
        command("release", str(run), "--out", str(tmp_path / "out")),
        command("evaluate", str(run), str(study.data)),
    ):
        assert "error[release.personal]" in done.err
        assert "aggregation=fedit" in done.err
    assert not (tmp_path / "out").exists()
