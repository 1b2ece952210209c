"""`fedtune server enrol list` and `revoke`: who takes part, until when, and who no longer does from this moment on."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from fedtune.flower.peer import Revocations
from fedtune_server.coordinator_key import coordinator_key
from fedtune_server.enrolment import REVOKED_FILE, Enrolment

if TYPE_CHECKING:
    from tests.server.commands.conftest import Office


def opened(office: Office) -> Enrolment:
    return Enrolment.open(office.place.enrolment, coordinator_key(office.place.key_file))


class TestRevoking:
    def test_a_running_listener_refuses_a_revoked_site_at_once(self, office: Office) -> None:
        site = office.site()
        office.enrol(site)
        gate = Revocations(office.place.enrolment / REVOKED_FILE)  # as a SuperLink that runs holds it
        serial = opened(office).members[0].grant.serial
        assert not gate.any_of(serial.lstrip("0"))
        done = office.done("enrol", "revoke", "north", "--reason", "left the federation")
        assert "nothing has to be restarted" in done.out
        assert gate.any_of(serial.lstrip("0"))
        (member,) = office.json("enrol", "list")["members"]
        assert (member["state"], member["reason"]) == ("revoked", "left the federation")
        assert opened(office).known()["north"][0].revoked
        assert "error[enrolment.not-enrolled]" in office.refused("enrol", "revoke", "north", "--reason", "again")

    def test_one_certificate_is_revoked_as_openssl_spells_it_and_the_site_asks_for_another(
        self, office: Office
    ) -> None:
        site = office.site()
        office.enrol(site)
        serial = opened(office).members[0].grant.serial
        spelled = ":".join(serial[at : at + 2] for at in range(0, 40, 2)).upper()
        found = office.json("enrol", "revoke", "--serial", spelled, "--reason", "laptop lost")
        assert (found["site"], found["serial"]) == ("north", serial)
        (member,) = office.json("enrol", "list")["members"]
        assert (member["state"], member["renewal_due"]) == ("member", True)
        assert "due: north" in office.done("enrol", "list").out
        office.renew(site)
        (member,) = office.json("enrol", "list")["members"]
        assert [found["revoked"] for found in member["certificates"]] == [True, False]
        assert member["renewal_due"] is False

    def test_a_revoked_site_comes_back_with_an_invitation_and_new_keys(self, office: Office) -> None:
        site = office.site()
        office.enrol(site)
        office.done("enrol", "revoke", "north", "--reason", "key seen")
        site.rotate()
        office.enrol(site)
        assert office.json("enrol", "list")["members"][0]["state"] == "member"

    @pytest.mark.parametrize(
        ("words", "code"),
        [
            (["north"], "usage"),
            (["--reason", "x"], "config.bad-arguments"),
            (["north", "--serial", "ab", "--reason", "x"], "config.bad-arguments"),
            (["north", "--reason", " "], "config.bad-reason"),
            (["north", "--reason", "x" * 1001], "config.bad-reason"),
            (["north", "--reason", "two\nlines"], "config.bad-reason"),
            (["south", "--reason", "x"], "enrolment.not-enrolled"),
            (["--serial", "ab", "--reason", "x"], "enrolment.unknown-certificate"),
            (["--serial", "no hex", "--reason", "x"], "enrolment.unknown-certificate"),
        ],
    )
    def test_what_cannot_be_revoked_is_said_and_nothing_is(self, office: Office, words: list[str], code: str) -> None:
        before = (office.place.enrolment / "enrolment.log").read_bytes()
        assert f"error[{code}]" in office.refused("enrol", "revoke", *words)
        assert (office.place.enrolment / "enrolment.log").read_bytes() == before


class TestListing:
    def test_a_coordinator_without_sites_says_how_to_invite_one(self, office: Office) -> None:
        assert "no site is enrolled: fedtune server enrol add SITE" in office.done("enrol", "list").out

    def test_members_invitations_and_days_that_are_left_are_listed(self, office: Office) -> None:
        office.enrol(office.site())
        office.done("enrol", "add", "south")
        found = office.json("enrol", "list")
        assert set(found) == {"federation", "members", "invitations", "own"}
        (certificate,) = found["members"][0]["certificates"]
        assert (certificate["days_left"], certificate["due"]) == (364, False)
        assert [(offer["site"], offer["expired"]) for offer in found["invitations"]] == [("south", False)]
        assert (found["own"]["certificate"]["days_left"], found["own"]["renewal_due"]) == (364, False)
        text = office.done("enrol", "list").out
        assert certificate["serial"] in text
        assert "invited and not enrolled: south, open until" in text

    def test_it_writes_the_list_of_revocations_again_where_it_was_damaged(self, office: Office) -> None:
        office.enrol(office.site())
        office.done("enrol", "revoke", "north", "--reason", "left")
        path = office.place.enrolment / REVOKED_FILE
        whole = path.read_bytes()
        path.unlink()
        office.done("enrol", "list")
        assert path.read_bytes() == whole

    def test_it_needs_no_secret_and_asks_nothing(self, office: Office, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.delenv("FEDTUNE_AUTHORITY_KEY_FILE")
        office.done("enrol", "list")
