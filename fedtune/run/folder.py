"""Where a study's results are: the names inside a run folder, and how one is made, found and never overwritten."""

from __future__ import annotations

import fcntl
import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from fedtune.config.machine import Machine
from fedtune.config.plan import StudyPlan
from fedtune.errors import RunError
from fedtune.run.files import append_line, disk_errors, read_lines, write_whole

_BEFORE_PLAN = {"machine.json", "checkpoints", "sites"}  # what is made before plan.json says that there is a run


@dataclass(frozen=True, slots=True)
class RunFolder:
    """A run folder's layout.

    `plan.json` what was run, `machine.json` facts of this machine, `metrics.jsonl` one line a round, `checkpoints/`
    the last rounds, `sites/` what simulated sites keep, `adapter/` the release, `summary.json` the result.
    """

    path: Path

    @property
    def plan_file(self) -> Path:
        """The plan in canonical JSON: its SHA-256 is the file's."""
        return self.path / "plan.json"

    @property
    def machine_file(self) -> Path:
        """Facts of the machine that runs the study."""
        return self.path / "machine.json"

    @property
    def metrics_file(self) -> Path:
        """One JSON line a round."""
        return self.path / "metrics.jsonl"

    @property
    def summary_file(self) -> Path:
        """The result, written last: its presence means that the study has ended."""
        return self.path / "summary.json"

    @property
    def checkpoints(self) -> Path:
        """One file a round, the last two kept."""
        return self.path / "checkpoints"

    @property
    def sites(self) -> Path:
        """What each simulated site keeps for itself."""
        return self.path / "sites"

    @property
    def adapter(self) -> Path:
        """The released PEFT folder."""
        return self.path / "adapter"

    def plan(self) -> StudyPlan:
        """Read the plan of this run."""
        return StudyPlan.from_json(self._read(self.plan_file))

    def machine(self) -> Machine:
        """Read the machine facts of this run."""
        return Machine.load(self.machine_file)

    def summary(self) -> dict[str, Any] | None:
        """Read the result, or None while the study has not ended."""
        if not self.summary_file.exists():
            return None
        try:
            found: dict[str, Any] = json.loads(self.summary_file.read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            hint = f"remove it, then write it again: fedtune simulate --resume {self.path}"
            raise RunError("damaged", f"{self.summary_file} cannot be read", hint=hint) from error
        return found

    def save_machine(self, machine: Machine) -> None:
        """Write the machine facts."""
        write_whole(self.machine_file, (machine.model_dump_json(indent=2) + "\n").encode())

    @contextmanager
    def in_use(self) -> Iterator[None]:
        """Hold the run for one process; the lock falls with the process, so a kill leaves nothing to clean."""
        with (self.checkpoints / ".lock").open("w") as lock:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError as error:
                hint = "wait for it, or end it first"
                raise RunError("in-use", f"{self.path} is being run by another process", hint=hint) from error
            yield

    def log_metrics(self, line: dict[str, Any]) -> None:
        """Append one round to `metrics.jsonl`."""
        append_line(self.metrics_file, json.dumps(line, sort_keys=True))

    def rewind_metrics(self, last: int) -> None:
        """Drop the lines of rounds after `last` and a torn one: these rounds are run again."""
        if self.metrics_file.exists():
            kept = [json.dumps(line, sort_keys=True) for line in read_lines(self.metrics_file) if line["round"] <= last]
            write_whole(self.metrics_file, "".join(f"{line}\n" for line in kept).encode())

    def _read(self, path: Path) -> str:
        try:
            return path.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise RunError(
                "no-run", f"{self.path} is not a run folder ({path.name} cannot be read)", hint="ls runs"
            ) from error


def create(plan: StudyPlan, machine: Machine) -> RunFolder:
    """Make a run folder and write what is run, the plan last; an existing folder with anything in it is refused.

    Only what a `create` that was stopped before its plan has left behind is taken over.
    """
    folder = RunFolder(machine.run)
    with disk_errors(folder.path):
        folder.path.mkdir(parents=True, exist_ok=True)
        _refuse_used(folder)
        folder.checkpoints.mkdir(exist_ok=True)
        folder.sites.mkdir(exist_ok=True)
    folder.save_machine(machine)
    write_whole(folder.plan_file, plan.json_text.encode())
    return folder


def _refuse_used(folder: RunFolder) -> None:
    found = {path.name for path in folder.path.iterdir() if not path.name.endswith(".partial")}
    if folder.plan_file.name in found:
        hint = f"choose another run.dir, or continue it: fedtune simulate --resume {folder.path}"
        raise RunError("exists", f"{folder.path} already holds a run", hint=hint)
    if found - _BEFORE_PLAN:
        named = ", ".join(sorted(found - _BEFORE_PLAN)[:3])
        raise RunError("exists", f"{folder.path} already holds other things ({named})", hint="choose another run.dir")


def default_path(root: str, study: str) -> Path:
    """Return `<root>/<study>/<time>`, with a number behind it where that exists."""
    base = Path(root) / study / datetime.now(UTC).strftime("%Y%m%d-%H%M%S")
    path, number = base, 2
    while path.exists():
        path, number = base.with_name(f"{base.name}-{number}"), number + 1
    return path
