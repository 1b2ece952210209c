"""The studies of a coordinator, as they stand in its folder: read, found, submitted, and told what is wished of them.

A study is a folder with a plan and a `study.json`, which is written last: a submission that was killed counts for
nothing, and the same submission completes it. One that cannot be read is named and holds up no other. Knows no Flower
and no process; whatever runs finds out by reading again.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import datetime
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING

from fedtune.config.canonical import sha256_hex
from fedtune.config.machine import Machine
from fedtune.config.plan import StudyPlan
from fedtune.errors import FedtuneError, RunError, StudyError
from fedtune.journal.chain import moment
from fedtune.journal.journal import Clock, utc_now
from fedtune.run.files import make_folder, write_whole
from fedtune.run.folder import RunFolder
from fedtune.run.private_files import PrivateFiles
from fedtune_server.folder import CoordinatorFolder
from fedtune_server.studies.record import RECORD_FILE, StudyRecord, read_record, write_record

if TYPE_CHECKING:
    from fedtune.flower.submission import RunFacts

_FILES = PrivateFiles(StudyError, one_writer=True)
_LEAST_PREFIX, _SHOWN = 4, 12
_STATUS = "fedtune server status"
_Stamp = tuple[tuple[int, int, int] | None, ...]


@dataclass(frozen=True, slots=True)
class StoredStudy:
    """A submitted study: its run folder, what is wished of it, and its plan's text."""

    path: Path
    record: StudyRecord
    plan_text: str = field(repr=False)

    @property
    def plan(self) -> StudyPlan:
        """The plan."""
        return _plan(self.plan_text)

    @property
    def bundle_sha256(self) -> str:
        """How Flower knows the study."""
        return _bundle_sha256(self.plan_text)

    def own(self, runs: Iterable[RunFacts]) -> list[RunFacts]:
        """Return the runs of this study among Flower's, without those that ended before it was submitted (anew)."""
        ours = (run for run in runs if run.bundle_sha256 == self.bundle_sha256)
        return [run for run in ours if run.status != "finished" or _is_after(run.submitted_at, self.record.submitted)]

    @property
    def is_finished(self) -> bool:
        """Whether its result is there."""
        return RunFolder(self.path).summary_file.exists()


@dataclass(frozen=True, slots=True)
class DamagedStudy:
    """A folder among the studies that cannot be read as one, and why."""

    path: Path
    error: FedtuneError


@dataclass(frozen=True, slots=True)
class Shelf:
    """All studies, in the order of their submission, and those that are damaged."""

    studies: tuple[StoredStudy, ...]
    damaged: tuple[DamagedStudy, ...] = ()


