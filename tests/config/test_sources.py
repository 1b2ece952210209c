from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import yaml

from fedtune.config.compose import compose
from fedtune.errors import ConfigError

Write = Callable[[str], Path]
Fails = Callable[..., ConfigError]


@pytest.mark.parametrize("word", ["off", "'off'", '"off"'])
def test_a_file_chooses_a_group_by_its_name_and_off_is_a_word(write: Write, word: str) -> None:
    assert compose([], write(f"privacy: {word}\n")).privacy.mode == "off"


def test_scalars_of_a_file_stay_as_they_are_written(write: Write) -> None:
    data = compose([], write("data:\n  path: 2020-01-01\n  label: 007\n  text: yes\n  labels: [on, 1, 1.10]\n")).data
    assert (data.path, data.label, data.text, data.labels) == ("2020-01-01", "007", "yes", ("on", "1", "1.10"))
    assert compose([], write("privacy:\n  delta: 1e-5\n")).privacy.delta == 1e-5


def test_a_file_may_be_empty_hold_empty_sections_and_dotted_keys(write: Write) -> None:
    assert compose([], write("")) == compose([])
    assert compose([], write("# nothing\ndata:\nlora:\n")) == compose([])
    chosen = compose([], write("privacy: off\nprivacy.epsilon: 3\nexperiment: ~\n")).privacy
    assert (chosen.mode, chosen.epsilon) == ("off", 3.0)


@pytest.mark.parametrize(
    "overrides",
    [
        [],
        ["privacy=off"],
        ["experiment=medquad", "seed=7"],
        ["data.path=x.csv", "data.label=0", "data.labels=[a,'b,c']"],
    ],
)
def test_shown_settings_read_back_as_a_file_are_the_same_settings(write: Write, overrides: list[str]) -> None:
    shown = compose(overrides)
    assert compose([], write(yaml.safe_dump(shown.model_dump(mode="json")))) == shown


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("seed: [1\n", "line 2"),
        ("- a\n", "not a mapping"),
        ("seed: 1\nseed: 2\n", "line 2: seed is given twice"),
        ("privacy: {epsilon: 1}\nprivacy.epsilon: 2\n", "given twice"),
        ("data: !!python/object/apply:os.system [ls]\n", "refused"),
        ("data: !env HOME\n", "refused"),
        ("data: {labels: [[a]]}\n", "words and numbers"),
        ("data: &loop\n  x: *loop\n", "nested too deeply"),
        ("? [a]\n: 1\n", "a key must be a word"),
        ("a\x00b: 1\n", "not allowed"),
    ],
)
def test_a_broken_file_is_an_error_that_names_the_place(fails: Fails, write: Write, text: str, problem: str) -> None:
    error = fails("bad-yaml", file=write(text))
    assert "study.yaml" in error.message
    assert problem in error.message


def test_a_file_that_cannot_be_read_says_why(fails: Fails, tmp_path: Path) -> None:
    assert "nowhere.yaml" in fails("file-missing", file=tmp_path / "nowhere.yaml").message
    fails("file-unreadable", file=tmp_path)
    latin = tmp_path / "latin.yaml"
    latin.write_bytes(b"study: {name: caf\xe9}\n")
    assert "not UTF-8" in fails("file-unreadable", file=latin).message
