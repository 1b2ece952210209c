from __future__ import annotations

import json
import shutil
from collections import Counter
from typing import TYPE_CHECKING, Any

import dp_accounting
import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from dp_accounting.pld import PLDAccountant

from fedtune.config.plan import StudyPlan
from fedtune.journal.entries import Committed, DataRegistered, Reserved
from fedtune.journal.ledger import Ledger
from fedtune.journal.witness import Head, Receipt
from fedtune.privacy.plan import PrivacyPlan
from tests.client.commands.conftest import EMPTY, study, write_claims
from tests.client.policy.conftest import plan_text

if TYPE_CHECKING:
    from tests.client.commands.conftest import Place

DELTA = 1e-6


def independent(records: list[dict[str, Any]]) -> float:
    """ε of RESERVE records' events by dp-accounting alone, on a finer grid than the product's."""
    accountant, steps = PLDAccountant(value_discretization_interval=2e-4), Counter[tuple[float, float]]()
    for event in (record["entry"]["event"] for record in records):
        steps[event["noise_multiplier"], event["sampling_rate"]] += event["steps"]
    for (sigma, rate), count in steps.items():
        sampled = dp_accounting.PoissonSampledDpEvent(rate, dp_accounting.GaussianDpEvent(sigma))
        accountant.compose(dp_accounting.SelfComposedDpEvent(sampled, count))
    return float(accountant.get_epsilon(DELTA))


def reserves(place: Place) -> list[dict[str, Any]]:
    return [record for record in place.records() if record["kind"] == "reserve"]


def off() -> StudyPlan:
    promise = PrivacyPlan.off(sampling_rate=0.1, max_steps=100).about("patient_id", 8)
    return StudyPlan.from_json(plan_text(name="open", privacy=promise.to_dict()))


def account(place: Place, *words: str) -> dict[str, Any]:
    (found,) = place.json("budget", *words)["accounts"]
    return dict(found)


def test_a_site_without_a_charge_has_all_of_its_budget(ready: Place) -> None:
    found = ready.json("budget")
    assert set(found) == {
        "site",
        "records",
        "time",
        "key_checked",
        "policy",
        "delta",
        "delta_of",
        "accounts",
        "not_registered",
        "forecast",
    }
    assert (found["site"], found["delta"], found["delta_of"], found["forecast"]) == ("mercy", DELTA, "policy", None)
    (only,) = found["accounts"]
    assert set(only) == {
        "account",
        "unit",
        "epsilon",
        "spent",
        "reserved",
        "rounds",
        "open",
        "not_private",
        "problem",
        "data",
        "studies",
    }
    assert only["data"] == [{"name": "claims", "registrations": [2], "units": 140, "cap": 8.0, "left": 8.0}]
    assert (only["unit"], only["epsilon"], only["spent"], only["reserved"]) == (None, 0.0, 0.0, 0.0)


def test_the_budget_equals_an_independent_computation(ready: Place) -> None:
    first, second = study("first"), study("second", 1.5)
    ready.charge(first, *range(1, 21))
    ready.charge(second, 1, 2, 3)
    ready.charge(second, 4, 5, commit=False)
    found, charged = account(ready), reserves(ready)
    committed = {record["entry"]["reserved"] for record in ready.records() if record["kind"] == "commit"}
    whole = independent(charged)
    spent = independent([record for record in charged if record["sequence"] in committed])
    assert found["epsilon"] == pytest.approx(whole, rel=2e-3)
    assert found["spent"] == pytest.approx(spent, rel=2e-3)
    assert found["spent"] + found["reserved"] == pytest.approx(found["epsilon"], abs=1e-12)
    assert found["data"][0]["left"] == pytest.approx(8 - whole, rel=2e-3)
    for plan, part in zip((first, second), found["studies"], strict=True):
        own = [record for record in charged if record["entry"]["plan"] == plan.sha256]
        assert part["epsilon"] == pytest.approx(independent(own), rel=2e-3)
    assert [(part["rounds"], part["charges"], part["open"]) for part in found["studies"]] == [(20, 20, 0), (5, 5, 2)]
    assert (found["rounds"], found["open"], found["unit"]) == (25, 2, "patient_id")


def test_what_is_shown_is_what_the_ledger_compares_with_its_caps(ready: Place) -> None:
    ready.charge(study(), 1, 2, 3)
    ready.charge(study(), 4, commit=False)
    site = ready.open()
    with site.journal as journal:
        assert account(ready)["epsilon"] == Ledger(journal).spent(2).epsilon(DELTA)


