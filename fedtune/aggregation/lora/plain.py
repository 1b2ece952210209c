"""What an algorithm has learnt as one plain LoRA adapter, which PEFT and every other tool can hold.

Rules that add to the base or train a core end with W − W0 = s·B·A of another rank than the plan's, and of another rank
in each layer. Zero rows of A and columns of B bring all layers to one rank without changing a product.
"""

# ruff: noqa: N806
# A and B are the factors' names in every LoRA paper and in PEFT.

from __future__ import annotations

import numpy as np

from fedtune.aggregation.lora.factors import fit_rank, only
from fedtune.aggregation.lora.protocol import Algorithm, ServerState
from fedtune.errors import AggregationError
from fedtune.model.layout import AdapterLayout, Array


def plain_adapter(algorithm: Algorithm, layout: AdapterLayout, state: ServerState) -> dict[str, Array]:
    """Return A (R, d_in) and B (d_out, R) of every layer at the study's scale, and the head; R is at least the plan's.

    An adapter at the plan's rank comes back bit for bit. Error: `no-global-adapter` for a rule that makes none.
    """
    if not algorithm.traits.releases:
        raise AggregationError(
            "no-global-adapter",
            "a part of the adapter is kept at each site, so the coordinator has none to release",
            hint="export it at the sites: fedtune client adapter STUDY --out DIR, or use aggregation.algorithm=fedsvd",
        )
    update = algorithm.server.update(layout, state)
    planned = layout.pairs[0][0].shape[0]
    rank = max([planned, *(A.shape[0] for A, _ in update.values())])
    found = {name: np.asarray(state.adapter[name], np.float32) for name in only(layout, "head").names}
    for spec_A, spec_B in layout.pairs:
        A, B = fit_rank(*update[spec_A.layer], rank)
        found[spec_A.name], found[spec_B.name] = np.asarray(A, np.float32), np.asarray(B, np.float32)
    return {name: found[name] for name in sorted(found)}
