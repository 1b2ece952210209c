from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import yaml

from fedtune.config.compose import compose
from fedtune.config.overrides import format_value
from fedtune.errors import ConfigError

Write = Callable[[str], Path]
Fails = Callable[..., ConfigError]


@pytest.mark.parametrize(
    ("override", "meant"),
    [
        ("privacy.epslon=3", "privacy.epsilon"),
        ("epsilon=3", "privacy.epsilon"),
        ("training.epsilon=3", "privacy.epsilon"),
        ("privcy=off", "privacy"),
        ("experment=banking77", "experiment"),
        ("data.partition.colum=x", "data.partition.column"),
    ],
)
def test_an_unknown_key_names_the_nearest_one(fails: Fails, override: str, meant: str) -> None:
    error = fails("unknown-key", override)
    assert error.hint == f"did you mean {meant}?"
    assert override.split("=", maxsplit=1)[0] in error.message


def test_a_key_that_several_sections_have_names_them_all(fails: Fails) -> None:
    assert fails("unknown-key", "momentum=0.5").hint == "did you mean training.momentum or aggregation.momentum?"


def test_an_unknown_option_lists_the_groups_options(fails: Fails) -> None:
    error = fails("unknown-option", "privacy=of")
    assert "dp, off" in error.message
    assert error.hint == "did you mean privacy=off?"
    assert "banking77" in fails("unknown-option", "experiment=nope").message
    fails("unknown-option", "privacy=null")
    fails("unknown-option", "privacy=[dp,off]")


def test_a_section_takes_no_value(fails: Fails) -> None:
    assert "lora.rank" in fails("not-a-value", "lora=8").message
    assert "data.partition.scheme" in fails("not-a-value", "data.partition=iid").message


@pytest.mark.parametrize(
    ("override", "allowed"),
    [
        ("privacy.clip_norm=-1", "a number > 0"),
        ("privacy.clip_norm=nan", "a number > 0"),
        ("privacy.epsilon=eight", "a number"),
        ("privacy.noise_multiplier=0.001", "a number >= 0.01"),
        ("lora.rank=0", "a whole number >= 1 and <= 1024"),
        ("federation.rounds=2.5", "a whole number >= 1"),
        ("privacy.mode=on", "dp or off"),
        ("data.partition.scheme=x", "iid, dirichlet, column or quantity"),
        ("model.allow_download=maybe", "true or false"),
        ("data.labels=a", "a list [a,b] or null"),
        ("aggregation.weights=[0.5,x]", "equal or a list of numbers"),
        ("data.text=[a]", "text or null"),
        ("study.name=a/b", "letters, digits, dots, underscores and hyphens"),
        ("federation.sites=null", "a whole number"),
    ],
)
def test_a_wrong_value_names_key_value_place_and_what_is_allowed(fails: Fails, override: str, allowed: str) -> None:
    message = fails("bad-value", override).message
    assert f"{override} (command line): allowed is " in message
    assert allowed in message
    assert "pydantic" not in message


def test_all_wrong_values_are_named_at_once_with_their_lines(fails: Fails, write: Write) -> None:
    file = write("seed: -1\nlora:\n  rank: x\n")
    message = fails("bad-value", "training.sampling_rate=2", file=file).message
    assert message.startswith("3 values cannot be used\n")
    for part in ("seed=-1", "line 1)", "lora.rank=x", "line 3)", "training.sampling_rate=2 (command line)"):
        assert part in message


def test_an_option_that_needs_a_value_says_which(fails: Fails) -> None:
    assert "model.base" in fails("missing-value", "model=local").message
    assert compose(["model=local", "model.base=/models/a b"]).model.base == "/models/a b"


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("hydra.run.dir", "x"),
        ("hydra.mode", "MULTIRUN"),
        ("_target_", "os.system"),
        ("model._target_", "os.system"),
        ("data._args_", ["x"]),
        ("defaults", ["privacy"]),
        ("data.path", "${oc.env:HOME}"),
        ("data.labels", ["a", "${seed}"]),
        ("study.name", "a-${now:%Y}"),
    ],
)
def test_nothing_executable_comes_in(fails: Fails, key: str, value: str | list[str], write: Write) -> None:
    fails("refused", f"{key}={format_value(value)}")
    fails("refused", file=write(yaml.safe_dump({key: value})))
    fails("refused", file=write(yaml.safe_dump({key: value}, default_style="'")))