def test_a_study_is_stated_at_its_own_delta_where_its_plan_is_known(ready: Place) -> None:
    terms = {"clip_norm": 1.0, "sampling_rate": 0.1, "noise": "secure"}
    promise = PrivacyPlan.calibrated(epsilon=2.0, delta=1e-7, max_steps=100, **terms).about("patient_id", 8)
    plan = StudyPlan.from_json(plan_text(name="careful", privacy=promise.to_dict()))
    ready.charge(plan, *range(1, 21))
    path = ready.write_plan(plan, "careful.json")
    (unknown,), (known,) = account(ready)["studies"], account(ready, "--plan", str(path))["studies"]
    assert set(known) == {
        "plan",
        "name",
        "delta",
        "delta_of",
        "rounds",
        "evaluations",
        "charges",
        "open",
        "not_private",
        "epsilon",
        "events",
    }
    assert (unknown["delta"], unknown["delta_of"], unknown["name"]) == (DELTA, "policy", "")
    assert (known["delta"], known["delta_of"], known["name"]) == (1e-7, "plan", "careful")
    assert unknown["epsilon"] < known["epsilon"] <= 2.0
    assert "1e-07 (plan)" in ready.done("budget", "--plan", str(path)).out


def test_the_numbers_are_the_same_when_only_journal_vault_and_policy_are_left(ready: Place) -> None:
    ready.charge(study(), 1, 2, 3)
    ready.charge(study(), 4, commit=False)
    before = ready.json("budget", "--forecast", "plan.json")
    for path in ready.site.iterdir():
        if path.name not in {"mercy.journal", "vault", "policy.yaml"}:
            shutil.rmtree(path) if path.is_dir() else path.unlink()
    after = ready.json("budget", "--forecast", "plan.json")
    assert after.pop("key_checked") is False
    assert before.pop("key_checked") is True
    assert after == before
    assert "the key that it names itself was believed" in ready.done("budget").out


def test_a_journal_put_back_to_before_a_receipt_is_not_counted(ready: Place) -> None:
    old = ready.journal.read_bytes()
    ready.charge(study(), 1)
    with ready.open().journal as journal:
        receipt = Receipt.of(Head.of(journal), Ed25519PrivateKey.generate())
    (ready.site / "heads.jsonl").write_text(json.dumps(receipt.to_dict()) + "\n")
    assert account(ready)["rounds"] == 1
    ready.journal.write_bytes(old)
    for words in (["budget"], ["consent", "list"], ["key", "rotate"], ["consent", "revoke", "3"]):
        done = ready.run(*words)
        assert (done.code, done.out) == (2, "")
        assert "error[journal.rolled-back]" in done.err
    assert ready.run("journal", "verify").code == 6


