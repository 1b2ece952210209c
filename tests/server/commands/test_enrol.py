"""`fedtune server enrol`: a site joins by three files, and a person approves it."""

from __future__ import annotations

import json
import stat
from datetime import UTC, datetime, timedelta
from itertools import count
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from fedtune.pki.invitations import read_invitation
from fedtune.pki.keys import read_node_key
from fedtune_client import enrolment as joining
from fedtune_server.coordinator_key import coordinator_key
from fedtune_server.enrolment import Enrolment
from tests.server.commands.conftest import ADDRESS, key_file
from tests.support.failing_calls import refuse_at
from tests.support.terminal import in_terminal

if TYPE_CHECKING:
    from tests.server.commands.conftest import Office


def opened(office: Office) -> Enrolment:
    return Enrolment.open(office.place.enrolment, coordinator_key(office.place.key_file))


class TestAWholeEnrolment:
    def test_three_files_make_a_site_a_member(self, office: Office) -> None:
        site = office.site()
        added = office.done("enrol", "add", "north").out
        invitation = read_invitation((office.folder / "north.invitation").read_bytes(), site.now())
        assert invitation.fingerprint in added
        assert f"fedtune client init --invitation {'north.invitation'}" in added
        request = office.request(site)
        fingerprint = joining.request_fingerprint(request.read_bytes())
        assert fingerprint in office.done("enrol", "show", str(request)).out
        assert opened(office).members == ()
        approved = office.done("enrol", "approve", str(request), "--yes").out
        assert fingerprint in approved
        office.take(site)
        (member,) = opened(office).members
        credentials = joining.credentials(site.open.vault, opened(office).federation)
        assert (member.site, credentials.certificate) == ("north", member.grant.certificate)
        assert credentials.address == ADDRESS
        assert member.grant.serial in office.done("enrol", "list").out

    def test_every_step_has_a_document_for_programs(self, office: Office) -> None:
        site = office.site()
        added = office.json("enrol", "add", "north", "--days", "3", "--out", "for-north")
        assert set(added) == {
            "site",
            "file",
            "fingerprint",
            "federation",
            "address",
            "expires",
            "withdrawn_earlier",
        }
        assert added["file"] == "for-north"
        left = datetime.fromisoformat(added["expires"]) - datetime.now(UTC)
        assert timedelta(days=2.9) < left < timedelta(days=3)
        request = office.write("request", site.answer(Path("for-north").read_bytes()))
        shown = office.json("enrol", "show", "request")
        assert (shown["site"], shown["occasion"], shown["changes"]) == ("north", "new", [])
        assert shown["fingerprint"] == joining.request_fingerprint(request.read_bytes())
        approved = office.json("enrol", "approve", "request", "--yes", "--out", "granted")
        assert approved == shown | {key: approved[key] for key in ("serial", "expires", "address", "file")}
        assert approved["file"] == "granted"
        joining.accept(site.open, Path("granted").read_bytes(), added["federation"], site.now())

    def test_no_private_key_of_a_site_and_no_secret_of_the_coordinator_travels(self, office: Office) -> None:
        site = office.site()
        office.enrol(site)
        granted = joining.membership(site.open.vault, opened(office).federation).granted
        assert granted is not None
        inside = [bytes.fromhex(text)[-40:-8] for text in (granted.tls_key, granted.node_key)]
        inside += [office.place.secret.read_bytes(), (office.place.enrolment / "token-secret").read_bytes()]
        files = {
            path: path.read_bytes() for path in [*office.folder.glob("north.*"), *office.place.path.rglob("*.log")]
        }
        assert {path.suffix for path in files} == {".invitation", ".request", ".grant", ".log"}
        for content in files.values():
            assert b"PRIVATE" not in content
            assert not any(secret in content or secret.hex().encode() in content for secret in inside)

    def test_the_invitations_token_is_in_its_file_alone_and_that_is_private(self, office: Office) -> None:
        done = office.done("enrol", "add", "north", "--verbose")
        path = office.folder / "north.invitation"
        token = json.loads(path.read_bytes())["body"]["token"]
        assert stat.S_IMODE(path.stat().st_mode) == 0o600
        assert token not in done.out + done.err
        for other in office.place.path.rglob("*"):
            assert other.is_dir() or token.encode() not in other.read_bytes()

    def test_a_renewal_says_which_keys_are_others(self, office: Office) -> None:
        site = office.site()
        office.enrol(site)
        site.rotate()
        request = office.write("again", joining.renew(site.open, opened(office).federation, site.now(), new_node=True))
        shown = office.json("enrol", "show", str(request))
        assert (shown["occasion"], shown["changes"]) == ("renewal", ["signing key", "node key"])
        assert (
            "changed since it was enrolled last: signing key and node key"
            in office.done("enrol", "approve", str(request), "--yes").out
        )
        office.take(site)
        (member,) = office.json("enrol", "list")["members"]
        assert [found["revoked"] for found in member["certificates"]] == [False, False]
        assert member["key"] == site.open.journal.chain.public_key
        read_node_key(member["node_key"])

    def test_a_changed_address_reaches_a_site_with_its_next_grant(self, office: Office) -> None:
        site = office.site()
        office.enrol(site)
        text = office.place.facts_file.read_text().replace(ADDRESS, "fl.example.org:9443")
        office.place.facts_file.write_text(text)
        office.renew(site)
        assert joining.credentials(site.open.vault, opened(office).federation).address == "fl.example.org:9443"


