"""What a round draws: the sampler that trains is the accounted one, and noise repeats exactly where it should."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch

from fedtune.errors import LedgerError, PrivacyError
from fedtune.journal.ledger import Reservation
from fedtune.privacy.accounting import Event
from fedtune.privacy.random import SeededSource
from fedtune.training.local import Assignment, LocalResult, event_of_round, train_round
from tests.support.bench import Bench, make_bench
from tests.support.ledgers import charge_of, ledger
from tests.support.ledgers import reserved as reserved_for

if TYPE_CHECKING:
    from pathlib import Path

    from fedtune.model.layout import AdapterState

MakeBench = Callable[..., Bench]


def equal(one: AdapterState, other: AdapterState) -> bool:
    return one.keys() == other.keys() and all(np.array_equal(one[name], other[name]) for name in one)


def forward_passes(bench: Bench) -> tuple[list[int], Any]:
    """Note the batch size of each forward pass, until the handle is removed."""
    sizes: list[int] = []

    def note(_model: Any, args: Any, kwargs: Any) -> None:
        sizes.append(len(kwargs["input_ids"] if kwargs else args[0]))

    return sizes, bench.workspace.model.register_forward_pre_hook(note, with_kwargs=True)


# --- repeatable and independent -------------------------------------------------------------------------------------


@pytest.mark.parametrize("head", ["pooled", "architecture"])
def test_the_same_assignment_gives_the_same_bits(bench: MakeBench, head: str) -> None:
    site = bench("bert", head)
    first = site.round(adapter=site.alive())
    torch.manual_seed(123)  # neither the global generator nor what was trained before may matter
    site.round(number=2)
    again = site.round(adapter=site.alive())
    assert equal(first.state, again.state)
    assert (first.event, first.records_seen) == (again.event, again.records_seen)


def test_a_round_leaves_the_global_generator_alone(bench: MakeBench) -> None:
    site = bench()
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    site.round()
    assert torch.equal(torch.rand(3), expected)


@pytest.mark.parametrize("other", [{"site": "site-9"}, {"number": 2}])
def test_another_site_or_round_draws_other_noise(bench: MakeBench, other: dict[str, Any]) -> None:
    silent = noise_alone(bench())
    one, two = silent.round(), silent.round(**other)
    assert correlation(one, two, silent) < 0.2


def test_another_seed_draws_other_noise(bench: MakeBench) -> None:
    silent = noise_alone(bench())
    assert correlation(silent.round(), silent.plan_with(seed=8).round(), silent) < 0.2


def test_another_plan_draws_other_noise(bench: MakeBench) -> None:
    """Two studies on the same records with one seed must not share noise: their difference would show the data."""
    silent = noise_alone(bench())
    assert correlation(silent.round(), silent.plan_with(name="another").round(), silent) < 0.2


def test_secure_noise_is_new_each_time(bench: MakeBench) -> None:
    secret = noise_alone(bench()).plan_with(privacy__noise="secure")
    one, two = secret.round(), secret.round()
    assert one.event is not None
    assert one.event.noise == "secure"
    assert correlation(one, two, secret) < 0.2


def noise_alone(bench: Bench) -> Bench:
    """The bench with a rate at which no record is drawn."""
    return bench.plan_with(privacy__sampling_rate=1e-6, training__local_steps=1)


def correlation(one: LocalResult, two: LocalResult, bench: Bench) -> float:
    steps = [
        np.concatenate([(result.state[name] - bench.workspace.initial[name]).ravel() for name in sorted(result.state)])
        for result in (one, two)
    ]
    return abs(float(np.corrcoef(*steps)[0, 1]))


# --- Poisson sampling -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("rate", [0.05, 0.4])
def test_records_are_drawn_at_the_rate_of_the_event(bench: MakeBench, rate: float) -> None:
    site = bench().plan_with(privacy__sampling_rate=rate, training__local_steps=60)
    result = site.round()
    assert result.event == Event(0.7, rate, 60, 0.5)
    draws = 60 * len(site.examples)
    assert abs(result.records_seen - draws * rate) < 5 * np.sqrt(draws * rate * (1 - rate))


def test_the_size_of_a_batch_varies_as_a_binomial_does(bench: MakeBench) -> None:
    site = bench().plan_with(privacy__sampling_rate=0.3, training__local_steps=80, training__physical_batch=1000)
    sizes, handle = forward_passes(site)
    site.round()
    handle.remove()
    variance = len(site.examples) * 0.3 * 0.7
    assert 0.5 * variance < np.var(sizes) < 1.7 * variance


def test_the_accounted_rate_is_the_one_that_trains(bench: MakeBench) -> None:
    """A plan that trained at one rate and accounted another would be caught here: only the promise's rate exists."""
    site = bench().plan_with(training__sampling_rate=1.0, privacy__sampling_rate=0.05, training__local_steps=40)
    result = site.round()
    assert result.event is not None
    assert result.event.sampling_rate == 0.05
    assert result.records_seen < 0.2 * 40 * len(site.examples)


