from __future__ import annotations

import csv
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from benchmarks.aggregation.__main__ import main
from benchmarks.aggregation.attacks import report
from benchmarks.aggregation.attacks.cells import SITES, Cell, table
from benchmarks.aggregation.attacks.command import RESULTS
from benchmarks.aggregation.attacks.hostile import HostileSites
from benchmarks.aggregation.attacks.records import TRIGGER, Files, read, write_files
from benchmarks.aggregation.attacks.study import measured, settings_of
from fedtune.aggregation.robust.traits import RULES
from fedtune.config import machine as machine_facts
from fedtune.config.compose import compose
from fedtune.config.plan import PLAN_KEY
from fedtune.data.formats import read_table
from fedtune.data.tasks import find_task
from fedtune.flower.engine import run
from fedtune.release.adapter import load_adapter
from fedtune.run.folder import create
from fedtune.simulation.dealing import Dealing
from fedtune.simulation.resolve import resolve
from tests.support.attacks import ATTACKS, State
from tests.support.tiny import tiny_base


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Files:
    """Texts that even a random encoder tells apart, and the encoder in the folder `base`."""
    folder = tmp_path_factory.mktemp("easy")
    tiny_base(folder / "base")
    with (folder / "easy.csv").open("w", newline="") as file:
        rows = [(word * (2 + n % 3), word) for n in range(50) for word in ("card", "zoom")]
        csv.writer(file).writerows([("text", "category"), *rows])
    return write_files(folder / "easy.csv", folder, train=40, test=10)


def words(files: Files) -> list[str]:
    """Return what makes the studies of the table fit the tiny model."""
    model = ["model.dtype=float32", "model.head_init=zero", "model.head_center=none", "lora.layers=null", "lora.rank=2"]
    return [f"model.base={files.folder / 'base'}", *model, "federation.rounds=2"]


def test_the_quick_benchmark_goes_on_where_it_was_killed_and_says_which_studies_are_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    main(["attacks", "--quick", "--out", str(tmp_path)])
    assert "[14/14]" in capsys.readouterr().err
    lines = (tmp_path / RESULTS).read_bytes()
    (tmp_path / RESULTS).write_bytes(lines[:-20])  # a kill tears the last line
    main(["attacks", "--quick", "--out", str(tmp_path)])
    again = capsys.readouterr()
    assert "[1/1]" in again.err
    assert (tmp_path / RESULTS).read_bytes().splitlines()[:-1] == lines.splitlines()[:-1]
    assert "refused: n ≥ 2f + 3" in again.out
    assert "14 studies" in again.out


def test_an_attack_undoes_learning_in_the_pipeline_and_a_rule_does_not_let_it(files: Files) -> None:
    accuracies = {
        rule: measured(Cell("ffa", rule, "sign_flip", 4, 4), files, *words(files))["accuracy"]
        for rule in ("none", "median")
    }
    assert accuracies == {"none": 0.5, "median": 1.0}


def test_a_study_that_no_attack_touches_is_the_plain_mean_for_rules_that_assume_none(files: Files) -> None:
    plain, trimmed = (
        measured(Cell("ffa", rule, "no attack", 0, 0), files, *words(files)) for rule in ("none", "trimmed_mean")
    )
    assert trimmed["accuracy"] == plain["accuracy"] == 1.0
    assert trimmed["backdoor"] == plain["backdoor"]


