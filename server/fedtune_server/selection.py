"""Which sites are asked in a round: all of them, or a sample that everyone can recompute from the plan."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from fedtune.config.plan import StudyPlan
from fedtune.privacy.random import SeededSource


def sites_of_round(plan: StudyPlan, sites: Sequence[str], number: int) -> list[str]:
    """Return the sites of round `number` (1-based) in site order; without replacement, uniform, from the plan's seed.

    Who is asked is public, so it does not amplify privacy: σ is calibrated for a site that is asked in every round.
    """
    size = plan.federation.sites_per_round
    if size is None or size >= len(sites):
        return list(sites)
    order = np.argsort(SeededSource("site-sampling", plan.seed, number).uniform(len(sites)), kind="stable")
    return [sites[index] for index in sorted(order[:size])]
