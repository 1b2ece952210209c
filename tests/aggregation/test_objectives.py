from dataclasses import dataclass

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fedtune.aggregation import objectives
from fedtune.errors import FedtuneError, PrivacyError
from fedtune.privacy.noise import NoisyGradient

RATE, STEPS, SIZE = 0.05, 20, 3
seeds = st.integers(0, 2**32 - 1)


def noisy(values: torch.Tensor, noise_std: float = 1.0) -> NoisyGradient:
    return NoisyGradient(values, noise_std, 10.0)


def vector(seed: int) -> torch.Tensor:
    return torch.tensor(np.random.default_rng(seed).standard_normal(SIZE), dtype=torch.float32)


@given(seed=seeds, mu=st.floats(0, 10))
def test_the_proximal_term_is_the_gradient_of_the_distance(seed: int, mu: float) -> None:
    weights, received, gradient = vector(seed).requires_grad_(), vector(seed + 1), vector(seed + 2)
    loss = gradient @ weights + 0.5 * mu * ((weights - received) ** 2).sum()
    (expected,) = torch.autograd.grad(loss, weights)
    reached = objectives.with_proximal_term(noisy(gradient), weights.detach(), received, mu)
    torch.testing.assert_close(reached.mean, expected)
    assert (reached.noise_std, reached.denominator) == (1.0, 10.0)


@pytest.mark.parametrize("mu", [-1.0, float("nan"), float("inf")])
def test_a_proximal_term_that_pushes_away_is_refused(mu: float) -> None:
    with pytest.raises(FedtuneError) as caught:
        objectives.with_proximal_term(noisy(vector(0)), vector(0), vector(0), mu)
    assert caught.value.code == "aggregation.bad-proximal"


def test_before_the_first_round_variates_change_nothing() -> None:
    zero = torch.zeros(SIZE)
    assert torch.equal(objectives.with_variates(noisy(vector(1)), zero, zero).mean, vector(1))


@given(seed=seeds)
def test_the_mean_of_the_noised_steps_is_the_papers_option_two(seed: int) -> None:
    start, own, common = vector(seed), vector(seed + 1), vector(seed + 2)
    weights, total = start.clone(), None
    for step in range(STEPS):
        gradient = noisy(vector(seed + 3 + step))
        total = objectives.added(total, gradient)
        weights = weights - RATE * objectives.with_variates(gradient, own, common).mean
    paper = own - common + (start - weights) / (STEPS * RATE)
    torch.testing.assert_close(objectives.new_variate(total, private=True), paper, atol=1e-5, rtol=1e-5)


def test_the_sum_of_corrected_gradients_would_be_another_variate() -> None:
    # The control: why `added` takes the gradient before its correction.
    own, common, gradient = vector(1), vector(2), noisy(vector(3))
    corrected = objectives.added(None, objectives.with_variates(gradient, own, common))
    assert (objectives.new_variate(corrected, private=True) - vector(3)).abs().max() > 0.1


@pytest.mark.parametrize("at", range(3))
def test_one_step_without_noise_makes_a_variate_unaccounted(at: int) -> None:
    total = None
    for step in range(3):
        total = objectives.added(total, noisy(vector(step), 0.0 if step == at else 1.0))
    objectives.new_variate(total, private=False)
    with pytest.raises(PrivacyError) as caught:
        objectives.new_variate(total, private=True)
    assert caught.value.code == "privacy.unaccounted-variate"


def test_a_full_gradient_is_refused_only_where_privacy_is_promised() -> None:
    objectives.check_variates("full-gradient", private=False)
    objectives.check_variates("steps", private=True)
    with pytest.raises(PrivacyError) as caught:
        objectives.check_variates("full-gradient", private=True)
    assert "option II" in caught.value.hint


@given(seed=seeds, answered=st.integers(1, 4))
def test_the_common_variate_stays_the_mean_of_all_sites_whoever_came(seed: int, answered: int) -> None:
    generator = np.random.default_rng(seed)
    weights = generator.dirichlet(np.ones(4))
    old, new = (generator.standard_normal((4, SIZE)).astype(np.float32) for _ in range(2))
    new[answered:] = old[answered:]
    came = weights[:answered] / weights[:answered].sum()
    change = {"x": (came @ (new - old)[:answered]).astype(np.float32)}
    reached = objectives.next_common_variate(
        {"x": (weights @ old).astype(np.float32)}, change, float(weights[:answered].sum())
    )
    np.testing.assert_allclose(reached["x"], weights @ new, atol=1e-5)


