"""The text of `KEY=VALUE`: splitting, quoting, lists and sweeps.

    VALUE  = item | item,item,...            a comma sweeps: one run for each item
    item   = "text" | 'text' | [a,b] | plain
    plain  = anything without a comma, not starting with a quote or a bracket

Quotes and brackets count only where an item starts, so spaces, dots, slashes, `=`, `:` and brackets inside a path need
no quoting. Inside quotes, a backslash escapes a quote and a backslash. Plain `null` and `none` unset a key that may be
unset. Every other value stays text until the schema gives it a type: `data.label=0` names a column called 0.

Knows the grammar only: neither which keys exist nor what they allow.
"""

from __future__ import annotations

import itertools
import re
from dataclasses import dataclass
from typing import TYPE_CHECKING

from fedtune.errors import ConfigError

if TYPE_CHECKING:
    from collections.abc import Sequence

quoted_text = re.compile(r""""(?:[^"\\]|\\.)*"|'(?:[^'\\]|\\.)*'""", re.DOTALL)
spaces = re.compile(r"\s*")
usage = "write KEY=VALUE, for example privacy.epsilon=8; `fedtune config show` prints every key"


@dataclass(frozen=True, slots=True)
class Text:
    """A scalar as it was written; a quoted one is never null."""

    text: str
    quoted: bool = False

    @property
    def is_null(self) -> bool:
        """Whether this unsets an optional key: a plain null or none, or nothing at all."""
        return not self.quoted and self.text.casefold() in {"null", "none", ""}


Value = Text | tuple[Text, ...]


@dataclass(frozen=True, slots=True)
class Assignment:
    """One key with its value and the place where it was written, for messages."""

    key: str
    value: Value
    place: str


def parse_override(override: str) -> Assignment:
    """Read one `KEY=VALUE` of the command line.

    Raises ConfigError: `bad-override` when it is not of this form, `refused` for Hydra's `+`, `++` and `~`, `sweep`
    when the value is a comma list, which only `expand_sweep` resolves.
    """
    key, text = _split_key(override)
    items = _split_items(text, override)
    if len(items) > 1:
        raise ConfigError(
            "sweep",
            f"{override}: {len(items)} values for one run",
            hint=f"quote a value that contains a comma: {key}='{format_value(text)}'",
        )
    return Assignment(key, _parse_item(items[0], override), "command line")


def expand_sweep(overrides: Sequence[str]) -> list[list[str]]:
    """Every combination of the comma-separated values, in the order of the command line, the last key fastest.

    `["a=1,2", "b=[x,y]"]` gives `[["a=1", "b=[x,y]"], ["a=2", "b=[x,y]"]]`; no comma gives one run.
    """
    columns = []
    for override in overrides:
        key, text = _split_key(override)
        columns.append([f"{key}={item}" for item in _split_items(text, override)])
    return [list(run) for run in itertools.product(*columns)]


def format_value(value: str | Sequence[str]) -> str:
    """Write a value so that `parse_override` reads the same one back, quoted only where that is needed."""
    if not isinstance(value, str):
        return f"[{','.join(_format_scalar(item, ',[]') for item in value)}]"
    return _quote(value) if value.startswith("[") else _format_scalar(value, ",")


def _format_scalar(text: str, special: str) -> str:
    stays = text == text.strip() and not text.startswith(("'", '"')) and not Text(text).is_null
    return text if stays and not any(mark in text for mark in special) else _quote(text)


def _quote(text: str) -> str:
    escaped = text.replace("\\", "\\\\").replace('"', '\\"')
    return f'"{escaped}"'


def _split_key(override: str) -> tuple[str, str]:
    key, equals, text = override.partition("=")
    key = key.strip()
    if key.startswith(("+", "~")):
        raise ConfigError("refused", f"{override}: a key cannot be added or deleted (+, ++, ~)", hint=usage)
    if not equals or not key:
        raise ConfigError("bad-override", f"{override!r} is not KEY=VALUE", hint=usage)
    if not text.strip():
        raise ConfigError("bad-override", f"{override} has no value", hint=f"{key}=null unsets, {key}='\"\"' is empty")
    return key, text


def _split_items(text: str, override: str) -> list[str]:
    """Cut at the commas that are outside quotes and lists."""
    items, start = [], 0
    while start <= len(text):
        end = _item_end(text, start, override)
        items.append(text[start:end].strip())
        start = end + 1
    if not all(items):
        raise ConfigError("bad-override", f"{override}: nothing between two commas", hint="remove the extra comma")
    return items


def _item_end(text: str, start: int, override: str) -> int:
    begin = _skip_spaces(text, start)
    if not text.startswith("[", begin):
        return _scalar_end(text, start, ",", override)
    end = _scalar_end(text, begin + 1, ",]", override)
    while text.startswith(",", end):
        end = _scalar_end(text, end + 1, ",]", override)
    return _require_stop(text, _skip_spaces(text, end + 1) if end < len(text) else end + 1, ",", override)


def _scalar_end(text: str, start: int, stops: str, override: str) -> int:
    begin = _skip_spaces(text, start)
    if text[begin : begin + 1] in {'"', "'"}:
        quoted = quoted_text.match(text, begin)
        return _require_stop(text, _skip_spaces(text, quoted.end()) if quoted else len(text) + 1, stops, override)
    end = min((at for stop in stops if (at := text.find(stop, begin)) >= 0), default=len(text))
    nested = "]" in stops and "[" in text[begin:end]
    return _require_stop(text, len(text) + 1 if nested else end, stops, override)


def _require_stop(text: str, end: int, stops: str, override: str) -> int:
    if end == len(text) or (end < len(text) and text[end] in stops):
        return end
    raise ConfigError(
        "bad-override",
        f"{override}: a quote or a bracket at the start of a value must close at its end, and a list holds no list",
        hint="put the whole value in quotes, and the argument in the shell's: 'data.path=\"[a].csv\"'",
    )


def _skip_spaces(text: str, start: int) -> int:
    match = spaces.match(text, start)
    return match.end() if match else start


def _parse_item(item: str, override: str) -> Value:
    if not item.startswith("["):
        return _parse_scalar(item)
    inner = item[1:-1]
    return tuple(_parse_scalar(entry) for entry in _split_items(inner, override)) if inner.strip() else ()


def _parse_scalar(item: str) -> Text:
    if item[:1] not in {'"', "'"}:
        return Text(item)
    return Text(re.sub(r"""\\(["'\\])""", r"\1", item[1:-1]), quoted=True)