class TestAdding:
    def test_a_name_that_no_site_can_have_or_that_means_something_else_writes_nothing(self, office: Office) -> None:
        before = office.snapshot()
        for name in ("coordinator", "Coordinator", "all", "none", "NULL"):
            assert "error[enrolment.reserved-name]" in office.refused("enrol", "add", name)
        for name in ("../north", "", "a b", "x" * 65):
            assert "error[enrolment.bad-name]" in office.refused("enrol", "add", name)
        assert office.snapshot() == before

    def test_a_second_invitation_is_asked_for_and_ends_the_first(self, office: Office) -> None:
        office.done("enrol", "add", "north")
        first, site = (office.folder / "north.invitation").read_bytes(), office.site()
        said = office.refused("enrol", "add", "north")
        assert "error[config.not-confirmed]" in said
        assert "north has an invitation that is open until" in said
        assert office.json("enrol", "add", "north", "--yes")["withdrawn_earlier"] is True
        office.write("north.request", site.answer(first))
        assert "error[enrolment.invitation-withdrawn]" in office.refused("enrol", "approve", "north.request", "--yes")

    def test_an_open_invitation_is_written_again_byte_for_byte(self, office: Office) -> None:
        office.done("enrol", "add", "north")
        path = office.folder / "north.invitation"
        first = path.read_bytes()
        path.unlink()
        office.done("enrol", "invitation", "north")
        assert path.read_bytes() == first
        assert "error[enrolment.unknown-invitation]" in office.refused("enrol", "invitation", "south")

    def test_a_withdrawn_invitation_enrols_nobody(self, office: Office) -> None:
        site = office.site()
        office.done("enrol", "add", "north")
        request = office.request(site)
        office.done("enrol", "withdraw", "north")
        assert "error[enrolment.invitation-withdrawn]" in office.refused("enrol", "approve", str(request), "--yes")
        assert "error[enrolment.unknown-invitation]" in office.refused("enrol", "withdraw", "north")

    def test_a_file_that_is_no_invitation_is_not_written_over_and_nobody_is_invited(self, office: Office) -> None:
        kept = office.write("thesis.txt", b"two years of work")
        assert "error[enrolment.exists]" in office.refused("enrol", "add", "north", "--out", str(kept))
        assert "error[enrolment.unwritable]" in office.refused("enrol", "add", "north", "--out", "no/folder/here")
        assert kept.read_bytes() == b"two years of work"
        assert opened(office).offers == ()
        office.done("enrol", "add", "north")
        office.done("enrol", "add", "south", "--out", "north.invitation")  # an older paper of the kind is replaced

    @pytest.mark.parametrize("days", ["0", "366", "x"])
    def test_a_life_that_is_none_is_a_usage_error(self, office: Office, days: str) -> None:
        assert "error[usage]" in office.refused("enrol", "add", "north", "--days", days)


