"""How a site joins a federation and stays in it, by its commands alone; the coordinator's half is its library."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from fedtune.pki.invitations import read_invitation
from fedtune_client.enrolment import credentials
from fedtune_client.vault import Vault
from tests.support.enrolments import FEDERATION, Coordinator, Now
from tests.support.terminal import in_terminal

if TYPE_CHECKING:
    from tests.client.commands.conftest import Place


@pytest.fixture
def coordinator(tmp_path: Path) -> Coordinator:
    return Coordinator(tmp_path / "coordinator", Now(datetime.now(UTC)))


def invited(coordinator: Coordinator, name: str = "mercy") -> Path:
    """Write an invitation into the folder in which commands run."""
    path = Path(f"{name}.invitation")
    path.write_bytes(coordinator.invite(name))
    return path


def granted(coordinator: Coordinator, request: str = "mercy.request") -> str:
    Path("grant").write_bytes(coordinator.approve(Path(request).read_bytes()))
    return "grant"


def test_a_site_is_made_of_an_invitation_and_joins_with_the_grant(empty: Place, coordinator: Coordinator) -> None:
    found = empty.json("init", "--invitation", str(invited(coordinator)), "--yes")
    request = Path(found["request"]).read_bytes()
    candidate = coordinator.enrolment.examine(request)
    assert (found["site"], found["federation"], found["request"]) == ("mercy", FEDERATION, "mercy.request")
    assert found["request_fingerprint"] == candidate.fingerprint
    now = coordinator.now()
    assert found["coordinator_fingerprint"] == read_invitation(Path("mercy.invitation").read_bytes(), now).fingerprint
    joined = empty.json("join", granted(coordinator))
    assert (joined["site"], joined["federation"]) == ("mercy", FEDERATION)
    vault = Vault.open(empty.site / "vault", empty.key)
    assert credentials(vault, FEDERATION).address == joined["coordinator"]
    assert (empty.site / "nonces.db").exists()  # what is signed from now on is taken
    assert empty.done("join", "grant").out.startswith("mercy takes part in")


def test_the_screen_says_what_to_read_out_and_what_comes_next(empty: Place, coordinator: Coordinator) -> None:
    text = empty.done("init", "--invitation", str(invited(coordinator)), "--yes").out
    fingerprint = read_invitation(Path("mercy.invitation").read_bytes(), coordinator.now()).fingerprint
    for words in (FEDERATION, fingerprint, "read this fingerprint of it out", "fedtune client join GRANT", "site.yaml"):
        assert words in text
    assert "fedtune client up" in empty.done("join", granted(coordinator)).out


def test_a_site_that_is_there_joins_too_and_asked_again_writes_the_same(begun: Place, coordinator: Coordinator) -> None:
    before = begun.journal.read_bytes()
    words = ("init", "--invitation", str(invited(coordinator)), "--yes")
    assert "is made in" not in begun.done(*words).out
    first = Path("mercy.request").read_bytes()
    begun.done(*words)
    assert Path("mercy.request").read_bytes() == first
    assert begun.journal.read_bytes() == before
    begun.done("join", granted(coordinator))
    assert "enrolment.invitation-used" in begun.run(*words).err


def test_nothing_is_made_when_the_fingerprint_is_not_confirmed(empty: Place, coordinator: Coordinator) -> None:
    path = str(invited(coordinator))
    done = empty.run("init", "--invitation", path)
    assert "error[config.not-confirmed]" in done.err
    asked = [("by telephone?", "n")]
    screen = in_terminal("client", "init", "--invitation", path, answers=asked, folder=empty.folder)
    assert "config.declined" in screen.text
    assert "fingerprint: " in screen.text
    assert not empty.site.exists()
    assert not Path("mercy.request").exists()


def test_an_invitation_that_was_changed_is_refused(empty: Place, coordinator: Coordinator) -> None:
    path = invited(coordinator)
    path.write_bytes(path.read_bytes().replace(b"localhost:8443", b"localhost:8444"))
    assert "error[enrolment.forged]" in empty.run("init", "--invitation", str(path), "--yes").err
    assert not empty.site.exists()


@pytest.mark.parametrize(
    ("words", "code"),
    [
        (["--invitation", "nowhere"], "enrolment.no-paper"),
        (["--invitation", "."], "enrolment.no-paper"),
        (["other", "--invitation", "mercy.invitation"], "config.other-name"),
        (["--invitation", "mercy.invitation", "--out", "plan.json"], "enrolment.exists"),
        (["--invitation", "mercy.invitation", "--out", "nowhere/x"], "enrolment.unwritable"),
        ([], "config.missing-value"),
    ],
)
def test_what_cannot_be_answered_is_said(empty: Place, coordinator: Coordinator, words: list[str], code: str) -> None:
    invited(coordinator)
    plan = empty.plan_file.read_bytes()
    done = empty.run("init", *words, "--yes")
    assert f"error[{code}]" in done.err
    assert "hint: " in done.err
    assert empty.plan_file.read_bytes() == plan


def test_an_invitation_for_another_site_is_refused_by_one_that_is_there(begun: Place, coordinator: Coordinator) -> None:
    done = begun.run("init", "--invitation", str(invited(coordinator, "north")), "--yes")
    assert "error[enrolment.other-site]" in done.err


def test_a_grant_of_somebody_else_is_refused(empty: Place, coordinator: Coordinator, tmp_path: Path) -> None:
    empty.done("init", "--invitation", str(invited(coordinator)), "--yes")
    other = Coordinator(tmp_path / "other", coordinator.now)
    Path("north.invitation").write_bytes(other.invite("north"))
    empty.done("init", "--invitation", "north.invitation", "--yes", "--site", "elsewhere")
    grant = granted(other, "north.request")
    assert "error[enrolment.forged]" in empty.run("join", grant).err
    assert "error[enrolment.no-paper]" in empty.run("join", "nowhere").err


def test_a_grant_before_any_invitation_names_the_command(begun: Place) -> None:
    Path("grant").write_text("{}")
    done = begun.run("join", "grant")
    assert "error[enrolment.not-enrolled]" in done.err
    assert "fedtune client init --invitation FILE" in done.err


def test_a_renewal_is_written_when_it_is_due_or_wanted(empty: Place, coordinator: Coordinator) -> None:
    empty.done("init", "--invitation", str(invited(coordinator)), "--yes")
    assert "error[enrolment.not-enrolled]" in empty.run("renew").err
    first = empty.json("join", granted(coordinator))
    found = empty.json("renew")
    assert (found["due"], found["request"]) == (False, None)
    found = empty.json("renew", "--now", "--out", "again.request")
    assert coordinator.enrolment.examine(Path("again.request").read_bytes()).fingerprint == found["request_fingerprint"]
    coordinator.now.later(minutes=1)
    second = empty.json("join", granted(coordinator, "again.request"))
    assert second["serial"] != first["serial"]
    empty.done("key", "rotate")
    assert empty.json("renew")["due"] is True
    assert "enrolment.exists" in empty.run("renew", "--out", "plan.json").err


def test_an_invitation_whose_time_is_over_is_refused(empty: Place, tmp_path: Path) -> None:
    early = Coordinator(tmp_path / "early", Now(datetime.now(UTC) - timedelta(days=30)))
    done = empty.run("init", "--invitation", str(invited(early)), "--yes")
    assert "error[enrolment.expired-invitation]" in done.err
    assert not empty.site.exists()
