"""Rounds about patients: a float64 loop over patients, an attack by all records of one, and bugs that would matter."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
from torch import Tensor, nn

from fedtune.data.units import Units
from fedtune.errors import PrivacyError
from fedtune.privacy.accounting import Event
from fedtune.privacy.clipping import ClippedSum
from fedtune.training import local
from tests.support.bench import Bench, make_bench
from tests.support.reference_round import reference_round

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from fedtune.model.layout import AdapterState
    from fedtune.privacy.noise import NoisyGradient
    from fedtune.privacy.random import RandomSource

MakeBench = Callable[..., Bench]
PATIENTS = {"privacy__unit": "patient_id", "privacy__max_records_per_unit": 4, "federation__sites": 1}


@pytest.fixture(scope="module")
def patients(tmp_path_factory: pytest.TempPathFactory) -> MakeBench:
    """Return a maker of sites with 11 patients to train on, one of whom has half of the file's records."""
    made: dict[tuple[str, str], Bench] = {}

    def make(architecture: str = "bert", head: str = "pooled") -> Bench:
        if (architecture, head) not in made:
            made[architecture, head] = make_bench(tmp_path_factory.mktemp(architecture), architecture, head, **PATIENTS)
        return made[architecture, head]

    return make


def distance(bench: Bench, number: int = 1) -> float:
    """How far a round ends from the reference, relative to how far the reference moved."""
    start = bench.alive()
    found, expected = bench.round(number, start).state, reference_round(bench, start, number)
    return error(found, expected, start)


def error(found: AdapterState, expected: dict[str, NDArray[np.float64]], start: AdapterState) -> float:
    apart = sum(float(np.square(found[name] - expected[name]).sum()) for name in expected)
    moved = sum(float(np.square(start[name] - expected[name]).sum()) for name in expected)
    return float(np.sqrt(apart / moved))


def test_the_file_holds_a_patient_with_more_records_than_a_step_uses(patients: MakeBench) -> None:
    site = patients()
    assert site.units is not None
    assert max(site.units.sizes) > 4 > min(site.units.sizes)
    assert site.units.count < len(site.examples)


@pytest.mark.parametrize("mode", ["dp", "off"])
@pytest.mark.parametrize(("architecture", "head"), [("bert", "pooled"), ("gpt2", "none"), ("llama", "architecture")])
def test_a_round_equals_a_float64_loop_over_patients(
    patients: MakeBench, architecture: str, head: str, mode: str
) -> None:
    assert distance(patients(architecture, head).plan_with(privacy__mode=mode), number=2) < 1e-5


@pytest.mark.parametrize("at_most", [1, 3, 1000])
@pytest.mark.parametrize("engine", ["lora", "opacus"])
def test_the_bound_on_a_patients_records_is_kept(patients: MakeBench, at_most: int, engine: str) -> None:
    site = patients().plan_with(privacy__max_records_per_unit=at_most, privacy__engine=engine)
    assert distance(site) < 1e-5


@pytest.mark.parametrize(
    "memory", [{"physical_batch": 1}, {"physical_batch": 3}, {"physical_tokens": 40}, {"physical_tokens": 1}]
)
def test_the_physical_batches_do_not_change_the_round(patients: MakeBench, memory: dict[str, int]) -> None:
    assert distance(patients().plan_with(**{f"training__{key}": value for key, value in memory.items()})) < 1e-5


def test_a_bound_on_tokens_bounds_what_the_model_sees(patients: MakeBench) -> None:
    site, seen = patients().plan_with(training__physical_tokens=60, training__physical_batch=1000), []
    handle = embeddings(site).register_forward_hook(lambda _layer, ids, _out: seen.append(tuple(ids[0].shape)))
    result = site.round()
    handle.remove()
    assert sum(records for records, _ in seen) == result.records_seen
    assert all(records * tokens <= 60 for records, tokens in seen)
    assert max(records for records, _ in seen) > 1


def embeddings(site: Bench) -> nn.Module:
    return next(layer for layer in site.workspace.model.modules() if isinstance(layer, nn.Embedding))


