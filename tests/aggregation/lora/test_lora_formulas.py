"""The rules that promise something else than the mean update keep to their published formula, computed densely."""

# ruff: noqa: N806
# A and B are the factors' names in every LoRA paper and in PEFT.

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedtune.aggregation.lora.draws import gaussian_sketch
from fedtune.aggregation.lora.factors import alpha_at, fit_rank
from fedtune.aggregation.lora.hetlora import product_norm
from fedtune.aggregation.lora.protocol import Options, Turn
from fedtune.aggregation.lora.registry import get_algorithm
from fedtune.errors import AggregationError
from tests.aggregation.lora.world import Site, World, dense, layout_of, start

SHAPES = {"h.wide": (3, 11, 5), "h.tall": (2, 4, 9), "h.square": (4, 6, 6), "emb": (2, 21, 4)}
seeds = st.integers(0, 2**32 - 1)
cohorts = st.lists(st.tuples(st.floats(0.05, 20), st.integers(1, 4)), min_size=1, max_size=5)


def federation(name: str, cohort: list[tuple[float, int]], **options: bool) -> World:
    sites = [Site(weight, rank, form="float64") for weight, rank in cohort]
    return start(get_algorithm(name, Options(**options)), layout_of(SHAPES), sites)


def shares(cohort: list[tuple[float, int]]) -> list[float]:
    total = math.fsum(weight for weight, _ in cohort)
    return [weight / total for weight, _ in cohort]


def trained(world: World, name: str) -> list[np.ndarray]:
    return [np.asarray(state.adapter[name], np.float64) for state in world.trained]


@settings(max_examples=30)
@given(cohort=cohorts, seed=seeds)
def test_fedits_error_is_the_weighted_covariance_of_the_factors(cohort: list[tuple[float, int]], seed: int) -> None:
    world = federation("fedit", cohort)
    wanted, reached = world.round(seed), world.update()
    for spec_A, spec_B in world.layout.pairs:
        As, Bs = trained(world, spec_A.name), trained(world, spec_B.name)
        covariance = np.zeros((spec_B.shape[0], spec_A.shape[1]))
        mean_A = sum(p * A for p, A in zip(shares(cohort), As, strict=True))
        mean_B = sum(p * B for p, B in zip(shares(cohort), Bs, strict=True))
        for p, A, B in zip(shares(cohort), As, Bs, strict=True):
            covariance += p * (B - mean_B) @ (A - mean_A)
        np.testing.assert_allclose(wanted[spec_A.layer] - reached[spec_A.layer], covariance, atol=1e-10)


@settings(max_examples=30)
@given(cohort=cohorts, seed=seeds)
def test_hetlora_averages_padded_factors_by_the_length_of_each_update(
    cohort: list[tuple[float, int]], seed: int
) -> None:
    world = federation("hetlora", cohort)
    world.round(seed)
    for spec_A, spec_B in world.layout.pairs:
        As, Bs = trained(world, spec_A.name), trained(world, spec_B.name)
        lengths = [p * math.sqrt((dense(A, B) ** 2).sum()) for p, A, B in zip(shares(cohort), As, Bs, strict=True)]
        mean_A, mean_B = np.zeros(spec_A.shape), np.zeros(spec_B.shape)
        for length, A, B in zip(lengths, As, Bs, strict=True):
            for row in range(min(spec_A.shape[0], A.shape[0])):
                mean_A[row] += length / sum(lengths) * A[row]
                mean_B[:, row] += length / sum(lengths) * B[:, row]
        np.testing.assert_allclose(world.server.adapter[spec_A.name], mean_A, atol=1e-12)
        np.testing.assert_allclose(world.server.adapter[spec_B.name], mean_B, atol=1e-12)


def test_hetlora_weighs_by_the_plan_alone_where_no_site_has_learnt_anything() -> None:
    cohort = [(1.0, 2), (3.0, 4)]
    world = federation("hetlora", cohort)
    world.sites = [Site(weight, rank, moves=0.0, form="float64") for weight, rank in cohort]
    world.round(0)
    first = world.server.adapter["h.wide.lora_A.weight"]
    assert np.isfinite(first).all()
    expected = sum(
        p * fit_rank(A, A.T, 3)[0] for p, A in zip([0.25, 0.75], trained(world, "h.wide.lora_A.weight"), strict=True)
    )
    np.testing.assert_allclose(first, expected, atol=1e-12)


def test_a_hetlora_site_trains_the_first_rows_of_the_global_pair() -> None:
    world = federation("hetlora", [(1.0, 1), (1.0, 4)])
    world.round(0)
    world.number += 1
    state = world.fetch(0)
    np.testing.assert_array_equal(
        state.adapter["h.wide.lora_A.weight"], world.server.adapter["h.wide.lora_A.weight"][:1]
    )
    np.testing.assert_array_equal(
        state.adapter["h.wide.lora_B.weight"], world.server.adapter["h.wide.lora_B.weight"][:, :1]
    )


@given(rank=st.integers(1, 6), d_in=st.integers(1, 9), d_out=st.integers(1, 9), seed=seeds)
def test_the_length_of_an_update_comes_without_the_product(rank: int, d_in: int, d_out: int, seed: int) -> None:
    generator = np.random.default_rng(seed)
    A, B = generator.standard_normal((rank, d_in)), generator.standard_normal((d_out, rank))
    assert product_norm(A, B) == pytest.approx(np.linalg.norm(dense(A, B)))


