"""The seven bugs of public implementations: each check holds for the code, and fails when the bug is planted.

Every test runs a check twice: on the code as it is, and on a variant with the bug in it. A check that both pass would
be no check. Bugs 4 to 6 are of training, not of aggregation, and are planted in a site's round on a tiny model.
"""

# ruff: noqa: N806
# A and B are the factors' names in every LoRA paper and in PEFT.

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from fedtune.aggregation.lora import drift
from fedtune.aggregation.lora.factors import alpha_at, at_rank, fit_rank
from fedtune.aggregation.lora.gather import Gathered
from fedtune.aggregation.lora.protocol import Algorithm, Options, ServerState
from fedtune.aggregation.lora.registry import ALGORITHMS, get_algorithm
from fedtune.data.sampling import ShuffleSampler
from fedtune.errors import FedtuneError
from fedtune.model.layout import AdapterLayout
from fedtune.training import local
from tests.aggregation.lora.world import ListStack, Site, dense, distance, layout_of, start
from tests.support.bench import Bench, make_bench
from tests.support.reference_round import distance as distance_from_reference

GLOBAL = [name for name in ALGORITHMS if get_algorithm(name).traits.releases]
EXACT = ["ffa", "rolora", "fedsvd", "flora", "fedex", "fedsb", "fedask"]
UNEQUAL = [Site(0.2, 2), Site(0.3, 3), Site(0.5, 1)]


def with_server(algorithm: Algorithm, **functions: Any) -> Algorithm:
    return replace(algorithm, server=replace(algorithm.server, **functions))


# 1. The mean was the first site's weights.


def first_site_only(algorithm: Algorithm) -> Algorithm:
    """Plant: the weights of a round are 1, 0, 0, …"""

    def receive(settings: Any, layout: AdapterLayout, turn: Any, state: ServerState, gathered: Gathered) -> ServerState:
        replies = gathered.stack.replies
        shares = (1.0, *[1e-30] * (len(replies) - 1))
        mean = {name: replies[0][name] for name in gathered.mean}
        return algorithm.server.receive(settings, layout, turn, state, Gathered(mean, ListStack(shares, replies)))

    return with_server(algorithm, receive=receive)


def every_site_counts_by_its_weight(algorithm: Algorithm) -> bool:
    """Move one site's head by one: the global head moves by that site's share."""
    for site, share in enumerate((0.2, 0.3, 0.5)):
        world, moved = (start(algorithm, layout_of({"h": (3, 9, 7)}), UNEQUAL) for _ in range(2))
        world.round(1)
        train = moved.train

        def other(at: int, state: Any, seed: int, site: int = site, train: Any = train) -> Any:
            trained = train(at, state, seed)
            if at == site:
                trained.adapter["score.weight"] = trained.adapter["score.weight"] + np.float32(1)
            return trained

        moved.train = other
        moved.round(1)
        if not np.allclose(
            moved.server.adapter["score.weight"] - world.server.adapter["score.weight"], share, atol=1e-5
        ):
            return False
    return True


@pytest.mark.parametrize("name", list(ALGORITHMS))
def test_bug_1_the_first_sites_weights_are_not_the_mean(name: str) -> None:
    assert every_site_counts_by_its_weight(get_algorithm(name))
    assert not every_site_counts_by_its_weight(first_site_only(get_algorithm(name)))


# 2. The residual was transposed, which a square layer hides from every shape check.


def transposed_update(algorithm: Algorithm) -> Algorithm:
    """Plant: on square layers the update, or what is added to the base, is (B·A)ᵀ = Aᵀ·Bᵀ."""

    def update(layout: AdapterLayout, state: ServerState) -> dict[str, Any]:
        factors = algorithm.server.update(layout, state)
        return {layer: (B.T, A.T) if A.shape[1] == B.shape[0] else (A, B) for layer, (A, B) in factors.items()}

    return with_server(algorithm, update=update)