def test_the_attackers_know_the_honest_updates_of_the_round_and_what_they_send_is_averaged(
    files: Files, tmp_path: Path
) -> None:
    seen: list[tuple[Sequence[State], State]] = []

    def attack(states: Sequence[State], centre: State, attackers: Sequence[int]) -> list[State]:
        seen.append((states, centre))
        far = {name: centre[name] + np.float32(1 + len(seen)) for name in centre}
        return [far if index in attackers else state for index, state in enumerate(states)]

    settings = settings_of(
        Cell("ffa", "none", "sign_flip", 2, 2),
        files,
        *words(files),
        "federation.rounds=1",
        f"run.dir={tmp_path / 'run'}",
    )
    study = resolve(settings)
    machine_facts.announce(create(study.plan, study.machine).machine_file)
    from fedtune_server.app import app as server

    run("inprocess", server, HostileSites(study.plan, attack, 2).app, SITES, {PLAN_KEY: study.plan.json_text})
    (first, centre), (second, _) = seen
    assert [len(first), len(second)] == [SITES, SITES]
    assert len({b"".join(array.tobytes() for array in state.values()) for state in first[:8]}) == 8
    adapter = load_adapter(tmp_path / "run" / "adapter")
    for name in centre:
        honest = [state[name] for state in first[:8]]
        assert all(np.array_equal(one, other[name]) for one, other in zip(honest, second, strict=False))
        expected = (np.sum(honest, axis=0, dtype=float) + 2 * centre[name] + 2 + 3) / SITES
        np.testing.assert_allclose(adapter[name], expected, rtol=0, atol=1e-6)


def test_a_backdoor_changes_half_of_each_attackers_records_and_nobody_elses(files: Files) -> None:
    cell = Cell("ffa", "median", "backdoor", 3, 3)
    settings = settings_of(cell, files, *words(files))
    table_of = read_table(str(files.poisoned(3)), "csv", columns=("text", "category"))
    deal = Dealing.of_settings(settings).deal(table_of, find_task(settings.data, list(table_of.columns)))
    before, after = read(files.train), read(files.poisoned(3))
    changed = {i for i, (old, new) in enumerate(zip(before, after, strict=True)) if old != new}
    for number, site in enumerate(deal.sites):
        held = set(map(int, site.train))
        assert len(held & changed) == (len(held) + 1) // 2 * (number >= SITES - 3)
    assert all(after[i] == (f"{before[i][0]} {TRIGGER}", files.target) for i in changed)


def test_no_record_is_both_trained_on_and_tested_and_the_trigger_is_measured_on_other_labels(files: Files) -> None:
    assert (len(read(files.train)), len(read(files.test))) == (80, 20)
    tested = read(files.triggered)
    assert len(tested) == sum(label != files.target for _, label in read(files.test))
    assert all(text.endswith(TRIGGER) and label == files.target for text, label in tested)


def test_the_table_has_every_rule_attack_and_share_of_attackers_and_each_plan_is_made_or_refused(files: Files) -> None:
    cells = table()
    assert len({cell.key for cell in cells}) == len(cells)
    of_ffa = {(cell.rule, cell.attack, cell.attackers) for cell in cells if cell.algorithm == "ffa" and cell.attackers}
    assert of_ffa == {(r, a, n) for r in ("none", *RULES) for a in (*ATTACKS, "backdoor") for n in (1, 2, 3, 4)}
    assert {(cell.rule, cell.attackers) for cell in cells if cell.refusal} == {
        ("krum", 4),
        ("multi_krum", 4),
        *(("bulyan", n) for n in (2, 3, 4)),
    }
    for cell in {(cell.rule, cell.assumed): cell for cell in cells if not cell.refusal}.values():
        compose(cell.words)


def test_the_report_tells_a_missing_a_refused_a_stopped_and_a_repeated_study_apart() -> None:
    cells = table(0) + table(1)
    done: dict[str, dict[str, Any]] = {
        "ffa median no attack 0 0 0": {"accuracy": 0.75, "backdoor": 0.0, "cpu_seconds": 30.0},
        "ffa median no attack 0 0 1": {"accuracy": 0.77, "backdoor": 0.0, "cpu_seconds": 30.0},
        "ffa median sign_flip 2 2 0": {"accuracy": 0.7, "cpu_seconds": 30.0},
        "ffa median scaled 2 2 0": {"stopped": "no quorum", "cpu_seconds": 30.0},
    }
    text = report.render(cells, done)
    assert "| `median` | 76.0 ± 1.0 | 70.0 | stopped | - | - | - | - |" in text
    assert "| `bulyan` | - | refused: n ≥ 4f + 3 |" in text
    assert "4 studies, 2 CPU minutes" in text
