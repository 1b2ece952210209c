"""LoRA aggregation algorithms: which tensors travel, and how the sites' mean becomes the next global adapter.

The target is the mean update M = Σ pᵢ·Bᵢ·Aᵢ with weights pᵢ of sum 1 (times alpha / r, which nothing here touches).

| name | trained and sent | coordinator | sent back | equals M |
|---|---|---|---|---|
| `fedit` | A, B, head | Ā, B̄ | A, B, head | no: M − B̄·Ā = Σ pᵢ·(Bᵢ − B̄)·(Aᵢ − Ā) |
| `ffa` | B, head | B̄; A stays what the plan's seed drew at every site | B, head | yes |
| `fedsvd` | B, head | B̄, then (A, B̄) re-factored with orthonormal rows in A | A, B, head | yes |

"Equals M" is for server optimiser `fedavg` at learning rate 1; any other moves the global adapter from where it was
towards the mean. A head's tensors are averaged as they are. Sources: FedIT (arXiv 2305.05644), FFA-LoRA (arXiv
2403.12313), FedSVD (arXiv 2505.12805).

An algorithm is a set of pure functions over serialisable state. Knows no site, no message and no model.
"""

# ruff: noqa: N806
# A and B are the factors' names in every LoRA paper and in PEFT.

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

import numpy as np

from fedtune.aggregation import server_optimizers
from fedtune.aggregation.algebra import basis_change, thin_refactor
from fedtune.aggregation.server_optimizers import MOMENTUM, OptimizerState
from fedtune.errors import AggregationError

if TYPE_CHECKING:
    from collections.abc import Callable

    from fedtune.config.schema import AggregationSettings
    from fedtune.model.layout import AdapterLayout, AdapterState, Array

    Outcome = tuple[dict[str, Array], OptimizerState]
    Refactor = Callable[[AdapterLayout, dict[str, Array], OptimizerState], Outcome]


def _keep(_layout: AdapterLayout, state: dict[str, Array], opt_state: OptimizerState) -> Outcome:
    """Leave the factors as the mean made them."""
    return state, opt_state


def _orthonormalise(layout: AdapterLayout, state: dict[str, Array], opt_state: OptimizerState) -> Outcome:
    """Give every A orthonormal rows; momentum on B is a direction of ΔW in A's coordinates, so it turns with them."""
    state, moments = dict(state), dict(opt_state.moments)
    for spec_A, spec_B in layout.pairs:
        A, B = state[spec_A.name], state[spec_B.name]
        new_A, new_B = thin_refactor(A, B)
        state[spec_A.name], state[spec_B.name] = new_A.astype(np.float32), new_B.astype(np.float32)
        momentum = MOMENTUM + spec_B.name
        if momentum in moments:
            moments[momentum] = moments[momentum] @ basis_change(A, new_A)
    return state, OptimizerState(opt_state.step, moments)


@dataclass(frozen=True, slots=True)
class Algorithm:
    """One row of the module's table.

    `trains_a` says whether a site trains and sends A, `returns_a` whether the coordinator sends A back, and `refactor`
    rewrites the new global adapter without changing any B·A, and the server optimiser's state along with it.
    """

    name: str
    trains_a: bool
    returns_a: bool
    refactor: Refactor

    def trained(self, layout: AdapterLayout) -> AdapterLayout:
        """Return what a site trains; every other tensor of `layout` must leave the site's round as it came."""
        return layout if self.trains_a else layout.without("lora_A")

    def upload(self, layout: AdapterLayout) -> AdapterLayout:
        """Return what a site sends: exactly what it trains."""
        return self.trained(layout)

    def download(self, layout: AdapterLayout) -> AdapterLayout:
        """Return what the coordinator sends: what a site cannot derive from the plan's seed."""
        return layout if self.returns_a else layout.without("lora_A")

    def start(self, settings: AggregationSettings, layout: AdapterLayout, global_state: AdapterState) -> OptimizerState:
        """Return the server optimiser's state before the first round."""
        return server_optimizers.init(settings, {name: global_state[name] for name in self.upload(layout).names})

    def step(
        self,
        settings: AggregationSettings,
        layout: AdapterLayout,
        global_state: AdapterState,
        mean_of_uploads: AdapterState,
        opt_state: OptimizerState,
    ) -> Outcome:
        """Return the next global adapter, all tensors of `layout`, and the server optimiser's next state.

        `mean_of_uploads` has the tensors of `upload(layout)`. The optimiser acts in the basis the sites trained in;
        only then is the adapter re-factored. Nothing is changed in place; tensors that no site trains are passed on as
        the same objects, except that `fedsvd` makes a new A. Error: `not-finite`, from the optimiser.
        """
        moved, opt_state = server_optimizers.apply(settings, global_state, mean_of_uploads, opt_state)
        merged = {name: moved.get(name, global_state[name]) for name in layout.names}
        return self.refactor(layout, merged, opt_state)


ALGORITHMS: Final = {
    algorithm.name: algorithm
    for algorithm in (
        Algorithm("fedit", trains_a=True, returns_a=True, refactor=_keep),
        Algorithm("ffa", trains_a=False, returns_a=False, refactor=_keep),
        Algorithm("fedsvd", trains_a=False, returns_a=True, refactor=_orthonormalise),
    )
}


def get_algorithm(name: str) -> Algorithm:
    """Return the algorithm of that name; `unknown-algorithm` names those there are."""
    if name not in ALGORITHMS:
        raise AggregationError(
            "unknown-algorithm",
            f"there is no aggregation algorithm {name!r}",
            hint=f"set aggregation.algorithm to one of {', '.join(ALGORITHMS)}",
        )
    return ALGORITHMS[name]