def transposed_residual(algorithm: Algorithm) -> Algorithm:
    """Plant: exactly the published bug, the increment of the base transposed."""

    def receive(settings: Any, layout: AdapterLayout, turn: Any, state: ServerState, gathered: Gathered) -> ServerState:
        after = algorithm.server.receive(settings, layout, turn, state, gathered)
        memory = dict(after.memory)
        for spec_A, spec_B in layout.pairs:
            key_A, key_B = (f"{drift.PREFIX}{turn.number:06d}/{spec.name}" for spec in (spec_A, spec_B))
            if key_A in memory and spec_A.shape[1] == spec_B.shape[0]:
                memory[key_A], memory[key_B] = memory[key_B].T, memory[key_A].T
        return ServerState(after.adapter, after.optimizer, memory)

    return with_server(algorithm, receive=receive)


def mean_update_is_reached(algorithm: Algorithm, sites: list[Site] | None = None) -> bool:
    """Three rounds on wide, tall and square layers with unequal weights (and ranks, where they may differ)."""
    shapes = {"h.wide": (3, 11, 5), "h.tall": (2, 4, 9), "h.square": (2, 6, 6)}
    world = start(algorithm, layout_of(shapes), UNEQUAL if sites is None else sites)
    for turn in range(3):
        before, wanted = world.base(), world.round(turn)
        reached = world.update()
        if distance({layer: reached[layer] - before[layer] for layer in wanted}, wanted) > 1e-5:
            return False
    return True


@pytest.mark.parametrize("name", EXACT)
def test_bug_2_the_update_is_not_transposed(name: str) -> None:
    assert mean_update_is_reached(get_algorithm(name))
    assert not mean_update_is_reached(transposed_update(get_algorithm(name)))


@pytest.mark.parametrize("name", ["fedex", "flora"])
def test_bug_2_what_is_added_to_the_base_is_not_transposed(name: str) -> None:
    assert mean_update_is_reached(get_algorithm(name))
    assert not mean_update_is_reached(transposed_residual(get_algorithm(name)))


@pytest.mark.parametrize("name", EXACT)
@pytest.mark.parametrize("bug", [False, True])
def test_bug_2_what_peft_applies_to_linear_conv1d_and_embedding_is_the_mean_update(name: str, bug: bool) -> None:
    # `Conv1D` and embeddings store W0 as (d_in, d_out): PEFT transposes B·A for them, and only PEFT may.
    world = start(get_algorithm(name), PEFT_LAYOUT, UNEQUAL)
    total = {layer: np.zeros((d_out, d_in)) for layer, (_, d_in, d_out) in PEFT_SHAPES.items()}
    for turn in range(2):
        before, wanted = world.base(), world.round(turn)
        total = {layer: before[layer] + wanted[layer] for layer in wanted}
    factors = world.algorithm.server.update(world.layout, world.server)
    if bug:
        factors["square"] = factors["square"][1].T, factors["square"][0].T
    applied = deltas_of(factors, scale=2.0)
    reached = {
        layer: np.linalg.norm(applied[layer] - 2.0 * orient(layer, total[layer])) <= 1e-5 * np.linalg.norm(total[layer])
        for layer in total
    }
    assert reached == {layer: not (bug and layer == "square") for layer in total}


PEFT_SHAPES = {"conv": (2, 8, 24), "emb": (2, 11, 8), "linear": (3, 8, 5), "square": (2, 8, 8)}
PEFT_LAYOUT = layout_of(PEFT_SHAPES, head=(3, 5))


