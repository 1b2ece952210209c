from __future__ import annotations

import re
from pathlib import Path

import pytest

from tests.support.runs import Done, Study, command, metric_lines, released, run_process, summary_of

DOCUMENTED = {"plan_sha256", "rounds", "sites", "metrics", "privacy", "traffic", "seconds", "versions"}


def own_file(study: Study, *changes: str) -> list[str]:
    return study.words("federation.sites=4", "privacy.epsilon=8", *changes)


def everything(folder: Path) -> dict[Path, bytes]:
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def assert_refused(done: Done, code: str, *named: str) -> None:
    assert done.code not in {0, 1}
    assert done.out == ""
    assert f"error[{code}]: " in done.err
    assert "hint: " in done.err
    assert "Traceback" not in done.err
    for text in named:
        assert text in done.err


def test_a_file_of_ones_own_needs_no_registration(study: Study) -> None:
    done = command("simulate", *own_file(study))
    assert done.code == 0, done.err
    assert "site-004" in done.out
    assert "round 1/2" in done.err
    run = Path(re.search(r"Run folder (\S+)", done.out)[1])  # type: ignore[index]
    assert {path.name for path in run.iterdir()} == {
        "plan.json",
        "machine.json",
        "metrics.jsonl",
        "summary.json",
        "adapter",
        "checkpoints",
        "sites",
        "heads",
        "heads.jsonl",
        "coordinator.key",
    }
    assert re.fullmatch(r"study/\d{8}-\d{6}(-\d+)?", str(run.relative_to(study.runs)))


def test_the_summary_has_what_the_documentation_promises(study: Study) -> None:
    summary = summary_of(*own_file(study))
    assert summary.keys() >= DOCUMENTED
    assert len(summary["sites"]) == 4
    for site in summary["sites"]:
        assert site.keys() >= {"name", "units", "epsilon", "delta"}
    assert summary["metrics"].keys() >= {"initial", "final"}
    names = {"accuracy", "macro_precision", "macro_recall", "macro_f1", "loss"}
    assert summary["metrics"]["initial"].keys() == summary["metrics"]["final"].keys() == names
    assert summary["privacy"].keys() >= {"mode", "max_epsilon", "delta", "accountant", "unit"}
    assert summary["traffic"]["bytes_up"] > 0 < summary["traffic"]["bytes_down"]
    assert {"fedtune", "python", "torch", "flwr"} <= summary["versions"].keys()
    assert len(metric_lines(Path(summary["run_dir"]))) == summary["rounds"] == 2


def test_json_is_one_document_and_nothing_else_on_stdout(study: Study) -> None:
    done = run_process("simulate", *own_file(study), "--format", "json")
    assert done.code == 0, done.err
    assert done.json.keys() >= DOCUMENTED
    assert done.err == ""


def test_a_configuration_file_says_the_same_as_the_command_line(study: Study, tmp_path: Path) -> None:
    file = tmp_path / "study.yaml"
    file.write_text("".join(f"{word.replace('=', ': ', 1)}\n" for word in study.words()), "utf-8")
    by_file = summary_of("--config", str(file))
    by_words = summary_of(*study.words())
    assert by_file["plan_sha256"] == by_words["plan_sha256"]
    assert by_file["metrics"] == by_words["metrics"]


def test_the_same_study_again_gives_the_same_adapter_and_another_seed_another(study: Study) -> None:
    first, again, other = (summary_of(*own_file(study, seed)) for seed in ("seed=1", "seed=1", "seed=2"))
    assert released(Path(first["run_dir"])) == released(Path(again["run_dir"]))
    assert released(Path(first["run_dir"])) != released(Path(other["run_dir"]))


def test_comma_values_sweep_and_end_in_one_table(study: Study) -> None:
    done = command("simulate", *study.words("federation.rounds=1"), "privacy.epsilon=1,8", "aggregation=fedit,ffa")
    assert done.code == 0, done.err
    rows = [line.split() for line in done.out.splitlines()]
    assert "4 runs compared" in done.out
    assert [row[:2] for row in rows if row[1:2] in (["fedit"], ["ffa"])] == [
        [epsilon, algorithm] for epsilon in ("1", "8") for algorithm in ("fedit", "ffa")
    ]
    assert "[4/4]" in done.err


