"""`fedtune server init`: what it makes, what it refuses, and that it can be interrupted anywhere."""

from __future__ import annotations

import json
import shutil
import stat
from datetime import UTC, datetime
from itertools import count
from typing import TYPE_CHECKING

import pytest

from fedtune.errors import FedtuneError
from fedtune.pki.authority import Authority, Secret
from fedtune.pki.certificates import check_authority, federation_of
from fedtune.pki.invitations import key_fingerprint
from fedtune_server.certificate import read_standing
from fedtune_server.coordinator_key import coordinator_key
from fedtune_server.enrolment import Enrolment
from fedtune_server.folder import CoordinatorFolder
from fedtune_server.initial import Wish, begin
from fedtune_server.settings import read_settings
from tests.server.commands.conftest import ADDRESS, key_file
from tests.support.failing_calls import Killed, kill_at, refuse_at
from tests.support.runs import run_process
from tests.support.terminal import in_terminal

if TYPE_CHECKING:
    from pathlib import Path

    from tests.server.commands.conftest import Office

WORDS = "plenty of horse battery"
SECRET = Secret.key(bytes([7]) * 32)


def federation(folder: CoordinatorFolder) -> str:
    return Enrolment.open(folder.enrolment, coordinator_key(folder.key_file)).federation


def check_whole(folder: CoordinatorFolder) -> str:
    """Check that the parts of a coordinator fit together, and return its federation."""
    name = federation(folder)
    assert read_settings(folder.facts_file).federation == name
    authority = Authority.load(folder.authority, SECRET)
    check_authority(authority.certificate, name, datetime.now(UTC))
    assert federation_of(read_standing(folder.authority).coordinator) == name  # type: ignore[arg-type]
    assert (folder.enrolment / "revoked.txt").is_file()
    assert len(folder.secret.read_bytes()) == 32
    return name


def test_a_coordinator_begins_with_all_that_it_needs_and_for_its_user_alone(empty: Office) -> None:
    done = empty.init("--host", "127.0.0.1", "--host", "fl.example.org")
    name = check_whole(empty.place)
    assert name.startswith("hospitals-")
    assert name in done.out
    assert key_fingerprint(coordinator_key(empty.place.key_file).public_key().public_bytes_raw().hex()) in done.out
    for word in ("back up coordinator.key", "next: edit coordinator.yaml", "fedtune server enrol add SITE"):
        assert word in done.out
    assert read_standing(empty.place.authority).certified == ("fl.example.org", "127.0.0.1")
    modes = {stat.S_IMODE(path.stat().st_mode) for path in [empty.place.path, *empty.place.path.rglob("*")]}
    assert modes == {0o600, 0o700}


def test_the_result_as_json_names_the_federation_and_no_secret(empty: Office) -> None:
    found = empty.json("init", "hospitals", "--address", ADDRESS, "--dir", str(empty.folder / "elsewhere"))
    assert set(found) == {
        "federation",
        "folder",
        "address",
        "hosts",
        "public_key",
        "fingerprint",
        "certificate_expires",
        "authority_expires",
    }
    assert found["federation"] == federation(CoordinatorFolder(empty.folder / "elsewhere"))
    assert found["address"] == ADDRESS


def test_nothing_secret_is_printed_and_no_key_of_the_authority_is_in_the_clear(empty: Office) -> None:
    done = empty.init("--verbose")
    printed, place = done.out + done.err, empty.place
    for secret in (place.key_file.read_bytes()[40:80], place.secret.read_bytes(), bytes([7]) * 32):
        assert secret.hex() not in printed
        assert secret.decode("latin-1") not in printed
    assert "PRIVATE" not in printed
    assert b"ENCRYPTED PRIVATE KEY" in (place.authority / "authority.pem").read_bytes()


@pytest.mark.parametrize("name", ["hospitals", "banks"])
def test_a_coordinator_that_is_there_is_refused_and_left_as_it_is(office: Office, name: str) -> None:
    before = office.snapshot()
    said = office.refused("init", name, "--address", ADDRESS)
    assert "error[enrolment.exists]: coordinator already holds a coordinator" in said
    assert office.snapshot() == before


@pytest.mark.parametrize(
    ("words", "code"),
    [
        (["../x", "--address", ADDRESS], "enrolment.bad-name"),
        (["Hospitals", "--address", ADDRESS], "enrolment.bad-name"),
        (["hospitals", "--address", "fl.example.org"], "enrolment.bad-host"),
        (["hospitals", "--address", "fl.example.org:99999"], "enrolment.bad-host"),
        (["hospitals", "--address", ADDRESS, "--host", "*.example.org"], "enrolment.bad-host"),
        (["hospitals"], "usage"),
    ],
)
def test_what_no_federation_can_be_called_or_reached_at_makes_nothing(
    empty: Office, words: list[str], code: str
) -> None:
    assert f"error[{code}]" in empty.refused("init", *words)
    assert not empty.place.path.exists()


