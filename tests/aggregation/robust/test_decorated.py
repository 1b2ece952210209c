"""A robust rule in the place of an algorithm's mean: the same messages, and attackers who move nothing."""

# ruff: noqa: N806
# A and B are the factors' names in every LoRA paper and in PEFT.

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest

from fedtune.aggregation.lora.gather import Collector
from fedtune.aggregation.lora.protocol import Algorithm, ServerState, SiteState, Turn
from fedtune.aggregation.lora.registry import get_algorithm
from fedtune.aggregation.matrix import matrix
from fedtune.aggregation.robust.decorated import with_robust_rule
from fedtune.aggregation.robust.rules import RobustRule
from fedtune.config.schema import AggregationSettings
from fedtune.errors import AggregationError
from fedtune.model.layout import AdapterLayout

State = dict[str, np.ndarray]
PLAIN = AggregationSettings()
SITES, ATTACKERS = 11, 2
CASES = [(row.name, rule) for row in matrix() for rule in row.robust]
cases = pytest.mark.parametrize(("name", "rule"), CASES)


@pytest.fixture
def layout(make_layout: Callable[..., AdapterLayout]) -> AdapterLayout:
    return make_layout({"h.wide": (3, 11, 5), "h.tall": (3, 6, 9)})


def robust(name: str, rule: str) -> Algorithm:
    return with_robust_rule(get_algorithm(name), RobustRule(rule, ATTACKERS), 2.0)


def begun(algorithm: Algorithm, layout: AdapterLayout, initial: State) -> ServerState:
    start = {key: np.zeros_like(array) if key.endswith("lora_B.weight") else array for key, array in initial.items()}
    return algorithm.server.start(PLAIN, layout, start)


def honest(algorithm: Algorithm, layout: AdapterLayout, state: ServerState, initial: State, seed: int) -> State:
    """What a site sends that took the common step and a tenth of one of its own."""
    turn = Turn(1)
    site = algorithm.site.start(layout, initial)
    received = algorithm.site.receive(layout, turn, site, algorithm.server.send(layout, turn, state, 0))
    common, own = np.random.default_rng(0), np.random.default_rng(1000 + seed)
    moved = {
        spec.name: (
            received.adapter[spec.name] + common.standard_normal(spec.shape) + 0.1 * own.standard_normal(spec.shape)
        ).astype(np.float32)
        for spec in algorithm.site.trained(layout, turn).tensors
    }
    return dict(algorithm.site.send(layout, turn, SiteState({**received.adapter, **moved}, received.memory)))


def after(algorithm: Algorithm, layout: AdapterLayout, state: ServerState, replies: list[State]) -> ServerState:
    turn = Turn(1)
    collector = Collector(algorithm.averaged(layout, turn), algorithm.stacked(layout, turn))
    for at, reply in enumerate(replies):
        collector.add(f"site-{at:02d}", reply, 1 / len(replies))
    return algorithm.server.receive(PLAIN, layout, turn, state, collector.result())


def learnt(algorithm: Algorithm, layout: AdapterLayout, state: ServerState) -> np.ndarray:
    factors = algorithm.server.update(layout, state)
    dense = [np.einsum("or,ri->oi", B.astype(float), A.astype(float)).ravel() for A, B in factors.values()]
    return np.concatenate([*dense, state.adapter["score.weight"].astype(float).ravel()])


@pytest.fixture
def initial(layout: AdapterLayout, make_state: Callable[..., State]) -> State:
    state = make_state(layout, 3)
    return {key: np.zeros_like(array) if key.endswith("lora_B.weight") else array for key, array in state.items()}


@cases
def test_the_messages_are_those_of_the_algorithm_and_all_of_it_is_held(
    layout: AdapterLayout, initial: State, name: str, rule: str
) -> None:
    bare, algorithm = get_algorithm(name), robust(name, rule)
    for number in (1, 2):
        assert algorithm.up(layout, Turn(number)) == bare.up(layout, Turn(number))
        assert algorithm.down(layout, Turn(number), 0) == bare.down(layout, Turn(number), 0)
        assert algorithm.averaged(layout, Turn(number)).tensors == ()
    assert not algorithm.traits.linear
    assert algorithm.traits.adapters_held(7) == 7


