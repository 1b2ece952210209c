"""A site answers its plan's coordinator, refuses everything else by a code, and lets no text out."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from fedtune.config.plan import StudyPlan
from fedtune.errors import DataError
from fedtune.flower.messages import Refusal, Update, decode_description, decode_evaluation, decode_update
from fedtune.model.layout import AdapterState
from fedtune.privacy.accounting import Event
from fedtune.privacy.plan import public_count
from tests.client.conftest import Coordinator
from tests.support.journal_lines import entries

Study = Callable[..., Coordinator]
CANARY = "patient Jane Roe, HIV positive"


def refusal(coordinator: Coordinator, kind: str = "train", *arguments: Any, **fields: Any) -> str:
    reply = coordinator.ask(kind, *arguments, **fields)
    assert not reply.has_error()
    decoded = decode_update(reply.content, coordinator.plan.sha256)
    assert isinstance(decoded, Refusal)
    assert set(reply.content) == {"fedtune"}
    return decoded.code


def update(coordinator: Coordinator, number: int = 1) -> Update:
    reply = coordinator.ask("train", number)
    decoded = decode_update(reply.content, coordinator.plan.sha256)
    assert isinstance(decoded, Update), decoded
    return decoded


def other_plan(coordinator: Coordinator, change: Callable[[dict[str, Any]], None]) -> Coordinator:
    """The same site under an edited plan, with messages that name it rightly."""
    values = coordinator.plan.model_dump(mode="json")
    change(values)
    plan = StudyPlan.model_validate(values)
    bench = type(coordinator.bench)(
        plan, coordinator.bench.machine, coordinator.bench.workspace, coordinator.bench.name, coordinator.bench.examples
    )
    return Coordinator(bench, plan.json_text)


# --- what it answers ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("algorithm", ["fedit", "ffa", "fedsvd"])
def test_an_update_holds_what_the_algorithm_sends_and_what_was_spent(study: Study, algorithm: str) -> None:
    asked = study(aggregation__algorithm=algorithm)
    answer = update(asked)
    assert set(answer.state) == set(asked.bench.layouts[1].names)
    assert (answer.site, answer.round) == (asked.bench.name, 1)
    assert answer.events == (Event(0.7, 0.5, 2, 0.5),)


def test_a_site_tells_its_rounded_size_and_no_other(study: Study) -> None:
    asked = study()
    reply = decode_description(asked.ask("query.describe", 0, {}).content, asked.plan.sha256)
    assert not isinstance(reply, Refusal)
    assert reply.units == public_count(len(asked.bench.examples))
    assert (reply.site, reply.events) == (asked.bench.name, ())


def test_a_site_tells_the_rounded_number_of_its_patients_where_they_are_the_unit(study: Study) -> None:
    asked = study(privacy__unit="patient_id", federation__sites=1)
    assert asked.bench.units is not None
    reply = decode_description(asked.ask("query.describe", 0, {}).content, asked.plan.sha256)
    assert not isinstance(reply, Refusal)
    assert reply.units == public_count(asked.bench.units.count) < len(asked.bench.examples)
    assert update(asked).events == (Event(0.7, 0.5, 2, 0.5, unit="patient_id"),)


def test_an_evaluation_holds_sums_only(study: Study) -> None:
    asked = study()
    reply = decode_evaluation(asked.ask("evaluate").content, asked.plan.sha256)
    assert not isinstance(reply, Refusal)
    assert set(reply.tally) == {"loss_sum", "counts", "confusion"}


def test_a_repeated_round_gives_the_same_update_and_costs_once(study: Study) -> None:
    asked = study(training__optimizer="adamw", training__optimizer_state="keep", training__learning_rate=0.01)
    update(asked, 1)
    first, again = update(asked, 2), update(asked, 2)
    assert all(np.array_equal(first.state[name], again.state[name]) for name in first.state)
    assert first.events == again.events == (Event(0.7, 0.5, 4, 0.5),)


def test_a_repeated_round_with_secure_noise_sends_the_stored_update_and_costs_once(study: Study) -> None:
    asked = study(privacy__noise="secure")
    first, again = update(asked, 1), update(asked, 1)
    assert all(first.state[name].tobytes() == again.state[name].tobytes() for name in first.state)
    assert first.events == again.events == (Event(0.7, 0.5, 2, 0.5, noise="secure"),)
    assert asked.charged == [1]


@pytest.mark.parametrize("noise", ["seeded", "secure"])
def test_the_same_round_from_another_adapter_is_charged_again(study: Study, noise: str) -> None:
    asked = study(privacy__noise=noise)
    update(asked, 1)
    assert not isinstance(decode_update(asked.ask("train", 1, other_start(asked)).content, asked.plan.sha256), Refusal)
    assert asked.charged == [1, 1]


def test_what_would_pass_the_plans_promise_is_refused_and_costs_nothing(study: Study) -> None:
    asked = study()
    for number in (1, 2):
        update(asked, number)
    assert refusal(asked, "train", 2, other_start(asked)) == "ledger.over-cap"
    assert asked.charged == [1, 2]
    assert update(asked, 2).events == (Event(0.7, 0.5, 4, 0.5),)


def other_start(asked: Coordinator) -> AdapterState:
    return {name: array + np.float32(0.01) for name, array in asked.download.items()}


def test_without_privacy_nothing_is_spent_or_written(study: Study) -> None:
    asked = study(privacy__mode="off", privacy__noise_multiplier=None)
    assert update(asked).events == ()
    (charge,) = entries(asked.journal, "reserve")
    assert charge["event"] is None


# --- what it refuses ------------------------------------------------------------------------------------------------


def test_the_event_is_on_disk_before_a_record_is_trained_on(study: Study, monkeypatch: pytest.MonkeyPatch) -> None:
    """A crash in the middle of training leaves the round charged."""
    asked = study()

    def crash(*args: Any, **kwargs: Any) -> None:
        assert asked.charged == [1]
        raise RuntimeError(CANARY)

    monkeypatch.setattr("fedtune.training.local.clip_and_sum", crash)
    assert refusal(asked) == "site.internal"
    assert (asked.charged, entries(asked.journal, "commit")) == ([1], [])


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (RuntimeError(CANARY), "site.internal"),
        (DataError("blank-value", CANARY, hint=CANARY), "data.blank-value"),
        (KeyError(CANARY), "site.internal"),
        (MemoryError(CANARY), "site.internal"),
        (UnicodeDecodeError("utf-8", CANARY.encode(), 0, 1, CANARY), "site.internal"),
    ],
)
@pytest.mark.parametrize("kind", ["train", "evaluate", "query.describe"])
def test_whatever_goes_wrong_leaves_the_site_as_a_code(
    study: Study, monkeypatch: pytest.MonkeyPatch, kind: str, error: Exception, code: str
) -> None:
    asked = study()

    def fail(*args: Any, **kwargs: Any) -> None:
        raise error

    for place in ("app.train_round", "app.measure", "app.Description"):
        monkeypatch.setattr(f"fedtune_client.{place}", fail)
    reply = asked.ask(kind)
    text = repr(reply.content) + repr(reply.metadata)
    assert refusal(asked, kind) == code
    assert "Jane" not in text
    assert "HIV" not in text


def test_a_failing_site_prints_nothing_about_its_records(
    study: Study, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, capfd: pytest.CaptureFixture[str]
) -> None:
    asked = study()

    def fail(*args: Any, **kwargs: Any) -> None:
        raise RuntimeError(CANARY)

    monkeypatch.setattr("fedtune_client.app.train_round", fail)
    with caplog.at_level(logging.INFO):
        assert refusal(asked) == "site.internal"
    assert "Jane" not in caplog.text + "".join(capfd.readouterr())


@pytest.mark.parametrize("number", [-1, 0, 3, 10**9])
def test_a_round_that_the_plan_does_not_have_is_refused_and_costs_nothing(study: Study, number: int) -> None:
    asked = study()
    assert refusal(asked, "train", number) == "message.wrong-round"
    assert asked.charged == []


@pytest.mark.parametrize(
    ("text", "code"),
    [
        ("", "not-json"),
        ("{}", "missing-key"),
        ("not json", "not-json"),
        ('{"schema_version": 2}', "missing-key"),
        ("[]", "not-json"),
    ],
)
def test_a_plan_that_cannot_be_read_is_refused(study: Study, text: str, code: str) -> None:
    asked = study()
    assert refusal(Coordinator(asked.bench, text)) == f"policy.plan-{code}"


def test_a_plan_in_another_spelling_is_refused(study: Study) -> None:
    asked = study()
    assert refusal(Coordinator(asked.bench, asked.plan_text + " ")) == "policy.plan-not-canonical"


def test_a_message_of_another_plan_is_refused(study: Study) -> None:
    assert refusal(study(), plan_sha256="0" * 64) == "message.other-plan"


def test_a_plan_whose_noise_does_not_keep_its_promise_is_refused_by_the_site_itself(study: Study) -> None:
    """Whoever wrote the plan: a coordinator that skips its own check gains nothing."""

    def promise_too_much(values: dict[str, Any]) -> None:
        values["privacy"]["epsilon"] = 0.5

    asked = other_plan(study(), promise_too_much)
    assert refusal(asked) == "privacy.overspends"
    assert asked.charged == []


def test_a_plan_with_more_steps_than_its_promise_covers_is_refused(study: Study) -> None:
    def more_rounds(values: dict[str, Any]) -> None:
        values["federation"]["rounds"] = 200

    assert refusal(other_plan(study(), more_rounds)) == "privacy.overspends"


def test_a_base_model_of_other_content_is_refused(study: Study) -> None:
    def other_base(values: dict[str, Any]) -> None:
        values["model"]["sha256"] = "0" * 64

    assert refusal(other_plan(study(), other_base)) == "model.other-base"


def test_an_adapter_of_another_layout_than_the_plans_is_refused(study: Study) -> None:
    def other_layout(values: dict[str, Any]) -> None:
        values["adapter"]["layout_sha256"] = "0" * 64

    assert refusal(other_plan(study(), other_layout)) == "model.other-layout"


@pytest.mark.parametrize("kind", ["train", "evaluate"])
def test_an_adapter_that_is_not_what_the_plan_sends_is_refused_and_costs_nothing(study: Study, kind: str) -> None:
    asked = study()
    name = next(iter(asked.download))
    wrong = {
        "message.missing-key": {key: value for key, value in asked.download.items() if key != name},
        "message.unknown-key": {**asked.download, "one.more": np.zeros(2, np.float32)},
        "message.wrong-shape": {**asked.download, name: np.zeros((1, 1), np.float32)},
        "aggregation.not-finite": {**asked.download, name: np.full_like(asked.download[name], np.nan)},
    }
    for code, adapter in wrong.items():
        assert refusal(asked, kind, 1, adapter) == code
    assert asked.charged == []


def test_a_frozen_a_is_never_taken_from_a_coordinator(study: Study) -> None:
    asked = study(aggregation__algorithm="ffa")
    assert refusal(asked, "train", 1, asked.bench.workspace.initial) == "message.unknown-key"


def test_metrics_that_the_plan_keeps_at_the_site_stay_there(study: Study) -> None:
    asked = study(evaluation__site_metrics="off")
    assert refusal(asked, "evaluate") == "privacy.metrics-off"


def test_a_damaged_journal_stops_the_site_before_it_trains(study: Study) -> None:
    asked = study()
    update(asked, 1)
    asked.journal.write_text("damaged\n" + asked.journal.read_text())
    before = asked.journal.read_bytes()
    assert refusal(asked, "train", 2) == "journal.tampered"
    assert asked.journal.read_bytes() == before
