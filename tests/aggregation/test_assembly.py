"""From a plan's words to the algorithm that runs: every combination that the table allows works for a round."""

from __future__ import annotations

from itertools import product
from typing import Any

import numpy as np
import pytest

from fedtune.aggregation.assembly import assemble, codec_of, robust_rule
from fedtune.aggregation.compatibility import check
from fedtune.aggregation.lora import drift
from fedtune.aggregation.lora.gather import Collector
from fedtune.aggregation.lora.protocol import Algorithm, SiteState, Turn
from fedtune.aggregation.lora.registry import ALGORITHMS
from fedtune.aggregation.matrix import ALL_RULES
from fedtune.config.schema import AggregationSettings, FederationSettings, LoraSettings, ModelSettings, TrainingSettings
from fedtune.errors import AggregationError
from tests.aggregation.lora.world import initial, layout_of

LAYOUT = layout_of({"h.wide": (2, 11, 7), "h.tall": (2, 8, 9)})
SITES = 7
LORA, FEDERATION = LoraSettings(rank=2, alpha=4), FederationSettings(sites=SITES, quorum=1)


class Words:
    """What a plan says, with defaults for the rest."""

    def __init__(self, aggregation: dict[str, Any], variates: Any = "none") -> None:
        self.aggregation, self.training = AggregationSettings(**aggregation), TrainingSettings(variates=variates)
        self.lora, self.federation, self.model = LORA, FEDERATION, ModelSettings()

    @property
    def algorithm(self) -> Algorithm:
        return assemble(self.aggregation, self.training, self.lora, 7)


def combinations() -> list[Words]:
    found = []
    optimizers = [("fedavg", 1.0), ("fedavgm", 0.5), ("fedadam", 0.1)]
    for name, head, rule, variates, (optimizer, rate) in product(
        ALGORITHMS, (False, True), ("none", *ALL_RULES), ("none", "scaffold"), optimizers
    ):
        said = {"algorithm": name, "local_head": head, "robust": rule, "attackers": int(rule != "none")}
        words = Words({**said, "server_optimizer": optimizer, "server_learning_rate": rate}, variates)
        try:
            check(words)  # type: ignore[arg-type]
        except AggregationError:
            continue
        found.append(words)
    return found


def run(words: Words) -> None:
    """Run two rounds; every message has the announced shapes and the states stay finite."""
    algorithm, settings = words.algorithm, words.aggregation
    state = algorithm.server.start(settings, LAYOUT, initial(LAYOUT))
    for number in (1, 2):
        states: dict[int, SiteState] = {}
        for part in range(algorithm.traits.exchanges):
            turn = Turn(number, part)
            collector = Collector(algorithm.averaged(LAYOUT, turn), algorithm.stacked(LAYOUT, turn))
            for at in range(SITES):
                message = algorithm.server.send(LAYOUT, turn, state, 0)
                down = {spec.name: spec.shape for spec in algorithm.down(LAYOUT, turn, 0).tensors}
                assert {key: array.shape for key, array in drift.without(message).items()} == down
                begun = states.get(at) or algorithm.site.start(LAYOUT, initial(LAYOUT))
                received = algorithm.site.receive(LAYOUT, turn, begun, message)
                states[at] = trained(algorithm, turn, received, at) if part == 0 else received
                sent = algorithm.site.send(LAYOUT, turn, states[at])
                up = {spec.name: spec.shape for spec in algorithm.up(LAYOUT, turn).tensors}
                assert {key: array.shape for key, array in sent.items()} == up
                collector.add(f"site-{at}", sent, 1 / SITES)
            state = algorithm.server.receive(settings, LAYOUT, turn, state, collector.result())
    assert all(np.isfinite(array).all() for array in state.to_arrays().values())
    if algorithm.traits.releases:
        assert all(np.any(factor) for pair in algorithm.server.update(LAYOUT, state).values() for factor in pair)


def trained(algorithm: Algorithm, turn: Turn, state: SiteState, at: int) -> SiteState:
    draw = np.random.default_rng(at)
    names = algorithm.site.trained(LAYOUT, turn).names
    moved = {
        name: (state.adapter[name] + draw.standard_normal(state.adapter[name].shape)).astype(np.float32)
        for name in names
    }
    return SiteState({**state.adapter, **moved}, state.memory)


def test_every_combination_that_is_allowed_runs() -> None:
    allowed = combinations()
    assert {words.aggregation.algorithm for words in allowed} == set(ALGORITHMS)
    assert {words.aggregation.robust for words in allowed} == {"none", *ALL_RULES}
    assert any(words.aggregation.local_head and words.aggregation.robust != "none" for words in allowed)
    for words in allowed:
        run(words)


def test_a_robust_rule_beside_a_local_head_leaves_the_head_at_the_sites() -> None:
    algorithm = Words({"algorithm": "ffa", "local_head": True, "robust": "median", "attackers": 1}).algorithm
    assert not algorithm.traits.releases
    assert not algorithm.traits.linear
    assert "score.weight" not in algorithm.up(LAYOUT, Turn(1)).names
    assert "score.weight" in algorithm.site.trained(LAYOUT, Turn(1)).names
    assert algorithm.site.kept(LAYOUT).names == ("score.weight",)


def test_the_head_and_a_factor_can_both_stay() -> None:
    algorithm = Words({"algorithm": "fedsa", "local_head": True}).algorithm
    kept = set(algorithm.site.kept(LAYOUT).names)
    assert kept == {"score.weight", *(B.name for _, B in LAYOUT.pairs)}
    assert set(algorithm.up(LAYOUT, Turn(1)).names) == {A.name for A, _ in LAYOUT.pairs}


def test_the_words_of_a_rule_reach_it() -> None:
    said = AggregationSettings(algorithm="ffa", robust="norm_clip", attackers=2, robust_threshold=0.5)
    rule = robust_rule(said)
    assert rule is not None
    assert (rule.name, rule.attackers, rule.threshold) == ("norm_clip", 2, 0.5)
    assert robust_rule(AggregationSettings()) is None


def test_the_words_of_fedask_reach_it() -> None:
    wide = Words({"algorithm": "fedask", "oversampling": 3}).algorithm
    both = Words({"algorithm": "fedask", "train_both": True}).algorithm
    assert {spec.shape[1] for spec in wide.up(LAYOUT, Turn(1)).tensors} == {5}
    assert {spec.name for spec in both.site.trained(LAYOUT, Turn(1)).tensors} == set(LAYOUT.names)


@pytest.mark.parametrize(
    ("words", "sent"),
    [({"upload": "int8"}, True), ({"upload_keep": 0.5}, True), ({"upload": "fp32"}, False), ({}, False)],
)
def test_plain_tensors_go_without_a_codec(words: dict[str, Any], sent: bool) -> None:
    assert (codec_of(AggregationSettings(**words)) is not None) == sent
