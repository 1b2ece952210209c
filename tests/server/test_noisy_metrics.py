"""The coordinator's side of noisy metrics: asked when planned, charged whatever a site says, shown with their noise."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace

import pytest
from flwr.app import RecordDict

from fedtune.errors import MessageError
from fedtune.flower.messages import Update, encode_reply
from fedtune.privacy.accounting import epsilon
from fedtune_server.facts import SiteFacts
from fedtune_server.replies import check_events
from tests.support.studies import TinyStudy, site_name

MakeStudy = Callable[..., TinyStudy]
NOISY = ("evaluation.site_metrics=noisy", "federation.rounds=5", "evaluation.every=2")
BAD = site_name(1)


def without_evaluations(update: Update) -> RecordDict:
    return encode_reply(replace(update, events=tuple(event for event in update.events if event.clip_norm != 1.0)))


def test_sites_are_asked_as_often_as_the_promise_covers(make_study: MakeStudy) -> None:
    study = make_study(*NOISY)
    summary = study.start()
    evaluation, rounds = study.plan.evaluation, study.plan.federation.rounds
    planned = [number for number in range(rounds + 1) if evaluation.measures(number, rounds)]
    assert set(study.sites.measured) == {site_name(index) for index in range(4)}
    assert all(asked == planned == [0, 2, 4, 5] for asked in study.sites.measured.values())
    assert study.plan.promise.evaluations == evaluation.count(rounds) == len(planned)
    assert summary["privacy"]["max_epsilon"] == study.plan.promise.forecast() <= study.plan.promise.epsilon


@pytest.mark.parametrize(("rounds", "every"), [(1, 1), (7, 3), (6, 3), (3, 10), (5, 5)])
def test_the_count_is_that_of_the_rounds_measured(make_study: MakeStudy, rounds: int, every: int) -> None:
    evaluation = make_study().plan.evaluation.model_copy(update={"every": every})
    assert sum(evaluation.measures(number, rounds) for number in range(-2, rounds + 3)) == evaluation.count(rounds)


def test_metrics_come_with_the_noise_that_is_in_them(make_study: MakeStudy) -> None:
    study = make_study(*NOISY)
    summary = study.start()
    found, promise = summary["metrics"], study.plan.promise
    alone = promise.evaluation_noise_multiplier / math.sqrt(2) / 20
    assert found["measured_on"] == "held-out units of all sites, noise charged to ε"
    assert found["final"]["accuracy_noise"] == pytest.approx(alone / 2)
    assert all(site["metrics"]["final"]["accuracy_noise"] == pytest.approx(alone) for site in summary["sites"])


def test_rounded_metrics_say_so_and_cost_nothing(make_study: MakeStudy) -> None:
    study, off = make_study("evaluation.site_metrics=coarse"), make_study()
    summary = study.start()
    assert summary["metrics"]["measured_on"] == "held-out units of all sites, rounded"
    assert summary["metrics"]["final"] == {"accuracy": 0.5, "loss": 1.0}
    assert study.plan.promise == off.plan.promise


def test_a_site_that_conceals_its_evaluations_is_refused_and_charged_for_them(make_study: MakeStudy) -> None:
    study = make_study(*NOISY, "privacy.clip_norm=0.5")
    study.sites.twists = {(BAD, 1): without_evaluations}
    study.start()
    assert [line["failed"] for line in study.lines()] == [{BAD: "message.wrong-events"}, *[{}] * 4]


def test_metrics_that_came_are_charged_before_the_site_reports_them(make_study: MakeStudy) -> None:
    promise = make_study(*NOISY).plan.promise
    cost = promise.evaluation_event()
    site = SiteFacts("bank-a", 100, "d" * 64, (promise.event(3),))
    for count in (1, 2):
        site.note_evaluation(cost)
        assert site.epsilon(promise) == epsilon([promise.event(3), promise.evaluation_event(count)], promise.delta)
    site.events = (promise.event(3), promise.evaluation_event(5))  # the site knows of more, which never arrived
    site.note_evaluation(cost)
    assert site.epsilon(promise) == epsilon([promise.event(3), promise.evaluation_event(5)], promise.delta)
    assert SiteFacts.from_dict(site.to_dict()) == site


def test_both_mechanisms_of_the_plan_are_known_and_each_is_bounded(make_study: MakeStudy) -> None:
    plan = make_study(*NOISY).plan
    training, metrics = plan.promise.event, plan.promise.evaluation_event
    check_events(plan, [training(5), metrics(4)], at_least=(5, 4))
    check_events(plan, [])
    for events, known in (
        ([training(5), metrics(3)], (5, 4)),
        ([training(4), metrics(4)], (5, 4)),
        ([training(100 * 5 + 1)], (0, 0)),
        ([metrics(100 * 4 + 1)], (0, 0)),
        ([replace(metrics(1), noise_multiplier=100.0)], (0, 0)),
        ([replace(training(1), sampling_rate=0.5)], (0, 0)),
    ):
        with pytest.raises(MessageError) as caught:
            check_events(plan, events, at_least=known)
        assert caught.value.code == "message.wrong-events"


def test_evaluations_that_a_plan_does_not_have_are_refused(make_study: MakeStudy) -> None:
    measuring, plain = make_study(*NOISY).plan.promise, make_study().plan
    with pytest.raises(MessageError):
        check_events(plain, [measuring.evaluation_event(1)])
