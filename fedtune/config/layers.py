"""One source of settings, checked: which group options it chooses and which keys it sets.

Everything that must not come from a user is refused here, whatever it is written in: unknown keys and options, keys
of Hydra, `_target_`, and `${...}` in a value. Knows no file format and does not compose.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from difflib import get_close_matches
from typing import TYPE_CHECKING

from fedtune.config.keys import known_keys, nearest_keys, sections
from fedtune.config.overrides import Assignment, Text, format_value
from fedtune.config.sources import groups
from fedtune.errors import ConfigError

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

Plain = str | list[str | None] | None
show_keys = "`fedtune config show` prints every key"


@dataclass(frozen=True, slots=True)
class Layer:
    """Group choices, applied first (None unsets `experiment`), then values by dotted key; and each value's place."""

    choices: Mapping[str, str | None] = field(default_factory=dict)
    values: Mapping[str, Plain] = field(default_factory=dict)
    places: Mapping[str, str] = field(default_factory=dict)


def read_layer(assignments: Iterable[Assignment]) -> Layer:
    """Check one source's assignments; a later one replaces an earlier one of the same key.

    Raises ConfigError: `refused`, `unknown-key` (names the nearest), `unknown-option` (lists the group's options) and
    `not-a-value` (a section was given a value).
    """
    choices: dict[str, str | None] = {}
    values: dict[str, Plain] = {}
    places: dict[str, str] = {}
    for entry in assignments:
        _refuse_executable(entry)
        if entry.key in sections() and entry.value == Text(""):
            continue  # an empty section of a FILE says nothing
        if entry.key in groups():
            choices |= _read_choice(entry)
        elif entry.key in known_keys():
            values[entry.key] = _plain(entry)
            places[entry.key] = entry.place
        else:
            raise _unknown(entry)
    return Layer(choices, values, places)


def _refuse_executable(entry: Assignment) -> None:
    """Refuse keys that Hydra would act on and values that OmegaConf would resolve."""
    words = entry.key.split(".")
    if words[0] in {"hydra", "defaults"} or any(re.fullmatch(r"_\w+_", word) for word in words):
        hint = "choose an option by its group, for example privacy=off" if words[0] == "defaults" else show_keys
        raise ConfigError("refused", f"{entry.key} ({entry.place}): not a key of a study", hint=hint)
    texts = (entry.value,) if isinstance(entry.value, Text) else entry.value
    if any("${" in item.text for item in texts):
        message = f"{entry.key} ({entry.place}): ${{...}} is not resolved in a value"
        raise ConfigError("refused", message, hint="write the value itself; your shell can fill in a variable")


def _read_choice(entry: Assignment) -> dict[str, str | None]:
    options = groups()[entry.key]
    if entry.key == "experiment" and isinstance(entry.value, Text) and entry.value.is_null:
        return {"experiment": None}
    chosen = entry.value.text if isinstance(entry.value, Text) else ""
    if chosen not in options:
        close = get_close_matches(chosen, options, n=1)
        raise ConfigError(
            "unknown-option",
            f"{entry.key}={_shown(entry)} ({entry.place}): {entry.key} has the options {', '.join(options)}",
            hint=f"did you mean {entry.key}={close[0]}?" if close else "`fedtune config ls` describes them",
        )
    return {entry.key: chosen}


def _unknown(entry: Assignment) -> ConfigError:
    if entry.key in sections():
        inside = [key for key in known_keys() if key.startswith(f"{entry.key}.")]
        message = f"{entry.key} ({entry.place}) takes no value; its keys are {', '.join(inside)}"
        return ConfigError("not-a-value", message, hint=f"for example {inside[0]}=...")
    nearest = nearest_keys(entry.key, groups())
    hint = f"did you mean {' or '.join(nearest)}?" if nearest else show_keys
    return ConfigError("unknown-key", f"{entry.key} ({entry.place}) is not a key", hint=hint)


def _plain(entry: Assignment) -> Plain:
    optional = known_keys()[entry.key].optional
    if isinstance(entry.value, Text):
        return None if optional and entry.value.is_null else entry.value.text
    return [item.text for item in entry.value]


def _shown(entry: Assignment) -> str:
    return format_value(entry.value.text if isinstance(entry.value, Text) else [item.text for item in entry.value])
