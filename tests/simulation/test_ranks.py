"""Sites of ranks of their own: each trains at its own, at the scale of the study, and what they learn adds up."""

# ruff: noqa: N806
# A and B are the factors' names in every LoRA paper and in PEFT.

from __future__ import annotations

import json
import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from flwr.app import RecordDict

from fedtune.aggregation.lora.protocol import Turn
from fedtune.data.batches import collate
from fedtune.flower.messages import Description, Instruction, Refusal, Standing, Update, decode_update, encode_reply
from fedtune.model.base import open_base
from fedtune.simulation import estimate
from fedtune.simulation.sites import dealt
from fedtune.simulation.workspace import open_workspace
from tests.support.whole import Federation, Letter, Workshop, dense, distance, workshop

RULES = ("flexlora", "hetlora", "flora")
OWN = {"site-001": 1, "site-002": 3, "site-003": 2}
rules = pytest.mark.parametrize("rule", RULES)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("ranks")


@pytest.fixture
def shop(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Workshop:
    return workshop(tmp_path, monkeypatch, shared=folder)


def words(rule: str, *more: str) -> list[str]:
    return [f"aggregation.algorithm={rule}", "lora.rank=4", "lora.alpha=6", "federation.rounds=2", *more]


def listed(shop: Workshop, rule: str, *more: str) -> Federation:
    return shop.make(*words(rule, "lora.ranks=[1,3,2]", *more))


def ranks_of(study: Federation, state: Any) -> set[int]:
    return {state[A.name].shape[0] for A, _ in study.merging.layout.pairs}


def product(study: Federation, state: Any) -> dict[str, np.ndarray]:
    """Return s·B·A of every layer, at the study's scale whatever the rank."""
    return {A.layer: study.scale * dense(state[A.name], state[B.name]) for A, B in study.merging.layout.pairs}


@pytest.mark.parametrize("mode", ["dp", pytest.param("off", marks=pytest.mark.slow)])
@rules
def test_each_site_is_sent_trains_and_answers_at_its_own_rank(shop: Workshop, rule: str, mode: str) -> None:
    study = listed(shop, rule, f"privacy.mode={mode}")
    summary = study.run()
    assert [site["failed"] for site in summary["sites"]] == [0, 0, 0]
    for number in (1, 2):
        for site, one in study.trained_in(number).items():
            assert ranks_of(study, one.start) == ranks_of(study, one.result.state) == {OWN[site]}
    for letter in study.letters:
        factors = {
            name: array.shape for name, array in letter.instruction.adapter.items() if name.endswith("lora_A.weight")
        }
        own = {shape[0] for name, shape in factors.items() if not name.startswith("drift/")}
        assert letter.kind == "query.describe" or letter.instruction.standing.rank == OWN[letter.site]
        assert own in (set(), {OWN[letter.site]})
    for reply in study.replies:
        assert isinstance(reply.update, Update)
        assert ranks_of(study, reply.update.state) == {OWN[reply.letter.site]}
    assert ranks_of(study, study.state.adapter) == {4}


@rules
def test_a_site_of_any_rank_adds_its_product_at_the_scale_of_the_study(shop: Workshop, rule: str) -> None:
    """The same factors, padded with zeros to the plan's rank, are the same model."""
    study = listed(shop, rule)
    study.run()
    plan = open_workspace(study.plan, study.machine)
    for site, one in study.trained_in(2).items():
        own = open_workspace(study.plan, study.machine, OWN[site])
        padded = dict(one.state)
        for A, B in study.merging.layout.pairs:
            missing = 4 - OWN[site]
            padded[A.name] = np.pad(one.state[A.name], ((0, missing), (0, 0)))
            padded[B.name] = np.pad(one.state[B.name], ((0, 0), (0, missing)))
        assert torch.allclose(logits(study, own, one.state), logits(study, plan, padded), rtol=1e-4, atol=1e-6)
        own.load(own.initial)
    plan.load(plan.initial)


def logits(study: Federation, workspace: Any, state: Any) -> torch.Tensor:
    workspace.load(state)
    examples = dealt(study.plan.json_text, study.machine, workspace.tokenizer).site(0).train[:4]
    with torch.no_grad():
        found: torch.Tensor = workspace.logits(collate(examples, workspace.pad_id, workspace.task.kind))
        return found.clone()


def test_the_rounds_of_flora_add_up_over_unequal_ranks(shop: Workshop) -> None:
    study = listed(shop, "flora")
    study.run()
    wanted = {layer: np.zeros(1) for layer in study.update_of(study.state)}
    for number in (1, 2):
        for site, one in study.trained_in(number).items():
            learnt = product(study, one.state)
            wanted = {layer: wanted[layer] + study.weights[site] * learnt[layer] for layer in wanted}
    assert distance(study.update_of(study.state), wanted) <= 1e-6


def test_flexlora_gives_each_site_the_best_adapter_of_its_rank_for_the_mean_of_all(shop: Workshop) -> None:
    study = listed(shop, "flexlora")
    study.run()
    mean = {layer: np.zeros(1) for layer in study.update_of(study.state)}
    for site, one in study.trained_in(1).items():
        learnt = product(study, one.state)
        mean = {layer: mean[layer] + study.weights[site] * learnt[layer] for layer in mean}
    for site, one in study.trained_in(2).items():
        for layer, found in product(study, one.start).items():
            U, S, V = np.linalg.svd(mean[layer])
            rank = OWN[site]
            assert np.allclose(found, U[:, :rank] * S[:rank] @ V[:rank], atol=1e-6 * S[0])


def test_hetlora_gives_each_site_the_first_rows_of_the_global_pair(shop: Workshop) -> None:
    study = listed(shop, "hetlora")
    study.run()
    state = study.state_after(1).adapter
    for site, one in study.trained_in(2).items():
        for A, B in study.merging.layout.pairs:
            assert np.array_equal(one.start[A.name], state[A.name][: OWN[site]])
            assert np.array_equal(one.start[B.name], state[B.name][:, : OWN[site]])


@rules
def test_the_release_is_the_coordinators_whatever_the_sites_ranks_are(shop: Workshop, rule: str) -> None:
    from fedtune.release.adapter import load_adapter

    study = listed(shop, rule)
    study.run()
    config = json.loads((study.folder.adapter / "adapter_config.json").read_text())
    adapter = load_adapter(study.folder.adapter)
    assert config["lora_alpha"] / config["r"] == pytest.approx(study.scale)
    assert distance(product(study, adapter), study.update_of(study.state)) <= 1e-6


# --- hardware -------------------------------------------------------------------------------------------------------


def memory_for(monkeypatch: pytest.MonkeyPatch, study: Federation, rank: int) -> None:
    """Give this machine just enough memory for a rank, by the estimate."""
    base = open_base(Path(study.machine.model_folder))
    least, more = (estimate.memory_bytes(study.plan, base, one) for one in (rank, rank + 1))
    wanted = (least + more) / 2 / 0.8
    pages = {"SC_PHYS_PAGES": int(wanted), "SC_PAGE_SIZE": 1}
    real = os.sysconf
    monkeypatch.setattr(estimate.os, "sysconf", lambda name: pages.get(name) or real(name))


@pytest.mark.parametrize(("fits", "gets"), [(1, 2), (2, 2), (3, 3), (4, 4), (9, 4)])
def test_the_largest_rank_is_what_memory_holds_within_the_plans_range(
    shop: Workshop, monkeypatch: pytest.MonkeyPatch, fits: int, gets: int
) -> None:
    study = shop.make(*words("flora", "lora.ranks=hardware", "lora.min_rank=2"))
    memory_for(monkeypatch, study, fits)
    assert estimate.largest_rank(study.plan, open_base(Path(study.machine.model_folder))) == gets


def test_a_site_says_the_rank_that_its_memory_holds_and_trains_at_it_to_the_end(
    shop: Workshop, monkeypatch: pytest.MonkeyPatch
) -> None:
    """More memory after a restart changes nothing: what a study has begun with, it goes on with."""
    study = shop.make(*words("flora", "lora.ranks=hardware"))
    memory_for(monkeypatch, study, 3)
    study.meddle = lambda letter: "kill" if (letter.kind, letter.number) == ("train", 2) else None
    study.run_until_killed()
    memory_for(monkeypatch, study, 9)
    study.meddle = lambda _letter: None
    study.run()
    assert [ranks_of(study, one.start) for one in study.trainings] == [{3}] * 6


@pytest.mark.parametrize(("claims", "gets"), [(-5, 2), (0, 2), (1, 2), (3, 3), (5, 4), (10**9, 4)])
def test_a_site_that_says_a_rank_outside_of_the_plan_gets_the_nearest_inside(
    shop: Workshop, claims: int, gets: int
) -> None:
    study = shop.make(*words("flora", "lora.ranks=hardware", "lora.min_rank=2", "federation.rounds=1"))
    study.introduce = lambda said: replace(said, rank=claims) if said.site == "site-002" else said
    study.run()
    assert {site: ranks_of(study, one.start) for site, one in study.trained_in(1).items()} == {
        "site-001": {4},
        "site-002": {gets},
        "site-003": {4},
    }


@pytest.mark.parametrize("rule", ["fedit", "fedex", "flora"])
def test_where_the_plan_has_one_rank_a_site_that_says_another_is_held_to_it(shop: Workshop, rule: str) -> None:
    """It is asked as all are; what it sends at its own rank is refused as its own fault, and ends no round."""
    study = shop.make(*words(rule))

    def introduce(said: Description) -> Description:
        return replace(said, rank=3) if said.site == "site-002" else said

    def spoil(letter: Letter, content: RecordDict) -> RecordDict:
        update = decode_update(content, study.plan.sha256)
        if letter.site != "site-002" or letter.number == 1 or isinstance(update, Refusal):
            return content
        return encode_reply(replace(update, state={name: cut(array, 3) for name, array in update.state.items()}))

    study.introduce, study.spoil = introduce, spoil
    summary = study.run()
    assert {letter.instruction.standing.rank for letter in study.letters} == {0}
    by_name = {site["name"]: site for site in summary["sites"]}
    assert [by_name[name]["rounds"] for name in sorted(by_name)] == [2, 1, 2]
    assert by_name["site-002"]["quarantine"] == "message.wrong-shape"


def cut(array: np.ndarray, rank: int) -> np.ndarray:
    """Return a factor of rank 4 at a lower one; other tensors as they are."""
    if array.ndim == 2 and 4 in array.shape:
        return np.ascontiguousarray(array[:rank] if array.shape[0] == 4 else array[:, :rank])
    return array


# --- what a site is asked -------------------------------------------------------------------------------------------


@pytest.fixture
def asked(shop: Workshop) -> Callable[..., str]:
    """Ask a site to train, with words that no coordinator of the plan sends."""

    def make(rule: str, standing: Standing, *more: str) -> str:
        study = shop.make(*words(rule, *more))
        merging = study.merging
        message = merging.algorithm.server.send(merging.layout, Turn(1), merging.start(), 0)
        answer = study.ask("train", Instruction(study.plan.sha256, 1, message, standing=standing))
        assert isinstance(answer, Refusal)
        assert study.trainings == []
        return answer.code

    return make


@pytest.mark.parametrize(
    ("rule", "more", "standing"),
    [
        ("flora", ["lora.ranks=[1,3,2]"], Standing(rank=5)),
        ("flora", ["lora.ranks=[1,3,2]"], Standing(rank=-1)),
        ("flora", ["lora.ranks=hardware", "lora.min_rank=2"], Standing(rank=1)),
        ("flora", ["lora.ranks=hardware"], Standing(rank=10**12)),
        ("flora", [], Standing(rank=3)),
        ("fedit", [], Standing(rank=3)),
        ("fedit", [], Standing(part=1)),
        ("fedit", [], Standing(part=-1)),
        ("fedask", [], Standing(part=2)),
        ("fedit", [], Standing(base="ab" * 16)),
        ("fedit", [], Standing(mark="ab" * 16)),
        ("fedit", [], Standing(since=1)),
        ("flora", [], Standing(mark="../../outside")),
        ("flora", [], Standing(base="AB" * 16)),
    ],
    ids=str,
)
def test_a_rank_an_exchange_or_a_kept_state_that_the_plan_has_not_is_refused(
    asked: Callable[..., str], rule: str, more: list[str], standing: Standing
) -> None:
    assert asked(rule, standing, *more) == "message.wrong-field"


def test_a_state_that_the_site_has_not_kept_is_asked_for_whole(asked: Callable[..., str]) -> None:
    assert asked("flora", Standing(base="ab" * 16, mark="cd" * 16)) == "message.lacks-state"
