"""What `fedtune client doctor` finds, against something that answers as a coordinator: each fault by its own name."""

from __future__ import annotations

import os
import shutil
import socket
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import yaml

from fedtune.model.base import open_base
from fedtune.pki.authority import Authority
from fedtune_client.channel import begin_memory
from fedtune_client.doctor.examination import examine
from fedtune_client.vault import Key
from tests.client.commands.conftest import study
from tests.support.answering import Answering, answering
from tests.support.enrolments import FEDERATION, HOSTS, Coordinator, Now, Site
from tests.support.opens import opened_files
from tests.support.tiny import tiny_base

if TYPE_CHECKING:
    from fedtune_client.doctor.finding import Finding
    from tests.client.commands.conftest import Place

CANARY = "patient 7 called about"


@dataclass
class Joined:
    """A site that is ready, with its coordinator; `answers` is what answers in its place."""

    place: Place
    coordinator: Coordinator
    answers: Answering

    def look(self, *words: str) -> tuple[int, dict[str, list[dict[str, Any]]]]:
        """Run doctor and return its exit code, and the findings by check."""
        done = self.place.run("doctor", "--format", "json", *words)
        assert done.out, done.err
        assert CANARY not in done.out
        document, found = done.json, dict[str, list[dict[str, Any]]]()
        for finding in document["findings"]:
            found.setdefault(finding["check"], []).append(finding)
            assert finding["level"] in {"ok", "warn", "fail"}
            assert finding["hint"] or finding["level"] != "fail"
        assert document["ready"] is (done.code == 0)
        return done.code, found

    def finding(self, check: str, *words: str) -> dict[str, Any]:
        """Return the worst finding of one check."""
        found = self.look(*words)[1][check]
        return max(found, key=lambda finding: ("ok", "warn", "fail").index(finding["level"]))


@pytest.fixture
def joined(ready: Place, tmp_path: Path) -> Iterator[Joined]:
    base = tiny_base(tmp_path / "base")
    facts = "name: mercy\ndata: {claims: {path: ../claims.csv}}\nmodels: {encoder: ../base}\ndevice: cpu\n"
    (ready.site / "site.yaml").write_text(facts)
    tree = yaml.safe_load((ready.site / "policy.yaml").read_text())
    tree["models"] = [{"sha256": open_base(base).sha256, "name": "the encoder"}]
    (ready.site / "policy.yaml").write_text(yaml.safe_dump(tree))
    ready.done("policy", "adopt", "--yes")
    coordinator = Coordinator(tmp_path / "coordinator", Now(datetime.now(UTC)))
    with answering(coordinator, tmp_path / "tls") as answers:
        site = Site(ready.open(), coordinator.now)
        request = site.answer(coordinator.invite("mercy"))
        site.accept(coordinator.enrolment.approve(request, coordinator.authority, answers.address))
        begin_memory(site.open.folder)
        yield Joined(ready, coordinator, answers)


