"""What a person wants of a study (`study.json`), and what became of the attempts at it (`attempts.json`).

Two files with one writer each: commands write the first under the store's lock, the conductor alone writes the second,
so that neither waits for the other. Knows no Flower and no rule.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal, TypeVar

from pydantic import Field

from fedtune.config.schema import Name, Section
from fedtune.errors import StudyError
from fedtune.journal.entries import Hash, SiteName
from fedtune.run.private_files import PrivateFiles

RECORD_FILE, ATTEMPTS_FILE = "study.json", "attempts.json"
Wish = Literal["run", "stop"]
Kind = TypeVar("Kind", bound=Section)
_FILES = PrivateFiles(StudyError, one_writer=True)


class StudyRecord(Section):
    """A study as it was submitted, and what is wished of it now.

    `sites` are the names of the enrolled sites that take part. `resumed` counts how often a person has said to go on:
    what went wrong before is forgiven then. A site stands in `released` once for each time that it was let out of
    quarantine, so it is in quarantine while it was put there more often. Times are in UTC.
    """

    schema_version: Literal[1] = 1
    plan_sha256: Hash
    name: Name
    sites: Annotated[tuple[SiteName, ...], Field(min_length=1)]
    submitted: str
    wish: Wish = "run"
    resumed: int = Field(0, ge=0)
    released: tuple[SiteName, ...] = ()


class Attempts(Section):
    """How the attempts at a study have ended since a person, or a new round, last gave it a fresh start.

    `released` is how many of the record's releases hold by now. `run` is the newest of Flower's runs whose end is
    counted in, and `submitted` when that was started. `failures` are those in a row that kept no new round, `faults`
    those of them by a fault of the coordinator's own. `code`, `message` and `hint` are the last failure's, `at` is when
    it ended, `round` the last round kept by then.
    """

    resumed: int = 0
    released: int = 0
    run: int = 0
    submitted: str = ""
    round: int = 0
    failures: int = 0
    faults: int = 0
    at: str = ""
    code: str = ""
    message: str = ""
    hint: str = ""


def read_record(folder: Path) -> StudyRecord:
    """Read a study's `study.json`. Errors: `study.damaged`, `study.unknown` where there is none."""
    return _read(StudyRecord, folder / RECORD_FILE)


def write_record(folder: Path, record: StudyRecord) -> None:
    """Write `study.json` whole. Errors: `study.disk-full`, `study.unwritable`."""
    _write(folder / RECORD_FILE, record)


def read_attempts(folder: Path) -> Attempts:
    """Read a study's `attempts.json`, or begin anew where there is none. Error: `study.damaged`."""
    file = folder / ATTEMPTS_FILE
    return _read(Attempts, file) if file.exists() else Attempts()


def write_attempts(folder: Path, attempts: Attempts) -> None:
    """Write `attempts.json` whole. Errors: `study.disk-full`, `study.unwritable`."""
    _write(folder / ATTEMPTS_FILE, attempts)


def _read(kind: type[Kind], file: Path) -> Kind:
    try:
        return kind.model_validate_json(file.read_bytes())
    except FileNotFoundError as error:
        raise StudyError("unknown", f"{file.parent} holds no study", hint="fedtune server status") from error
    except (OSError, ValueError) as error:
        hint = f"restore {file.name} from a backup; the other studies go on"
        raise StudyError("damaged", f"{file} cannot be read as fedtune writes it", hint=hint) from error


def _write(file: Path, value: Section) -> None:
    _FILES.write(file, [(value.model_dump_json(indent=2) + "\n").encode()])
