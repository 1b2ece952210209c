"""Say which values cannot be used, in the words of the configuration: key, value found, place, what is allowed.

Knows pydantic's error list and the schema's keys; decides nothing itself.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from fedtune.config.keys import known_keys
from fedtune.config.overrides import format_value
from fedtune.errors import ConfigError

if TYPE_CHECKING:
    from pydantic import ValidationError


def wrong_values(error: ValidationError, tree: Mapping[str, Any], places: Mapping[str, str]) -> ConfigError:
    """Translate a validation error: one line for each key, however many complaints pydantic has about it."""
    keys = dict.fromkeys(_key_at(entry["loc"]) for entry in error.errors(include_url=False, include_context=False))
    lines = [_line(key, _lookup(tree, key), places.get(key, "conf")) for key in keys]
    if len(lines) == 1:
        return ConfigError("bad-value", lines[0], hint=_hint(next(iter(keys))))
    message = "\n  ".join([f"{len(lines)} values cannot be used", *lines])
    return ConfigError("bad-value", message, hint=_hint(*keys))


def missing_values(tree: Mapping[str, Any], missing: str) -> None:
    """Raise ConfigError `missing-value` for every key that a chosen option leaves to the user."""
    absent = [key for key in known_keys() if _lookup(tree, key) == missing]
    if absent:
        options = " ".join(f"{key}=..." for key in absent)
        raise ConfigError("missing-value", f"{' and '.join(absent)} must be given", hint=f"add {options}")


def _key_at(location: tuple[str | int, ...]) -> str:
    """Return the longest known key that a pydantic location starts with; unions and list positions come after it."""
    names = [".".join(str(part) for part in location[:length]) for length in range(len(location), 0, -1)]
    return next((name for name in names if name in known_keys()), names[0])


def _line(key: str, value: Any, place: str) -> str:
    allowed = known_keys()[key].allowed if key in known_keys() else "nothing: this is not a key"
    return f"{key}={_shown(value)} ({place}): allowed is {allowed}"


def _shown(value: Any) -> str:
    if isinstance(value, list):
        return format_value([str(item) for item in value])
    return "null" if value is None else str(value)


def _lookup(tree: Mapping[str, Any], key: str) -> Any:
    value: Any = tree
    for word in key.split("."):
        value = value.get(word) if isinstance(value, Mapping) else None
    return value


def _hint(*keys: str) -> str:
    lists = [key for key in keys if key in known_keys() and "a list" in known_keys()[key].allowed]
    return f"a list is written {lists[0]}=[a,b]" if lists else f"change {' and '.join(keys)}"
