"""FedProx and SCAFFOLD in a site's own round: the published formulas, with the noise, step by step."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch
from torch import nn

from fedtune.data.batches import collate
from fedtune.errors import PrivacyError
from fedtune.privacy.noise import NoisyGradient
from fedtune.training import local
from fedtune.training.site_objective import SiteObjective, Variates
from tests.support.bench import Bench, make_bench

if TYPE_CHECKING:
    from collections.abc import Callable

RATE = 0.3
Arrays = dict[str, np.ndarray]
modes = pytest.mark.parametrize("mode", ["dp", "off"])


@pytest.fixture(scope="module")
def whole_batches(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Bench]:
    """Benches whose every step sees every record: nothing but the noise is drawn."""

    def make(mode: str = "off", **keys: Any) -> Bench:
        torch.set_num_threads(1)
        folder = tmp_path_factory.mktemp("objective")
        fixed = {"training__sampling_rate": 1.0, "training__learning_rate": RATE, "privacy__mode": mode}
        return make_bench(
            folder, **{**fixed, "training__head_learning_rate": None, "training__noise_limit": None, **keys}
        )

    return make


def flat(state: Any, names: Any) -> np.ndarray:
    return np.concatenate([np.asarray(state[name], np.float64).ravel() for name in sorted(names)])


def gradients_of(site: Bench, monkeypatch: pytest.MonkeyPatch, **fields: Any) -> tuple[list[np.ndarray], Any, Arrays]:
    """Run a round and return the gradients before any correction, its result, and where it began."""
    seen: list[np.ndarray] = []
    inner = SiteObjective.of

    def of(self: SiteObjective, gradient: NoisyGradient) -> NoisyGradient:
        seen.append(gradient.mean.double().numpy().copy())
        return inner(self, gradient)

    monkeypatch.setattr(SiteObjective, "of", of)
    start = dict(site.alive())
    result = site.round(adapter=start, **fields)
    monkeypatch.setattr(SiteObjective, "of", inner)
    return seen, result, start


def random_variates(site: Bench, seed: int = 1) -> Variates:
    draw = np.random.default_rng(seed)
    layout = site.layouts[0]
    common, own = (
        {spec.name: draw.normal(size=spec.shape).astype(np.float32) for spec in layout.tensors} for _ in range(2)
    )
    return Variates(common, own)


@modes
@pytest.mark.parametrize("algorithm", ["fedit", "ffa"])
def test_a_round_of_fedprox_takes_the_papers_steps(
    whole_batches: Callable[..., Bench], monkeypatch: pytest.MonkeyPatch, mode: str, algorithm: str
) -> None:
    """w ← w − η·(g̃ + µ·(w − x)) with x what was received."""
    mu = 0.7
    site = whole_batches(mode, training__proximal=mu, training__local_steps=3, aggregation__algorithm=algorithm)
    gradients, result, start = gradients_of(site, monkeypatch)
    names = site.layouts[0].names
    x = flat(start, names)
    w = x.copy()
    for gradient in gradients:
        w = w - RATE * (gradient + mu * (w - x))
    assert len(gradients) == 3
    assert np.allclose(flat(result.state, names), w, atol=1e-6)
    without = x - RATE * sum(gradients)
    assert not np.allclose(without, w, atol=1e-4)


@modes
def test_a_round_of_scaffold_takes_the_papers_steps(
    whole_batches: Callable[..., Bench], monkeypatch: pytest.MonkeyPatch, mode: str
) -> None:
    """y ← y − η·(g̃ − cᵢ + c), cᵢ⁺ = cᵢ − c + (x − y)/(K·η) = the mean of the g̃ that the steps took."""
    site = whole_batches(mode, training__variates="scaffold", training__local_steps=3)
    variates = random_variates(site)
    gradients, result, start = gradients_of(site, monkeypatch, variates=variates)
    names = site.layouts[0].names
    common, own = (flat(one, names) for one in (variates.common, variates.own))
    y = flat(start, names) - RATE * sum(gradient - own + common for gradient in gradients)
    assert np.allclose(flat(result.state, names), y, atol=1e-5)
    paper = own - common + (flat(start, names) - flat(result.state, names)) / (3 * RATE)
    assert np.allclose(flat(result.variate, names), sum(gradients) / 3, atol=1e-6)
    assert np.allclose(flat(result.variate, names), paper, atol=1e-4)
    assert np.allclose(flat(result.variate_change, names), flat(result.variate, names) - own, atol=1e-6)


def test_under_privacy_the_variate_is_made_of_the_noised_gradients_that_were_paid_for(
    whole_batches: Callable[..., Bench], monkeypatch: pytest.MonkeyPatch
) -> None:
    """It differs from the mean of the clipped ones by the noise of K steps, as much as the plan says."""
    site = whole_batches("dp", training__variates="scaffold", training__local_steps=4, privacy__noise_multiplier=5.0)
    clipped: list[np.ndarray] = []
    inner = local.add_noise

    def add_noise(total: Any, sigma: float, source: Any, expected: float) -> NoisyGradient:
        clipped.append(total.total.double().numpy() / expected)
        noisy = inner(total, sigma, source, expected)
        assert noisy.noise_std == pytest.approx(sigma * total.sensitivity)
        return noisy

    monkeypatch.setattr(local, "add_noise", add_noise)
    result = site.round(adapter=site.alive(), variates=Variates({}, {}))
    names = site.layouts[0].names
    error = flat(result.variate, names) - sum(clipped) / 4
    promise = site.plan.promise
    wanted = promise.noise_multiplier * promise.clip_norm / promise.expected_batch(len(site.examples)) / np.sqrt(4)
    assert error.std() == pytest.approx(wanted, rel=0.2)


def test_a_gradient_without_noise_makes_no_variate_of_a_private_study(whole_batches: Callable[..., Bench]) -> None:
    site = whole_batches("dp", training__variates="scaffold")
    parameter = nn.Parameter(torch.zeros(3))
    objective = SiteObjective(site.plan, [("x", parameter)], Variates({}, {}))
    objective.of(NoisyGradient(torch.ones(3), 1.0, 1.0))
    objective.of(NoisyGradient(torch.ones(3), 0.0, 1.0))
    with pytest.raises(PrivacyError, match=r"privacy\.unaccounted-variate"):
        objective.result()


def test_both_objectives_together_are_the_sum_of_their_terms(whole_batches: Callable[..., Bench]) -> None:
    site = whole_batches("off", training__variates="scaffold", training__proximal=0.5)
    parameter = nn.Parameter(torch.tensor([1.0, 2.0, 3.0]))
    variates = Variates({"x": np.float32([1, 0, -1])}, {"x": np.float32([0.5, 0.5, 0.5])})
    objective = SiteObjective(site.plan, [("x", parameter)], variates)
    with torch.no_grad():
        parameter += 2.0
    gradient = NoisyGradient(torch.tensor([10.0, 20.0, 30.0]), 0.3, 4.0)
    corrected = objective.of(gradient)
    assert torch.allclose(corrected.mean, torch.tensor([10 - 0.5 + 1 + 1, 20 - 0.5 + 1, 30 - 0.5 - 1 + 1]))
    assert (corrected.noise_std, corrected.denominator) == (0.3, 4.0)
    variate, change = objective.result()
    assert np.allclose(variate["x"], [10, 20, 30])
    assert np.allclose(change["x"], [9.5, 19.5, 29.5])


def test_a_plan_without_either_leaves_the_gradient_as_it_is(whole_batches: Callable[..., Bench]) -> None:
    site = whole_batches("off")
    objective = SiteObjective(site.plan, [("x", nn.Parameter(torch.ones(2)))], None)
    gradient = NoisyGradient(torch.ones(2), 0.0, 1.0)
    assert objective.of(gradient) is gradient
    assert objective.result() == ({}, {})


def test_variates_go_to_the_tensors_of_their_names_in_their_shapes(whole_batches: Callable[..., Bench]) -> None:
    site = whole_batches("off", training__variates="scaffold")
    parameters = [("a", nn.Parameter(torch.zeros(2, 3))), ("b", nn.Parameter(torch.zeros(4)))]
    own = {"a": np.arange(6, dtype=np.float32).reshape(2, 3)}  # none of b yet
    objective = SiteObjective(site.plan, parameters, Variates({"b": np.full(4, 7, np.float32)}, own))
    corrected = objective.of(NoisyGradient(torch.zeros(10), 0.0, 1.0)).mean.numpy()
    assert np.array_equal(corrected[:6], -np.arange(6))
    assert np.array_equal(corrected[6:], np.full(4, 7))
    variate, change = objective.result()
    assert {name: array.shape for name, array in variate.items()} == {"a": (2, 3), "b": (4,)}
    assert np.array_equal(change["a"], -own["a"])


@modes
def test_an_optimiser_of_any_kind_makes_variates_of_gradients_and_not_of_its_steps(
    whole_batches: Callable[..., Bench], monkeypatch: pytest.MonkeyPatch, mode: str
) -> None:
    site = whole_batches(mode, training__variates="scaffold", training__optimizer="adamw", training__local_steps=2)
    gradients, result, _ = gradients_of(site, monkeypatch, variates=random_variates(site))
    assert np.allclose(flat(result.variate, site.layouts[0].names), sum(gradients) / 2, atol=1e-6)


def test_without_privacy_the_gradient_is_that_of_the_mean_loss(
    whole_batches: Callable[..., Bench],
) -> None:
    """One step of SCAFFOLD from zero variates: cᵢ⁺ is the site's gradient at x, by plain autograd over its records."""
    site = whole_batches("off", training__variates="scaffold", training__local_steps=1)
    start = dict(site.alive())
    result = site.round(adapter=start, variates=Variates({}, {}))
    workspace, names = site.workspace, site.layouts[0].names
    workspace.load(start)
    parameters = dict(workspace.train_only(site.layouts[0]))
    total = 0.0
    for example in site.examples:
        batch = collate([example], workspace.pad_id, workspace.task.kind)
        loss = nn.functional.cross_entropy(workspace.logits(batch), batch.labels)
        found = torch.autograd.grad(loss, [parameters[name] for name in sorted(names)])
        total = total + np.concatenate([one.double().numpy().ravel() for one in found])
    wanted = total / site.plan.promise.expected_batch(len(site.examples))
    assert np.allclose(flat(result.variate, names), wanted, atol=1e-5)
