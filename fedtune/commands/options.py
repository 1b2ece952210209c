"""What the subcommands share: their common arguments and options, and the completion of `KEY=VALUE`.

Modules of `fedtune.commands` do not postpone annotations: typer reads them when a command is built.
"""

from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer


class OutputFormat(StrEnum):
    """Text for people, or JSON for programs (on stdout the result, on stderr an error)."""

    text = "text"
    json = "json"


def complete_override(ctx: typer.Context, incomplete: str) -> list[tuple[str, str]]:
    """Offer keys and groups, and after `=` the named values; zsh and fish pass one word, bash cuts it at `=`."""
    earlier = [str(word) for word in ctx.params.get("overrides") or ()]
    if earlier[-1:] == ["="]:
        return _values(earlier[-2] if len(earlier) > 1 else "", incomplete)
    if not incomplete and earlier and "=" not in earlier[-1]:
        return _values(earlier[-1], "")
    key, equals, value = incomplete.partition("=")
    if equals:
        return [(f"{key}={choice}", words) for choice, words in _values(key, value)]
    return _keys(incomplete)


def _keys(start: str) -> list[tuple[str, str]]:
    from fedtune.config.keys import known_keys
    from fedtune.config.sources import groups

    offers = [(f"{group}=", " | ".join(options)) for group, options in groups().items()]
    offers += [(f"{key.name}=", key.allowed) for key in known_keys().values()]
    return [offer for offer in offers if offer[0].startswith(start)]


def _values(key: str, start: str) -> list[tuple[str, str]]:
    """Offer the values of a key that begin as typed; in a sweep `a,b` the last one is being typed."""
    from fedtune.config.keys import known_keys
    from fedtune.config.sources import groups

    swept, comma, last = start.rpartition(",")
    offers = dict(groups().get(key, {}))
    if key in known_keys():
        offers |= dict.fromkeys(known_keys()[key].choices, "")
    return [(swept + comma + choice, words) for choice, words in offers.items() if choice.startswith(last)]


Overrides = Annotated[
    list[str] | None,
    typer.Argument(
        metavar="[KEY=VALUE]...",
        help="Change keys and choose group options; comma-separated values sweep. See `fedtune config ls` and `show`.",
        autocompletion=complete_override,
        show_default=False,
    ),
]
ConfigFile = Annotated[
    Path | None,
    typer.Option("--config", metavar="FILE", help="YAML of the same shape; the command line wins.", show_default=False),
]
Base = Annotated[
    Path | None,
    typer.Option("--base", metavar="FOLDER", help="The base model, where it is not found.", show_default=False),
]
Format = Annotated[OutputFormat, typer.Option("--format", help="Output as text, or as JSON for programs.")]
Verbose = Annotated[bool, typer.Option("--verbose", help="Show the traceback of an error.")]
