"""A real site and its coordinator: only what the coordinator has signed for it, here and now, is acted on."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from flwr.app import ConfigRecord, RecordDict

from fedtune.config.machine import ENVIRONMENT_VARIABLE as MACHINE
from fedtune.errors import ConfigError
from fedtune.flower.messages import Instruction, Refusal, Update, decode_description, encode_instruction
from fedtune.flower.sealed import ENVELOPE
from fedtune_client import channel, operator
from fedtune_client.folder import SiteFolder, require_unused
from tests.support.enrolments import Coordinator, Site, enrol
from tests.support.opens import opened_files
from tests.support.residents import Resident, make_resident, point_at_all

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path


@pytest.fixture
def resident(tmp_path: Path) -> Resident:
    return make_resident(tmp_path)


def test_what_the_coordinator_asks_is_answered_in_an_envelope_that_it_can_open(resident: Resident) -> None:
    assert isinstance(resident.train(1), Update)
    described = decode_description(resident.ask(0, "query.describe"), resident.study.plan.sha256)
    assert not isinstance(described, Refusal)
    assert described.site == "mercy"
    assert resident.site.charged == 1


def test_a_message_without_an_envelope_opens_no_file_of_the_site(resident: Resident) -> None:
    before = resident.site.journal.read_bytes()
    with opened_files() as opened:
        assert resident.refused(resident.instruction()) == "envelope.missing"
    assert not [path for path in opened if str(resident.site.path) in path]
    assert resident.site.journal.read_bytes() == before
    assert isinstance(resident.train(), Update)  # the control: the same instruction, signed


def other_key(resident: Resident) -> dict[str, Any]:
    return {"end": resident.as_coordinator(Ed25519PrivateKey.generate())}


def other_federation(resident: Resident) -> dict[str, Any]:
    return {"end": resident.as_coordinator(federation="banks-0011223344556677")}


def other_study(_resident: Resident) -> dict[str, Any]:
    return {"study": "a" * 64}


@pytest.mark.parametrize(
    ("change", "code"),
    [(other_key, "unknown-key"), (other_federation, "other-federation"), (other_study, "other-study")],
)
def test_what_is_signed_by_another_or_for_another_is_refused_before_data_and_journal(
    resident: Resident, change: Callable[[Resident], dict[str, Any]], code: str
) -> None:
    message, before = resident.seal(**change(resident)), resident.site.journal.read_bytes()
    with opened_files() as opened:
        assert resident.refused(message) == f"envelope.{code}"
    assert str(resident.site.data) not in opened
    assert resident.site.journal.read_bytes() == before


def test_a_message_for_another_site_is_refused(resident: Resident, tmp_path: Path) -> None:
    enrol(resident.coordinator, Site.make(tmp_path / "north", "north", resident.coordinator.now))
    assert resident.refused(resident.seal(site="north")) == "envelope.other-receiver"


def test_a_message_of_another_kind_than_flower_says_is_refused(resident: Resident) -> None:
    assert resident.refused(resident.seal(kind="train"), kind="evaluate") == "envelope.other-kind"


def test_a_body_that_was_swapped_under_a_valid_header_is_refused(resident: Resident) -> None:
    sealed = resident.seal()
    other = resident.study.sent(resident.study.bench.alive(7))
    swapped = {**encode_instruction(Instruction(resident.study.plan.sha256, 1, other)), ENVELOPE: sealed[ENVELOPE]}
    assert resident.refused(RecordDict(swapped)) == "envelope.other-body"
    assert resident.site.charged == 0
    assert not resident.send(sealed).has_error()  # the honest one still counts


def test_a_request_that_comes_again_is_answered_by_the_same_bytes_and_charged_once(resident: Resident) -> None:
    sealed = resident.seal()
    first, again = resident.send(sealed).content, resident.restart().send(sealed).content
    assert first[ENVELOPE] == again[ENVELOPE]
    assert first["fedtune"] == again["fedtune"]
    for name, array in first["arrays"].items():
        assert array.data == again["arrays"][name].data
    assert resident.site.charged == 1


def test_a_request_older_than_the_newest_is_refused_also_after_a_restart(resident: Resident) -> None:
    old, new = resident.seal(), resident.seal()
    assert not resident.send(new).has_error()
    assert resident.restart().refused(old) == "envelope.replayed"


def test_a_refusal_is_signed_and_the_plan_is_kept_for_the_operator(tmp_path: Path) -> None:
    resident = make_resident(tmp_path, require_approval=True)
    plan = resident.study.plan
    with opened_files() as opened:
        assert resident.train() == Refusal("policy.not-approved")
    assert str(resident.site.data) not in opened
    kept = resident.site.folder.asked / f"{plan.sha256[:16]}.json"
    assert kept.read_text("utf-8") == plan.json_text
    operator.approve(resident.site.open(), plan, "A. Person")
    assert isinstance(resident.train(), Update)
    assert not kept.exists()


def test_a_plan_whose_model_is_not_here_is_refused_until_it_is_named_without_a_restart(resident: Resident) -> None:
    model = resident.study.bench.machine.model_folder
    point_at_all(resident.site, nowhere=str(resident.site.path))
    assert resident.train() == Refusal("model.not-here")
    point_at_all(resident.site, anything=model)
    assert isinstance(resident.train(), Update)


def test_a_list_of_plans_that_cannot_be_written_changes_no_answer(tmp_path: Path) -> None:
    resident = make_resident(tmp_path, require_approval=True)
    resident.site.folder.asked.write_text("a file in the way")
    assert resident.train() == Refusal("policy.not-approved")


def test_after_a_rotation_the_site_signs_with_the_key_that_the_coordinator_knows(resident: Resident) -> None:
    assert isinstance(resident.train(1), Update)
    site = resident.joined()
    site.rotate()
    resident.restart()
    assert isinstance(resident.train(2), Update)
    resident.coordinator.now.later(minutes=1)
    grant = resident.coordinator.approve(site.renew())
    site.accept(grant)
    with resident.environment():
        key = channel.open_channel(resident.site.open()).endpoint()._key.public_key().public_bytes_raw().hex()
    assert key == resident.site.open().journal.chain.public_key
    assert isinstance(resident.train(2), Update)


def test_a_site_that_has_joined_nothing_answers_nobody(resident: Resident) -> None:
    vault = resident.site.open().vault
    vault.remove(f"federation-{resident.coordinator.federation}")
    assert resident.restart().refused(resident.seal()) == "enrolment.not-enrolled"


def test_a_site_of_two_federations_has_to_be_told_which(
    resident: Resident, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    other = Coordinator(tmp_path / "banks", resident.coordinator.now, "banks-0011223344556677")
    site = resident.joined()
    site.accept(other.approve(site.answer(other.invite("mercy"))), other.federation)
    assert resident.refused(resident.seal()) == "enrolment.which-federation"
    monkeypatch.setenv("FEDTUNE_FEDERATION", resident.coordinator.federation)
    assert isinstance(resident.train(), Update)
    monkeypatch.setenv("FEDTUNE_FEDERATION", other.federation)
    assert resident.refused(resident.seal()) == "envelope.unknown-key"


def test_no_site_is_called_as_coordinators_sign(tmp_path: Path) -> None:
    with pytest.raises(ConfigError) as refused:
        require_unused(SiteFolder(tmp_path / "site"), "coordinator")
    assert refused.value.code == "config.bad-name"


def test_a_locked_vault_is_said_by_code(resident: Resident, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tests.support.residents.SERVICE_KEY", "00" * 32)
    assert resident.restart().refused(resident.seal()) == "vault.wrong-key"


def test_in_a_simulation_messages_need_no_envelope(resident: Resident, monkeypatch: pytest.MonkeyPatch) -> None:
    """What `FEDTUNE_MACHINE` takes away is why the executor of a real site drops that variable first."""
    assert isinstance(resident.site.answer(), Update)
    monkeypatch.setenv("FEDTUNE_SITE", str(resident.site.path))
    monkeypatch.setenv(MACHINE, "run/machine.json")
    assert not channel.is_resident()
    monkeypatch.delenv(MACHINE)
    assert channel.is_resident()


def test_an_envelope_record_of_another_shape_is_refused(resident: Resident) -> None:
    for record in (ConfigRecord({"header": b"{}"}), ConfigRecord({"header": b"{}", "signature": "no bytes"})):
        assert resident.refused(RecordDict({ENVELOPE: record, **resident.instruction()})) == "envelope.missing"
    record = ConfigRecord({"header": b"{}", "signature": b"x" * 64})
    assert resident.refused(RecordDict({ENVELOPE: record, **resident.instruction()})) == "envelope.bad-header"
