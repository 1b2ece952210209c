from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import yaml
from hydra.core.global_hydra import GlobalHydra
from hypothesis import given, settings
from hypothesis import strategies as st

from fedtune.config.compose import compose
from fedtune.config.keys import known_keys
from fedtune.config.overrides import format_value
from fedtune.config.schema import Settings
from fedtune.config.sources import conf_folder, groups
from fedtune.errors import ConfigError

Write = Callable[[str], Path]
Fails = Callable[..., ConfigError]

paths = st.text(st.characters(exclude_categories=["Cs", "Cc"]), min_size=1).filter(lambda text: "${" not in text)


def test_the_embedded_default_is_six_banks_with_epsilon_8() -> None:
    default = compose([])
    assert (default.data.source, default.federation.sites, default.privacy.epsilon) == ("bank-messages", 6, 8.0)


def test_every_key_of_the_schema_is_spelled_in_the_shipped_defaults_with_a_comment() -> None:
    text = (conf_folder() / "config.yaml").read_text("utf-8")
    spelled = yaml.safe_load(text)
    del spelled["defaults"]

    def leaves(tree: dict, prefix: str = "") -> set[str]:
        inner = {name for name, value in tree.items() if isinstance(value, dict)}
        return {prefix + name for name in tree if name not in inner}.union(
            *(leaves(tree[name], f"{prefix}{name}.") for name in inner)
        )

    assert leaves(spelled) == set(known_keys())
    body = text.split("experiment: null")[1]
    assert all("#" in line for line in body.splitlines() if line.strip() and not line.endswith(":"))


@pytest.mark.parametrize("choice", [f"{group}={option}" for group, options in groups().items() for option in options])
def test_every_shipped_option_composes_and_is_described(choice: str) -> None:
    group, option = choice.split("=")
    assert isinstance(compose([choice, "model.base=somewhere"]), Settings)
    assert groups()[group][option]


def test_experiments_find_their_data_under_the_environments_folder(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FEDTUNE_DATA", "/my data")
    banking = compose(["experiment=banking77"])
    assert banking.data.path == "/my data/banking77/train.csv"
    assert (banking.data.source, banking.data.text, banking.data.label) == ("file", "text", "category")
    assert (banking.federation.sites, banking.privacy.delta) == (8, 1e-5)
    medquad = compose(["experiment=medquad"])
    assert (medquad.data.prompt, medquad.data.completion, medquad.data.text) == ("question", "answer", None)
    assert (medquad.data.partition.scheme, medquad.data.partition.column) == ("column", "site")


def test_later_sources_win(write: Write) -> None:
    file = write("experiment: banking77\nfederation: {sites: 5}\nprivacy: {epsilon: 3}\n")
    assert compose(["experiment=banking77"]).federation.sites == 8
    assert compose([], file).federation.sites == 5
    both = compose(["federation.sites=4"], file)
    assert (both.federation.sites, both.privacy.epsilon, both.data.label) == (4, 3.0, "category")
    assert compose(["seed=1", "seed=2"]).seed == 2


def test_a_group_chosen_later_wins_over_values_set_earlier(write: Write) -> None:
    file = write("privacy: {mode: dp, epsilon: 3}\n")
    chosen = compose(["privacy=off"], file).privacy
    assert (chosen.mode, chosen.epsilon) == ("off", 3.0)
    assert compose(["training=poisson", "experiment=banking77"]).training.sampling_rate == 0.1
    assert compose(["training.sampling_rate=0.5", "training=default"]).training.sampling_rate == 0.5


def test_an_option_changes_only_its_own_keys(write: Write) -> None:
    file = write("aggregation: {average_last: 3, server_learning_rate: 0.5}\n")
    chosen = compose(["aggregation=ffa"], file).aggregation
    assert (chosen.algorithm, chosen.average_last, chosen.server_learning_rate) == ("ffa", 3, 0.5)


@settings(max_examples=25, deadline=None)
@given(path=paths, label=paths)
def test_any_path_and_column_name_arrives_as_it_was_given(path: str, label: str) -> None:
    data = compose([f"data.path={format_value(path)}", f"data.label={format_value(label)}"]).data
    assert (data.path, data.label) == (path, label)


def test_values_that_look_like_other_types_stay_text_where_text_is_wanted() -> None:
    data = compose(["data.path=/tmp/my data (1)/x=1.csv", "data.text=true", "data.label=0", "data.labels=[0,1]"]).data
    assert (data.path, data.text, data.label) == ("/tmp/my data (1)/x=1.csv", "true", "0")
    assert data.labels == ("0", "1")


@pytest.mark.parametrize("word", ["null", "none", "NULL"])
def test_null_unsets_an_optional_key_and_is_a_word_elsewhere(word: str) -> None:
    assert compose([f"data.text={word}"]).data.text is None
    assert compose([f'data.text="{word}"']).data.text == word
    assert compose([f"study.name={word}"]).study.name == word


def test_setting_a_path_chooses_the_file_source_and_drops_the_defaults_columns(write: Write) -> None:
    data = compose(["data.path=bank.csv", "data.text=body"]).data
    assert (data.source, data.path, data.text, data.label) == ("file", "bank.csv", "body", None)
    assert compose(["data.source=file"]).data.text is None
    assert compose(["data.path=bank.csv"], write("data: {text: body}\n")).data.text == "body"


def test_an_experiments_columns_stay_when_only_its_path_is_moved() -> None:
    data = compose(["experiment=banking77", "data.path=/elsewhere.csv"]).data
    assert (data.path, data.text, data.label) == ("/elsewhere.csv", "text", "category")


def test_a_path_with_a_source_that_makes_its_own_records_is_a_conflict(fails: Fails) -> None:
    assert "data.path" in fails("conflict", "data=bank_messages", "data.path=x.csv").message


def test_composition_leaves_a_callers_hydra_as_it_was() -> None:
    assert not GlobalHydra.instance().is_initialized()
    compose(["experiment=banking77"])
    assert not GlobalHydra.instance().is_initialized()