class StudyStore:
    """The studies below a coordinator's folder. What was read once is read again only after it has changed."""

    def __init__(self, folder: CoordinatorFolder, clock: Clock = utc_now) -> None:
        self._folder, self._clock = folder, clock
        self._known: dict[Path, tuple[_Stamp, StoredStudy | DamagedStudy]] = {}

    def read(self) -> Shelf:
        """Return what is there now."""
        found = [self._open(path) for path in self._places()]
        studies = (study for study in found if isinstance(study, StoredStudy))
        damaged = tuple(study for study in found if isinstance(study, DamagedStudy))
        return Shelf(tuple(sorted(studies, key=lambda study: (study.record.submitted, study.path))), damaged)

    def find(self, words: str) -> StoredStudy:
        """Return the study of a name, of a plan's hash or the first 4 or more digits of it, or of its folder's name.

        Errors: `study.unknown`, `study.ambiguous`, and what is wrong with the study that is meant.
        """
        shelf = self.read()
        found = [study for study in shelf.studies if _is_meant(study, words)]
        if len(found) == 1:
            return found[0]
        if found:
            hashes = ", ".join(study.record.plan_sha256[:_SHOWN] for study in found)
            hint = f"name one by its plan's hash: {hashes}"
            raise StudyError("ambiguous", f"{len(found)} studies are meant by {words}", hint=hint)
        for study in shelf.damaged:
            if study.path.name.startswith(words):
                raise study.error
        raise StudyError("unknown", f"no study {words} was submitted to {self._folder.path}", hint=_STATUS)

    def require_new(self, plan: StudyPlan) -> None:
        """Refuse a plan that was submitted before: `study.exists`, since a plan's hash is a study."""
        place = self._folder.study(plan)
        if (place / RECORD_FILE).exists():
            short = plan.sha256[:_SHOWN]
            hint = f"see it: fedtune server status {short}; another seed makes another study: seed=N"
            raise StudyError("exists", f"the plan {short}… was submitted before, as {place}", hint=hint)

    def submit(self, plan: StudyPlan, sites: Sequence[str], machine: Machine) -> StoredStudy:
        """Keep a study to be run. Errors: `study.exists`, `study.disk-full`, `study.unwritable`."""
        place = self._folder.study(plan)
        now = moment(self._clock())
        record = StudyRecord(plan_sha256=plan.sha256, name=plan.name, sites=tuple(sites), submitted=now)
        with self._deciding(), _disk():
            self.require_new(plan)
            folder = RunFolder(place)
            make_folder(folder.checkpoints)
            folder.save_machine(machine)
            write_whole(folder.plan_file, plan.json_text.encode())
            write_record(place, record)
        return StoredStudy(place, record, plan.json_text)

    def stop(self, study: StoredStudy) -> StudyRecord:
        """Wish that a study stops; what it has reached is kept. Error: `study.finished`."""
        return self._change(study, lambda record: record.model_copy(update={"wish": "stop"}))

    def resume(self, study: StoredStudy, release: Sequence[str] = ()) -> StudyRecord:
        """Wish that a study goes on whatever has failed, with sites let out of quarantine.

        Errors: `study.finished`, `study.other-site` for a site that is none of the study's.
        """
        for site in release:
            if site not in study.record.sites:
                hint = f"its sites are {', '.join(study.record.sites)}"
                raise StudyError("other-site", f"{site} takes no part in the study {study.record.name}", hint=hint)

        def gone_on(record: StudyRecord) -> StudyRecord:
            changes = {"wish": "run", "resumed": record.resumed + 1, "released": (*record.released, *release)}
            return record.model_copy(update=changes)

        return self._change(study, gone_on)

    def _change(self, study: StoredStudy, change: Callable[[StudyRecord], StudyRecord]) -> StudyRecord:
        if study.is_finished:
            hint = f"its result is in {study.path}"
            raise StudyError("finished", f"the study {study.record.name} has ended", hint=hint)
        with self._deciding():
            record = change(read_record(study.path))
            write_record(study.path, record)
        return record

    @contextmanager
    def _deciding(self) -> Iterator[None]:
        """Let one process at a time write a `study.json`."""
        _FILES.make_folder(self._folder.studies)
        with _FILES.locked(self._folder.studies / "lock", alone=True):
            yield

    def _places(self) -> list[Path]:
        """Return the folders of submitted studies, as far as the disk tells."""
        try:
            return sorted(path for path in self._folder.studies.iterdir() if (path / RECORD_FILE).exists())
        except FileNotFoundError:
            return []
        except OSError as error:
            message = f"{self._folder.studies} cannot be read ({error.strerror})"
            raise StudyError("unreadable", message, hint=f"ls -ld {self._folder.studies}") from error

    def _open(self, path: Path) -> StoredStudy | DamagedStudy:
        stamp = tuple(_stamp(path / name) for name in (RECORD_FILE, "plan.json"))
        known = self._known.get(path)
        if known is None or known[0] != stamp:
            known = self._known[path] = (stamp, _read(path))
        return known[1]


def _read(path: Path) -> StoredStudy | DamagedStudy:
    """Read a study, and refuse a plan other than the one that was submitted."""
    try:
        record = read_record(path)
        text = (path / "plan.json").read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        hint = f"restore {path} from a backup; the other studies go on"
        return DamagedStudy(path, StudyError("damaged", f"{path}/plan.json cannot be read ({error})", hint=hint))
    except FedtuneError as error:
        return DamagedStudy(path, error)
    if sha256_hex(text) != record.plan_sha256:
        hint = "restore it from a backup: the sites have approved the other plan; the other studies go on"
        return DamagedStudy(path, StudyError("damaged", f"{path}/plan.json is not the plan submitted", hint=hint))
    return StoredStudy(path, record, text)


def _is_meant(study: StoredStudy, words: str) -> bool:
    is_prefix = len(words) >= _LEAST_PREFIX and study.record.plan_sha256.startswith(words)
    return is_prefix or words in {study.record.name, study.path.name}


def _is_after(later: str, earlier: str) -> bool:
    try:
        return datetime.fromisoformat(later) >= datetime.fromisoformat(earlier)
    except (ValueError, TypeError):
        return True


def _stamp(path: Path) -> tuple[int, int, int] | None:
    try:
        facts = path.stat()
    except OSError:
        return None
    return facts.st_mtime_ns, facts.st_size, facts.st_ino


@contextmanager
def _disk() -> Iterator[None]:
    """Say of a disk that takes no study that it is the coordinator's, not a simulation's."""
    try:
        yield
    except RunError as error:
        hint = "the coordinator's folder must be this user's, on a disk with space; then submit it again"
        raise StudyError(error.code.removeprefix("run."), error.message, hint=hint) from error


@lru_cache(maxsize=64)
def _plan(text: str) -> StudyPlan:
    return StudyPlan.from_json(text)


@lru_cache(maxsize=256)
def _bundle_sha256(text: str) -> str:
    from fedtune.flower.bundle import build

    return build(text).sha256
