from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from fedtune.config.compose import compose
from fedtune.errors import RunError
from fedtune.release.adapter import load_adapter
from fedtune.simulation.finished import FinishedRun
from fedtune.simulation.progress import NullProgress
from fedtune.simulation.resolve import resolve
from fedtune.simulation.runner import simulate
from tests.support.runs import Study


@pytest.fixture(scope="module", params=["pooled", "architecture"])
def run(request: pytest.FixtureRequest, study: Study) -> Path:
    folder = study.runs / f"finished-{request.param}"
    found = resolve(compose(study.words(f"run.dir={folder}", f"model.head={request.param}")))
    simulate(found.plan, found.machine, NullProgress())
    return folder


def test_the_open_run_holds_the_released_numbers(run: Path) -> None:
    workspace, saved = FinishedRun(run).workspace, load_adapter(run / "adapter")
    live = workspace.export(workspace.layout)
    assert live.keys() == saved.keys()
    assert all(np.array_equal(live[name], saved[name]) for name in live)


def test_predictions_come_in_file_order_and_know_probabilities(run: Path, tmp_path: Path) -> None:
    texts = ["my cash" + " again" * (n % 5) for n in range(12)]
    file = tmp_path / "new.csv"
    file.write_text("\n".join(["text", *texts]) + "\n")
    found = list(FinishedRun(run).predictions(str(file)))
    assert [line["text"] for line in found] == texts
    assert {line["text"]: line["label"] for line in found} == {line["text"]: line["label"] for line in found[:5]}
    assert all(0.5 <= line["probability"] <= 1 for line in found)


def test_measuring_twice_gives_the_same_and_predicting_between_changes_nothing(study: Study, run: Path) -> None:
    finished = FinishedRun(run)
    first = finished.metrics(str(study.data))
    list(finished.predictions(str(study.data)))
    assert finished.metrics(str(study.data)) == first


def test_a_folder_without_a_release_says_how_to_get_one(run: Path, tmp_path: Path) -> None:
    with pytest.raises(RunError, match="not a run folder"):
        FinishedRun(tmp_path)
    (tmp_path / "plan.json").write_bytes((run / "plan.json").read_bytes())
    with pytest.raises(RunError, match="no released adapter") as caught:
        FinishedRun(tmp_path)
    assert "--resume" in caught.value.hint
