"""Settings as a file that `--config` reads: what a study says beyond the shipped configuration.

Knows neither what a key means nor where the file goes.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from fedtune.config.compose import compose
from fedtune.config.schema import Settings

# What a reader looks for first; and the source, with which compose starts from the same shipped keys as here.
_ALWAYS = (
    ("study", "name"),
    ("data", "source"),
    ("privacy", "epsilon"),
    ("federation", "sites"),
    ("federation", "rounds"),
)


def study_text(settings: Settings, about: str) -> str:
    """Return YAML from which `compose` makes the same settings again, apart from `run`, facts of one machine.

    It begins with `about` as a comment and holds the keys that differ from the shipped ones, and `_ALWAYS`. A text with
    `${` in it can be written and is refused when it is read.
    """
    import yaml

    from_file = settings.data.source == "file"
    shipped = compose(["data.source=file"] if from_file else []).model_dump(mode="json")
    for section, key in _ALWAYS:
        del shipped[section][key]
    said = _difference(settings.model_dump(mode="json", exclude={"run"}), shipped)
    body = yaml.safe_dump(said, sort_keys=False, allow_unicode=True, width=120)
    return f"# {about}\n{body}"


def _difference(wanted: Mapping[str, Any], shipped: Mapping[str, Any]) -> dict[str, Any]:
    """Return the keys whose values differ, section by section."""
    found: dict[str, Any] = {}
    for key, value in wanted.items():
        if isinstance(value, Mapping):
            if inside := _difference(value, shipped[key]):
                found[key] = inside
        elif value != shipped.get(key):
            found[key] = value
    return found