class Net(nn.Module):
    """An embedding, GPT-2's transposed linear layer, and two of torch's own."""

    def __init__(self) -> None:
        from transformers.pytorch_utils import Conv1D

        super().__init__()
        self.emb, self.conv, self.linear, self.square = (
            nn.Embedding(11, 8),
            Conv1D(24, 8),
            nn.Linear(8, 5),
            nn.Linear(8, 8),
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.linear(self.square(self.emb(x))) + self.conv(self.emb(x))[..., :5]


def orient(layer: str, update: np.ndarray) -> np.ndarray:
    """Return B·A in the order in which the layer stores its weight."""
    return update.T if layer in {"conv", "emb"} else update


def peft_model(ranks: Mapping[str, int], scale: float, seed: int = 0) -> Any:
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(seed)
    alphas = {layer: scale * rank for layer, rank in ranks.items()}
    config = LoraConfig(target_modules=list(ranks), rank_pattern=dict(ranks), alpha_pattern=alphas)
    return get_peft_model(Net(), config)


def load_into(model: Any, factors: Mapping[str, tuple[np.ndarray, np.ndarray]]) -> None:
    with torch.no_grad():
        for layer, (A, B) in factors.items():
            module = model.base_model.model.get_submodule(layer)
            if layer == "emb":
                targets = module.lora_embedding_A["default"], module.lora_embedding_B["default"]
            else:
                targets = module.lora_A["default"].weight, module.lora_B["default"].weight
            for target, array in zip(targets, (A, B), strict=True):
                target.copy_(torch.from_numpy(np.array(array, np.float32)))


def deltas_in(model: Any, layers: Mapping[str, Any]) -> dict[str, np.ndarray]:
    """Return what PEFT itself would add to each base weight."""
    modules = {layer: model.base_model.model.get_submodule(layer) for layer in layers}
    return {layer: module.get_delta_weight("default").detach().double().numpy() for layer, module in modules.items()}


def deltas_of(factors: Mapping[str, tuple[np.ndarray, np.ndarray]], scale: float) -> dict[str, np.ndarray]:
    model = peft_model({layer: len(A) for layer, (A, _) in factors.items()}, scale)
    load_into(model, factors)
    return deltas_in(model, factors)


# 3. A was to be frozen before the adapter existed, so nothing was.


def nothing_frozen(algorithm: Algorithm) -> Algorithm:
    """Plant: the site's optimiser holds every tensor, whatever the algorithm says."""
    return replace(algorithm, site=replace(algorithm.site, trained=lambda layout, _turn: layout))


@pytest.mark.parametrize("name", ["ffa", "fedsvd", "rolora", "fedask"])
def test_bug_3_what_is_frozen_does_not_move_and_its_moving_would_be_seen(name: str) -> None:
    for algorithm, sound in ((get_algorithm(name), True), (nothing_frozen(get_algorithm(name)), False)):
        world = start(algorithm, layout_of({"h": (3, 9, 7)}), UNEQUAL)
        world.number = 1
        before = world.fetch(0)
        after = world.train(0, before, seed=1)
        assert np.array_equal(before.adapter["h.lora_A.weight"], after.adapter["h.lora_A.weight"]) == sound
        assert mean_update_is_reached(algorithm) == sound


# 4, 5 and 6. In a site's round, on a tiny model.


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Bench:
    torch.set_num_threads(1)
    return make_bench(tmp_path_factory.mktemp("site"))


@pytest.mark.parametrize("planted", [False, True])
def test_bug_4_the_batches_that_train_are_those_of_the_accounted_sampler(
    site: Bench, planted: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Plant: the accountant reads a Poisson rate, and a shuffled loader of the same rate trains."""
    if planted:
        monkeypatch.setattr(local, "sampler_of", lambda _name, units, rate: ShuffleSampler(units, rate))
    assert site.plan.promise.sampler == "poisson"
    assert (distance_from_reference(site) < 1e-4) != planted


class Unchecked:
    """Plant: a reservation that never refuses, as when a restarted site trains without asking its ledger."""

    def begin(self, *_charge: object) -> None:
        return


@pytest.mark.parametrize("planted", [False, True])
def test_bug_5_no_round_trains_without_a_charge_of_its_own(site: Bench, planted: bool) -> None:
    reservation = Unchecked() if planted else local_reservation(site, number=1)
    site.round(1, reservation=reservation)
    refused = [round_is_refused(site, number, reservation) for number in (1, 2)]
    assert refused == [not planted, not planted]


def local_reservation(site: Bench, number: int) -> Any:
    from tests.support.ledgers import reserved

    return reserved(site.plan, number)


def round_is_refused(site: Bench, number: int, reservation: Any) -> bool:
    try:
        site.round(number, reservation=reservation)
    except FedtuneError:
        return True
    return False


@pytest.mark.parametrize("planted", [False, True])
def test_bug_6_a_round_moves_every_b_of_the_live_adapter_and_that_is_what_is_sent(
    site: Bench, planted: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Plant: the optimiser steps on tensors that are no longer the model's, so the adapter stays as it was."""
    if planted:
        monkeypatch.setattr(local.optimizers, "step", lambda *_arguments: None)
    start_state = site.workspace.initial
    sent = site.round().state
    live = site.workspace.export(site.workspace.layout)
    moved = [np.linalg.norm(sent[B.name] - start_state[B.name]) > 0 for _, B in site.workspace.layout.pairs]
    assert all(np.array_equal(sent[name], live[name]) for name in sent)
    assert all(moved) != planted


# 7. The scale alpha / r was applied twice, or not at all, where ranks differ.

Plant = Callable[[float, int, int], float]
SCALES: dict[str, tuple[Plant, bool]] = {
    "the study's scale at every rank": (alpha_at, True),
    "the plan's alpha at every rank": (lambda alpha, _rank, _own: alpha, False),
    "the scale a second time": (lambda alpha, rank, own: alpha_at(alpha, rank, own) * alpha / rank, False),
    "no scale": (lambda _alpha, _rank, own: float(own), False),
}


@pytest.mark.parametrize("scaling", SCALES)
@pytest.mark.parametrize("own_rank", [1, 2, 5])
def test_bug_7_a_site_of_any_rank_adds_the_same_update_to_the_same_model(
    scaling: str, own_rank: int, tmp_path: Path
) -> None:
    # From the coordinator's pair of rank 3, padded or cut, through PEFT's own save and load at the site's rank.
    alpha, rank = 6.0, 3
    rule, sound = SCALES[scaling]
    generator = np.random.default_rng(1)
    shapes = {"square": (8, 8), "conv": (24, 8), "emb": (8, 11), "linear": (5, 8)}
    factors = {
        layer: fit_rank(
            *fit_rank(generator.standard_normal((rank, i)), generator.standard_normal((o, rank)), min(rank, own_rank)),
            own_rank,
        )
        for layer, (o, i) in shapes.items()
    }
    site_model = peft_model(dict.fromkeys(shapes, own_rank), rule(alpha, rank, own_rank) / own_rank)
    load_into(site_model, factors)
    saved_twice = reloaded(reloaded(site_model, tmp_path / "once"), tmp_path / "twice")
    found = deltas_in(saved_twice, shapes)
    same = all(
        np.allclose(found[layer], alpha / rank * orient(layer, dense(A, B)), atol=1e-4)
        for layer, (A, B) in factors.items()
    )
    assert same == sound


def reloaded(model: Any, folder: Path) -> Any:
    """Save with PEFT and load into a fresh base of the same weights."""
    from peft import PeftModel

    model.save_pretrained(str(folder), save_embedding_layers=False)
    torch.manual_seed(0)
    return PeftModel.from_pretrained(Net(), str(folder))


@pytest.mark.parametrize("name", GLOBAL)
def test_bug_7_the_update_survives_send_aggregate_save_and_load_in_plain_peft(name: str, tmp_path: Path) -> None:
    scale = 2.0
    algorithm = get_algorithm(name, Options(seed=3))
    world = start(algorithm, PEFT_LAYOUT, UNEQUAL)
    for turn in range(2):
        world.round(turn)
    factors = algorithm.server.update(world.layout, world.server)
    model = peft_model({layer: len(A) for layer, (A, _) in factors.items()}, scale)
    load_into(model, factors)
    saved_twice = reloaded(reloaded(model, tmp_path / "once"), tmp_path / "twice")
    found, wanted = deltas_in(saved_twice, factors), world.update()
    for layer, update in wanted.items():
        np.testing.assert_allclose(found[layer], scale * orient(layer, update), atol=1e-4 * np.abs(update).max())


@pytest.mark.parametrize("name", ["flora", "flexlora", "hetlora"])
def test_bug_7_sites_of_unequal_ranks_send_at_their_own_rank_and_nothing_is_rescaled(name: str) -> None:
    # One site of each rank alone: whatever its rank, the global update is its own.
    for rank in (1, 2, 3):
        world = start(get_algorithm(name), layout_of({"h": (3, 9, 7)}), [Site(0.4, rank)])
        wanted = world.round(rank)
        assert at_rank(world.layout, rank).pairs[0][0].shape == (rank, 9)
        assert distance(world.update(), wanted) <= 1e-6