@pytest.mark.parametrize("share", [0.0, -1.0, 1.5, float("nan")])
def test_a_share_that_no_round_can_have_is_refused(share: float) -> None:
    zero = {"x": np.zeros(2, np.float32)}
    with pytest.raises(FedtuneError) as caught:
        objectives.next_common_variate(zero, zero, share)
    assert caught.value.code == "aggregation.bad-share"


def test_a_common_variate_beyond_float32_is_refused() -> None:
    high = {"x": np.full(2, 3e38, np.float32)}
    with pytest.raises(FedtuneError) as caught:
        objectives.next_common_variate(high, high, 1.0)
    assert caught.value.code == "aggregation.not-finite"


@dataclass(frozen=True)
class Quadratic:
    """Site i's loss ½·hᵢ·(w − oᵢ)²: curvature and optimum differ from site to site."""

    curvature: torch.Tensor
    optimum: torch.Tensor

    def gradient(self, weights: torch.Tensor, noise: torch.Tensor) -> torch.Tensor:
        return self.curvature * (weights - self.optimum) + noise


SITES = [
    Quadratic(torch.tensor([1.0]), torch.tensor([0.0])),
    Quadratic(torch.tensor([8.0]), torch.tensor([1.0])),
    Quadratic(torch.tensor([0.2]), torch.tensor([9.0])),
]
OPTIMUM = (1.0 * 0 + 8 * 1 + 0.2 * 9) / 9.2


def study(rounds: int, *, scaffold: bool, mu: float = 0.0, noise: float = 0.0) -> tuple[float, list[float]]:
    """Federated rounds of many local steps on the three sites; returns the last global and each site's last drift."""
    generator = torch.Generator().manual_seed(0)
    weights, common = torch.zeros(1), torch.zeros(1)
    own = [torch.zeros(1) for _ in SITES]
    drifts: list[float] = []
    for _ in range(rounds):
        ends, changes = [], []
        for i, site in enumerate(SITES):
            local, total = weights.clone(), None
            for _ in range(STEPS):
                step = noisy(site.gradient(local, noise * torch.randn(1, generator=generator)), noise or 1.0)
                total = objectives.added(total, step)
                if scaffold:
                    step = objectives.with_variates(step, own[i], common)
                local = local - RATE * objectives.with_proximal_term(step, local, weights, mu).mean
            ends.append(local)
            fresh = objectives.new_variate(total, private=True)
            changes.append(fresh - own[i])
            own[i] = fresh
        drifts = [float(end - weights) for end in ends]
        weights = torch.stack(ends).mean(0)
        mean_change = {"x": torch.stack(changes).mean(0).numpy()}
        common = torch.tensor(objectives.next_common_variate({"x": common.numpy()}, mean_change, 1.0)["x"])
    return float(weights), drifts


def test_scaffold_reaches_the_common_optimum_where_local_steps_alone_do_not() -> None:
    plain, _ = study(200, scaffold=False)
    corrected, drifts = study(200, scaffold=True)
    assert abs(plain - OPTIMUM) > 0.2
    assert corrected == pytest.approx(OPTIMUM, abs=1e-3)
    assert max(abs(drift) for drift in drifts) < 1e-3


def test_fedprox_keeps_sites_nearer_to_the_global_adapter() -> None:
    _, far = study(50, scaffold=False)
    _, near = study(50, scaffold=False, mu=5.0)
    assert max(map(abs, near)) < 0.6 * max(map(abs, far))


def test_variates_double_a_sites_noise_and_cancel_in_the_mean() -> None:
    # No gradient but noise, 50,000 coordinates at once: the variances are the docstring's.
    size, sites, steps = 50_000, 3, 4
    generator = torch.Generator().manual_seed(1)
    noise = torch.randn(2, sites, steps, size, generator=generator)
    own = [earlier.mean(0) for earlier in noise[0]]
    common = torch.stack(own).mean(0)
    drifts = torch.stack(
        [sum(objectives.with_variates(noisy(step), own[i], common).mean for step in noise[1, i]) for i in range(sites)]
    )
    assert float(drifts[0].var()) == pytest.approx(steps * (2 - 1 / sites), rel=0.05)
    torch.testing.assert_close(drifts.mean(0), noise[1].sum(1).mean(0), atol=1e-5, rtol=0)