@settings(max_examples=30)
@given(cohort=cohorts, seed=seeds)
def test_fedask_with_both_factors_trained_is_the_best_rank_of_the_sketched_mean(
    cohort: list[tuple[float, int]], seed: int
) -> None:
    world = federation("fedask", cohort, train_both=True)
    wanted, reached = world.round(seed), world.update()
    for layer, (rank, d_in, _) in SHAPES.items():
        basis = np.linalg.qr(wanted[layer] @ gaussian_sketch(d_in, rank + 8, 0, 1, layer))[0]
        left, singular, right = np.linalg.svd(basis @ (basis.T @ wanted[layer]), full_matrices=False)
        best = left[:, :rank] * singular[:rank] @ right[:rank]
        np.testing.assert_allclose(reached[layer], best, atol=1e-8 * np.linalg.norm(wanted[layer]))


def test_fedask_loses_a_part_when_a_site_leaves_between_the_exchanges_and_nothing_when_none_does() -> None:
    gaps = {}
    for leaves in (False, True):
        world = start(
            get_algorithm("fedask", Options(oversampling=1)), layout_of({"h": (2, 9, 12)}), [Site(1.0, 2)] * 3
        )
        world.number = 1
        states = {at: world.train(at, world.fetch(at), at) for at in range(3)}
        world.exchange(0, states)
        if leaves:
            del states[2]
        world.exchange(1, states)
        mean = sum(dense(s.adapter["h.lora_A.weight"], s.adapter["h.lora_B.weight"]) for s in states.values())
        gaps[leaves] = np.linalg.norm(world.update()["h"] - mean / len(states))
    assert gaps[False] < 1e-5
    assert gaps[True] > 0.1


def test_fedsa_leaves_every_site_with_its_own_b_and_the_mean_of_a() -> None:
    cohort = [(1.0, 3), (3.0, 3), (0.5, 3)]
    world = federation("fedsa", cohort)
    for turn in range(3):
        world.round(turn)
    own = [dict(state.adapter) for state in world.trained]
    world.number += 1
    for at in range(3):
        state = world.fetch(at)
        for spec_A, spec_B in world.layout.pairs:
            mean_A = sum(p * one[spec_A.name] for p, one in zip(shares(cohort), own, strict=True))
            np.testing.assert_allclose(state.adapter[spec_A.name], mean_A, atol=1e-12)
            np.testing.assert_array_equal(state.adapter[spec_B.name], own[at][spec_B.name])


def test_fedsa_sends_no_b_and_has_nothing_to_release() -> None:
    world = federation("fedsa", [(1.0, 3)])
    world.round(0)
    assert not any("lora_B" in name for name in world.algorithm.up(world.layout, turn=None).names)
    assert all(not np.any(world.server.adapter[B.name]) for _, B in world.layout.pairs)
    with pytest.raises(AggregationError) as caught:
        world.update()
    assert caught.value.code == "aggregation.no-global-adapter"


def test_fedsb_trains_a_core_between_frozen_orthonormal_bases() -> None:
    world = start(get_algorithm("fedsb"), layout_of({"h": (3, 9, 7)}), [Site(1.0), Site(2.0)])
    bases = {name: array.copy() for name, array in world.server.adapter.items() if "lora_R" not in name}
    world.round(0)
    A, B = bases["h.lora_A.weight"], bases["h.lora_B.weight"]
    np.testing.assert_allclose(A @ A.T, np.eye(3), atol=1e-6)
    np.testing.assert_allclose(B.T @ B, np.eye(3), atol=1e-6)
    for name in ("h.lora_A.weight", "h.lora_B.weight"):
        np.testing.assert_array_equal(world.server.adapter[name], bases[name])
        assert all(np.array_equal(state.adapter[name], bases[name]) for state in world.trained)
    assert world.algorithm.up(world.layout, turn=None).size == 9 + 15


@pytest.mark.parametrize("name", ["flexlora", "fedsvd", "fedask"])
def test_no_direction_dies_when_nothing_was_learnt(name: str) -> None:
    # The balanced split √Σ would leave A and B both zero, and no gradient would ever pass again.
    world = start(get_algorithm(name), layout_of({"h": (3, 9, 7)}), [Site(1.0, moves=0.0), Site(1.0, moves=0.0)])
    world.round(0)
    rows = world.server.adapter["h.lora_A.weight"]
    np.testing.assert_allclose(rows @ rows.T, np.eye(3), atol=1e-6)


@given(st.integers(1, 64), st.integers(1, 64), st.floats(0.1, 100))
def test_every_rank_has_the_scale_of_the_study(rank: int, own_rank: int, alpha: float) -> None:
    assert alpha_at(alpha, rank, own_rank) / own_rank == pytest.approx(alpha / rank)


@pytest.mark.parametrize("d_out", [5, 30])
def test_both_exchanges_of_fedask_have_the_shapes_that_are_announced(d_out: int) -> None:
    world = start(get_algorithm("fedask"), layout_of({"h": (2, 9, d_out)}), [Site(1.0), Site(2.0)])
    world.number, layout = 1, world.layout
    states = {at: world.train(at, world.fetch(at), at) for at in range(2)}
    world.exchange(0, states)
    down = world.algorithm.server.send(layout, Turn(1, 1), world.server, 0)
    up = world.algorithm.site.send(
        layout, Turn(1, 1), world.algorithm.site.receive(layout, Turn(1, 1), states[0], down)
    )
    for message, announced in (
        (down, world.algorithm.down(layout, Turn(1, 1), 0)),
        (up, world.algorithm.up(layout, Turn(1, 1))),
    ):
        assert {name: array.shape for name, array in message.items()} == {s.name: s.shape for s in announced.tensors}
    assert not world.algorithm.site.trained(layout, Turn(1, 1)).tensors
