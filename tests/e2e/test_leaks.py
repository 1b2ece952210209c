"""No text of a record is in any file of a run folder or in any output, also when a site fails."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.support.runs import Study, command
from tests.support.watching import At

SECRETS = [f"zqxj{n:03}kvw" for n in range(60)]


@pytest.fixture
def secret_csv(tmp_path: Path) -> Path:
    file = tmp_path / "secret.csv"
    rows = (
        f"{word} my {'card' if n % 2 else 'cash'},{'card' if n % 2 else 'cash'}\n" for n, word in enumerate(SECRETS)
    )
    file.write_text("text,category\n" + "".join(rows))
    return file


def found_in(folder: Path) -> dict[Path, str]:
    files = [path for path in folder.rglob("*") if path.is_file()]
    return {path: word for path in files for word in SECRETS if word.encode() in path.read_bytes()}


@pytest.mark.parametrize("extra", ["privacy=off", "privacy.noise=seeded", "training.optimizer_state=keep"])
def test_no_word_of_a_record_is_in_the_run_folder_or_on_the_screen(
    study: Study, secret_csv: Path, tmp_path: Path, extra: str
) -> None:
    run = tmp_path / "run"
    words = study.words(f"data.path={secret_csv}", extra, "training.momentum=0.5", "aggregation=fedit")
    done = command("simulate", *words, f"run.dir={run}", "--verbose")
    assert done.code == 0, done.err
    assert found_in(run) == {}
    assert not [word for word in SECRETS if word in done.out + done.err]
    labelled = {path.name for path in run.rglob("*") if path.is_file() and b'"card"' in path.read_bytes()}
    assert labelled == {"plan.json", "fedtune.json"}


def test_the_search_finds_what_is_there(secret_csv: Path, tmp_path: Path) -> None:
    assert found_in(tmp_path) == {secret_csv: SECRETS[-1]}


def test_a_file_that_turns_bad_at_the_sites_leaves_them_as_a_code(
    study: Study, secret_csv: Path, tmp_path: Path
) -> None:
    from fedtune.config.compose import compose
    from fedtune.errors import FederationError
    from fedtune.simulation.resolve import resolve
    from fedtune.simulation.runner import simulate

    run = tmp_path / "run"
    resolved = resolve(compose(study.words(f"data.path={secret_csv}", f"run.dir={run}")))
    secret_csv.write_text(secret_csv.read_text() + f"{SECRETS[0]},{SECRETS[1]}\n")
    with pytest.raises(FederationError) as caught:
        simulate(resolved.plan, resolved.machine, At("never", list))
    assert caught.value.code == "federation.no-quorum"
    assert "data.unknown-label" in caught.value.message
    assert not [word for word in SECRETS if word in str(caught.value) + caught.value.hint]
    assert found_in(run) == {}
