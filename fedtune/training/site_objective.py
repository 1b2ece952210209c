"""What a site's steps follow besides its records' gradient: FedProx's pull and SCAFFOLD's correction, after the noise.

The formulas, and why neither costs privacy, are in `fedtune.aggregation.objectives`; here they meet parameters.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from fedtune.aggregation.objectives import GradientSum, added, new_variate, with_proximal_term, with_variates
from fedtune.config.plan import StudyPlan
from fedtune.privacy.noise import NoisyGradient

Arrays = Mapping[str, NDArray[np.float32]]
Named = Sequence[tuple[str, nn.Parameter]]


@dataclass(frozen=True, slots=True)
class Variates:
    """SCAFFOLD's control variates by tensor: the coordinator's c, and the site's own cᵢ, empty before its first."""

    common: Arrays
    own: Arrays


class SiteObjective:
    """The gradients of one round's steps, from the noised ones: g̃ + µ·(w − x) − cᵢ + c, each term where it is wanted.

    Made before the first step, when the parameters are x. Flat vectors are (P,) in the order of `parameters`.
    """

    def __init__(self, plan: StudyPlan, parameters: Named, variates: Variates | None) -> None:
        self._parameters, self._mu = parameters, plan.training.proximal
        self._private = plan.promise.mode == "dp"
        self._received = self._weights() if self._mu else None
        self._sum: GradientSum | None = None
        self._common = self._own = None
        if variates is not None:
            self._common, self._own = self._flat(variates.common), self._flat(variates.own)

    def of(self, gradient: NoisyGradient) -> NoisyGradient:
        """Return the gradient of a step."""
        corrected = gradient
        if self._common is not None and self._own is not None:
            self._sum = added(self._sum, gradient)
            corrected = with_variates(corrected, self._own, self._common)
        if self._received is not None:
            corrected = with_proximal_term(corrected, self._weights(), self._received, self._mu)
        return corrected

    def result(self) -> tuple[Arrays, Arrays]:
        """Return cᵢ⁺ and Δcᵢ by tensor, both empty without variates.

        Error: `privacy.unaccounted-variate` where a private step had no noise.
        """
        if self._sum is None or self._own is None:
            return {}, {}
        variate = new_variate(self._sum, private=self._private)
        return self._named(variate), self._named(variate - self._own)

    def _weights(self) -> Tensor:
        return torch.cat([parameter.detach().reshape(-1).float() for _, parameter in self._parameters])

    def _flat(self, arrays: Arrays) -> Tensor:
        parts = (_or_zero(arrays.get(name), parameter) for name, parameter in self._parameters)
        return torch.cat([part.reshape(-1) for part in parts])

    def _named(self, vector: Tensor) -> dict[str, NDArray[np.float32]]:
        sizes = [parameter.numel() for _, parameter in self._parameters]
        pieces: Iterable[Any] = torch.split(vector, sizes)
        return {
            name: piece.reshape(parameter.shape).cpu().numpy().copy()
            for (name, parameter), piece in zip(self._parameters, pieces, strict=True)
        }


def _or_zero(array: NDArray[np.float32] | None, parameter: nn.Parameter) -> Tensor:
    if array is None:
        return torch.zeros(parameter.shape, dtype=torch.float32, device=parameter.device)
    return torch.tensor(array, device=parameter.device)
