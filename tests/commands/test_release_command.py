"""`fedtune release` from a study to a folder that somebody else can check and use."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import pytest

from tests.support.runs import ROOT, Done, Study, command, run_process, summary_of
from tests.support.tiny import question_jsonl, tiny_base

MODELS = Path(os.environ.get("FEDTUNE_MODELS", ROOT.parent / "shared" / "models"))


@pytest.fixture(scope="module")
def run(study: Study) -> Path:
    folder = study.runs / "released"
    summary_of(*study.words("privacy.noise=secure", "federation.rounds=1", f"run.dir={folder}"))
    return folder


@pytest.fixture(scope="module")
def language(study: Study, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of a language model, whose adapter every kind of release can carry."""
    folder = tmp_path_factory.mktemp("language")
    return language_run(study, folder, tiny_base(folder / "llama", "llama"))


def language_run(study: Study, folder: Path, base: Path) -> Path:
    words = [word for word in study.words() if not word.startswith(("data.", "model."))]
    task = [f"data.path={question_jsonl(folder / 'train.jsonl')}", "data.prompt=prompt", "data.completion=completion"]
    more = ["data.max_tokens=32", f"model.base={base}", f"run.dir={folder / 'run'}", "federation.rounds=1"]
    summary_of(*words, *task, *more, "model.head_init=zero")
    return folder / "run"


