"""A folder in which a coordinator is made by the commands themselves, and sites that enrol with it by files."""

from __future__ import annotations

import os
import shutil
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest

from fedtune.pki.authority import Secret
from fedtune_client import enrolment as joining
from fedtune_client.folder import SiteFolder, begin
from fedtune_server.folder import CoordinatorFolder
from fedtune_server.initial import Wish
from fedtune_server.initial import begin as begin_coordinator
from tests.support.enrolments import KEY, Now, Site
from tests.support.runs import Done, command

ADDRESS = "fl.example.org:8443"


@dataclass(frozen=True, slots=True)
class Office:
    """A folder with a key file for the authority; `coordinator/` in it once `init` has run."""

    folder: Path

    @property
    def place(self) -> CoordinatorFolder:
        return CoordinatorFolder(self.folder / "coordinator")

    def run(self, *words: str) -> Done:
        return command("server", *words)

    def done(self, *words: str) -> Done:
        """Run a command that must succeed."""
        found = self.run(*words)
        assert found.code == 0, found.err
        return found

    def json(self, *words: str) -> Any:
        return self.done(*words, "--format", "json").json

    def refused(self, *words: str) -> str:
        """Run a command that must be refused, and return what it says on standard error."""
        found = self.run(*words)
        assert (found.code, found.out) == (2, ""), found
        assert "hint: " in found.err
        return found.err

    def init(self, *words: str) -> Done:
        return self.done("init", "hospitals", "--address", ADDRESS, *words)

    def site(self, name: str = "north") -> Site:
        """Begin a site, on the clock of this machine."""
        now = Now(datetime.now(UTC))
        return Site(begin(SiteFolder(self.folder / name), name, KEY, now), now)

    def request(self, site: Site) -> Path:
        """Let a site answer its invitation, and return the file that it sends."""
        name = site.open.facts.name
        return self.write(f"{name}.request", site.answer((self.folder / f"{name}.invitation").read_bytes()))

    def write(self, name: str, content: bytes) -> Path:
        path = self.folder / name
        path.write_bytes(content)
        return path

    def enrol(self, site: Site) -> None:
        """Let a site join by the whole exchange of files."""
        name = site.open.facts.name
        self.done("enrol", "add", name)
        self.done("enrol", "approve", str(self.request(site)), "--yes")
        self.take(site)

    def take(self, site: Site) -> None:
        """Let a site keep the grant that lies there for it."""
        federation = self.json("enrol", "list")["federation"]
        joining.accept(site.open, (self.folder / f"{site.open.facts.name}.grant").read_bytes(), federation, site.now())

    def renew(self, site: Site) -> None:
        """Let a member ask for its next certificate, and take it."""
        name, federation = site.open.facts.name, self.json("enrol", "list")["federation"]
        request = self.write(f"{name}.request", joining.renew(site.open, federation, site.now()))
        self.done("enrol", "approve", str(request), "--yes")
        self.take(site)

    def snapshot(self) -> dict[str, bytes]:
        return {str(path): path.read_bytes() for path in sorted(self.folder.rglob("*")) if path.is_file()}


def key_file(path: Path, byte: int) -> Path:
    with os.fdopen(os.open(path, os.O_WRONLY | os.O_CREAT, 0o600), "wb") as file:
        file.write(bytes([byte]) * 32)
    return path


@pytest.fixture
def empty(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Office:
    """A folder where no coordinator has begun."""
    for name in os.environ:
        if name.startswith(("FEDTUNE_AUTHORITY", "FEDTUNE_COORDINATOR")):
            monkeypatch.delenv(name)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("FEDTUNE_AUTHORITY_KEY_FILE", str(key_file(tmp_path / "authority.key", 7)))
    return Office(tmp_path)


@pytest.fixture(scope="session")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A coordinator's folder that is copied and never changed."""
    folder = CoordinatorFolder(tmp_path_factory.mktemp("made") / "coordinator")
    begin_coordinator(folder, Wish.of("hospitals", ADDRESS), Secret.key(bytes([7]) * 32))
    return folder.path


@pytest.fixture
def office(empty: Office, made: Path) -> Office:
    """A coordinator that has just been made, as `empty.init()` makes it."""
    shutil.copytree(made, empty.place.path)
    return empty