def test_a_damaged_journal_is_not_counted(ready: Place) -> None:
    data = bytearray(ready.journal.read_bytes())
    data[len(data) // 2] ^= 1
    ready.journal.write_bytes(data)
    done = ready.run("budget")
    assert (done.code, done.out) == (2, "")
    assert "error[journal.tampered]" in done.err
    assert ready.run("journal", "verify").code == 5


def test_a_record_in_the_making_is_left_out_and_nothing_is_written(ready: Place) -> None:
    whole = ready.journal.read_bytes()
    ready.journal.write_bytes(whole + whole.splitlines()[-1][:50])
    assert ready.json("budget")["records"] == 4
    assert ready.journal.read_bytes() == whole + whole.splitlines()[-1][:50]
    assert ready.run("journal", "verify").code == 4


def test_another_key_beside_the_journal_is_refused(ready: Place) -> None:
    (ready.site / "public.key").write_text("ab" * 32 + "\n")
    assert "error[journal.other-key]" in ready.run("budget").err


def test_a_round_without_privacy_leaves_nothing(begun: Place) -> None:
    begun.policy(privacy__allow_off=True)
    begun.done("policy", "adopt", "--yes")
    begun.done("consent", "grant", "claims", "--purpose", "research")
    begun.charge(off(), 1)
    found = account(begun)
    assert (found["epsilon"], found["spent"], found["reserved"], found["not_private"]) == ("inf", "inf", 0.0, 1)
    assert found["data"][0]["left"] == 0.0
    assert " inf " in begun.done("budget").out


def test_joined_data_sets_whose_units_differ_have_no_common_epsilon(ready: Place) -> None:
    event = study().promise.event(5).to_dict()
    site = ready.open()
    with site.journal as journal:
        entry = journal.state.spending.data[2]
        other = DataRegistered(
            name="letters", fingerprint="c" * 64, unit="record", units=50, population="d" * 64, joins=()
        )
        given = journal.state.grants[3]
        journal.append(other, given.model_copy(update={"data": 4, "fingerprint": "c" * 64}))
        for data, grant, unit in ((2, 3, "patient_id"), (4, 5, "record")):
            charge = {"plan": "e" * 64, "round": 1, "purpose": "training", "input": EMPTY, "data": data, "grant": grant}
            journal.append(Reserved(**charge, event=event | {"unit": unit}))
        assert len(ready.json("budget")["accounts"]) == 2
        journal.append(entry.model_copy(update={"name": "both", "fingerprint": "f" * 64, "joins": (2, 4)}))
    found = account(ready)
    assert (found["epsilon"], found["unit"]) == (None, None)
    assert "patient_id, record" in found["problem"]
    assert {data["name"]: (data["cap"], data["left"]) for data in found["data"]} == {
        "claims": (8.0, 0.0),
        "letters": (None, 0.0),
        "both": (None, 0.0),
    }
    assert "nothing more is charged to it" in ready.done("budget").out


def test_a_forecast_is_what_the_study_then_comes_to(ready: Place) -> None:
    ready.charge(study("first"), *range(1, 21))
    coming = ready.json("budget", "--forecast", "plan.json")["forecast"]
    assert set(coming) == {
        "before",
        "after",
        "cap",
        "study_after",
        "plan",
        "name",
        "data",
        "delta",
        "study_delta",
        "needs_approval",
        "allowed",
        "reasons",
    }
    assert (coming["allowed"], coming["needs_approval"], coming["reasons"], coming["cap"]) == (True, True, [], 8.0)
    assert coming["before"] == account(ready)["epsilon"]
    ready.charge(study(), *range(1, 11))
    assert ready.json("budget", "--forecast", "plan.json")["forecast"]["after"] == coming["after"]
    ready.charge(study(), *range(11, 21))
    found = account(ready)
    assert (found["epsilon"], found["studies"][1]["epsilon"]) == (coming["after"], coming["study_after"])


def test_a_forecast_that_does_not_fit_has_an_exit_code_and_every_reason(begun: Place) -> None:
    begun.policy(data__claims__lifetime_epsilon=3.0)
    begun.done("policy", "adopt", "--yes")
    done = begun.run("budget", "--forecast", "plan.json", "--format", "json")
    assert done.code == 7
    codes = {reason["code"] for reason in done.json["forecast"]["reasons"]}
    assert codes == {"consent.unknown-data", "policy.few-units"}
    begun.done("consent", "grant", "claims", "--purpose", "research")
    begun.charge(study("first"), *range(1, 21))
    done = begun.run("budget", "--forecast", "plan.json")
    assert done.code == 7
    assert "allows ε = 3 at δ = 1e-06" in " ".join(done.out.split())
    assert "[ledger.over-cap]" in done.out
    assert begun.kinds().count("plan-refused") == 0, "a forecast decides nothing"


def test_data_of_the_policy_that_was_never_granted_is_named(begun: Place) -> None:
    begun.done("policy", "adopt", "--yes")
    assert begun.json("budget")["not_registered"] == ["claims"]
    assert "fedtune client consent grant claims --purpose" in begun.done("budget").out


def test_a_changed_file_keeps_its_account(ready: Place) -> None:
    ready.charge(study(), 1, 2)
    before = account(ready)
    write_claims(ready.folder / "claims.csv", rows=310)
    ready.done("consent", "grant", "claims", "--purpose", "research")
    after = account(ready)
    assert after["epsilon"] == before["epsilon"]
    assert after["data"][0]["registrations"] == [2, max(after["data"][0]["registrations"])]
    assert len(after["data"][0]["registrations"]) == 2


def test_names_from_a_plan_cannot_steer_the_terminal(ready: Place) -> None:
    site = ready.open()
    with site.journal as journal:
        event = study().promise.event(5).to_dict() | {"unit": "\x1b[2Jpatient"}
        (record,) = journal.append(
            Reserved(plan="e" * 64, round=1, purpose="training", input=EMPTY, data=2, grant=3, event=event)
        )
        journal.append(Committed(reserved=record.sequence, payload="a" * 64, size=1))
    for words in (["budget"], ["journal", "show"]):
        assert "\x1b" not in ready.done(*words).out