def test_above_the_noise_limit_the_rate_falls_with_the_number_of_patients(patients: MakeBench) -> None:
    assert distance(patients().plan_with(training__noise_limit=0.01)) < 1e-5


# --- draws ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("noise", ["seeded", "secure"])
def test_patients_are_drawn_at_the_rate_and_bring_no_more_than_the_bound(patients: MakeBench, noise: str) -> None:
    steps = {"training__local_steps": 60, "training__physical_batch": 64}
    site = patients().plan_with(privacy__sampling_rate=0.3, privacy__noise=noise, **steps)
    assert site.units is not None
    result = site.round()
    assert result.event == Event(0.7, 0.3, 60, 0.5, unit="patient_id", noise=noise)  # type: ignore[arg-type]
    brought = np.minimum(site.units.sizes, 4)
    spread = np.sqrt(60 * 0.3 * 0.7 * float(np.square(brought).sum()))
    assert abs(result.records_seen - 60 * 0.3 * brought.sum()) < 5 * spread


@pytest.mark.parametrize("noise", ["seeded", "secure"])
def test_over_the_steps_every_record_of_a_large_patient_is_used(patients: MakeBench, noise: str) -> None:
    terms = {"privacy__max_records_per_unit": 16, "training__local_steps": 30, "training__physical_batch": 64}
    site = patients().plan_with(privacy__sampling_rate=1.0, privacy__noise=noise, **terms)
    seen: set[tuple[int, ...]] = set()
    handle = embeddings(site).register_forward_hook(
        lambda _layer, ids, _out: seen.update(tuple(t for t in row if t) for row in ids[0].tolist())
    )
    site.round()
    handle.remove()
    assert {tuple(example.input_ids.tolist()) for example in site.examples} <= seen


def test_a_repeated_round_uses_the_same_records_and_the_next_one_others(patients: MakeBench) -> None:
    site = patients()
    first, again, following = (site.round(number).state for number in (1, 1, 2))
    assert all(np.array_equal(first[name], again[name]) for name in first)
    assert any(not np.array_equal(first[name], following[name]) for name in first)


def test_an_empty_draw_is_a_step_of_noise(patients: MakeBench) -> None:
    site = patients().plan_with(privacy__sampling_rate=1e-4)
    result = site.round()
    assert result.records_seen == 0
    assert result.event is not None
    assert all(np.linalg.norm(result.state[name] - site.workspace.initial[name]) > 0 for name in result.state)


# --- attack: all records of one patient -----------------------------------------------------------------------------


def clipped_sum(site: Bench, monkeypatch: pytest.MonkeyPatch) -> Tensor:
    """Return the sum of one step in which everybody is drawn, before any noise."""
    sums: list[Tensor] = []
    right = local.add_noise

    def spying(clipped: ClippedSum, sigma: float, source: RandomSource, expected: float) -> NoisyGradient:
        sums.append(clipped.total.clone())
        return right(clipped, sigma, source, expected)

    with monkeypatch.context() as patch:
        patch.setattr(local, "add_noise", spying)
        site.round(adapter=site.alive())
    (total,) = sums
    return total


def moved_by_one_patient(site: Bench, owners: list[str], monkeypatch: pytest.MonkeyPatch, unit: str) -> float:
    """By how much the sum moves when the patient "big" and all its records leave."""
    terms = {"privacy__unit": unit, "privacy__max_records_per_unit": None if unit == "record" else 1000}
    whole = site.plan_with(privacy__sampling_rate=1.0, training__local_steps=1, privacy__clip_norm=1e-3, **terms)
    stays = [at for at, owner in enumerate(owners) if owner != "big"]
    grouped = unit != "record"
    everybody = replace(whole, units=Units.grouped(owners) if grouped else None)
    without = replace(
        whole,
        examples=[whole.examples[at] for at in stays],
        units=Units.grouped([owners[at] for at in stays]) if grouped else None,
    )
    return float((clipped_sum(everybody, monkeypatch) - clipped_sum(without, monkeypatch)).norm())