def test_without_a_secret_the_variables_are_named(empty: Office, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("FEDTUNE_AUTHORITY_KEY_FILE")
    said = empty.refused("init", "hospitals", "--address", ADDRESS)
    assert "error[enrolment.locked]: nothing is given as passphrase of the authority" in said
    assert "FEDTUNE_AUTHORITY_KEY_FILE or FEDTUNE_AUTHORITY_PASSPHRASE" in said
    assert not empty.place.path.exists()


def test_a_short_passphrase_or_a_key_file_of_others_makes_nothing(
    empty: Office, monkeypatch: pytest.MonkeyPatch
) -> None:
    (empty.folder / "authority.key").chmod(0o644)
    assert "error[enrolment.permissions]" in empty.refused("init", "hospitals", "--address", ADDRESS)
    monkeypatch.setenv("FEDTUNE_AUTHORITY_KEY_FILE", "nowhere.key")
    assert "error[enrolment.no-key-file]" in empty.refused("init", "hospitals", "--address", ADDRESS)
    monkeypatch.delenv("FEDTUNE_AUTHORITY_KEY_FILE")
    monkeypatch.setenv("FEDTUNE_AUTHORITY_PASSPHRASE", "short")
    assert "error[enrolment.bad-secret]" in empty.refused("init", "hospitals", "--address", ADDRESS)
    assert not empty.place.path.exists()


def test_a_key_file_may_hold_digits_and_is_named_by_the_option_first(empty: Office) -> None:
    digits = empty.write("digits.key", (bytes([9]) * 32).hex().encode() + b"\n")
    digits.chmod(0o600)
    empty.init("--key-file", str(digits))
    assert Authority.load(empty.place.authority, Secret.key(bytes([9]) * 32))


def test_a_passphrase_is_asked_for_twice_at_the_terminal_and_never_shown(
    empty: Office, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("FEDTUNE_AUTHORITY_KEY_FILE")
    question = "passphrase of the authority:"
    asked = [(question, WORDS), ("once more:", "another"), (question, WORDS), ("once more:", WORDS)]
    words = ["server", "init", "hospitals", "--address", ADDRESS]
    screen = in_terminal(*words, answers=asked, folder=empty.folder)
    assert screen.code == 0, screen.text
    assert WORDS not in screen.text
    assert Authority.load(empty.place.authority, Secret.passphrase(WORDS))


def test_a_folder_that_cannot_be_made_is_said_with_its_place(empty: Office) -> None:
    said = empty.refused("init", "hospitals", "--address", ADDRESS, "--dir", str(empty.folder / "authority.key" / "x"))
    assert "error[enrolment.unwritable]" in said
    assert "authority.key" in said


def test_the_commands_answer_as_a_process_with_an_error_for_programs(empty: Office) -> None:
    words = ["server", "init", "hospitals", "--address", ADDRESS, "--format", "json"]
    done = run_process(*words, cwd=empty.folder)
    assert done.code == 0, done.err
    again = run_process(*words, cwd=empty.folder)
    assert again.code == 2
    assert json.loads(again.err)["error"]["code"] == "enrolment.exists"


class TestInterrupted:
    def test_wherever_it_is_killed_the_same_call_makes_a_whole_coordinator(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        self.interrupt(tmp_path, monkeypatch, is_kill=True)

    def test_wherever_the_disk_is_full_the_same_call_goes_on_later(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        self.interrupt(tmp_path, monkeypatch, is_kill=False)

    def interrupt(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, *, is_kill: bool) -> None:
        """Interrupt `begin` at each of its calls; a federation that has been founded keeps its name and its key."""
        wish, interruptions = Wish.of("hospitals", ADDRESS), 0
        for moment in count(1):
            folder = CoordinatorFolder(tmp_path / f"{moment}")
            with monkeypatch.context() as patch:
                calls = kill_at(patch, moment) if is_kill else refuse_at(patch, moment)
                try:
                    begin(folder, wish, SECRET)
                except (Killed, FedtuneError):
                    interruptions += 1
            before = self.begun(folder)
            if not folder.facts_file.exists():
                begin(folder, wish, SECRET)
            name = check_whole(folder)
            assert before in (None, (name, folder.key_file.read_bytes()))
            shutil.rmtree(folder.path)
            if len(calls) < moment:
                break
        assert interruptions > 40

    @staticmethod
    def begun(folder: CoordinatorFolder) -> tuple[str, bytes] | None:
        """Return the name that was founded, if one was, and the key that it was founded with."""
        log = folder.enrolment / "enrolment.log"
        first, end, _ = (log.read_bytes() if log.exists() else b"").partition(b"\n")
        return (json.loads(first)["entry"]["federation"], folder.key_file.read_bytes()) if end else None

    def test_a_beginning_is_gone_on_with_under_its_own_name_and_secret_alone(self, office: Office) -> None:
        name = federation(office.place)
        office.place.facts_file.unlink()  # it is written last
        said = office.refused("init", "banks", "--address", ADDRESS)
        assert "error[enrolment.exists]" in said
        assert f"was begun as the federation {name}" in said
        other = str(key_file(office.folder / "other.key", 8))
        assert "error[enrolment.wrong-secret]" in office.refused(
            "init", "hospitals", "--address", ADDRESS, "--key-file", other
        )
        office.init()
        assert check_whole(office.place) == name

    def test_it_may_go_on_with_another_address(self, office: Office) -> None:
        office.place.facts_file.unlink()
        office.done("init", "hospitals", "--address", "10.0.0.7:9443")
        assert read_settings(office.place.facts_file).listen.port == 9443
        assert read_standing(office.place.authority).certified == ("10.0.0.7",)

    @pytest.mark.parametrize("lost", ["enrolment/enrolment.log", "coordinator.key"])
    def test_what_a_beginning_cannot_lack_was_lost_and_is_not_made_anew(self, office: Office, lost: str) -> None:
        """A new log would forget who was revoked, and a new key would be nobody's coordinator."""
        office.place.facts_file.unlink()
        (office.place.path / lost).unlink()
        said = office.refused("init", "hospitals", "--address", ADDRESS)
        assert "error[enrolment.incomplete]" in said
        assert "restore the whole folder" in said
        assert not (office.place.path / lost).exists()
