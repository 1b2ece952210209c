from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from tests.support.hub import Repository, StandIn, connect, running_hub
from tests.support.runs import Study, command, run_process, summary_of

if TYPE_CHECKING:
    from collections.abc import Iterator


def made(study: Study, name: str, *words: str) -> Path:
    """Simulate a study and release its adapter."""
    run, out = study.runs / f"pushed-{name}", study.folder / f"release-{name}"
    summary_of(*study.words("federation.rounds=1", *words), f"run.dir={run}")
    done = command("release", str(run), "--to", "peft", "--out", str(out))
    assert done.code == 0, done.err
    return out


@pytest.fixture(scope="module")
def release(study: Study) -> Path:
    return made(study, "secure", "privacy.noise=secure")


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[StandIn]:
    with running_hub() as running:
        connect(monkeypatch, running)
        yield running


def contents(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_a_release_arrives_whole_in_a_private_repository(hub: StandIn, release: Path) -> None:
    done = command("push", str(release), "ward/adapter", "--format", "json")
    assert done.code == 0, done.err
    assert hub.repositories["ward/adapter"].private
    assert hub.files("ward/adapter", done.json["commit"]) == contents(release)
    assert done.json["fetch"].endswith(f"--revision {done.json['commit']}")


def test_the_commit_to_pin_and_the_next_command_are_printed(hub: StandIn, release: Path) -> None:
    done = command("push", str(release), "ward/adapter")
    commit = hub.repositories["ward/adapter"].branches["main"]
    assert f"fedtune pull ward/adapter --out DIR --revision {commit}" in done.out
    assert hub.token not in done.out + done.err


def test_a_large_file_is_stored_apart_and_takes_no_token_there(hub: StandIn, release: Path) -> None:
    command("push", str(release), "ward/adapter")
    assert any(line.startswith("PUT /cdn/") for line in hub.asked)
    assert not hub.leaked


def test_pushing_the_same_again_makes_no_new_commit(hub: StandIn, release: Path) -> None:
    first, second = (command("push", str(release), "ward/adapter", "--format", "json").json for _ in range(2))
    assert first["commit"] == second["commit"]
    assert len(hub.repositories["ward/adapter"].commits) == 2  # the Hub's own and one of ours


def test_what_an_older_release_left_is_removed(hub: StandIn, release: Path) -> None:
    command("push", str(release), "ward/adapter")
    held = hub.repositories["ward/adapter"]
    held.commit("main", hub.files("ward/adapter") | {"old.safetensors": b"old", "notes/patients.csv": b"secret"})
    assert command("push", str(release), "ward/adapter").code == 0
    assert hub.files("ward/adapter") == contents(release)


def test_a_branch_of_its_own_leaves_main_alone(hub: StandIn, release: Path) -> None:
    done = command("push", str(release), "ward/adapter", "--branch", "v2/beta", "--message", "second try")
    assert done.code == 0, done.err
    assert hub.files("ward/adapter", "v2/beta") == contents(release)
    assert hub.files("ward/adapter", "main") == {}


def test_a_public_repository_is_made_only_when_asked_for(hub: StandIn, release: Path) -> None:
    assert command("push", str(release), "ward/open", "--public").code == 0
    assert not hub.repositories["ward/open"].private


def test_a_repository_that_is_public_already_gets_nothing_unasked(hub: StandIn, release: Path) -> None:
    public = hub.repositories["ward/open"] = Repository(private=False)
    public.commit("main", {})
    done = command("push", str(release), "ward/open")
    assert done.code == 2
    assert "error[hub.public-repository]" in done.err
    assert hub.files("ward/open") == {}
    assert not hub.large
    assert command("push", str(release), "ward/open", "--public").code == 0


# --- what is not pushed ---------------------------------------------------------------------------------------------


def refused(hub: StandIn, code: str, *arguments: str) -> None:
    done = command("push", *arguments)
    assert (done.code, done.out) == (2, "")
    assert f"error[{code}]" in done.err
    assert "hint: " in done.err
    assert not hub.asked


@pytest.mark.parametrize("damage", ["changed", "missing", "extra", "unsigned"])
def test_a_folder_that_does_not_verify_is_not_pushed(hub: StandIn, release: Path, tmp_path: Path, damage: str) -> None:
    folder = Path(shutil.copytree(release, tmp_path / "release"))
    weights = folder / "adapter_model.safetensors"
    if damage == "changed":
        weights.write_bytes(weights.read_bytes()[:-1] + b"?")
    elif damage == "missing":
        weights.unlink()
    elif damage == "extra":
        (folder / "patients.csv").write_text("name\n")
    else:
        manifest = json.loads((folder / "release.json").read_text())
        (folder / "release.json").write_text(json.dumps(manifest | {"study": "another"}, sort_keys=True))
    refused(hub, "hub.not-verified", str(folder), "ward/adapter")


def test_a_folder_that_is_no_release_is_not_pushed(hub: StandIn, tmp_path: Path) -> None:
    refused(hub, "release.no-manifest", str(tmp_path), "ward/adapter")


@pytest.mark.parametrize("words", ["privacy=off", "privacy.noise=seeded"])
def test_what_is_not_private_is_pushed_only_knowingly(hub: StandIn, study: Study, words: str) -> None:
    folder = made(study, words.replace("=", "-"), words, "training.learning_rate=0.3")
    refused(hub, "hub.not-private", str(folder), "ward/adapter")
    assert command("push", str(folder), "ward/adapter", "--not-private").code == 0


@pytest.mark.parametrize("name", ["adapter", "ward/", "ward/a b", "../adapter", "ward/a/b", "ward/a--b", "https://x/y"])
def test_what_names_no_repository_is_refused(hub: StandIn, release: Path, name: str) -> None:
    refused(hub, "hub.bad-repository", str(release), name)


def test_a_token_without_the_right_is_refused_in_words(
    hub: StandIn, release: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_anotherToken")
    done = command("push", str(release), "ward/adapter", "--verbose")
    assert "error[hub.refused]" in done.err
    assert "hf_anotherToken" not in done.err
    assert "hf auth login" in done.err


def test_a_commit_that_holds_something_else_is_not_recommended(hub: StandIn, release: Path) -> None:
    """As when a repository's `.gitignore` leaves a file out, or the server is another's."""

    def ignoring(method: str, path: str, _headers: dict[str, str]) -> Any:
        if "/preupload/" not in path:
            return None
        modes = [
            {"path": name, "uploadMode": "regular", "shouldIgnore": name == "README.md"} for name in contents(release)
        ]
        return 200, {"Content-Type": "application/json"}, json.dumps({"files": modes}).encode()

    hub.answers = ignoring
    done = command("push", str(release), "ward/adapter")
    assert done.code == 2
    assert "error[hub.not-stored]" in done.err
    assert "README.md" in done.err


def test_a_commit_of_somebody_else_meanwhile_is_not_undone(hub: StandIn, release: Path) -> None:
    command("push", str(release), "ward/adapter")
    held, theirs = hub.repositories["ward/adapter"], []
    held.commit("main", {"old": b""})

    def meanwhile(method: str, path: str, _headers: dict[str, str]) -> None:
        if "/preupload/" in path and not theirs:
            theirs.append(held.commit("main", {"theirs": b"theirs"}))

    hub.answers = meanwhile
    assert "error[hub.changed-meanwhile]" in command("push", str(release), "ward/adapter").err
    assert hub.files("ward/adapter") == {"theirs": b"theirs"}


def test_a_token_that_the_server_echoes_is_in_no_traceback(hub: StandIn, release: Path) -> None:
    """As a process of its own, with --verbose, where the token is in the environment alone."""
    hub.answers = lambda *_: (403, {"X-Error-Message": f"Bearer {hub.token}"}, f'{{"error": "{hub.token}"}}'.encode())
    environment = {
        "HF_ENDPOINT": hub.url,
        "HF_TOKEN": hub.token,
        "HF_HUB_OFFLINE": "0",
        "HF_HUB_DISABLE_XET": "1",
        "HF_DEBUG": "1",
    }
    done = run_process("push", str(release), "ward/adapter", "--verbose", env=environment)
    assert done.code == 2
    assert "Traceback" in done.err
    assert "error[hub.refused]" in done.err
    assert hub.token not in done.out + done.err