@cases
def test_attackers_who_send_anything_hardly_move_it_and_would_take_the_mean_over(
    layout: AdapterLayout, initial: State, name: str, rule: str
) -> None:
    algorithm, bare = robust(name, rule), get_algorithm(name)
    state = begun(algorithm, layout, initial)
    good = [honest(algorithm, layout, state, initial, seed) for seed in range(SITES)]
    spoilt = [
        {key: -50 * array for key, array in reply.items()} if at < ATTACKERS else reply for at, reply in enumerate(good)
    ]
    wanted = learnt(bare, layout, after(bare, layout, state, good))
    distance = np.linalg.norm(learnt(algorithm, layout, after(algorithm, layout, state, spoilt)) - wanted)
    taken = np.linalg.norm(learnt(bare, layout, after(bare, layout, state, spoilt)) - wanted)
    size = np.linalg.norm(wanted)
    assert distance < (0.8 if rule == "norm_clip" else 0.35) * size
    assert taken > 3 * size


@pytest.mark.parametrize(
    ("name", "rule"), [(name, rule) for name, rule in CASES if rule not in {"krum", "norm_clip", "bulyan", "median"}]
)
def test_without_an_attacker_it_is_nearly_the_mean(layout: AdapterLayout, initial: State, name: str, rule: str) -> None:
    algorithm, bare = robust(name, rule), get_algorithm(name)
    state = begun(algorithm, layout, initial)
    good = [honest(algorithm, layout, state, initial, seed) for seed in range(SITES)]
    wanted = learnt(bare, layout, after(bare, layout, state, good))
    found = learnt(algorithm, layout, after(algorithm, layout, state, good))
    assert np.linalg.norm(found - wanted) < 0.05 * np.linalg.norm(wanted)


@cases
def test_equal_sites_are_followed_whatever_the_rule(
    layout: AdapterLayout, initial: State, name: str, rule: str
) -> None:
    algorithm, bare = robust(name, rule), get_algorithm(name)
    state = begun(algorithm, layout, initial)
    same = [honest(algorithm, layout, state, initial, 1)] * SITES
    found, wanted = (learnt(one, layout, after(one, layout, state, same)) for one in (algorithm, bare))
    assert np.allclose(found, wanted, atol=1e-4)


@cases
def test_too_few_answers_for_the_attackers_it_was_told_of_are_an_error_and_not_a_guess(
    layout: AdapterLayout, initial: State, name: str, rule: str
) -> None:
    algorithm = with_robust_rule(get_algorithm(name), RobustRule(rule, 3), 2.0)
    state = begun(algorithm, layout, initial)
    few = [honest(algorithm, layout, state, initial, seed) for seed in range(4)]
    with pytest.raises(AggregationError):
        after(algorithm, layout, state, few)


def test_the_server_optimiser_acts_on_the_robust_answer(layout: AdapterLayout, initial: State) -> None:
    settings = AggregationSettings(server_optimizer="fedavgm", momentum=0.5, server_learning_rate=0.5)
    algorithm = robust("ffa", "median")
    state = algorithm.server.start(settings, layout, initial)
    replies = [honest(algorithm, layout, state, initial, seed) for seed in range(SITES)]
    turn = Turn(1)
    collector = Collector(algorithm.averaged(layout, turn), algorithm.stacked(layout, turn))
    for at, reply in enumerate(replies):
        collector.add(f"site-{at:02d}", reply, 1 / SITES)
    moved = algorithm.server.receive(settings, layout, turn, state, collector.result())
    for key in replies[0]:
        median = np.median(np.stack([reply[key].astype(float) for reply in replies]), axis=0)
        assert np.allclose(moved.adapter[key], initial[key] + 0.5 * (median - initial[key]), atol=1e-6)


def test_a_product_rule_on_flexlora_is_blind_to_how_a_site_writes_its_factors(
    layout: AdapterLayout, initial: State
) -> None:
    """(B·M⁻¹)·(M·A) is the same update for every invertible M; a rule on entries would see another one."""
    algorithm = robust("flexlora", "multi_krum")
    state = begun(algorithm, layout, initial)
    good = [honest(algorithm, layout, state, initial, seed) for seed in range(SITES)]
    turned = [dict(reply) for reply in good]
    draw = np.random.default_rng(5)
    for reply in turned:
        for A, B in layout.pairs:
            mixing = draw.standard_normal((3, 3)) + 3 * np.eye(3)
            reply[A.name] = (mixing @ reply[A.name]).astype(np.float32)
            reply[B.name] = (reply[B.name] @ np.linalg.inv(mixing)).astype(np.float32)
    found, wanted = (learnt(algorithm, layout, after(algorithm, layout, state, one)) for one in (turned, good))
    assert np.allclose(found, wanted, atol=1e-3 * np.abs(wanted).max())
