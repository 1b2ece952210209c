"""Reads the plan that a command names: a file, or the hash of a plan that a coordinator has asked for.

A file is a plan.json, a run folder, or what `fedtune plan --format json` printed.
"""

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from fedtune.errors import ConfigError

if TYPE_CHECKING:
    from fedtune.config.plan import StudyPlan
    from fedtune_client.folder import SiteFolder

longest = 4_000_000  # bytes: a plan has at most a million characters

PlanOrHash = Annotated[
    Path,
    typer.Argument(
        metavar="PLAN", help="plan.json, a run folder, or a hash that `client asked` shows.", show_default=False
    ),
]


def find_plan(given: Path, folder: "SiteFolder") -> "StudyPlan":
    """Return the plan of a file, or the one that was asked for whose hash begins so; a file that is there wins.

    Errors: those of `read_plan_file` and of `fedtune_client.asked.find`.
    """
    from fedtune_client.asked import PREFIX, find

    if PREFIX.fullmatch(str(given)) and not given.exists():
        return find(folder, str(given))
    return read_plan_file(given)


def read_plan_file(path: Path) -> "StudyPlan":
    """Return a plan that another machine may have written.

    Errors: `config.no-plan` for a path that cannot be read, and those of `fedtune_client.policy.plans.read_plan`.
    """
    from fedtune_client.policy.plans import read_plan

    file = path / "plan.json" if path.is_dir() else path
    try:
        with file.open("rb") as opened:
            text = opened.read(longest + 1).decode("utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = "it is not text" if isinstance(error, UnicodeDecodeError) else error.strerror
        hint = "name the plan.json that the coordinator sent, or a run folder"
        raise ConfigError("no-plan", f"{file} cannot be read as a plan ({reason})", hint=hint) from error
    return read_plan(_of_document(text) or text)


def _of_document(text: str) -> str | None:
    """Return the plan in what `fedtune plan --format json` prints, None for anything else."""
    from fedtune.config.canonical import canonical_json

    try:
        document = json.loads(text)
        if isinstance(document, dict) and {"plan", "plan_sha256"} <= set(document):
            return canonical_json(document["plan"])
    except (ValueError, RecursionError):
        return None
    return None