@pytest.mark.parametrize(("architecture", "head"), [("bert", "pooled"), ("llama", "none")])
def test_a_patient_with_most_records_moves_the_sum_by_the_clip_norm_at_most(
    patients: MakeBench, monkeypatch: pytest.MonkeyPatch, architecture: str, head: str
) -> None:
    site = patients(architecture, head)
    same = replace(site, examples=[site.examples[0]] * 24 + list(site.examples[:6]))
    owners = ["big"] * 24 + [f"other {at // 2}" for at in range(6)]
    assert moved_by_one_patient(same, owners, monkeypatch, "patient_id") <= 1e-3 * (1 + 1e-6)


@pytest.mark.parametrize(("architecture", "head"), [("bert", "pooled"), ("llama", "none")])
def test_control_with_records_as_units_the_same_patient_moves_it_many_times_further(
    patients: MakeBench, monkeypatch: pytest.MonkeyPatch, architecture: str, head: str
) -> None:
    site = patients(architecture, head)
    same = replace(site, examples=[site.examples[0]] * 24 + list(site.examples[:6]))
    owners = ["big"] * 24 + [f"other {at // 2}" for at in range(6)]
    assert moved_by_one_patient(same, owners, monkeypatch, "record") > 20e-3


# --- what must be refused, and planted bugs -------------------------------------------------------------------------


def test_a_promise_about_patients_is_not_kept_with_records_and_the_other_way_round(patients: MakeBench) -> None:
    site = patients()
    assert site.units is not None
    by_record = site.plan_with(privacy__unit="record", privacy__max_records_per_unit=None)
    shorter = site.units.take(np.arange(len(site.examples) - 1))
    for wrong in (replace(site, units=None), by_record, replace(site, units=shorter)):
        with pytest.raises(PrivacyError, match=r"privacy\.units"):
            wrong.round()
    assert distance(replace(by_record, units=None)) < 1e-5


def records_clipped_one_by_one(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(local, "unit_rows", lambda batches, _units: batches)


def units_clipped_again_in_every_batch(patch: pytest.MonkeyPatch) -> None:
    right = local.unit_rows

    def forgetful(batches: Any, units: Any) -> Any:
        for rows, own in zip(batches, units, strict=True):
            yield from right([rows], [own])

    patch.setattr(local, "unit_rows", forgetful)


def the_same_records_of_a_patient_every_time(patch: pytest.MonkeyPatch) -> None:
    def first_ones(units: Units, drawn: Any, at_most: int, _source: Any) -> Any:
        return np.concatenate([units.records(unit)[:at_most] for unit in drawn])

    patch.setattr(local, "choose_records", first_ones)


def no_bound_on_a_patients_records(patch: pytest.MonkeyPatch) -> None:
    right = local.choose_records
    patch.setattr(local, "choose_records", lambda units, drawn, _bound, source: right(units, drawn, None, source))


@pytest.mark.parametrize(
    "plant",
    [
        records_clipped_one_by_one,
        units_clipped_again_in_every_batch,
        the_same_records_of_a_patient_every_time,
        no_bound_on_a_patients_records,
    ],
    ids=lambda plant: plant.__name__,
)
def test_the_comparison_catches_a_planted_bug(
    patients: MakeBench, monkeypatch: pytest.MonkeyPatch, plant: Callable[[pytest.MonkeyPatch], None]
) -> None:
    site = patients("bert", "architecture").plan_with(privacy__clip_norm=0.1, privacy__sampling_rate=1.0)
    assert distance(site) < 1e-5
    plant(monkeypatch)
    assert distance(site) > 1e-2


def test_the_comparison_catches_the_number_of_records_as_denominator(patients: MakeBench) -> None:
    site = patients()
    assert site.units is not None
    start = site.alive()
    ratio = site.units.count / len(site.examples)
    expected = reference_round(site, start)
    wrong = {name: start[name] + (value - start[name]) * ratio for name, value in expected.items()}
    assert error(site.round(adapter=start).state, wrong, start) > 0.1
