from __future__ import annotations

import json
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from tests.support.hub import ATTRIBUTES, StandIn, connect, running_hub
from tests.support.runs import ROOT, Done, Study, command, summary_of
from tests.support.tiny import bank_csv

if TYPE_CHECKING:
    from collections.abc import Iterator

REPO = "ward/adapter"
PAGE = ROOT / "docs" / "hub.md"


@pytest.fixture(scope="module")
def release(study: Study) -> Path:
    run, out = study.runs / "pulled", study.folder / "release-pulled"
    summary_of(*study.words("federation.rounds=1", "privacy.noise=secure"), f"run.dir={run}")
    done = command("release", str(run), "--to", "peft", "--out", str(out))
    assert done.code == 0, done.err
    return out


@pytest.fixture
def hub(release: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[StandIn]:
    """Return a Hub that holds the release, and a cache of this machine that holds nothing."""
    with running_hub() as running:
        connect(monkeypatch, running)
        monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "cache"))
        done = command("push", str(release), REPO)
        assert done.code == 0, done.err
        running.asked.clear()
        yield running


@pytest.fixture
def commit(hub: StandIn) -> str:
    return hub.repositories[REPO].branches["main"]


def contents(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def refused(done: Done, code: str, out: Path) -> Done:
    assert (done.code, done.out) == (2, ""), done.out
    assert f"error[{code}]" in done.err, done.err
    assert "hint: " in done.err
    assert not out.exists()
    assert not [path for path in out.parent.iterdir() if "partial" in path.name]
    return done


def test_what_was_pushed_is_pulled_and_measures_the_same(
    hub: StandIn, commit: str, release: Path, study: Study, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    done = command("pull", REPO, "--out", str(out), "--revision", commit, "--format", "json")
    assert done.code == 0, done.err
    assert contents(out) == contents(release)
    assert (done.json["commit"], done.json["files"]) == (commit, len(contents(release)))
    assert not hub.leaked
    assert not (tmp_path / "cache").exists()
    file, base = bank_csv(tmp_path / "other.csv", rows=30, seed=4), ("--base", str(study.base), "--format", "json")
    before = command("evaluate", str(study.runs / "pulled"), str(file), "--format", "json").json["metrics"]
    assert command("evaluate", str(out), str(file), *base).json["metrics"] == before


def test_the_key_that_signed_is_said_and_can_be_demanded(hub: StandIn, commit: str, tmp_path: Path) -> None:
    key = json.loads(hub.files(REPO)["release.json"])["coordinator"]
    done = command("pull", REPO, "--out", str(tmp_path / "one"), "--revision", commit)
    assert key in done.out
    assert "--coordinator-key" in done.out
    demanded = ("--revision", commit, "--coordinator-key")
    done = command("pull", REPO, "--out", str(tmp_path / "two"), *demanded, key)
    assert "--coordinator-key" not in done.out
    done = command("pull", REPO, "--out", str(tmp_path / "three"), *demanded, "ab" * 32)
    assert "other-coordinator" in refused(done, "hub.not-verified", tmp_path / "three").err


@pytest.mark.parametrize("revision", [(), ("--revision", "main"), ("--revision", "SHORT")])
def test_a_revision_that_can_move_is_refused_with_the_commit_it_names(
    hub: StandIn, commit: str, tmp_path: Path, revision: tuple[str, ...]
) -> None:
    held = hub.repositories[REPO]
    held.branches[commit[:12]] = commit  # the Hub also knows commits by their first digits
    named = [commit[:12] if word == "SHORT" else word for word in revision]
    done = refused(
        command("pull", REPO, "--out", str(tmp_path / "out"), *named), "hub.moving-revision", tmp_path / "out"
    )
    assert f"--revision {commit}" in done.err


def test_a_branch_that_looks_like_a_commit_is_seen_through(hub: StandIn, commit: str, tmp_path: Path) -> None:
    hub.repositories[REPO].branches["a" * 40] = commit
    done = command("pull", REPO, "--out", str(tmp_path / "out"), "--revision", "a" * 40)
    refused(done, "hub.other-commit", tmp_path / "out")


@pytest.mark.parametrize("damage", ["changed", "missing", "extra"])
def test_nothing_is_left_of_a_release_that_does_not_verify(hub: StandIn, tmp_path: Path, damage: str) -> None:
    files, held = hub.files(REPO), hub.repositories[REPO]
    weights = files.pop("adapter_model.safetensors")
    if damage == "changed":
        files["adapter_model.safetensors"] = weights[:-1] + b"?"
    elif damage == "extra":
        files |= {"adapter_model.safetensors": weights, "run_me.py": b"print()"}
    commit = held.commit("main", files | {".gitattributes": ATTRIBUTES})
    done = command("pull", REPO, "--out", str(tmp_path / "out"), "--revision", commit)
    refused(done, "hub.not-verified", tmp_path / "out")


def test_a_repository_that_holds_no_release_leaves_nothing(hub: StandIn, tmp_path: Path) -> None:
    commit = hub.repositories[REPO].commit("main", {"model.safetensors": b"x"})
    done = command("pull", REPO, "--out", str(tmp_path / "out"), "--revision", commit)
    assert ".partial" not in refused(done, "hub.no-release", tmp_path / "out").err


@pytest.mark.parametrize(
    "name", ["../outside", "/etc/outside", "a/../../outside", ".ssh/config", "a\\..\\b", "c:x", "a\x1bb"]
)
def test_a_name_that_leads_out_of_the_folder_is_not_fetched(hub: StandIn, tmp_path: Path, name: str) -> None:
    commit = hub.repositories[REPO].commit("main", hub.files(REPO) | {name: b"mine now"})
    done = command("pull", REPO, "--out", str(tmp_path / "deep" / "out"), "--revision", commit)
    assert (done.code, "error[hub.bad-name]" in done.err) == (2, True)
    assert not [line for line in hub.asked if "/resolve/" in line]
    assert not [path for path in tmp_path.rglob("*") if path.name in {"outside", "config"}]


def test_a_connection_that_breaks_leaves_nothing(hub: StandIn, commit: str, tmp_path: Path) -> None:
    hub.answers = lambda method, path, _: (500, {}, b"") if (method, path[-12:]) == ("GET", "release.json") else None
    done = command("pull", REPO, "--out", str(tmp_path / "out"), "--revision", commit)
    assert done.code == 2
    assert not (tmp_path / "out").exists()
    hub.answers = lambda *_: None
    assert command("pull", REPO, "--out", str(tmp_path / "out"), "--revision", commit).code == 0


def test_a_folder_that_is_there_is_not_touched(hub: StandIn, commit: str, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine").write_text("mine")
    done = command("pull", REPO, "--out", str(tmp_path / "out"), "--revision", commit)
    assert "error[release.exists]" in done.err
    assert contents(tmp_path / "out") == {"mine": b"mine"}
    assert not hub.asked


def test_a_private_repository_is_not_there_for_strangers(
    hub: StandIn, commit: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("HF_TOKEN")
    done = command("pull", REPO, "--out", str(tmp_path / "out"), "--revision", commit)
    assert "hf auth login" in refused(done, "hub.no-repository", tmp_path / "out").err


def test_a_commit_that_is_not_there_is_said(hub: StandIn, tmp_path: Path) -> None:
    done = command("pull", REPO, "--out", str(tmp_path / "out"), "--revision", "0" * 40)
    refused(done, "hub.no-revision", tmp_path / "out")


def test_offline_nothing_is_asked(hub: StandIn, commit: str, tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    for words in (("pull", REPO, "--out", str(tmp_path / "out"), "--revision", commit), ("pull", REPO, "--out", "x")):
        assert "error[hub.offline]" in command(*words).err
    assert not hub.asked


def test_the_answer_for_programs_holds_what_was_checked(hub: StandIn, commit: str, tmp_path: Path) -> None:
    done = command("pull", REPO, "--out", str(tmp_path / "out"), "--revision", commit, "--format", "json")
    assert done.json["coordinator_checked"] is False
    assert done.json["bytes"] == sum(map(len, hub.files(REPO).values()))


def test_the_page_about_the_hub_is_a_story_that_runs(
    study: Study, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run, (block,) = (
        study.runs / "told",
        re.findall(r"^```sh\n(.*?)^```", PAGE.read_text("utf-8"), re.MULTILINE | re.DOTALL),
    )
    summary_of(*study.words("federation.rounds=1", "privacy.noise=secure"), f"run.dir={run}")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("FEDTUNE_MODELS", str(study.folder))
    bank_csv(tmp_path / "bank.csv", rows=20)
    told = {"RUN": str(run)}
    with running_hub() as hub:
        connect(monkeypatch, hub)
        for line in block.splitlines():
            done = command(*(told.get(word, word) for word in line.split()[1:]))
            assert done.code == 0, done.err
            if REPO in hub.repositories:
                told["SHA"] = hub.repositories[REPO].branches["main"]
            told["KEY"] = json.loads((tmp_path / "release" / "release.json").read_text())["coordinator"]