def test_a_site_that_is_ready_passes_every_check(joined: Joined, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("HTTPS_PROXY", "https_proxy", "ALL_PROXY", "all_proxy"):
        monkeypatch.delenv(name, raising=False)
    code, found = joined.look()
    assert code == 0
    worst = [one for every in found.values() for one in every if one["level"] != "ok"]
    assert worst == []
    assert set(found) == {
        "vault",
        "journal",
        "messages",
        "membership",
        "certificate",
        "name resolution",
        "coordinator",
        "ways out",
        "disk",
        "device",
        "base model encoder",
        "data set claims",
        "policy",
        "budget",
        "client",
    }
    assert found["data set claims"][0]["text"] == "300 records; as they were granted for research"
    assert joined.answers.paths == ["/health"]


def test_the_screen_has_a_line_a_finding_and_says_what_to_do(joined: Joined) -> None:
    (joined.place.folder / "claims.csv").unlink()
    done = joined.place.run("doctor")
    assert done.code == 1
    assert "ok    vault " in done.out
    assert "→ put it there, or correct data.claims.path" in done.out
    assert done.out.splitlines()[-1].endswith("1 to mend")


def test_nothing_of_the_site_is_changed_but_the_doctors_own_leftovers(joined: Joined) -> None:
    joined.look()
    before = {path: path.read_bytes() for path in joined.place.site.rglob("*") if path.is_file()}
    joined.look()
    assert {path: path.read_bytes() for path in joined.place.site.rglob("*") if path.is_file()} == before


def test_no_other_name_than_the_coordinators_is_looked_up(joined: Joined, monkeypatch: pytest.MonkeyPatch) -> None:
    asked, real = [], socket.getaddrinfo

    def noted(host: Any, *rest: Any, **more: Any) -> Any:
        asked.append(host)
        return real(host, *rest, **more)

    monkeypatch.setattr(socket, "getaddrinfo", noted)
    joined.look()
    assert set(asked) <= {"127.0.0.1"}


# --- the way to the coordinator -------------------------------------------------------------------------------------


def test_a_coordinator_that_does_not_answer(joined: Joined, tmp_path: Path) -> None:
    joined.answers.port = 1
    site = Site(joined.place.open(), joined.coordinator.now)
    request = site.renew()
    site.accept(joined.coordinator.enrolment.approve(request, joined.coordinator.authority, "127.0.0.1:1"))
    assert joined.finding("coordinator")["code"] == "transport.not-reached"


def test_one_that_shows_a_certificate_of_another_authority(joined: Joined, tmp_path: Path) -> None:
    foreign = Authority.create(FEDERATION, HOSTS, joined.coordinator.now())
    with answering(joined.coordinator, tmp_path / "foreign", foreign) as impostor:
        renew_at(joined, impostor.address)
        assert joined.finding("coordinator")["code"] == "transport.other-coordinator"
        assert impostor.paths == []


def test_one_that_trusts_another_authority_than_the_sites(joined: Joined, tmp_path: Path) -> None:
    other = Coordinator(tmp_path / "other", joined.coordinator.now)
    with answering(other, tmp_path / "tls2", joined.coordinator.authority) as elsewhere:
        renew_at(joined, elsewhere.address)
        assert joined.finding("coordinator")["code"] == "transport.handshake"


def test_one_that_refuses_the_certificate(joined: Joined) -> None:
    joined.answers.status = 401
    found = joined.finding("coordinator")
    assert (found["level"], "revoked" in found["text"]) == ("fail", True)


@pytest.mark.parametrize(("ahead", "level"), [(0, "ok"), (80, "warn"), (-80, "warn"), (130, "fail"), (-4000, "fail")])
def test_clocks_that_are_apart(joined: Joined, ahead: float, level: str) -> None:
    joined.answers.ahead = ahead
    found = joined.finding("coordinator")
    assert found["level"] == level
    assert ("behind" in found["text"]) is (ahead > 60)


def test_a_name_that_nobody_knows(joined: Joined) -> None:
    renew_at(joined, "nobody.invalid:8443")
    assert joined.finding("name resolution")["level"] == "fail"


def test_a_proxy_is_named_without_its_password(joined: Joined, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HTTPS_PROXY", "http://user:hunter2@proxy.invalid:3128")
    found = joined.finding("ways out")
    assert (found["level"], "HTTPS_PROXY" in found["text"]) == ("warn", True)
    assert "hunter2" not in str(joined.look())
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    assert joined.finding("ways out")["level"] == "ok"
    assert joined.finding("coordinator")["level"] == "ok"


def renew_at(joined: Joined, address: str) -> None:
    site = Site(joined.place.open(), joined.coordinator.now)
    joined.coordinator.now.later(seconds=1)
    site.accept(joined.coordinator.enrolment.approve(site.renew(), joined.coordinator.authority, address))


# --- vault, journal, papers -----------------------------------------------------------------------------------------


def test_a_vault_that_does_not_open_leaves_the_other_checks(joined: Joined, tmp_path: Path) -> None:
    with os.fdopen(os.open(tmp_path / "other.key", os.O_WRONLY | os.O_CREAT, 0o600), "wb") as file:
        file.write(b"\1" * 32)
    code, found = joined.look("--key-file", "other.key")
    assert code == 1
    assert found["vault"][0]["code"] == "vault.wrong-key"
    assert found["data set claims"][0]["level"] == "ok"
    assert "coordinator" not in found


def test_a_journal_that_was_changed(joined: Joined) -> None:
    journal = joined.place.journal
    journal.write_bytes(journal.read_bytes().replace(b"research", b"resale  ", 1))
    found = joined.look()[1]
    assert {one["code"] for one in found["journal"]} == {"journal.tampered"}


def test_a_site_that_has_joined_nothing(ready: Place) -> None:
    done = ready.run("doctor", "--format", "json")
    assert done.code == 1
    assert "enrolment.not-enrolled" in {one["code"] for one in done.json["findings"]}


def test_a_certificate_is_told_before_it_ends_and_after(joined: Joined) -> None:
    assert at(joined, days=300, check="certificate").level == "warn"
    assert at(joined, days=364, check="certificate").hint == "fedtune client renew"
    over = at(joined, days=400, check="certificate")
    assert (over.level, over.code) == ("fail", "enrolment.certificate-expired")


def test_a_key_that_was_rotated_and_not_told(joined: Joined) -> None:
    joined.place.done("key", "rotate")
    assert joined.finding("membership")["hint"] == "fedtune client renew"


def at(joined: Joined, days: int, check: str) -> Finding:
    later = datetime.now(UTC) + timedelta(days=days)
    found = examine(joined.place.open().folder, lambda: Key(joined.place.key.data), None, later)
    return next(finding for finding in found if finding.check == check)


# --- models, data, decisions ----------------------------------------------------------------------------------------


def test_a_model_with_another_content_than_the_policy_allows(joined: Joined) -> None:
    (joined.place.folder / "base" / "vocab.txt").write_text("another\n")
    found = joined.look()[1]
    assert found["base model encoder"][0]["level"] == "warn"
    assert "the encoder" in found["base models"][0]["text"]
    shutil.rmtree(joined.place.folder / "base")
    assert joined.finding("base model encoder")["code"] == "model.missing-base"


def test_data_that_changed_since_it_was_granted(joined: Joined) -> None:
    with (joined.place.folder / "claims.csv").open("a") as file:
        file.write(f"{CANARY} again,loan,p7,yes\n")
    found = joined.finding("data set claims")
    assert (found["level"], found["text"][:11]) == ("warn", "301 records")
    assert "consent grant claims" in found["hint"]


def test_data_that_cannot_be_read_is_not_quoted(joined: Joined) -> None:
    (joined.place.folder / "claims.csv").write_text(f'note,category\n"{CANARY}\n')
    found = joined.look()[1]["data set claims"][0]
    assert found["level"] in {"warn", "fail"}
    (joined.place.folder / "claims.csv").write_bytes(f"note,note\n{CANARY},\xff\xfe\n".encode("latin-1"))
    assert joined.look()[1]["data set claims"][0]["level"] in {"warn", "fail"}


def test_a_policy_that_was_edited_and_one_that_was_never_adopted(joined: Joined, begun_site: Place) -> None:
    joined.place.policy(name="another")
    assert joined.finding("policy")["level"] == "warn"
    done = begun_site.run("doctor", "--format", "json", "--site", "second")
    assert {"policy": "fail"}.items() <= {one["check"]: one["level"] for one in done.json["findings"]}.items()


@pytest.fixture
def begun_site(joined: Joined) -> Place:
    joined.place.done("init", "second", "--site", "second")
    return joined.place


def test_a_budget_that_is_used_up_and_charges_that_were_never_finished(joined: Joined) -> None:
    joined.place.charge(study(epsilon=2.5), 1, commit=False)
    assert "1 charges were never committed" in joined.finding("budget")["text"]


def test_the_doctor_reads_no_data_file_to_look_at_the_rest(joined: Joined) -> None:
    facts = joined.place.site / "site.yaml"
    facts.write_text(facts.read_text().replace("data: {claims: {path: ../claims.csv}}\n", ""))
    with opened_files() as opened:
        joined.look()
    assert not [path for path in opened if path.endswith("claims.csv")]


def test_a_folder_that_is_no_site_is_said(empty: Place) -> None:
    assert "config.file-missing" in empty.run("doctor").err
