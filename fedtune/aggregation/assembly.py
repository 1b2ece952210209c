"""From a plan's words to the one algorithm that its rounds run, and to how updates are written.

The parts are independent decorators of an algorithm, put on in this order: control variates, a head that stays at the
site, a robust rule. What cannot be combined has been refused by `compatibility` when the plan was made, and is refused
again here wherever it would be wrong without a sound.
"""

from __future__ import annotations

from fedtune.aggregation.compression.codec import Codec, make_codec
from fedtune.aggregation.lora.local_head import with_local_head
from fedtune.aggregation.lora.protocol import Algorithm, Options
from fedtune.aggregation.lora.registry import get_algorithm
from fedtune.aggregation.lora.variates import with_variates
from fedtune.aggregation.robust.decorated import with_robust_rule
from fedtune.aggregation.robust.rules import RobustRule
from fedtune.config.schema import AggregationSettings, LoraSettings, TrainingSettings


def assemble(aggregation: AggregationSettings, training: TrainingSettings, lora: LoraSettings, seed: int) -> Algorithm:
    """Return the algorithm that a plan with these words runs."""
    options = Options(seed, aggregation.oversampling, aggregation.train_both)
    algorithm = get_algorithm(aggregation.algorithm, options)
    if training.variates == "scaffold":
        algorithm = with_variates(algorithm)
    if aggregation.local_head:
        algorithm = with_local_head(algorithm)
    rule = robust_rule(aggregation)
    return algorithm if rule is None else with_robust_rule(algorithm, rule, lora.alpha / lora.rank)


def robust_rule(aggregation: AggregationSettings) -> RobustRule | None:
    """Return the plan's robust rule, None for the plain mean."""
    if aggregation.robust == "none":
        return None
    return RobustRule(
        aggregation.robust, aggregation.attackers, aggregation.robust_chosen, aggregation.robust_threshold
    )


def codec_of(aggregation: AggregationSettings) -> Codec | None:
    """Return how updates are written, None for plain float32 tensors."""
    if aggregation.upload == "fp32" and aggregation.upload_keep == 1:
        return None
    return make_codec(aggregation.upload, aggregation.upload_keep, feedback=aggregation.error_feedback)
