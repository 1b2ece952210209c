"""What a site answers when it is asked for metrics, in each form, and what it refuses."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from fedtune.data.units import Units
from fedtune.errors import FedtuneError, MessageError
from fedtune.evaluation.site_metrics import Measured, UnitMeans, event_of_evaluation, read_site_metrics
from fedtune.journal.ledger import Reservation
from fedtune.training.evaluate import HeldOut, evaluate, measure, record_numbers
from tests.support.bench import Bench, make_bench
from tests.support.ledgers import charge_of, ledger

MakeBench = Callable[..., Bench]
NOISY = {"evaluation__site_metrics": "noisy"}


@pytest.fixture
def bench(tmp_path: Path) -> MakeBench:
    torch.set_num_threads(1)
    return partial(make_bench, tmp_path)


def held_out(site: Bench) -> HeldOut:
    return HeldOut(site.name, site.examples, site.units or Units.each_record(len(site.examples)))


def reserved(site: Bench, number: int = 0) -> Reservation:
    with ledger() as open_ledger:
        return open_ledger.reserve(charge_of(site.plan, number, event_of_evaluation(site.plan)), ())


def measured(site: Bench, number: int = 0, reservation: Reservation | None = None) -> Measured:
    return measure(site.plan, site.workspace, held_out(site), number, site.alive(), reservation)


def means(site: Bench, number: int = 0) -> UnitMeans:
    found = measured(site, number, reserved(site, number))
    assert isinstance(found, UnitMeans)
    return found


def test_clear_metrics_are_the_tally(bench: MakeBench) -> None:
    site: Bench = bench()
    expected = evaluate(site.workspace, site.alive(), site.examples, site.plan.evaluation.batch_size)
    assert measured(site).metrics() == expected.metrics()


@pytest.mark.parametrize(("architecture", "head"), [("bert", "pooled"), ("llama", "none")])
@pytest.mark.parametrize("shapes", ["tight", "fixed"])
def test_each_record_has_the_numbers_it_has_alone(bench: MakeBench, architecture: str, head: str, shapes: str) -> None:
    site: Bench = bench(architecture, head, training__batch_shapes=shapes, evaluation__batch_size=5)
    numbers = record_numbers(site.plan, site.workspace, site.alive(), held_out(site))
    for example, row in zip(site.examples, numbers, strict=True):
        alone = evaluate(site.workspace, site.alive(), [example], 1).metrics()
        assert row[-1] == pytest.approx(alone["loss"], rel=1e-5)
        assert row[0] == alone.get("accuracy", row[0])


def test_in_fixed_shapes_no_record_changes_the_numbers_of_another(bench: MakeBench) -> None:
    site: Bench = bench(model__dtype="bfloat16")
    assert site.plan.has_fixed_shapes
    whole = record_numbers(site.plan, site.workspace, site.alive(), held_out(site))
    for left_out in range(0, len(site.examples), 7):
        fewer = replace(site, examples=[*site.examples[:left_out], *site.examples[left_out + 1 :]])
        numbers = record_numbers(site.plan, site.workspace, site.alive(), held_out(fewer))
        np.testing.assert_array_equal(numbers, np.delete(whole, left_out, axis=0))


@pytest.mark.parametrize("form", ["coarse", "noisy"])
@pytest.mark.parametrize("keys", [{}, {"privacy__unit": "patient_id", "privacy__max_records_per_unit": 2}])
def test_the_coordinator_reads_what_a_site_sends(bench: MakeBench, form: str, keys: dict[str, Any]) -> None:
    site: Bench = bench(evaluation__site_metrics=form, **keys)
    sent = means(site)
    assert read_site_metrics(site.plan, sent.to_arrays()) == sent
    assert ("accuracy_noise" in sent.metrics()) == (form == "noisy")
    count = held_out(site).units.count
    assert sent.units == (0 if form == "coarse" and count < 10 else count)


def test_seeded_noise_repeats_and_differs_between_rounds_and_sites(bench: MakeBench) -> None:
    site: Bench = bench(**NOISY)
    assert means(site) == means(site)
    others = [means(site, 1), means(replace(site, name="other"))]
    assert all(np.all(np.array(other.means) != np.array(means(site).means)) for other in others)


def test_secure_noise_never_repeats(bench: MakeBench) -> None:
    site: Bench = bench(**NOISY, privacy__noise="secure")
    assert means(site).means != means(site).means


@pytest.mark.parametrize(
    ("keys", "number", "code"),
    [
        ({"evaluation__site_metrics": "off"}, 0, "privacy.metrics-off"),
        ({**NOISY, "evaluation__every": 2, "federation__rounds": 3}, 1, "privacy.unplanned-evaluation"),
        ({"federation__rounds": 3}, 4, "privacy.unplanned-evaluation"),
        ({"federation__rounds": 3}, -1, "privacy.unplanned-evaluation"),
        (NOISY, 0, "privacy.unreserved"),
    ],
)
def test_what_the_plan_or_the_ledger_does_not_allow_is_not_measured(
    bench: MakeBench, keys: dict[str, Any], number: int, code: str
) -> None:
    with pytest.raises(FedtuneError) as caught:
        measured(bench(**keys), number)
    assert caught.value.code == code


def test_a_reservation_serves_one_evaluation_of_its_own_round(bench: MakeBench) -> None:
    site: Bench = bench(**NOISY)
    used = reserved(site, 0)
    measured(site, 0, used)
    for number, reservation in ((0, used), (1, reserved(site, 0))):
        with pytest.raises(FedtuneError) as caught:
            measured(site, number, reservation)
        assert caught.value.code == "ledger.not-reserved"


@pytest.mark.parametrize(
    "spoiled",
    [
        {"means": np.array([0.5, np.nan])},
        {"means": np.array([0.5, np.inf])},
        {"means": np.array([0.5])},
        {"means": np.array([0.5, 1.0], np.float32)},
        {"units": np.array([-1])},
        {"units": np.array([2.0])},
        {"confusion": np.zeros((3, 3), np.int64)},
    ],
)
def test_a_release_in_another_form_is_refused(bench: MakeBench, spoiled: dict[str, Any]) -> None:
    plan, good = bench(**NOISY).plan, UnitMeans((0.5, 1.0), 20, (0.0, 0.0)).to_arrays()
    read_site_metrics(plan, good)
    with pytest.raises(MessageError) as caught:
        read_site_metrics(plan, good | spoiled)
    assert caught.value.code == "message.broken-tally"


def test_a_plan_that_measures_more_often_than_it_pays_for_is_refused(bench: MakeBench) -> None:
    site: Bench = bench(**NOISY)
    longer = site.plan_with(federation__rounds=site.plan.federation.rounds + 1)
    with pytest.raises(FedtuneError) as caught:
        event_of_evaluation(longer.plan)
    assert caught.value.code == "privacy.uncovered-evaluations"
