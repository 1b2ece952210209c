"""Site objectives beside plain training: FedProx's proximal term and SCAFFOLD's control variates, after the noise.

With w the site's weights, x the global ones it received, g̃ₖ the noised mean gradient of local step k of K:

| objective | gradient of a step | else |
|---|---|---|
| FedProx | g̃ₖ + μ·(w − x) | the gradient of ½·μ·‖w − x‖² |
| SCAFFOLD | g̃ₖ − cᵢ + c | site: cᵢ⁺ = (1/K)·Σ g̃ₖ, sends Δcᵢ = cᵢ⁺ − cᵢ; coordinator: c ← c + Σ pᵢ·Δcᵢ over who came |

Sources: FedProx, Li et al. (arXiv 1812.06127); SCAFFOLD, Karimireddy et al. (arXiv 1910.06378); with DP, Noble et al.
(arXiv 2111.09278).

**What DP needs.** Both terms take a `NoisyGradient` and return one, so neither can be added before the clipping.

- The proximal term is a function of w and x, both made of noised gradients: post-processing, no cost. Added to a
  record's loss instead it would be clipped along with the gradient and vanish with an empty batch.
- SCAFFOLD's Δcᵢ leaves the site, so it is a release. From the noised gradients that the steps took (the paper's option
  II) it is a function of what the accountant has paid for already: DP-SGD's guarantee covers every g̃ₖ by itself, not
  the last weights alone. No cost, no event. An accountant of the last iterate alone would not cover it.
- The paper's option I, the site's gradient at x, reads the records once more, unclipped and unnoised: refused under DP.
  To pay for it would take a clipped, noised gradient and an event of its own each round.
- c and cᵢ are functions of earlier releases; subtracting them costs nothing.

What it costs in accuracy: cᵢ carries the noise of K steps, v/K in each coordinate beside v in g̃ₖ, but the same in all
K steps. A site's drift gets the noise variance K·v·(2 − 1/n) instead of K·v when all n sites take part with equal
weights; in the mean over them the variates sum to zero and add nothing.

Knows no model, no message and no optimiser. Where the coordinates of what is trained change from round to round
(`fedsvd`, `flora`, `fedask`, `rolora`), a kept cᵢ would point elsewhere: not to be combined. Δcᵢ is as much a lever
for an attacker as the update is, and must pass the same validation and the same robust rule.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Literal

import numpy as np

from fedtune.errors import AggregationError, PrivacyError

if TYPE_CHECKING:
    from torch import Tensor

    from fedtune.model.layout import AdapterState, Array
    from fedtune.privacy.noise import NoisyGradient


def with_proximal_term(gradient: NoisyGradient, weights: Tensor, received: Tensor, mu: float) -> NoisyGradient:
    """Return g̃ + μ·(w − x), all (P,); μ ≥ 0 in units of 1 / learning rate. Error: `bad-proximal`."""
    if not 0 <= mu < float("inf"):
        raise AggregationError("bad-proximal", f"a proximal strength of {mu}", hint="give 0 or more")
    return replace(gradient, mean=gradient.mean + mu * (weights - received))


def with_variates(gradient: NoisyGradient, own: Tensor, common: Tensor) -> NoisyGradient:
    """Return g̃ − cᵢ + c, all (P,); zeros for both before the first round are plain training.

    Keep g̃ for `added`: the sum of corrected gradients would give cᵢ⁺ − cᵢ + c.
    """
    return replace(gradient, mean=gradient.mean - own + common)


@dataclass(frozen=True, slots=True)
class GradientSum:
    """Σ g̃ₖ (P,) float64 over `steps` local steps; `noise_std` is the smallest noise any of them carried."""

    total: Tensor
    steps: int
    noise_std: float


def added(so_far: GradientSum | None, gradient: NoisyGradient) -> GradientSum:
    """Return the sum with one step's own gradient, before any correction; None is the empty sum."""
    if so_far is None:
        return GradientSum(gradient.mean.double(), 1, gradient.noise_std)
    noise = min(so_far.noise_std, gradient.noise_std)
    return GradientSum(so_far.total + gradient.mean.double(), so_far.steps + 1, noise)


def new_variate(gradients: GradientSum, *, private: bool) -> Tensor:
    """Return cᵢ⁺ = (1/K)·Σ g̃ₖ, (P,) float32: option II of the paper, for any site optimiser and schedule.

    For SGD at a constant rate η it is the paper's cᵢ − c + (x − y)/(K·η). Post-processing of the noised gradients.
    Error: `unaccounted-variate` in a private study when a step carried no noise.
    """
    if private and not gradients.noise_std > 0:
        raise PrivacyError(
            "unaccounted-variate",
            "a control variate would be made of a gradient without noise, and it leaves the site",
            hint="make it of the noised gradients of the round's steps",
        )
    return (gradients.total / gradients.steps).float()


def check_variates(source: Literal["steps", "full-gradient"], *, private: bool) -> None:
    """Raise `unaccounted-variate` for option I in a private study: one more look at all records, which no event covers.

    "steps" is option II, "full-gradient" option I.
    """
    if private and source == "full-gradient":
        raise PrivacyError(
            "unaccounted-variate",
            "SCAFFOLD's option I releases a site's whole gradient once more each round, which no ε covers",
            hint="make the variates of the noised steps (option II), or use FedProx",
        )


def next_common_variate(common: AdapterState, mean_change: AdapterState, share: float) -> dict[str, Array]:
    """Return c + share·mean(Δcᵢ) tensor by tensor, float32.

    `mean_change` is the weighted mean over the sites that came, `share` the part of all sites' weights that they hold
    (the paper's |S| / N): then c stays Σ pᵢ·cᵢ over all sites, whoever came. Errors: `bad-share`, `not-finite`.
    """
    if not 0 < share <= 1 + 1e-9:
        raise AggregationError("bad-share", f"the sites of a round cannot hold {share} of all weights")
    return {name: _moved(name, array, mean_change, share) for name, array in common.items()}


def _moved(name: str, array: Array, change: Mapping[str, Array], share: float) -> Array:
    wide = array.astype(np.float64) + share * change[name].astype(np.float64)
    with np.errstate(over="ignore"):
        narrow = wide.astype(np.float32)
    if not np.isfinite(narrow).all():
        raise AggregationError("not-finite", f"the common variate of {name} leaves float32's range")
    return narrow
