"""Where settings are written down: the shipped `conf/` folder and the user's `--config FILE`.

`conf/` is a folder of groups (`privacy/`), each a folder of options (`dp.yaml`), plus `experiment/`; the first comment
of an option's file describes it. FILE is YAML of the same shape in which a group's name may take an option
(`privacy: off`). FILE is read as text: every scalar stays as it is written, so `off` is not False and `007` is not 7,
exactly as on the command line. Tags, duplicate keys and nested lists are refused.

Knows neither which keys exist nor what they allow; composes nothing.
"""

from __future__ import annotations

import importlib.resources
import re
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING

import yaml

from fedtune.config.overrides import Assignment, Text, Value
from fedtune.errors import ConfigError

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

plain_tags = re.compile(r"tag:yaml\.org,2002:(str|int|float|bool|null|timestamp|value|merge|seq|map)")


@cache
def conf_folder() -> Path:
    """Find the shipped configuration: the installed `fedtune.conf`, else `conf/` beside the package (a source tree)."""
    try:
        return Path(str(importlib.resources.files("fedtune.conf")))
    except ModuleNotFoundError:
        return Path(__file__).resolve().parents[2] / "conf"


@cache
def groups() -> Mapping[str, Mapping[str, str]]:
    """Every group with its options and the sentence that describes each: `{"privacy": {"dp": "...", "off": "..."}}`."""
    folders = sorted(path for path in conf_folder().iterdir() if any(path.glob("*.yaml")))
    return {
        folder.name: {file.stem: _description(file) for file in sorted(folder.glob("*.yaml"))} for folder in folders
    }


def _description(file: Path) -> str:
    comments = (line.lstrip("# ").strip() for line in file.read_text("utf-8").splitlines() if line.startswith("#"))
    return next((comment for comment in comments if not comment.startswith("@package")), "")


def read_file(file: Path) -> list[Assignment]:
    """Read a configuration file as assignments, each with its line.

    A mapping becomes dotted keys; a key may also be written with dots (`privacy.epsilon: 3`).

    Raises ConfigError: `file-missing`, `file-unreadable` (a folder, not permitted, not UTF-8) and `bad-yaml` (syntax, a
    tag, a key given twice, a list of lists, not a mapping).
    """
    root = _compose_yaml(file)
    if root is None:
        return []
    if not isinstance(root, yaml.MappingNode):
        raise _bad_yaml(file, root, "the file is not a mapping of keys")
    assignments = list(_walk(root, "", file, depth=0))
    seen: set[str] = set()
    for entry in assignments:
        if entry.key in seen:
            raise ConfigError("bad-yaml", f"{entry.place}: {entry.key} is given twice", hint="keep one of them")
        seen.add(entry.key)
    return assignments


def _compose_yaml(file: Path) -> yaml.Node | None:
    try:
        text = file.read_text("utf-8")
        return yaml.compose(text, Loader=yaml.SafeLoader)
    except FileNotFoundError:
        raise ConfigError("file-missing", f"no configuration file {file}", hint="check --config") from None
    except (OSError, UnicodeDecodeError) as error:
        reason = "is not UTF-8" if isinstance(error, UnicodeDecodeError) else f"cannot be read: {error.strerror}"
        raise ConfigError("file-unreadable", f"{file} {reason}", hint="--config takes a YAML file in UTF-8") from None
    except yaml.YAMLError as error:
        raise ConfigError(
            "bad-yaml", f"{file}: {_reason(error)}", hint="check the line, its indent and quotes"
        ) from None


def _reason(error: yaml.YAMLError) -> str:
    if isinstance(error, yaml.MarkedYAMLError) and error.problem_mark is not None:
        return f"line {error.problem_mark.line + 1}: {error.problem}"
    return str(error).splitlines()[0]


def _walk(node: yaml.MappingNode, prefix: str, file: Path, depth: int) -> Iterator[Assignment]:
    if depth > 8:  # noqa: PLR2004 - deeper than any key; an alias to its own parent would not end
        raise _bad_yaml(file, node, "mappings are nested too deeply")
    for key_node, value_node in node.value:
        _require_plain_tag(file, key_node)
        _require_plain_tag(file, value_node)
        if not isinstance(key_node, yaml.ScalarNode):
            raise _bad_yaml(file, key_node, "a key must be a word")
        key = prefix + key_node.value
        if isinstance(value_node, yaml.MappingNode):
            yield from _walk(value_node, f"{key}.", file, depth + 1)
        else:
            yield Assignment(key, _value(value_node, file), _place(file, key_node))


def _value(node: yaml.Node, file: Path) -> Value:
    if isinstance(node, yaml.SequenceNode):
        return tuple(_scalar(entry, file) for entry in node.value)
    return _scalar(node, file)


def _scalar(node: yaml.Node, file: Path) -> Text:
    _require_plain_tag(file, node)
    if not isinstance(node, yaml.ScalarNode):
        raise _bad_yaml(file, node, "a list may hold only words and numbers")
    if node.style is not None:
        return Text(node.value, quoted=True)
    return Text("null" if node.value == "~" else node.value)


def _require_plain_tag(file: Path, node: yaml.Node) -> None:
    if not plain_tags.fullmatch(node.tag):
        raise _bad_yaml(file, node, f"the tag {node.tag} is refused: nothing in a configuration is executed")


def _bad_yaml(file: Path, node: yaml.Node, problem: str) -> ConfigError:
    return ConfigError("bad-yaml", f"{_place(file, node)}: {problem}", hint="`fedtune config show` prints the shape")


def _place(file: Path, node: yaml.Node) -> str:
    return f"{file} line {node.start_mark.line + 1}"
