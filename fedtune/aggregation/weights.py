"""How much each site counts in the mean: what the plan says, and nothing that a site says.

With a count of records that a site reports, one site could take the model over, and no ε would cover the count.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from fedtune.errors import AggregationError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from fedtune.config.schema import AggregationSettings


def site_weights(settings: AggregationSettings, site_names: Sequence[str]) -> dict[str, float]:
    """Return one positive weight a site, in site order, with sum 1: equal, or the plan's numbers normalised.

    A round that misses sites needs no new weights: `StreamingMean` divides by the weights of those that came.
    Errors: `no-site`, `duplicate-site`, `weights-length`, `bad-weight`.
    """
    names = list(site_names)
    _check_names(names)
    weights = [1.0] * len(names) if settings.weights == "equal" else list(settings.weights)
    if len(weights) != len(names):
        raise AggregationError(
            "weights-length",
            f"aggregation.weights has {len(weights)} numbers for {len(names)} sites",
            hint="give one weight a site, in site order, or aggregation.weights=equal",
        )
    largest = max(weights)
    for name, weight in zip(names, weights, strict=True):
        if not (0 < weight < math.inf and weight / largest > 0):
            raise AggregationError(
                "bad-weight",
                f"aggregation.weights gives site {name} no positive weight, or one that vanishes beside the largest",
                hint="leave a site out of the federation instead of giving it no weight",
            )
    scaled = [weight / largest for weight in weights]
    total = math.fsum(scaled)
    return {name: weight / total for name, weight in zip(names, scaled, strict=True)}


def _check_names(names: list[str]) -> None:
    if not names:
        raise AggregationError("no-site", "the federation has no site", hint="set federation.sites to 1 or more")
    if len(set(names)) != len(names):
        raise AggregationError("duplicate-site", "two sites have one name", hint="name each site once")
