"""The keys that a configuration may set, read from the schema: what each allows and which one was probably meant.

Knows no value and no source of values; the schema (`Settings`) is the only place where a key is defined.
"""

from __future__ import annotations

from dataclasses import dataclass
from difflib import get_close_matches
from functools import cache
from typing import TYPE_CHECKING, Any

from fedtune.config.schema import Settings

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping

type_words = {"integer": "a whole number", "number": "a number", "string": "text", "boolean": "true or false"}
bound_signs = {"exclusiveMinimum": ">", "minimum": ">=", "exclusiveMaximum": "<", "maximum": "<="}


@dataclass(frozen=True, slots=True)
class Key:
    """One key: its dotted name, what it allows in words, its named values, and whether `null` is one."""

    name: str
    allowed: str
    choices: tuple[str, ...]
    optional: bool


@cache
def known_keys() -> Mapping[str, Key]:
    """Every key by its dotted name, in the schema's order."""
    schema = Settings.model_json_schema()
    return {name: _key(name, leaf) for name, leaf in _leaves(schema, schema["$defs"], "")}


@cache
def sections() -> tuple[str, ...]:
    """Every name that holds keys and takes no value itself: `data`, `data.partition`, ..."""
    parents = (name.rsplit(".", 1)[0] for name in known_keys() if "." in name)
    return tuple(dict.fromkeys(parents))


def nearest_keys(name: str, groups: Iterable[str] = ()) -> list[str]:
    """Return what `name` was probably meant to be: keys with the same last word, else the closest spelling."""
    last = name.rsplit(".", 1)[-1]
    same = [key for key in known_keys() if key.rsplit(".", 1)[-1] == last]
    return same or get_close_matches(name, [*known_keys(), *sections(), *groups], n=1, cutoff=0.5)


def _leaves(schema: Mapping[str, Any], definitions: Mapping[str, Any], prefix: str) -> Iterator[tuple[str, Any]]:
    for name, entry in schema["properties"].items():
        target = definitions.get(entry.get("$ref", "").rsplit("/", 1)[-1], {})
        if "properties" in target:
            yield from _leaves(target, definitions, f"{prefix}{name}.")
        else:
            yield prefix + name, entry


def _key(name: str, schema: Mapping[str, Any]) -> Key:
    kinds = [kind for kind in schema.get("anyOf", [schema]) if kind.get("type") != "null"]
    optional = len(kinds) < len(schema.get("anyOf", [schema]))
    words = [_describe(kind) for kind in kinds] + ["null"] * optional
    return Key(name, " or ".join(words), tuple(choice for kind in kinds for choice in _choices(kind)), optional)


def _describe(schema: Mapping[str, Any]) -> str:
    if choices := _choices(schema):
        return choices[0] if len(choices) == 1 else " or ".join([", ".join(choices[:-1]), choices[-1]])
    if schema["type"] == "array":
        return "a list of numbers [0.5,0.5]" if schema["items"]["type"] == "number" else "a list [a,b]"
    words = type_words[schema["type"]]
    if "pattern" in schema:
        words = f"at most {schema['maxLength']} letters, digits, dots, underscores and hyphens"
    bounds = [f"{sign} {schema[bound]:.20g}" for bound, sign in bound_signs.items() if bound in schema]
    return " ".join([words, " and ".join(bounds)]).strip()


def _choices(schema: Mapping[str, Any]) -> tuple[str, ...]:
    if schema.get("type") == "boolean":
        return ("true", "false")
    return tuple(schema.get("enum", [schema["const"]] if "const" in schema else []))
