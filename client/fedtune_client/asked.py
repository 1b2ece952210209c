"""Plans that a coordinator asked for and this site has not taken part in, kept for its operator to read and approve.

    asked/HASH16.json   the plan as it came, canonical and read by the same rules; nothing of it was carried out

At most `MOST` are kept, the newest. Knows no policy and no reason.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

from fedtune.config.plan import StudyPlan
from fedtune.errors import ConfigError, FedtuneError
from fedtune.run.files import disk_errors, make_folder, write_whole
from fedtune_client.folder import SiteFolder
from fedtune_client.policy.plans import read_plan

MOST = 50
PREFIX = re.compile(r"[0-9a-f]{6,64}")
_SHOWN = 16


@dataclass(frozen=True, slots=True)
class Asked:
    """A plan and when it was last asked for."""

    plan: StudyPlan
    at: datetime


def keep(folder: SiteFolder, plan: StudyPlan) -> None:
    """Keep a plan; one that is there counts as asked for now. The oldest make room. Errors: `run.*` for the disk."""
    make_folder(folder.asked)
    write_whole(_file(folder, plan), plan.json_text.encode())
    with disk_errors(folder.asked):
        for path in _files(folder)[MOST:]:
            path.unlink(missing_ok=True)


def forget(folder: SiteFolder, plan: StudyPlan) -> None:
    """Drop a plan that the site takes part in by now."""
    with disk_errors(folder.asked):
        _file(folder, plan).unlink(missing_ok=True)


def all_asked(folder: SiteFolder) -> Iterator[Asked]:
    """Yield what was asked for, newest first; a file that is not the plan that its name says is left out."""
    for path in _files(folder):
        try:
            at = datetime.fromtimestamp(path.stat().st_mtime, UTC)
            plan = read_plan(path.read_text(encoding="utf-8"))
        except (OSError, UnicodeDecodeError, FedtuneError):
            continue
        if path == _file(folder, plan):
            yield Asked(plan, at)


def find(folder: SiteFolder, start: str) -> StudyPlan:
    """Return the one plan whose hash begins so. Errors: `config.no-plan`, `config.two-plans`."""
    found = [asked.plan for asked in all_asked(folder) if asked.plan.sha256.startswith(start)]
    if not found:
        hint = "fedtune client asked lists what was asked for; a plan.json works too"
        raise ConfigError("no-plan", f"no plan {start} was asked for", hint=hint)
    if len(found) > 1:
        raise ConfigError("two-plans", f"{len(found)} plans begin with {start}", hint="write more of the hash")
    return found[0]


def _file(folder: SiteFolder, plan: StudyPlan) -> Path:
    return folder.asked / f"{plan.sha256[:_SHOWN]}.json"


def _files(folder: SiteFolder) -> list[Path]:
    """Return the files by when they were written, newest first."""
    found = []
    for path in folder.asked.glob("[0-9a-f]*.json"):
        with suppress(FileNotFoundError):  # dropped meanwhile
            found.append((path.stat().st_mtime_ns, path))
    return [path for _, path in sorted(found, reverse=True)]