def test_a_sweep_in_json_is_one_list(study: Study) -> None:
    done = command("simulate", *study.words("federation.rounds=1"), "seed=1,2", "--format", "json")
    assert [summary["rounds"] for summary in done.json] == [1, 1]
    assert len({summary["run_dir"] for summary in done.json}) == 2


def test_a_mistake_in_the_last_run_of_a_sweep_stops_it_before_the_first(study: Study, tmp_path: Path) -> None:
    done = command("simulate", *study.words(f"run.root={tmp_path / 'runs'}"), "data.max_tokens=24,4096")
    assert_refused(done, "model.sequence-limit", "4096")
    assert not (tmp_path / "runs").exists()


def test_a_sweep_into_one_folder_is_refused_before_the_first_run(study: Study, tmp_path: Path) -> None:
    done = command("simulate", *study.words(f"run.dir={tmp_path / 'run'}"), "seed=1,2")
    assert_refused(done, "config.one-folder", "run.root=")
    assert not (tmp_path / "run").exists()


def test_the_run_goes_where_run_dir_says_and_is_never_overwritten(study: Study, tmp_path: Path) -> None:
    run = tmp_path / "deep" / "run"
    assert summary_of(*own_file(study, f"run.dir={run}"))["run_dir"] == str(run)
    before = everything(run)
    assert_refused(command("simulate", *own_file(study, f"run.dir={run}", "seed=5")), "run.exists", f"--resume {run}")
    assert everything(run) == before


def test_a_folder_with_other_things_in_it_is_not_touched(study: Study, tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").write_text("years of work")
    assert_refused(command("simulate", *own_file(study, f"run.dir={tmp_path}")), "run.exists", "thesis.tex")
    assert everything(tmp_path) == {tmp_path / "thesis.tex": b"years of work"}


def test_resuming_a_finished_run_shows_its_summary_and_changes_nothing(study: Study, tmp_path: Path) -> None:
    run = tmp_path / "run"
    summary = summary_of(*own_file(study, f"run.dir={run}"))
    before = everything(run)
    assert command("simulate", "--resume", str(run), "--format", "json").json == summary
    assert command("simulate", "--resume", str(run), *own_file(study), "--format", "json").json == summary
    assert everything(run) == before


def test_resuming_under_another_plan_is_refused(study: Study, tmp_path: Path) -> None:
    run = tmp_path / "run"
    summary_of(*own_file(study, f"run.dir={run}"))
    before = everything(run)
    done = command("simulate", "--resume", str(run), *own_file(study, "privacy.epsilon=9"))
    assert_refused(done, "run.other-plan", f"--resume {run}")
    assert everything(run) == before


@pytest.mark.parametrize("kind", ["missing", "empty", "file"])
def test_resuming_what_is_no_run_is_a_clear_error(tmp_path: Path, kind: str) -> None:
    path = tmp_path / "here"
    if kind == "empty":
        path.mkdir()
    elif kind == "file":
        path.write_text("text")
    assert_refused(command("simulate", "--resume", str(path)), "run.no-run", str(path))


def test_a_damaged_plan_is_a_clear_error(study: Study, tmp_path: Path) -> None:
    run = tmp_path / "run"
    summary_of(*own_file(study, f"run.dir={run}"))
    (run / "plan.json").write_text("{}")
    assert_refused(command("simulate", "--resume", str(run)), "config.bad-plan")
    (run / "plan.json").write_bytes(b"\xff")
    assert_refused(command("simulate", "--resume", str(run)), "run.no-run")


def test_a_traceback_appears_with_verbose_alone(study: Study) -> None:
    wrong = study.words("data.text=nothing")
    assert "Traceback" not in command("simulate", *wrong).err
    assert "Traceback" in command("simulate", *wrong, "--verbose").err
    failure = command("simulate", *wrong, "--format", "json")
    assert failure.out == ""
    assert '"code": "data.missing-column"' in failure.err
