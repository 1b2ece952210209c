"""Compose and validate the settings of one run.

Hydra composes the shipped `conf/` with the chosen group options; the user's own values are laid over the result as
data and never pass through Hydra or OmegaConf, so nothing a user writes is resolved or executed. Order, later wins:

1. `conf/config.yaml` and the chosen options,
2. the chosen experiment,
3. `--config FILE`,
4. the command line.

A FILE and a command line each apply their group choices first, then their values. An option changes only the keys in
its own file: `experiment=banking77 aggregation=ffa` keeps everything else of the experiment.

One convenience: setting `data.path` (or `data.source=file`) chooses `data=file`, unless `data` was chosen, so that the
default data's column names do not linger. An experiment that brings its own file keeps its columns.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cache
from typing import TYPE_CHECKING, Any

from pydantic import ValidationError

from fedtune.config.invalid import missing_values, wrong_values
from fedtune.config.layers import Layer, read_layer
from fedtune.config.overrides import parse_override
from fedtune.config.schema import Settings
from fedtune.config.sources import conf_folder, read_file
from fedtune.errors import ConfigError

if TYPE_CHECKING:
    from pathlib import Path

    from omegaconf import DictConfig

Tree = dict[str, Any]
missing = "???"  # OmegaConf's word for a value that somebody else must give


def compose(overrides: Sequence[str], config_file: Path | None = None) -> Settings:
    """Compose `conf/`, `config_file` and `overrides` (each `KEY=VALUE`) into validated settings.

    Raises ConfigError; a message about a value names its key, what was found, where, and what is allowed, and all
    wrong values are named at once.
    """
    layers = [read_layer(read_file(config_file))] if config_file is not None else []
    layers.append(read_layer([parse_override(override) for override in overrides]))
    tree = _shipped_tree(layers)
    for layer in layers:
        for group, option in layer.choices.items():
            if group != "experiment":
                _overlay(tree, _shipped(f"{group}/{option}", {}))
        for key, value in layer.values.items():
            _overlay(tree, _nest(key, value))
    return _validate(tree, layers)


def _shipped_tree(layers: Sequence[Layer]) -> Tree:
    choices = {group: option for layer in layers for group, option in layer.choices.items()}
    tree = _shipped("config", choices)
    brings_file = any(_brings_file(layer) for layer in layers)
    if brings_file and "data" not in choices and tree["data"]["source"] != "file":
        tree = _shipped("config", choices | {"data": "file"})
    return tree


def _brings_file(layer: Layer) -> bool:
    return layer.values.get("data.path") is not None or layer.values.get("data.source") == "file"


def _shipped(config: str, choices: Mapping[str, str | None]) -> Tree:
    """Compose one shipped file and fill in the environment; the caller may change the result."""
    from omegaconf import OmegaConf

    overrides = tuple(f"{group}={option}" for group, option in choices.items() if option is not None)
    tree = OmegaConf.to_container(_hydra_compose(config, overrides), resolve=True)
    if not isinstance(tree, dict):
        raise TypeError(f"conf/{config}.yaml is not a mapping")
    return {str(key): value for key, value in tree.items()}


@cache
def _hydra_compose(config: str, overrides: tuple[str, ...]) -> DictConfig:
    """Let Hydra compose one shipped file; its global state is as before afterwards."""
    from hydra import compose as hydra_compose
    from hydra import initialize_config_dir

    with initialize_config_dir(str(conf_folder()), version_base="1.3"):
        return hydra_compose(config, overrides=list(overrides))


def _overlay(tree: Tree, changes: Mapping[str, Any]) -> None:
    """Lay `changes` over `tree` in place."""
    for key, value in changes.items():
        if isinstance(value, Mapping):
            _overlay(tree.setdefault(key, {}), value)
        else:
            tree[key] = value


def _nest(key: str, value: Any) -> Tree:
    for word in reversed(key.split(".")):
        value = {word: value}
    return dict(value)


def _validate(tree: Tree, layers: Sequence[Layer]) -> Settings:
    places = {key: place for layer in layers for key, place in layer.places.items()}
    missing_values(tree, missing)
    try:
        settings = Settings.model_validate(tree)
    except ValidationError as error:
        raise wrong_values(error, tree, places) from None
    if settings.data.path is not None and settings.data.source != "file":
        message = f"data.path={settings.data.path} is set, but data.source={settings.data.source} makes its own records"
        raise ConfigError("conflict", message, hint="data=file reads the path; data.path=null keeps the source")
    return settings