class TestApproving:
    def request(self, office: Office) -> Path:
        site = office.site()
        office.done("enrol", "add", "north")
        return office.request(site)

    def test_nobody_is_enrolled_without_a_person_or_their_word(self, office: Office) -> None:
        request = self.request(office)
        found = office.run("enrol", "approve", str(request))
        assert found.code == 2
        assert "error[config.not-confirmed]" in found.err
        assert joining.request_fingerprint(request.read_bytes()) in found.err
        assert opened(office).members == ()
        assert not (office.folder / "north.grant").exists()

    def test_a_person_is_shown_the_fingerprint_and_asked_before_the_passphrase(
        self, office: Office, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        request = self.request(office)
        fingerprint = joining.request_fingerprint(request.read_bytes())
        words = ["server", "enrol", "approve", str(request)]
        no = in_terminal(*words, answers=[(f"its request is {fingerprint}?", "n")], folder=office.folder)
        assert (no.code, opened(office).members) == (2, ())
        assert "error[config.declined]: nothing was changed" in no.text
        yes = in_terminal(*words, answers=[(f"its request is {fingerprint}?", "y")], folder=office.folder)
        assert yes.code == 0, yes.text
        assert [member.site for member in opened(office).members] == ["north"]

    def test_a_wrong_secret_enrols_nobody_and_is_not_shown(
        self, office: Office, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        request = self.request(office)
        other = str(key_file(office.folder / "other.key", 8))
        found = office.run("enrol", "approve", str(request), "--yes", "--key-file", other)
        assert "error[enrolment.wrong-secret]" in found.err
        monkeypatch.delenv("FEDTUNE_AUTHORITY_KEY_FILE")
        monkeypatch.setenv("FEDTUNE_AUTHORITY_PASSPHRASE", "plenty of horse battery")
        found = office.run("enrol", "approve", str(request), "--yes", "--verbose")
        assert "error[enrolment.wrong-secret]" in found.err
        assert "horse" not in found.err + found.out
        monkeypatch.delenv("FEDTUNE_AUTHORITY_PASSPHRASE")
        assert "error[enrolment.locked]" in office.run("enrol", "approve", str(request), "--yes").err
        assert opened(office).members == ()

    def test_the_same_request_gets_the_same_grant_again_without_question_or_secret(
        self, office: Office, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        request = self.request(office)
        office.done("enrol", "approve", str(request), "--yes")
        path = office.folder / "north.grant"
        first = path.read_bytes()
        path.unlink()
        monkeypatch.delenv("FEDTUNE_AUTHORITY_KEY_FILE")
        assert office.json("enrol", "approve", str(request))["occasion"] == "again"
        assert path.read_bytes() == first
        path.unlink()
        office.done("enrol", "grant", "north")
        assert path.read_bytes() == first
        assert "error[enrolment.not-enrolled]" in office.refused("enrol", "grant", "south")

    def test_what_is_no_request_is_said_to_be_none(self, office: Office) -> None:
        office.done("enrol", "add", "north")
        office.write("large", b"x" * 200_000)
        for name, code in [
            ("nowhere", "no-paper"),
            ("coordinator", "no-paper"),
            ("large", "too-large"),
            ("authority.key", "malformed"),
            ("north.invitation", "malformed"),
        ]:
            for command in ("show", "approve"):
                assert f"error[enrolment.{code}]" in office.refused("enrol", command, name)

    def test_a_request_that_was_changed_on_its_way_is_refused(self, office: Office) -> None:
        request = self.request(office)
        raw = request.read_bytes()
        office.write("changed", raw.replace(b'"site":"north"', b'"site":"south"', 1))
        assert "error[enrolment.forged]" in office.refused("enrol", "approve", "changed", "--yes")
        office.done("enrol", "approve", str(request), "--yes")


class TestWhatIsNotThere:
    @pytest.mark.parametrize(
        "words",
        [
            ["list"],
            ["add", "north"],
            ["invitation", "north"],
            ["withdraw", "north"],
            ["grant", "north"],
            ["show", "authority.key"],
            ["approve", "authority.key", "--yes"],
            ["revoke", "north", "--reason", "x"],
        ],
    )
    def test_without_a_coordinator_every_command_says_how_to_make_one(self, empty: Office, words: list[str]) -> None:
        said = empty.refused("enrol", *words)
        assert "error[config.file-missing]: there is no coordinator in coordinator" in said
        assert "fedtune server init" in said
        assert not empty.place.path.exists()

    def test_a_folder_is_named_by_option_or_variable(self, office: Office, monkeypatch: pytest.MonkeyPatch) -> None:
        name = office.json("enrol", "list")["federation"]
        monkeypatch.chdir(office.place.path)
        assert office.json("enrol", "list", "--dir", str(office.place.path))["federation"] == name
        monkeypatch.setenv("FEDTUNE_COORDINATOR", str(office.place.path))
        assert office.json("enrol", "list")["federation"] == name

    def test_a_lost_signing_key_is_not_made_anew(self, office: Office) -> None:
        office.place.key_file.unlink()
        assert "error[enrolment.incomplete]" in office.refused("enrol", "list")
        assert not office.place.key_file.exists()

    def test_a_signing_key_that_others_can_read_is_refused_with_the_command_that_mends_it(self, office: Office) -> None:
        office.place.key_file.chmod(0o644)
        said = office.refused("enrol", "add", "north")
        assert "error[enrolment.permissions]" in said
        assert "hint: chmod go-rwx" in said

    def test_settings_of_another_federation_are_refused(self, office: Office) -> None:
        name = office.json("enrol", "list")["federation"]
        text = office.place.facts_file.read_text().replace(name, "banks-0011223344556677")
        office.place.facts_file.write_text(text)
        said = office.refused("enrol", "list")
        assert "error[config.other-federation]" in said
        assert f"write federation: {name}" in said


def test_wherever_the_disk_is_full_a_person_is_told_whether_the_site_was_invited(
    office: Office, monkeypatch: pytest.MonkeyPatch
) -> None:
    told = set()
    for moment in count(1):
        name = f"site{moment}"
        with monkeypatch.context() as patch:
            calls = refuse_at(patch, moment)
            found = office.run("enrol", "add", name)
        is_invited = name in {offer.site for offer in opened(office).offers}
        is_told = f"what was decided is kept; write it again: fedtune server enrol invitation {name}" in found.err
        assert is_invited == (is_told or found.code == 0)
        told.add((found.code, is_told))
        if len(calls) < moment:
            break
    assert told == {(2, False), (2, True), (0, False)}


def test_help_names_every_command_and_how_a_site_enrols(office: Office) -> None:
    text = " ".join(office.done("enrol", "--help").out.split())
    for word in ("add", "show", "approve", "list", "revoke", "withdraw", "grant", "invitation", "three files"):
        assert word in text