def test_at_rate_one_every_record_is_in_every_step(bench: MakeBench) -> None:
    site = bench().plan_with(privacy__sampling_rate=1.0)
    assert site.round().records_seen == 2 * len(site.examples)


def test_an_empty_batch_is_a_step_of_noise_alone_and_runs_no_model(bench: MakeBench) -> None:
    site = bench().plan_with(privacy__sampling_rate=1e-4, training__local_steps=3, privacy__noise_multiplier=1e-4)
    sizes, handle = forward_passes(site)
    result = site.round()
    handle.remove()
    assert (sizes, result.records_seen) == ([], 0)
    assert result.event == Event(1e-4, 1e-4, 3, 0.5)
    found = np.concatenate([(result.state[n] - site.workspace.initial[n]).ravel() for n in site.layouts[0].names])
    assert np.allclose(found, three_steps_of_noise(site, len(found)), rtol=1e-3, atol=1e-6)


def three_steps_of_noise(site: Bench, size: int) -> Any:
    source, total = SeededSource("training", site.plan.seed, site.plan.sha256, site.name, 1), np.zeros(size)
    for _ in range(3):
        source.uniform(len(site.examples))
        total += source.normal(size) * 1e-4 * 0.5 / (1e-4 * 24)
    return -0.3 * total


def test_a_site_without_records_is_refused(bench: MakeBench) -> None:
    site = bench()
    with pytest.raises(PrivacyError, match=r"privacy\.expected-batch"):
        replace(site, examples=[]).round()


# --- dropout --------------------------------------------------------------------------------------------------------


def test_dropout_masks_come_from_the_sites_own_stream(tmp_path: Path) -> None:
    site = make_bench(tmp_path, lora__dropout=0.5)
    first = site.round(adapter=site.alive())
    torch.manual_seed(1)
    assert equal(first.state, site.round(adapter=site.alive()).state)
    secret = site.plan_with(privacy__noise="secure", privacy__noise_multiplier=1e-6, privacy__sampling_rate=1.0)
    one, two = (secret.round(adapter=site.alive()) for _ in range(2))
    apart = max(float(np.abs(one.state[name] - two.state[name]).max()) for name in one.state)
    assert apart > 2e-5  # with so little noise, only unlike masks set two rounds this far apart


def test_control_without_dropout_two_secret_rounds_with_little_noise_agree(bench: MakeBench) -> None:
    site = bench()
    secret = site.plan_with(privacy__noise="secure", privacy__noise_multiplier=1e-6, privacy__sampling_rate=1.0)
    one, two = (secret.round(adapter=site.alive()) for _ in range(2))
    assert max(float(np.abs(one.state[name] - two.state[name]).max()) for name in one.state) < 1e-6


# --- reservation ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("reserved", [None, Event(0.7, 0.5, 1, 0.5), Event(9.0, 0.5, 2, 0.5)])
def test_a_round_is_not_trained_without_its_event_reserved(bench: MakeBench, reserved: Event | None) -> None:
    site = bench()
    assert reserved != event_of_round(site.plan)
    with ledger() as open_ledger:
        reservation = open_ledger.reserve(charge_of(site.plan, 1, reserved), ())
    assert refused_passes(site, reservation) == []


def test_a_reservation_serves_one_training_of_its_own_round(bench: MakeBench) -> None:
    site = bench()
    other_round = reserved_for(site.plan, 2)
    assert refused_passes(site, other_round) == []
    used = reserved_for(site.plan, 1)
    site.round(reservation=used)
    assert refused_passes(site, used) == []


def refused_passes(site: Bench, reservation: Reservation) -> list[int]:
    """Return the forward passes of a training that must be refused."""
    sizes, handle = forward_passes(site)
    assignment = Assignment(site.name, 1, site.workspace.initial, reservation)
    with pytest.raises(LedgerError, match=r"ledger\.not-reserved"):
        train_round(site.plan, site.workspace, site.examples, assignment, site.layouts)
    handle.remove()
    return sizes