@pytest.fixture(scope="module")
def stories(study: Study, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run on the 260k Llama, whose tokenizer llama.cpp knows."""
    base = MODELS / "stories260k"
    if not base.exists():
        pytest.skip("stories260k is not here; set FEDTUNE_MODELS")
    return language_run(study, tmp_path_factory.mktemp("stories"), base)


@pytest.fixture
def release(run: Path, tmp_path: Path) -> Path:
    done = command("release", str(run), "--to", "peft", "--out", str(tmp_path / "release"))
    assert done.code == 0, done.err
    return tmp_path / "release"


def journals(run: Path) -> list[str]:
    return [word for path in sorted(run.glob("sites/*/*.journal")) for word in ("--journal", str(path))]


def test_a_release_verifies_with_what_sites_hand_out_and_the_key_that_was_printed(run: Path, tmp_path: Path) -> None:
    done = command("release", str(run), "--out", str(tmp_path / "release"))
    assert done.code == 0, done.err
    (following,) = [line for line in done.out.splitlines() if line.startswith("next: fedtune ")]
    words = following.removeprefix("next: fedtune ").split()
    verified = command(*words, *journals(run), "--format", "json")
    assert verified.code == 0, verified.err
    assert verified.json["holds"]
    assert verified.json["journals"] == ["site-001", "site-002", "site-003"]
    assert verified.json["key_checked"]


def test_what_was_written_is_told_with_its_sizes(run: Path, tmp_path: Path) -> None:
    told = command("release", str(run), "--out", str(tmp_path / "release"), "--format", "json").json
    found = {path.name: path.stat().st_size for path in (tmp_path / "release").iterdir()}
    assert told["files"] == found
    assert told["bytes"] == sum(found.values())
    assert {"README.md", "release.json", "release.signatures.json"} < found.keys()


@pytest.mark.parametrize("first", [[], ["export"]])
def test_the_word_export_may_be_left_out_and_options_may_come_first(
    run: Path, tmp_path: Path, first: list[str]
) -> None:
    assert command("release", *first, "--to", "peft", "--out", str(tmp_path / "a"), str(run)).code == 0
    assert command("release", "--help").code == 0
    assert "verify" in command("release", "--help").out


def test_a_changed_file_is_named_and_the_exit_code_says_so(release: Path) -> None:
    (release / "fedtune.json").write_text("{}")
    done = command("release", "verify", str(release))
    assert done.code == 5
    assert "tampered-file" in done.out
    assert "fedtune.json" in done.out
    found = command("release", "verify", str(release), "--format", "json")
    assert (found.code, found.json["holds"], found.json["exit_code"]) == (5, False, 5)


def test_what_was_not_checked_is_said(release: Path) -> None:
    done = command("release", "verify", str(release))
    assert done.code == 0
    assert "coordinator's key" in done.out
    assert "base model was not looked at" in done.out
    assert "journals were not given" in done.out


def test_a_release_is_measured_as_its_run_wherever_it_lies(study: Study, run: Path, release: Path) -> None:
    there = ["--base", str(study.base), "--format", "json"]
    before = command("evaluate", str(run), str(study.data), "--format", "json").json["metrics"]
    assert command("evaluate", str(release), str(study.data), *there).json["metrics"] == before
    predicted = command("predict", str(release), str(study.data), "--base", str(study.base))
    assert predicted.out == command("predict", str(run), str(study.data)).out


def test_a_release_is_not_used_without_its_base_or_after_a_change(
    study: Study, release: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("FEDTUNE_MODELS", raising=False)
    assert "error[release.no-base]" in command("evaluate", str(release), str(study.data)).err
    other = tiny_base(tmp_path / "other", seed=3)
    assert "error[release.no-base]" in command("evaluate", str(release), str(study.data), "--base", str(other)).err
    monkeypatch.setenv("FEDTUNE_MODELS", str(study.folder))
    assert command("evaluate", str(release), str(study.data)).code == 0
    (release / "head.safetensors").write_bytes(b"")
    assert "error[release.does-not-hold]" in command("evaluate", str(release), str(study.data)).err


@pytest.mark.parametrize(
    ("words", "contains"),
    [
        (["--to", "merged"], "model.safetensors"),
        (["--to", "gguf"], "study-adapter-f16.gguf"),
        (["--to", "gguf", "--merged", "--dtype", "f32"], "study-merged-f32.gguf"),
        (["--to", "ollama", "--parameter", "temperature=0.5"], "Modelfile"),
        (["--to", "ollama", "--merged"], "Modelfile"),
    ],
)
def test_a_language_model_is_released_in_every_kind(
    stories: Path, tmp_path: Path, words: list[str], contains: str
) -> None:
    done = command("release", str(stories), *words, "--out", str(tmp_path / "out"), "--format", "json")
    assert done.code == 0, done.err
    assert contains in done.json["files"]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out"]
    assert command("release", "verify", str(tmp_path / "out"), *journals(stories)).code == 0
    assert ("parity" in done.json) == ("merged" in words or "--merged" in words)


def test_parameters_and_template_are_in_the_modelfile(stories: Path, tmp_path: Path) -> None:
    words = ["--to", "ollama", "--parameter", "temperature=0.5", "--parameter", "num_ctx=128"]
    assert command("release", str(stories), *words, "--out", str(tmp_path / "out")).code == 0
    text = (tmp_path / "out" / "Modelfile").read_text()
    assert all(word in text for word in ("FROM ./", "ADAPTER ./", "TEMPLATE", "temperature 0.5", "num_ctx 128"))
    wrong = command("release", str(stories), "--to", "ollama", "--parameter", "heat=1", "--out", str(tmp_path / "no"))
    assert "error[release.bad-parameter]" in wrong.err
    assert "error[usage]" in command("release", str(stories), "--parameter", "heat", "--out", str(tmp_path / "no")).err


def test_a_base_that_a_kind_cannot_hold_is_refused_with_what_can(language: Path, tmp_path: Path) -> None:
    """The tiny tokenizer cuts texts as none of llama.cpp's."""
    done = command("release", str(language), "--to", "gguf", "--merged", "--out", str(tmp_path / "out"))
    assert "error[release.unknown-tokenizer]" in done.err
    assert "--to merged" in done.err
    assert list(tmp_path.iterdir()) == []


def test_what_a_kind_cannot_carry_is_refused_before_anything_is_written(run: Path, tmp_path: Path) -> None:
    done = command("release", str(run), "--to", "gguf", "--out", str(tmp_path / "out"))
    assert done.code == 2
    assert "error[release.classifier]" in done.err
    assert "--to merged" in done.err
    assert list(tmp_path.iterdir()) == []


def test_a_run_that_has_not_ended_is_not_released(study: Study, run: Path, tmp_path: Path) -> None:
    copy = shutil.copytree(run, tmp_path / "run")
    (copy / "summary.json").unlink()
    done = command("release", str(copy), "--out", str(tmp_path / "out"))
    assert "error[release.unfinished]" in done.err
    assert "fedtune simulate --resume" in done.err


def test_seeded_noise_and_no_privacy_are_warned_of(study: Study, language: Path, tmp_path: Path) -> None:
    done = command("release", str(language), "--out", str(tmp_path / "out"))
    assert "NOT FOR RELEASE" in done.err
    assert "**Not for release:**" in (tmp_path / "out" / "README.md").read_text()


def test_verify_of_anything_else_is_an_error_with_a_hint(tmp_path: Path) -> None:
    done = command("release", "verify", str(tmp_path), "--format", "json")
    assert done.code == 2
    assert json.loads(done.err)["error"]["code"] == "release.no-manifest"


@pytest.mark.slow
def test_nothing_but_what_is_told_is_printed_by_a_process_of_its_own(language: Path, tmp_path: Path) -> None:
    done: Done = run_process("release", str(language), "--to", "merged", "--out", str(tmp_path / "out"))
    assert done.code == 0, done.err
    assert all(line.endswith("…") or line.startswith("warning:") for line in done.err.splitlines()), done.err
