"""Which settings cannot work together, decided when the configuration is read and never in the middle of a study.

Every refusal gives the reason and the nearest combination that works. Knows only the settings: what depends on the data
or the number of sites is checked where those are known (`site_weights`).
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from fedtune.aggregation.server_optimizers import ADAPTIVE
from fedtune.errors import AggregationError

if TYPE_CHECKING:
    from fedtune.config.schema import AggregationSettings, TrainingSettings


def check(aggregation: AggregationSettings, training: TrainingSettings) -> None:
    """Raise when the algorithm, the server optimiser and the sites' optimiser cannot be combined.

    `fedsvd` turns the basis of B every round. A momentum on B is a direction of ΔW and is turned along at the
    coordinator; two things cannot be: a second moment, which belongs to single entries (`adaptive-with-fedsvd`), and
    the moments that a site keeps, which no message reaches (`kept-state-with-fedsvd`).
    """
    if aggregation.algorithm != "fedsvd":
        return
    if aggregation.server_optimizer in ADAPTIVE:
        raise AggregationError(
            "adaptive-with-fedsvd",
            f"{aggregation.server_optimizer} keeps a second moment for each entry of B, "
            "and fedsvd turns B's basis every round, so the entries change their meaning",
            hint="use aggregation.server_optimizer=fedavgm with fedsvd, or aggregation.algorithm=ffa with "
            f"{aggregation.server_optimizer}",
        )
    if training.optimizer_state == "keep" and (training.optimizer == "adamw" or training.momentum > 0):
        raise AggregationError(
            "kept-state-with-fedsvd",
            "training.optimizer_state=keep keeps moments of B in a basis that fedsvd turns before the site's next "
            "round",
            hint="use training.optimizer_state=reset with fedsvd, or aggregation.algorithm=ffa",
        )
